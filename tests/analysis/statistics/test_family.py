"""Verdicts over many statistics at once: their level, whatever the number of draws, and what their bands say."""

from collections import defaultdict

import numpy as np
import pytest

from kpo_cli.analysis.statistics.family import LEVEL, judge

ANYWHERE = defaultdict(lambda: (-np.inf, np.inf))


def families(draws, statistics, trials, shift=0.0, freedom=3):
    """Correlated statistics of very different scales and tails, one of them shifted in the data."""
    rng = np.random.default_rng(3)
    scale = 10.0 ** np.arange(statistics)[:, None]
    for _ in range(trials):
        common = rng.normal(size=draws + 1)
        table = scale * (common + rng.standard_t(freedom, (statistics, draws + 1)))
        table[-1, -1] += shift * scale[-1, 0]
        drawn, observed = ({i: row[part] for i, row in enumerate(table)} for part in (slice(-1), -1))
        yield judge(drawn, observed, ANYWHERE)


@pytest.mark.parametrize("draws", [20, 39, 100])
def test_a_family_without_structure_is_significant_as_often_as_it_says(draws):
    """At 5% for all its statistics, and not less: with 20 draws the level is 1/21, with 39 2/40, with 100 5/101."""
    level = int(LEVEL * (draws + 1)) / (draws + 1)
    trials = 600
    rejected = sum(family.p_value <= LEVEL for family in families(draws, 12, trials))
    assert abs(rejected - level * trials) <= 3.3 * (level * (1 - level) * trials) ** 0.5


@pytest.mark.parametrize("draws", [20, 100])
def test_one_statistic_far_out_is_found_with_few_draws(draws):
    for family in families(draws, 12, 20, shift=60.0, freedom=99):
        assert family.refutable
        assert family.judged[11].p_adjusted == pytest.approx(1 / (draws + 1))


def test_outside_its_band_is_significant_and_inside_is_not():
    seen = set()
    for family in families(60, 6, 60, shift=7.0):
        for one in family.judged.values():
            inside = one.band[0] <= one.observed <= one.band[1]
            assert inside == (one.p_adjusted > LEVEL)
            seen.add(inside)
        assert family.p_value == min(one.p_adjusted for one in family.judged.values())
    assert seen == {True, False}


def test_what_the_null_cannot_change_is_never_significant_and_nothing_can_be_told_from_it():
    family = judge({"std": np.full(50, 0.1), "none": np.full(50, np.nan)}, {"std": 0.1 + 1e-14, "none": 0.3}, ANYWHERE)
    assert (family.p_value, family.refutable, family.size) == (1.0, False, 1)
    assert family.judged["none"] is None
    # Two tokens have two orders: a draw is as far out as half of the others.
    coin = judge({"switches": np.tile([0.0, 1.0], 25)}, {"switches": 1.0}, ANYWHERE)
    assert (coin.p_value > LEVEL, coin.refutable) == (True, False)


def test_an_infinite_draw_is_left_out():
    drawn = np.append(np.random.default_rng(0).normal(size=49), np.inf)
    family = judge({"ess": drawn}, {"ess": 9.0}, ANYWHERE)
    assert family.p_value == pytest.approx(1 / 51)


def test_bands_end_where_a_statistic_does():
    """An effective sample size of 0.999 +- 0.002 reaches 1 and no further; what is significant is as it was."""
    drawn = 0.999 + 0.001 * np.random.default_rng(0).normal(size=50)
    (free,), (cut,) = (
        judge({"ess": drawn}, {"ess": 0.98}, {"ess": limits}).judged.values() for limits in (ANYWHERE[0], (0.0, 1.0))
    )
    assert free.band[1] > cut.band[1] == 1.0
    assert free.band[0] == cut.band[0]
    assert free.p_adjusted == cut.p_adjusted == pytest.approx(1 / 51)
