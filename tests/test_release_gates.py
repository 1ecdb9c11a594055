"""What a release is judged by: its bundle's own proof, and a champion that is asked by its own fields, or not at all."""

from pathlib import Path

import numpy as np
import pandas as pd
from serving_support import CARRIERS, ORIGINS, SCHEMA, build_bundle, late_model

from mlops_workbench.core.features import Feature
from mlops_workbench.core.files import write_json
from mlops_workbench.core.settings import GateSettings
from mlops_workbench.core.workspace import create_workspace
from mlops_workbench.release.bundles import build_bundle as build_release
from mlops_workbench.release.bundles import predict_onnx
from mlops_workbench.release.candidates import CPU, CUDA
from mlops_workbench.release.gates import (
    OPTIMISATION_FILE,
    answers_of,
    optimisation_gate,
    server_gates,
)
from mlops_workbench.release.probe import LOAD_FILE, json_row, prove_server, read_proof
from mlops_workbench.serving.models import load_model


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


def test_the_form_that_serves_and_what_the_server_bore_travel_in_the_bundle(tmp_path: Path) -> None:
    """The bundle is asked before it has its digest; its gates are judged by that, and by nothing else."""
    workspace = create_workspace(
        tmp_path / "w", settings={"release.load_seconds": 0.2, "release.latency_requests": 20}
    )
    settings, frame = workspace.settings, rows(20)
    trained, form = tmp_path / "trained", tmp_path / "form.onnx"
    trained.mkdir()
    (trained / "model.onnx").write_bytes(late_model())
    (trained / "model.safetensors").write_bytes(b"weights")
    form.write_bytes(late_model(0.3))
    optimisation = {"kept": "another", "lost": 0.5, "providers": [CUDA, CPU]}
    asked = [json_row(row, list(frame)) for row in frame.to_dict("records")]
    bundle = build_release(
        workspace,
        name="flights-r1",
        recipe="flights",
        model_folder=trained,
        features=SCHEMA,
        profile={},
        parameters={},
        thresholds={},
        metrics={},
        data_version="flights@v1.0",
        data_digest="",
        provenance={},
        run_id="run",
        cycle="cycle",
        onnx=form,
        more={OPTIMISATION_FILE: optimisation},
        prove=lambda folder: {LOAD_FILE: prove_server(folder, asked, settings.release).as_dict()},
    )
    assert (bundle / "model.onnx").read_bytes() == form.read_bytes()
    served = load_model(bundle, bundle.name)  # made for a GPU, and this machine may have none
    columns = {name: frame[name].to_numpy() for name in frame}
    np.testing.assert_allclose(
        served.probabilities(asked),
        predict_onnx(form, SCHEMA.encode_columns(columns)),
        atol=1e-6,
    )
    proof = read_proof(bundle)
    assert proof is not None and proof.load.requests > 20 and proof.load.errors == 0
    assert 20 < proof.load.memory_mb < 250 and proof.load.p50_ms <= proof.load.p99_ms
    judged = {
        result.name: result.passed
        for result in (
            *server_gates(proof, GateSettings()),
            *optimisation_gate(bundle, GateSettings(metric="brier")),
        )
    }
    assert judged == {
        "latency p99": proof.latency.p99_ms <= 100,
        "errors under load": True,
        "safety: wrong answers to hostile input": True,
        "brier lost by optimisation": False,
    }
    other = {**proof.as_dict(), "model": "0" * 64}  # a proof of another model proves nothing
    write_json(bundle / LOAD_FILE, other)
    assert read_proof(bundle) is None
