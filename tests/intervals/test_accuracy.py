import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from kpo_cli.intervals import accuracy as s


def test_pass_at_k_equals_its_definition_by_brute_force():
    rng = np.random.default_rng(0)
    correct = rng.random((6, 7)) < 0.4
    for k in range(1, 8):
        by_subsets = np.mean(
            [np.mean([any(row[list(subset)]) for subset in itertools.combinations(range(7), k)]) for row in correct]
        )
        assert s.pass_at_k(correct, k, 0).value == pytest.approx(by_subsets, rel=1e-12)
    assert s.pass_at_k(correct, 1, 0).value == pytest.approx(s.avg_at_k(correct, 0).value)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    rng = np.random.default_rng(1)
    p, k, n = 0.15, 4, 8
    draws = rng.random((20_000, n)) < p
    truth = 1 - (1 - p) ** k
    ours = s.pass_at_k(draws, k, 0).value
    plug_in = np.mean(1 - (1 - draws.mean(axis=1)) ** k)
    assert ours == pytest.approx(truth, abs=0.005)
    assert abs(plug_in - truth) > 0.02


@pytest.mark.parametrize("k", [0, 8])
def test_pass_at_k_needs_enough_samples(k):
    with pytest.raises(ValueError, match="there are 7"):
        s.pass_at_k(np.zeros((2, 7)), k, 0)


@pytest.mark.parametrize(
    ("draw", "k", "count"),
    [
        (lambda rng, n: rng.beta(0.6, 0.9, n), 1, 15),
        (lambda rng, n: rng.beta(0.3, 6, n), 4, 30),
        (lambda rng, n: rng.beta(5, 1, n), 4, 30),
        (lambda rng, n: rng.beta(5, 1, n), 8, 200),
        (lambda rng, n: rng.beta(6, 0.8, n), 8, 500),
        (lambda rng, n: np.where(rng.random(n) < 0.5, 0.97, 0.03), 1, 30),
        (lambda rng, n: np.where(rng.random(n) < 0.05, 0.5, 0.995), 1, 200),
        (lambda rng, n: np.where(rng.random(n) < 0.03, 0.9, 0.005), 1, 30),
    ],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(draw, k, count, monkeypatch):
    """Problems of varying difficulty, drawn anew each time; 93% less 2.3 standard errors of 200 trials. A bootstrap of
    problems that nearly all have nearly the same value holds the truth 63% of the time."""
    monkeypatch.setattr(s, "DRAWS", 1000)
    everything = draw(np.random.default_rng(1), 1_000_000)
    truth = float(np.mean(1 - (1 - everything) ** k))
    rng, covered, trials = np.random.default_rng(2), 0, 200
    for trial in range(trials):
        found = s.pass_at_k(rng.random((count, 16)) < draw(rng, count)[:, None], k, trial)
        covered += found.low <= truth <= found.high
    assert covered / trials > 0.93 - 2.3 * math.sqrt(0.93 * 0.07 / trials)


def test_the_usual_interval_does_not():
    rng, covered, trials = np.random.default_rng(2), 0, 200
    for _ in range(trials):
        share = float((rng.random((30, 16)) < rng.beta(0.6, 0.9, (30, 1))).mean())
        covered += abs(share - 0.4) <= 1.96 * math.sqrt(share * (1 - share) / 480)
    assert covered / trials < 0.7


@pytest.mark.parametrize("right", [0, 1, 3, 27, 30])
def test_of_few_zeros_or_ones_it_is_clopper_and_pearsons(right, monkeypatch):
    monkeypatch.setattr(s, "DRAWS", 200_000)
    monkeypatch.setattr(s, "deviating", lambda values: 0.0)  # the weight of the made-up problem is 1
    found = s.mean_over_problems(np.repeat([0.0, 1.0], [30 - right, right]), 0)
    exact = stats.binomtest(right, 30).proportion_ci()
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=2e-3)


def test_of_many_zeros_and_ones_it_nears_jeffreys(monkeypatch):
    monkeypatch.setattr(s, "DRAWS", 200_000)
    found = s.mean_over_problems(np.repeat([0.0, 1.0], [300, 200]), 0)
    assert found.low == pytest.approx(stats.beta.ppf(0.025, 200.5, 300.5), abs=2e-3)
    assert found.high == pytest.approx(stats.beta.ppf(0.975, 200.5, 300.5), abs=2e-3)


