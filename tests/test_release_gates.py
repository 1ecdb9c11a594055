"""The champion beside a release of a recipe that was changed meanwhile: asked by its own fields, or not at all."""

from pathlib import Path

import numpy as np
import pandas as pd
from serving_support import CARRIERS, ORIGINS, SCHEMA, build_bundle

from mlops_workbench.core.features import Feature
from mlops_workbench.release.bundles import predict_onnx
from mlops_workbench.release.gates import answers_of


def rows(count: int) -> pd.DataFrame:
    """Rows of the schema, some without a temperature."""
    numbers = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "hour": numbers.integers(0, 24, count).astype(float),
            "distance": numbers.integers(100, 4000, count).astype(float),
            "temp": numbers.normal(40, 10, count),
            "carrier": numbers.choice(CARRIERS, count),
            "origin": numbers.choice(ORIGINS, count),
        }
    )
    frame.loc[::7, "temp"] = np.nan
    return frame


def test_the_champion_is_asked_by_its_own_fields(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path / "bundle")
    frame = rows(60)
    columns = {name: frame[name].to_numpy() for name in frame}
    right = predict_onnx(bundle / "model.onnx", SCHEMA.encode_columns(columns))
    assert right.std() > 0.05
    turned = SCHEMA.model_copy(update={"features": SCHEMA.features[::-1]})
    np.testing.assert_array_equal(answers_of(bundle, frame, turned), right)
    hour = Feature(name="hour", kind="category", categories=tuple(map(str, range(24))))
    other = SCHEMA.model_copy(update={"features": (hour, *SCHEMA.features[1:])})
    as_text = frame.assign(hour=frame["hour"].astype(int).astype(str))
    np.testing.assert_array_equal(answers_of(bundle, as_text, other), right)


def test_a_champion_that_cannot_answer_is_not_compared(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path / "bundle")
    frame = rows(10)
    assert answers_of(bundle, frame.drop(columns="temp"), SCHEMA) is None
    turned = SCHEMA.model_copy(update={"classes": SCHEMA.classes[::-1]})
    assert answers_of(bundle, frame, turned) is None
