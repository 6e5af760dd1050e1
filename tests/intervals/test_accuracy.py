import itertools
import math

import numpy as np
import pytest
from scipy import stats

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


@pytest.mark.parametrize(("questions", "samples"), [(30, 16), (30, 1), (200, 4)])
def test_the_interval_covers_the_truth_as_often_as_it_says(questions, samples, monkeypatch):
    """Problems of varying difficulty, drawn anew each time; 95% +- 4 standard errors of 300 trials."""
    monkeypatch.setattr(s, "DRAWS", 2000)
    rng = np.random.default_rng(2)
    covered = normal = 0
    trials = 300
    for trial in range(trials):
        difficulty = rng.beta(0.6, 0.9, questions)
        correct = rng.random((questions, samples)) < difficulty[:, None]
        interval = s.avg_at_k(correct, trial)
        truth = 0.6 / 1.5
        covered += interval.low <= truth <= interval.high
        share = correct.mean()
        normal += abs(share - truth) <= 1.96 * math.sqrt(share * (1 - share) / correct.size)
    assert covered / trials == pytest.approx(0.95, abs=0.04)
    if samples == 16:
        assert normal / trials < 0.7  # what is commonly printed


def test_an_interval_where_all_agree_is_wilsons():
    estimate = s.avg_at_k(np.ones((30, 4)), 0)
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(stats.binomtest(30, 30).proportion_ci(method="wilson").low, abs=1e-4)


@pytest.mark.parametrize(("share", "level"), [(0.03, 0.9), (0.05, 0.5), (0.1, 0.9)])
def test_the_interval_holds_on_a_benchmark_that_is_all_but_unsolved(share, level, monkeypatch):
    """A few of 30 problems are solved now and then: the plain bootstrap covers the truth 63% to 80% of the time."""
    monkeypatch.setattr(s, "DRAWS", 1000)
    rng = np.random.default_rng(6)
    covered, trials, truth = 0, 200, share * level + (1 - share) * 0.005
    for trial in range(trials):
        difficulty = np.where(rng.random(30) < share, level, 0.005)
        interval = s.avg_at_k(rng.random((30, 16)) < difficulty[:, None], trial)
        covered += interval.low <= truth <= interval.high
    assert covered / trials > 0.9


def test_nothing_differs_is_not_certainty():
    none = s.paired(np.zeros(30), np.zeros(30), 0)
    assert (none.difference.value, none.p_value) == (0, 1)
    assert none.difference.low < -0.05
    assert none.difference.high > 0.05
    assert math.isnan(none.detectable)
    assert s.mean_over_problems(np.full(30, 0.5), 0).low < 0.4


def test_student_quantiles():
    for freedom in (1, 2, 5, 29, 499):
        assert s._student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)


def test_paired_comparison_finds_a_difference_and_no_difference():
    rng = np.random.default_rng(3)
    base = rng.beta(0.6, 0.9, 100)
    better = np.clip(base + 0.08 + 0.05 * rng.standard_normal(100), 0, 1)
    found = s.paired(better, base, 0)
    assert found.p_value < 1e-3
    assert 0 < found.difference.low < found.difference.value < found.difference.high
    assert found.detectable < 0.05
    same = s.paired(base, base, 0)
    assert (same.difference.value, same.p_value) == (0, 1)


def test_the_paired_test_has_its_nominal_level(monkeypatch):
    monkeypatch.setattr(s, "DRAWS", 1000)
    rng = np.random.default_rng(4)
    rejected = 0
    for trial in range(400):
        difficulty = rng.beta(0.6, 0.9, 40)
        first, second = (rng.binomial(8, difficulty) / 8 for _ in range(2))
        rejected += s.paired(first, second, trial).p_value < 0.05
    assert rejected / 400 == pytest.approx(0.05, abs=0.035)


def test_the_detectable_difference_is_found_four_times_out_of_five(monkeypatch):
    monkeypatch.setattr(s, "DRAWS", 1000)
    rng = np.random.default_rng(5)
    noise = rng.standard_normal(50) * 0.2
    size = s.paired(noise, np.zeros(50), 0).detectable
    found = sum(s.paired(size + 0.2 * rng.standard_normal(50), np.zeros(50), i).p_value < 0.05 for i in range(200))
    assert found / 200 == pytest.approx(0.8, abs=0.15)


def test_majority_by_hand():
    answers = [["a", "a", "b"], ["a", "b", None], [None, None, None], ["c", "d", "d"]]
    correct = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=bool)
    # right; a tie of one right and one wrong: 1/2; no answer: 0; the majority is wrong: 0.
    assert s.majority(answers, correct, 0).value == pytest.approx((1 + 0.5 + 0 + 0) / 4)
