"""Paired comparisons and covariates by simulation: false words, coverage, and what they gain."""

import numpy as np
import pytest

from mlops_workbench.release.arms import measure_arm, remove_covariate
from mlops_workbench.release.confidence_sequence import difference_sequence
from mlops_workbench.release.paired import judge_pairs, paired_interval
from mlops_workbench.release.verdict import Metric, judge

ALPHA = 0.05
RUNS = 300
LIMIT = ALPHA + 3 * (ALPHA * (1 - ALPHA) / RUNS) ** 0.5


@pytest.mark.parametrize("unlike", [0.002, 0.02, 0.3])
def test_equal_models_on_the_same_rows_get_no_false_word(unlike: float) -> None:
    """Both are right equally often and differ on a share of the rows; looked at every 50 rows up to 2,000."""
    random = np.random.default_rng(int(unlike * 1000))
    metric = Metric("accuracy", 0.02, binary=True)
    false = outside = 0
    for _ in range(RUNS):
        away = random.random(2000) < unlike
        differences = np.where(away, np.where(random.random(2000) < 0.5, 1.0, -1.0), 0.0)
        looks = range(50, 2001, 50)
        words = {judge_pairs(metric, differences[:n], np.arange(n)).word for n in looks}
        false += bool(words & {"better", "worse"})
        held = (paired_interval(metric, differences[:n], np.arange(n), ALPHA)[0] for n in looks)
        outside += any(each.known and not each.low <= 0 <= each.high for each in held)
    assert false / RUNS <= LIMIT and outside / RUNS <= LIMIT


def test_the_true_difference_is_inside_at_all_looks_together() -> None:
    random = np.random.default_rng(5)
    metric = Metric("accuracy", 0.02, binary=True)
    outside = 0
    for _ in range(RUNS):
        draw = random.random(2000)
        differences = np.where(draw < 0.06, 1.0, np.where(draw < 0.09, -1.0, 0.0))  # truth: 0.03
        held = (
            paired_interval(metric, differences[:n], np.arange(n), ALPHA)[0]
            for n in range(50, 2001, 50)
        )
        outside += any(each.known and not each.low <= 0.03 <= each.high for each in held)
    assert outside / RUNS <= LIMIT


def test_pairs_find_with_hundreds_of_rows_what_a_split_does_not_find_with_thousands() -> None:
    """86 % against 88 % on rows of unlike difficulty."""
    random = np.random.default_rng(6)
    metric = Metric("accuracy", 0.02, binary=True)
    by_pairs = by_split = 0
    for _ in range(60):
        hard = random.random(1500)
        old, new = (hard < 0.86).astype(float), (hard < 0.88).astype(float)
        by_pairs += judge_pairs(metric, new - old, np.arange(1500)).word == "better"
        half = random.random(1500) < 0.5
        arms = measure_arm(old[half]), measure_arm(new[~half])
        by_split += judge(metric, *arms, share_new=0.5).word == "better"
    assert by_pairs >= 55 and by_split <= 10


def test_twenty_rows_a_person_do_not_inflate_the_pairs() -> None:
    random = np.random.default_rng(7)
    metric = Metric("brier", 0.02, higher_is_better=False)
    false = 0
    for _ in range(RUNS):
        people = np.repeat(np.arange(100), 20)
        differences = np.repeat(random.normal(0, 0.1, 100), 20) + random.normal(0, 0.05, 2000)
        words = {
            judge_pairs(metric, differences[:n], people[:n]).word for n in range(1000, 2001, 100)
        }
        false += bool(words & {"better", "worse"})
    assert false / RUNS <= LIMIT


def test_a_covariate_narrows_the_interval_and_makes_no_false_word() -> None:
    """The covariate explains half of the variance; A/A, looked at every 100 rows, slope estimated anew each time."""
    random = np.random.default_rng(8)
    metric = Metric("brier", 0.05, higher_is_better=False)
    false, plain_width, width = 0, 0.0, 0.0
    for _ in range(RUNS):
        known = random.normal(0, 0.2, 2000)
        values = known + random.normal(0.4, 0.2, 2000)
        new = random.random(2000) < 0.5
        words = set()
        for n in range(200, 2001, 100):
            clean = remove_covariate(values[:n], known[:n])
            arms = measure_arm(clean[~new[:n]]), measure_arm(clean[new[:n]])
            words.add(judge(metric, *arms, share_new=0.5, alpha=ALPHA).word)
        false += bool(words & {"better", "worse"})
        found = difference_sequence(*arms, scale=0.05)
        plain = difference_sequence(measure_arm(values[~new]), measure_arm(values[new]), scale=0.05)
        width, plain_width = width + found.high - found.low, plain_width + plain.high - plain.low
    assert false / RUNS <= LIMIT
    assert 0.65 < width / plain_width < 0.78  # the square root of a half
