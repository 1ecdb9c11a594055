"""What the monitor claims about chance, measured: false alarms, power, coverage of intervals."""

import json

import numpy as np
import pandas as pd
import pytest
from monitoring_support import FLIGHTS, draw_labels, draw_rows, flights_profile
from scipy.stats import binom

from mlops_workbench.experiment.export import export_model
from mlops_workbench.experiment.recorder import Recorder
from mlops_workbench.experiment.training import fit
from mlops_workbench.monitoring.drift import drift
from mlops_workbench.monitoring.quality import (
    compare_to_reference,
    measure_quality,
    reliability_table,
)
from mlops_workbench.pipeline.evaluate import reference_profile
from mlops_workbench.pipeline.train import split_parts
from mlops_workbench.recipes.flights import flights
from mlops_workbench.recipes.protocol import encode
from mlops_workbench.release.bundles import predict_onnx

RATE = 0.05


def most_expected(windows: int, rate: float = RATE) -> int:
    """More false alarms than this happen by chance in one of a thousand test runs."""
    return int(binom.ppf(0.999, windows, rate))


def any_moved(report: object) -> bool:
    return any(column.moved for column in report.everything)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "windows"),
    [
        (200, 50),
        pytest.param(200, 200, marks=pytest.mark.slow),
        pytest.param(2_000, 50, marks=pytest.mark.slow),
        (20_000, 8),
    ],
)
def test_unchanged_windows_raise_no_more_false_alarms_than_stated(rows: int, windows: int) -> None:
    """Reference and window are drawn anew, without a practical minimum: 17 tests a window."""
    generator = np.random.default_rng(rows)
    alarms = 0
    for window in range(windows):
        profile = flights_profile(1000 * rows + window)
        found = drift(
            profile,
            draw_rows(generator, rows),
            FLIGHTS,
            false_alarm_rate=RATE,
            minimum_effect=0.0,
            seed=window,
        )
        assert len(found.everything) == 17  # 14 features, gaps of two, the prediction
        alarms += any_moved(found)
    assert alarms <= most_expected(windows)


def test_a_strict_test_of_its_own_would_notice_a_broken_correction() -> None:
    """The same windows without the correction alarm far more often: the test above can fail."""
    generator = np.random.default_rng(1)
    alarms = 0
    for window in range(30):
        found = drift(
            flights_profile(window), draw_rows(generator, 200), FLIGHTS, minimum_effect=0.0
        )
        alarms += any(column.p_value <= RATE for column in found.everything)
    assert alarms > most_expected(30)


@pytest.mark.parametrize(("rows", "windows", "least"), [(500, 12, 0.9), (2_000, 8, 1.0)])
def test_a_shift_of_a_third_of_a_standard_deviation_is_found(
    rows: int, windows: int, least: float
) -> None:
    generator = np.random.default_rng(rows)
    found = 0
    for window in range(windows):
        report = drift(
            flights_profile(window), draw_rows(generator, rows, warmer=0.3), FLIGHTS, seed=window
        )
        temperature = next(column for column in report.columns if column.column == "temp")
        found += temperature.moved
        if temperature.moved:
            assert "right" in temperature.direction or "up" in temperature.direction
    # a window that misses by bad luck is allowed for: 0.9 is asked of a power of about 0.99
    assert found >= np.floor(least * windows)


def test_a_meaningless_shift_in_a_large_window_is_not_reported() -> None:
    """0.05 standard deviations at 20,000 rows: significant, and of no use to anybody."""
    rows = draw_rows(np.random.default_rng(3), 20_000, warmer=0.05)
    report = drift(flights_profile(3), rows, FLIGHTS)
    temperature = next(column for column in report.columns if column.column == "temp")
    assert not temperature.moved
    assert temperature.effect < 0.1


def test_the_profile_is_small() -> None:
    assert len(json.dumps(flights_profile(0, training_rows=20_000))) < 300_000


def test_intervals_of_quality_cover_the_truth() -> None:
    """95 % intervals at 300 labels hold the value of a million rows in about 95 % of draws."""
    generator = np.random.default_rng(5)

    def draw(count: int) -> dict[str, object]:
        chance = generator.beta(2, 4, count)
        labels = (generator.random(count) < np.clip(chance + 0.05, 0, 1)).astype(np.int64)
        return dict(measure_quality(labels, np.column_stack([1 - chance, chance])))

    truth, draws = draw(1_000_000), [draw(300) for _ in range(300)]
    for name in ("accuracy", "recall", "brier", "log_loss", "auc", "calibration_bias"):
        inside = sum(one[name].low <= truth[name].value <= one[name].high for one in draws)  # type: ignore[attr-defined]
        assert binom.ppf(0.0005, 300, 0.93) <= inside, (name, inside)


