"""Our anytime-valid tests beside those of `savvi`, written by others from the same papers, on the same data.

Lindon and Malek 2022 for counts, Lindon, Ham, Tingley and Bojinov 2024 for means. savvi answers row by row and for one
fixed question; ours work on sums that add up. Where both ask the same thing they say the same number; where they differ, by what
and how much is part of the test.
"""

import math

import numpy as np
import pytest
from savvi.linear_regression import LinearRegression
from savvi.multinomial import Multinomial

from mlops_workbench.release.arms import measure_arm
from mlops_workbench.release.confidence_sequence import difference_sequence, sequence_reach
from mlops_workbench.release.rare_events import PRIOR_WEIGHT, log_wealth, share_sequence
from mlops_workbench.release.sample_ratio import check_ratio


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.99, 0.01), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_the_ratio_check_says_what_the_oracle_says(shares: tuple[float, ...], drift: float) -> None:
    """As planned, and with a tenth of the last arm's people lost; batch by batch."""
    generator, theirs = np.random.default_rng(1), Multinomial(0.001, np.array(shares))
    real = np.array([*shares[:-1], shares[-1] * (1 - drift)])
    names, counts = [str(number) for number in range(len(shares))], np.zeros(len(shares), int)
    for _ in range(30):
        batch = generator.multinomial(200, real / real.sum())
        counts += batch
        theirs.update(batch)
        said = check_ratio(
            dict(zip(names, counts.tolist(), strict=True)), dict(zip(names, shares, strict=True))
        )
        value = float(theirs.calculate_p_value())
        assert math.exp(-said.log_wealth) == pytest.approx(value, rel=1e-9)
        assert said.ok == (value > 0.001)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_wealth_of_rare_events_is_the_oracles(share: float) -> None:
    """Which arm an event falls into, event by event; twice as often as planned into the new one."""
    generator = np.random.default_rng(2)
    theirs = Multinomial(0.05, np.array([share, 1 - share]), k=PRIOR_WEIGHT)
    new = old = 0
    for _ in range(60):
        is_new = bool(generator.random() < 2 * share)
        new, old = new + is_new, old + (not is_new)
        theirs.update(np.array([is_new, not is_new], dtype=int))
        value = float(theirs.calculate_p_value())
        assert math.exp(-log_wealth(new, old, share)) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("events", "rows"), [(0, 40), (3, 400), (25, 50), (199, 200)])
def test_the_interval_of_a_share_is_the_oracles(events: int, rows: int) -> None:
    """Their ends come from a convex solver, ours from the root itself: they agree to the solver's tolerance."""
    theirs = Multinomial(0.05, np.array([0.5, 0.5]), k=1)  # Jeffreys' prior
    theirs.update(np.array([events, rows - events]))
    ends = theirs.calculate_conf_int()[0]
    ours = share_sequence(events, rows, 0.05)
    assert [ours.low, ours.high] == pytest.approx(ends.tolist(), abs=2e-5)


def both_arms(rows: int) -> tuple[LinearRegression, np.ndarray, np.ndarray]:
    """Their regression of a value on the arm, and the values of both arms, as many of each."""
    generator, theirs = np.random.default_rng(rows), LinearRegression(0.05, 2)
    old, new = generator.normal(1.0, 0.5, rows), generator.normal(1.04, 0.5, rows)
    for first, second in zip(old, new, strict=True):
        theirs.update(np.array([first, 1.0, 0.0]))
        theirs.update(np.array([second, 1.0, 1.0]))
    return theirs, old, new


SCALE = 0.1


def test_the_sequence_of_a_difference_is_the_limit_of_the_oracles() -> None:
    """Theirs pays for not knowing the variance, as a t-test does; ours takes it as known, which the burn-in is for.

    With the same prior (its scale in their unit, the deviation of a row) both are one formula, theirs with degrees of freedom, ours
    with infinitely many. Ours is narrower, and the difference falls like one over the rows: 5 % at the burn-in's 50 rows, 0.2 % at 500.
    """
    excess = {}
    for rows in (50, 500, 5_000):
        theirs, old, new = both_arms(rows)
        theirs.phi = (theirs.sigma() / SCALE) ** 2
        arms = measure_arm(old), measure_arm(new)
        ours = difference_sequence(*arms, scale=SCALE, alpha=0.05)
        variance = sum(arm.variance_of_mean for arm in arms)
        assert ours.value == pytest.approx(theirs.estimate[1], rel=1e-5)
        assert variance == pytest.approx(theirs.standard_errors()[1] ** 2, rel=1e-5)
        low, high = theirs.calculate_conf_int()[1]
        excess[rows] = (high - low) / (ours.high - ours.low) - 1
        freedom = theirs.nu()
        theirs.nu = lambda: 1e9
        low, high = theirs.calculate_conf_int()[1]
        assert [ours.low, ours.high] == pytest.approx([low, high], abs=1e-5)
        if (
            value := float(theirs.calculate_p_value()[1])
        ) < 1:  # the level at which the interval ends at zero
            assert sequence_reach(variance, SCALE, value) == pytest.approx(
                abs(ours.value), rel=1e-4
            )
        print(
            f"{rows} rows an arm, {freedom} degrees of freedom: theirs is {excess[rows]:.3%} wider"
        )
    assert 0 < excess[5_000] < excess[500] / 8 and excess[500] < 0.01 < excess[50] < 0.1