@pytest.mark.parametrize(("right", "count"), [(0, 30), (1, 30), (15, 30), (30, 30), (199, 200), (7, 500)])
def test_an_interval_of_one_share_is_exact(right, count):
    exact = stats.binomtest(right, count).proportion_ci()
    assert s.proportion(right / count, count) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_an_interval_of_one_share_is_never_too_narrow():
    """Wilson's holds a chance of .0059 in 83.8% of all samples of 30."""
    low, high = np.array([s.proportion(right / 30, 30) for right in range(31)]).T
    for chance in (0.0059, *np.linspace(0.001, 0.5, 200)):
        assert stats.binom.pmf(range(31), 30, chance)[(low <= chance) & (chance <= high)].sum() >= 0.95


def test_nothing_differs_is_not_certainty():
    none = s.paired(np.zeros(30), np.zeros(30), 16, 0)
    assert (none.difference.value, none.p_value) == (0, 1)
    assert none.difference.low < -0.05
    assert none.difference.high > 0.05
    assert math.isnan(none.detectable)
    assert s.mean_over_problems(np.full(30, 0.5), 0).low < 0.45


def test_paired_comparison_finds_a_difference_and_no_difference():
    rng = np.random.default_rng(3)
    base = rng.beta(0.6, 0.9, 100)
    better = np.clip(base + 0.08 + 0.05 * rng.standard_normal(100), 0, 1)
    found = s.paired(better, base, 16, 0)
    assert found.p_value < 1e-3
    assert 0 < found.difference.low < found.difference.value < found.difference.high
    assert found.detectable < 0.05
    same = s.paired(base, base, 16, 0)
    assert (same.difference.value, same.p_value) == (0, 1)


def test_the_paired_test_has_its_nominal_level(monkeypatch):
    monkeypatch.setattr(s, "DRAWS", 1000)
    rng = np.random.default_rng(4)
    rejected = 0
    for trial in range(400):
        difficulty = rng.beta(0.6, 0.9, 40)
        first, second = (rng.binomial(8, difficulty) / 8 for _ in range(2))
        rejected += s.paired(first, second, 8, trial).p_value < 0.05
    assert rejected / 400 == pytest.approx(0.05, abs=0.035)


@pytest.mark.parametrize("count", [30, 200])
def test_the_detectable_difference_is_found_four_times_out_of_five(count, monkeypatch):
    """Where the better policy multiplies all odds alike, until the mean is better by what two equal ones were told."""
    monkeypatch.setattr(s, "DRAWS", 1000)
    rng = np.random.default_rng(5)
    everything = rng.beta(0.6, 0.9, 50_000)
    shifts = np.linspace(0, 6, 100)
    gains = [float(np.mean(special.expit(special.logit(everything) + shift) - everything)) for shift in shifts]
    found, trials = 0, 300
    for trial in range(trials):
        chances = rng.beta(0.6, 0.9, (3, count))
        told = s.paired(*(rng.binomial(16, chances[0], (2, count)) / 16), 16, trial).detectable
        better = special.expit(special.logit(chances[1]) + np.interp(told, gains, shifts))
        pair = rng.binomial(16, better) / 16, rng.binomial(16, chances[1]) / 16
        found += s.paired(*pair, 16, trial).p_value < 0.05
    assert found / trials == pytest.approx(0.8, abs=0.06)


def test_where_few_problems_differ_nothing_is_said_to_be_detectable():
    """Of five differences the least p is 2 / 2^5."""
    d = np.repeat([0.0, 1.0], [25, 5])
    few = s.paired(d, np.zeros(30), 16, 0)
    assert few.p_value > 0.05
    assert math.isnan(few.detectable)
    assert math.isnan(s.paired(np.full(30, 0.5), np.full(30, 0.25), 16, 0).detectable)  # no spread to go by


def test_majority_by_hand():
    answers = [["a", "a", "b"], ["a", "b", None], [None, None, None], ["c", "d", "d"]]
    correct = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=bool)
    # right; a tie of one right and one wrong: 1/2; no answer: 0; the majority is wrong: 0.
    assert s.majority(answers, correct, 0).value == pytest.approx((1 + 0.5 + 0 + 0) / 4)
