"""Nulls and intervals: what they keep, and that they are wrong as often as they say."""

import numpy as np
import pytest
from scipy import stats

from kpo_cli.analysis.statistics.resampling import Null, null_totals, shuffled, sign_flipped
from kpo_cli.analysis.statistics.series import Series
from kpo_cli.analysis.statistics.spectrum import spectra
from kpo_cli.analysis.statistics.sums import LIMITS, response_sums, statistics
from kpo_cli.core.filters import Kalman
from kpo_cli.intervals.clusters import cluster_intervals
from kpo_cli.runs.ratios import Ratios


def identity(z, mask, old_log_probs):
    return z


def smoothed(z, mask, old_log_probs):
    return Series("kalman", "", Kalman(q=0.01)).apply(z, mask, old_log_probs)


def batch_of(z, mask=None):
    mask = np.ones(z.shape, bool) if mask is None else mask
    z = np.where(mask, z, 0.0)
    return Ratios(log_ratio=z, mask=mask, step=np.zeros(len(z), int), old_log_probs=-np.abs(z))


def sums_of(z, mask):
    return response_sums(z, mask, 0.0, spectra(z, mask, 0.05).low)


def test_a_shuffle_keeps_the_tokens_of_a_response_and_its_gaps():
    rng = np.random.default_rng(0)
    batch = batch_of(rng.normal(size=(5, 12)), rng.random((5, 12)) > 0.3)
    seen = set()
    for part in shuffled(batch, 30, seed=0):
        assert (part.mask == np.tile(batch.mask, (part.copies, 1))).all()
        for i, (row, old, mask) in enumerate(zip(part.z, part.old_log_probs, part.mask, strict=True)):
            original = batch.log_ratio[i % 5]
            assert sorted(row[mask]) == sorted(original[mask])
            assert (row[~mask] == 0).all()
            assert (old == -np.abs(row)).all()  # old log-probabilities go with their tokens
            seen.add((i % 5, tuple(row)))
    assert len(seen) > 140


def test_a_sign_flip_keeps_the_sizes_where_they_stand():
    batch = batch_of(np.random.default_rng(0).normal(size=(5, 12)))
    (part,) = sign_flipped(batch, 40, seed=0)
    assert (np.abs(part.z) == np.tile(np.abs(batch.log_ratio), (40, 1))).all()
    assert np.sign(part.z).mean() == pytest.approx(0, abs=0.1)


def test_draws_are_the_same_for_the_same_seed_and_all_there():
    batch = batch_of(np.random.default_rng(0).normal(size=(300, 100)))  # more than fits at once
    first, second, other = (
        null_totals(shuffled(batch, 11, seed), [identity, smoothed], 0.0, 0.05) for seed in (0, 0, 1)
    )
    assert first.shape[:2] == (2, 11)
    assert (first == second).all()
    assert not (first == other).all()


@pytest.mark.parametrize("null", [shuffled, sign_flipped])
@pytest.mark.parametrize("apply", [identity, smoothed])
def test_the_null_rejects_white_noise_as_often_as_it_says(null, apply):
    """200 data sets without structure, tested at 10%: the count of rejections is binomial."""
    rejected = dict.fromkeys(("switch_frequency", "low_frequency_energy", "autocorrelation"), 0)
    rng = np.random.default_rng(5)
    for trial in range(200):
        # Heavy tails, and sizes that differ between responses: exchangeable within each.
        z = rng.standard_t(3, (6, 30)) * rng.lognormal(size=(6, 1))
        batch = batch_of(z)
        observed = statistics(sums_of(apply(z, batch.mask, batch.old_log_probs), batch.mask).sum(0))
        drawn = statistics(null_totals(null(batch, 39, trial), [apply], 0.0, 0.05)[0])
        for name in rejected:
            rejected[name] += Null.of(drawn[name], float(observed[name])).p_value <= 0.1
    for count in rejected.values():
        assert 8 <= count <= 34  # 20 expected, standard deviation 4.2


def test_the_shuffle_sees_a_slow_drift():
    rng = np.random.default_rng(6)
    z = rng.normal(size=(40, 60)) + np.cumsum(rng.normal(size=(40, 60)) * 0.2, 1)
    batch = batch_of(z)
    observed = statistics(sums_of(z, batch.mask).sum(0))
    drawn = statistics(null_totals(shuffled(batch, 99, 0), [identity], 0.0, 0.05)[0])
    for name in ("switch_frequency", "low_frequency_energy", "autocorrelation"):
        found = Null.of(drawn[name], float(observed[name]))
        assert found.p_value == pytest.approx(0.02)
        assert not found.low <= found.observed <= found.high


def test_a_statistic_that_the_null_leaves_alone_is_not_significant():
    assert Null.of(np.full(99, 0.1), 0.1 + 1e-12).p_value == 1
    assert Null.of(np.full(9, np.nan), 0.1) is None


@pytest.mark.parametrize("count", [6, 24])
def test_intervals_hold_the_truth_as_often_as_they_say(count):
    """Few prompts of 4 responses that share a tendency and a size. Drawing prompts with replacement holds the truth in
    77% to 90% of the trials."""
    rng = np.random.default_rng(7)

    def prompts(number):
        size = np.exp(0.4 * rng.normal(size=(number, 1, 1)))
        z = 0.1 * size * (0.5 * rng.normal(size=(number, 1, 1)) + rng.normal(size=(number, 4, 20)))
        flat = z.reshape(-1, 20)
        return sums_of(flat, np.ones(flat.shape, bool)).reshape(number, 4, -1).sum(1)

    truth = statistics(prompts(40_000).sum(0))
    names, trials = ("mean", "autocorrelation", "switch_frequency", "effective_sample_size", "kl_k3"), 200
    hits = dict.fromkeys(names, 0)
    for _ in range(trials):
        found = cluster_intervals(prompts(count), statistics, LIMITS)
        for name in names:
            hits[name] += found[name][0] <= truth[name] <= found[name][1]
    assert min(hits.values()) / trials > 0.93 - 2.3 * (0.93 * 0.07 / trials) ** 0.5, hits


def test_an_interval_of_the_mean_of_clusters_of_one_length_is_students():
    """But for the degrees of freedom."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(12, 1, 20)).reshape(12, 20)
    means, clusters = z.mean(1), sums_of(z, np.ones(z.shape, bool))
    low, high = cluster_intervals(clusters, statistics, LIMITS)["mean"]
    squares = (means - means.mean()) ** 2
    freedom = squares.sum() ** 2 / (squares**2).sum()
    expected = stats.t.interval(0.95, freedom, means.mean(), stats.sem(means))
    assert (low, high) == pytest.approx(expected, rel=1e-9)


def test_intervals_stay_within_what_can_be():
    rng = np.random.default_rng(0)
    for _ in range(20):
        z = rng.normal(size=(3, 6)) * np.array([[0.01], [0.5], [3.0]])
        for name, (low, high) in cluster_intervals(sums_of(z, np.ones(z.shape, bool)), statistics, LIMITS).items():
            if np.isfinite([low, high]).all():
                assert LIMITS[name][0] <= low <= high <= LIMITS[name][1]


def test_one_prompt_has_no_interval():
    assert cluster_intervals(sums_of(np.ones((1, 5)), np.ones((1, 5), bool)), statistics, LIMITS) is None
