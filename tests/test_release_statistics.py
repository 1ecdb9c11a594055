"""What a comparison of two releases claims about chance, measured: false words, coverage, power, whatever one looks at and when."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from mlops_workbench.core.assignment import choose_arm
from mlops_workbench.release.arms import Arm, measure_arm
from mlops_workbench.release.comparison_plan import Design, rows_needed
from mlops_workbench.release.confidence_sequence import BURN_IN_EVENTS, difference_sequence
from mlops_workbench.release.sample_ratio import check_ratio
from mlops_workbench.release.verdict import Metric, judge, normal_alpha

ALPHA = 0.05
MARGIN = {0.001: 0.001, 0.01: 0.005, 0.1: 0.02, 0.5: 0.03}  # what would matter at such a rate


def most_expected(count: int, rate: float = ALPHA) -> int:
    """More than this happen by chance in one of a thousand test runs when the true rate is `rate`."""
    return int(scipy.stats.binom.ppf(0.999, count, rate))


def binary_arm(hits: float, rows: float) -> Arm:
    """The sums of an arm whose rows are 0 or 1, one an entity."""
    return Arm(int(rows), rows, hits, hits, hits, rows)


class Stream:
    """One comparison, row by row: which rows went to the new arm, and which are hits."""

    def __init__(
        self, generator: np.random.Generator, rows: int, share: float, old: float, new: float
    ):
        self.share = share
        is_new = generator.random(rows) < share
        hit = generator.random(rows) < np.where(is_new, new, old)
        self.new_rows = np.cumsum(is_new).astype(np.float64)
        self.old_rows = np.arange(1, rows + 1) - self.new_rows
        self.new_hits = np.cumsum(hit & is_new).astype(np.float64)
        self.old_hits = np.cumsum(hit & ~is_new).astype(np.float64)
        self.hit = hit

    def arms(self, row: int) -> tuple[Arm, Arm]:
        """Old and new after a row, counted from 0."""
        return (
            binary_arm(self.old_hits[row], self.old_rows[row]),
            binary_arm(self.new_hits[row], self.new_rows[row]),
        )

    def normal(self, margin: float, alpha: float) -> tuple[NDArray[np.float64], ...]:
        """Value and reach of the normal form after every row: the formula once more, for all rows at once."""
        with np.errstate(divide="ignore", invalid="ignore"):
            old, new = self.old_hits / self.old_rows, self.new_hits / self.new_rows
            variance = old * (1 - old) / (self.old_rows - 1) + new * (1 - new) / (self.new_rows - 1)
            whole = variance + margin**2
            reach = np.sqrt(
                2 * variance * whole / margin**2 * np.log(np.sqrt(whole / variance) / alpha)
            )
        kinds = [
            self.old_hits,
            self.old_rows - self.old_hits,
            self.new_hits,
            self.new_rows - self.new_hits,
        ]
        ready = np.min(kinds, axis=0) >= BURN_IN_EVENTS
        return new - old, np.where(ready, reach, np.inf), ready

    def early_looks(self, ready: NDArray[np.bool_]) -> Iterator[int]:
        """Each hit before the burn-in has ended, and the row before it: where the exact form is at its extremes."""
        end = int(np.argmax(ready)) if ready.any() else len(ready)
        for row in np.flatnonzero(self.hit[:end]):
            yield from (max(int(row) - 1, 0), int(row))

    def words(self, metric: Metric) -> set[str]:
        """All words that somebody hears who looks after every row."""
        value, reach, ready = self.normal(metric.margin, normal_alpha(ALPHA, True))
        said = set()
        if (value - reach > 0).any():
            said.add("better")
        if (value + reach < 0).any():
            said.add("worse")
        for row in self.early_looks(ready):
            said.add(judge(metric, *self.arms(row), share_new=self.share, alpha=ALPHA).word)
        return said


def test_the_formula_for_all_rows_is_that_of_the_library() -> None:
    stream = Stream(np.random.default_rng(1), 5_000, 0.3, 0.1, 0.12)
    value, reach, ready = stream.normal(0.02, ALPHA)
    assert ready[-1] and not ready[100]
    for row in (2_500, 4_000, 4_999):
        found = difference_sequence(*stream.arms(row), scale=0.02, alpha=ALPHA, binary=True)
        assert found.value == pytest.approx(value[row])
        assert found.high - found.value == pytest.approx(reach[row])


ROWS = {0.001: 200_000, 0.01: 60_000, 0.1: 20_000, 0.5: 20_000}
GRID = [(rate, share) for rate in ROWS for share in (0.01, 0.1, 0.5)]


def count_false_words(rate: float, share: float, comparisons: int) -> int:
    """Comparisons of two equal arms in which "better" or "worse" was ever said."""
    generator = np.random.default_rng(round(1e6 * rate) + round(100 * share))
    metric = Metric("hits", margin=MARGIN[rate], binary=True)
    return sum(
        bool(Stream(generator, ROWS[rate], share, rate, rate).words(metric) & {"better", "worse"})
        for _ in range(comparisons)
    )


@pytest.mark.parametrize(("rate", "share"), [(0.001, 0.5), (0.01, 0.01), (0.1, 0.1), (0.5, 0.5)])
def test_equal_arms_are_seldom_told_apart(rate: float, share: float) -> None:
    assert count_false_words(rate, share, 60) <= most_expected(60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("rate", "share"), GRID)
def test_equal_arms_are_told_apart_in_at_most_a_twentieth_of_all_comparisons(
    rate: float, share: float
) -> None:
    found = count_false_words(rate, share, 1_000)
    print(f"\nrate {rate:g}, share {share:g}: {found} false of 1000")
    assert found <= most_expected(1_000)


def test_a_z_test_at_every_row_would_be_noticed() -> None:
    """The same arms under the usual interval: the tests above can fail."""
    generator, false = np.random.default_rng(2), 0
    for _ in range(60):
        value, reach, ready = Stream(generator, 20_000, 0.5, 0.1, 0.1).normal(0.02, ALPHA)
        stream_reach = reach.copy()
        old = 0.1 * 0.9 * (1 / 10_000 + 1 / 10_000)
        growing = np.sqrt(old * 20_000 / np.arange(1, 20_001))
        stream_reach[ready] = 1.96 * growing[ready]
        false += bool((np.abs(value) > stream_reach)[ready].any())
    assert false > most_expected(60)


def count_misses(rate: float, effect: float, share: float, comparisons: int) -> int:
    """Comparisons in which the sequence ever left out the true difference."""
    generator = np.random.default_rng(round(1e6 * (rate + effect)))
    misses = 0
    for _ in range(comparisons):
        stream = Stream(generator, ROWS[rate], share, rate, rate + effect)
        value, reach, _ = stream.normal(MARGIN[rate], ALPHA)
        misses += bool((np.abs(value - effect) > reach).any())
    return misses


def test_the_truth_is_inside_at_all_rows_together() -> None:
    assert count_misses(0.1, 0.02, 0.5, 100) <= most_expected(100)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("rate", "effect"), [(0.01, 0.01), (0.1, -0.02), (0.5, 0.05)])
def test_the_truth_is_inside_in_nineteen_of_twenty(
    rate: float, effect: float, share: float
) -> None:
    misses = count_misses(rate, effect, share, 1_000)
    print(f"\nrate {rate:g}, effect {effect:+g}, share {share:g}: {misses} misses of 1000")
    assert misses <= most_expected(1_000)


def test_eight_instead_of_ten_percent_is_found_within_ten_thousand_rows_an_arm() -> None:
    generator, found = np.random.default_rng(3), 0
    for _ in range(100):
        stream = Stream(generator, 20_000, 0.5, 0.10, 0.08)
        value, reach, _ = stream.normal(0.02, normal_alpha(ALPHA, True))
        found += bool((value + reach < 0).any())
    assert found >= 90


def measure_power(design: Design, old: float, comparisons: int, seed: int) -> float:
    """Share of the comparisons that find the effect within the planned rows."""
    generator, rows, found = np.random.default_rng(seed), rows_needed(design), 0
    for _ in range(comparisons):
        stream = Stream(generator, rows, design.share_new, old, old + design.effect)
        value, reach, _ = stream.normal(design.effect, normal_alpha(design.alpha, True))
        found += bool((value - reach > 0).any())
    return found / comparisons


def planned(old: float, effect: float, share: float) -> Design:
    """The design for a share that rises from `old` by `effect`."""
    # variance of the difference with unequal rates, as that of one common deviation
    new = old + effect
    spread = (1 - share) * new * (1 - new) + share * old * (1 - old)
    return Design(effect=effect, deviation=math.sqrt(spread), share_new=share, binary=True)


def test_planned_power_is_roughly_there() -> None:
    assert 0.7 <= measure_power(planned(0.1, 0.03, 0.5), 0.1, 200, seed=4) <= 0.9


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("old", "effect", "share"),
    [(0.1, 0.02, 0.5), (0.1, 0.03, 0.1), (0.5, 0.04, 0.5), (0.02, 0.01, 0.5)],
)
def test_planned_power_of_80_percent_is_77_to_83(old: float, effect: float, share: float) -> None:
    power = measure_power(planned(old, effect, share), old, 4_000, seed=5)
    print(f"\nold {old:g}, effect {effect:g}, share {share:g}: power {power:.3f}")
    assert 0.77 <= power <= 0.83


def count_clustered(comparisons: int, by_entity: bool) -> int:
    """Equal arms of people with 20 alike requests each, told apart at any of 40 looks."""
    generator, told = np.random.default_rng(6), 0
    for _ in range(comparisons):
        people, requests = 4_000, 20
        is_new = generator.random(people) < 0.5
        late = generator.beta(0.2, 0.8, people)  # a person is nearly always late, or nearly never
        hits = generator.binomial(requests, late)
        for look in np.linspace(200, people, 40).astype(int):
            arms = []
            for side in (~is_new[:look], is_new[:look]):
                counts = hits[:look][side]
                if by_entity:
                    rows = float(requests * len(counts))
                    total = float(counts.sum())
                    squares = float((counts.astype(float) ** 2).sum())
                    arms.append(
                        Arm(len(counts), rows, total, squares, requests * total, rows * requests)
                    )
                else:
                    arms.append(binary_arm(float(counts.sum()), float(requests * len(counts))))
            found = difference_sequence(*arms, scale=0.02, alpha=ALPHA, binary=True)
            if found.low > 0 or found.high < 0:
                told += 1
                break
    return told


def test_twenty_requests_a_person_do_not_make_it_rash() -> None:
    assert count_clustered(60, by_entity=True) <= most_expected(60)
    assert count_clustered(60, by_entity=False) > most_expected(60)


def test_arms_add_up_in_any_order_and_repeatedly_read_rows_are_the_same() -> None:
    generator = np.random.default_rng(7)
    values = generator.random(1_000)
    people = generator.integers(0, 100, 1_000)
    whole = measure_arm(values, people)
    parts = [
        measure_arm(values[people % 7 == part], people[people % 7 == part]) for part in range(7)
    ]
    for _ in range(3):
        generator.shuffle(parts)  # type: ignore[arg-type]
        total = sum(parts, Arm())
        assert total.mean == pytest.approx(whole.mean)
        assert total.variance_of_mean == pytest.approx(whole.variance_of_mean)


def test_a_hundred_thousand_people_are_split_within_half_a_point() -> None:
    shares = {"champion": 0.75, "challenger": 0.25}
    arms = [choose_arm(f"person {number}", "rollout 1", shares) for number in range(100_000)]
    assert abs(arms.count("challenger") / len(arms) - 0.25) < 0.005
    again = [choose_arm(f"person {number}", "rollout 1", shares) for number in range(1_000)]
    assert again == arms[:1_000]


def test_lost_rows_of_one_arm_block_the_verdict() -> None:
    """A tenth of the new arm's rows, the failed ones, never arrive: it looks better, and is not believed."""
    generator = np.random.default_rng(8)
    is_new = generator.random(40_000) < 0.5
    hit = generator.random(40_000) < 0.10
    arrives = ~(is_new & hit)
    metric = Metric("error rate", margin=0.01, higher_is_better=False, binary=True)
    old = measure_arm(hit[arrives & ~is_new])
    new = measure_arm(hit[arrives & is_new])
    assert judge(metric, old, new, share_new=0.5).word == "better"
    counts = {"old": int(old.rows), "new": int(new.rows)}
    ratio = check_ratio(counts, {"old": 0.5, "new": 0.5})
    said = judge(metric, old, new, share_new=0.5, ratio=ratio)
    assert said.word == "not yet" and "blocked" in said.reason


@pytest.mark.parametrize("seed", range(3))
def test_the_ratio_check_is_quiet_where_the_split_is_kept(seed: int) -> None:
    generator, alarms = np.random.default_rng(seed), 0
    for _ in range(100):
        new = np.cumsum(generator.random(5_000) < 0.1)
        alarms += any(
            not check_ratio(
                {"old": row + 1 - int(new[row]), "new": int(new[row])}, {"old": 0.9, "new": 0.1}
            ).ok
            for row in range(0, 5_000, 20)
        )
    assert alarms <= most_expected(100, 0.001)