def test_a_calibrated_model_shows_no_calibration_error_at_few_rows() -> None:
    """The plain expected error is about 0.1 at 150 rows; the corrected one has no such bias."""
    generator = np.random.default_rng(6)
    squares, plain = [], []
    for _ in range(300):
        chance = generator.beta(2, 4, 150)
        labels = (generator.random(150) < chance).astype(np.int64)
        both = np.column_stack([1 - chance, chance])
        value = measure_quality(labels, both)["calibration_error"].value
        assert value is not None
        squares.append(value)
        table = reliability_table(labels, both)
        plain.append(np.mean([abs(row["promised"] - row["observed"]) for row in table]))
    assert np.median(squares) < 0.06 < 0.08 < np.median(plain)


def test_comparisons_with_an_unchanged_evaluation_move_no_more_often_than_stated() -> None:
    generator = np.random.default_rng(7)
    moved = 0
    for _ in range(200):
        both = []
        for count in (1500, 400):
            rows = draw_rows_of_answers(generator, count)
            both.append(measure_quality(*rows))
        result = compare_to_reference(both[1], both[0], minimum_difference=0.0)
        moved += result.verdict == "moved"
    assert moved <= most_expected(200)


def test_the_late_share_moves_and_the_ranking_does_not() -> None:
    """Flights in April: every promise is too low, the order is as good as before."""
    generator = np.random.default_rng(8)
    reference = measure_quality(*draw_rows_of_answers(generator, 1500))
    later = measure_quality(*draw_rows_of_answers(generator, 1500, shift=0.1))
    moved = {c.figure for c in compare_to_reference(later, reference).changes if c.moved}
    assert {"label_share", "calibration_bias"} <= moved
    assert "auc" not in moved


def draw_rows_of_answers(
    generator: np.random.Generator, count: int, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities of such rows."""
    rows = draw_rows(generator, count)
    return draw_labels(generator, rows, shift), np.array(rows["probabilities"].tolist())


@pytest.fixture(scope="module")
def flights_release(tmp_path_factory: pytest.TempPathFactory):
    """All flights with the answers of a release of January to mid April, how many rows it is made of, and its profile."""
    folder = tmp_path_factory.mktemp("flights")
    rows = flights.source("")
    month = rows["flight_id"].str[5:7].astype(int)
    version = pd.concat([rows[month <= 3], rows[month == 4].head(1600)], ignore_index=True)
    parts = split_parts(flights, version)
    with Recorder(folder / "run") as recorder:
        trained = fit(
            flights, parts["train"], parts["validation"], parameters={"epochs": 4}, seed=0,
            folder=folder / "run", recorder=recorder,
        )  # fmt: skip
    export_model(flights, trained, folder)
    arrays, labels = encode(flights, parts["test"])
    held_out = predict_onnx(folder / "model.onnx", arrays)
    profile = reference_profile(
        flights, "flights@v1.1", parts, folder / "model.onnx", held_out, labels
    )
    asked = {"version": version, 4: rows[month == 4], 6: rows[month == 6]}
    for name, part in asked.items():
        answers = predict_onnx(folder / "model.onnx", encode(flights, part)[0])
        asked[name] = part.assign(probabilities=list(answers)).reset_index(drop=True)
    return profile, asked


@pytest.mark.parametrize("rows", [500, 2_000])
def test_traffic_like_the_data_version_raises_no_more_false_alarms_than_stated(
    flights_release, rows: int
) -> None:
    """Whole days of flights are held out, and it rains on whole days: still a sample of all rows has not moved; April and June have."""
    profile, asked = flights_release

    def look(name: str | int, seed: int):
        window = asked[name].sample(rows, random_state=seed, ignore_index=True)
        return drift(profile, window, flights.features, seed=seed)

    alarms = sum(any_moved(look("version", seed)) for seed in range(20))
    assert alarms <= RATE * 20
    for month in (4, 6):
        found = look(month, 0)
        moved = {column.column for column in found.everything if column.moved}
        assert {"temp", "dewp"} <= moved
        assert "columns moved against all rows of flights@v1.1, most temp" in found.summary
