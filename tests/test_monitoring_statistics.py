"""What the monitor claims about chance, measured: false alarms, power, coverage of intervals."""

import json

import numpy as np
import pytest
from monitoring_support import FLIGHTS, draw_labels, draw_rows, flights_profile
from scipy.stats import binom

from mlops_workbench.monitoring.drift import drift
from mlops_workbench.monitoring.quality import (
    compare_to_reference,
    measure_quality,
    reliability_table,
)

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
