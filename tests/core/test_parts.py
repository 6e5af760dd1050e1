"""Advantages, log-probabilities, and the metrics of ratios."""

import math

import pytest
import torch

from kpo_cli.core import group_normalised, token_log_probs
from kpo_cli.core.diagnostics import RatioSums


@pytest.mark.parametrize("reward", [math.inf, -math.inf])
def test_an_infinite_reward_is_refused(reward):
    with pytest.raises(ValueError, match=f"reward 2 is {reward}"):
        group_normalised(torch.tensor([1.0, 0.0, reward, 1.0]), 2)


def test_group_normalised_by_hand():
    # Group 1, 0, 0, 0: mean 1/4, sample standard deviation 1/2.
    got, zero_variance = group_normalised(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1]), 4)
    assert got.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], rel=1e-5)
    assert got[4:].tolist() == [0.0] * 4
    assert zero_variance.tolist() == [False, True]


def test_a_group_without_variance_is_exactly_zero_whatever_the_reward():
    got, zero_variance = group_normalised(torch.full((6,), 0.1), 3)
    assert got.tolist() == [0.0] * 6
    assert zero_variance.all()


def test_a_response_without_a_reward_is_as_if_its_group_had_never_had_it():
    nan = math.nan
    rewards = torch.tensor([1.0, nan, 0, 0, nan, 1, 1, nan, nan, nan, nan, 1, nan, nan, nan, nan])
    for divide in (True, False):
        got, zero_variance = group_normalised(rewards, 4, divide_by_std=divide)
        alone, _ = group_normalised(torch.tensor([1.0, 0, 0]), 3, divide_by_std=divide)
        assert got[[0, 2, 3]].tolist() == alone.tolist()
        assert got[[1, *range(4, 16)]].tolist() == [0.0] * 13
        assert zero_variance.tolist() == [False, True, True, True]


@pytest.mark.parametrize(("rewards", "size"), [(torch.zeros(4), 1), (torch.zeros(5), 2), (torch.zeros(2, 2), 2)])
def test_bad_groups_are_refused(rewards, size):
    with pytest.raises(ValueError, match=r"group"):
        group_normalised(rewards, size)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_token_log_probs_against_plain_arithmetic(temperature):
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 11, (2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs, entropy = token_log_probs(logits, ids, temperature)
    assert log_probs.dtype == torch.float32
    for i in range(2):
        for t in range(3):
            scaled = [x / temperature for x in logits[i, t].tolist()]
            log_total = math.log(sum(map(math.exp, scaled)))
            p = [math.exp(x - log_total) for x in scaled]
            assert float(log_probs[i, t]) == pytest.approx(scaled[ids[i, t]] - log_total, abs=1e-6)
            assert float(entropy[i, t]) == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-6)


def test_an_impossible_token_leaves_the_entropy_finite():
    logits = torch.tensor([[0.0, 0.0, float("-inf")]])
    log_probs, entropy = token_log_probs(logits, torch.tensor([1]), 1.0)
    assert float(entropy) == pytest.approx(math.log(2))
    assert float(log_probs) == pytest.approx(-math.log(2))


def test_ratio_metrics_by_hand():
    z = torch.tensor([[0.2, -0.1, 9.0], [0.0, 7.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    flags = torch.tensor([[True, False, True], [False, True, True]])
    sums = RatioSums.of(z, z / 2, flags, flags | ~mask, mask)
    metrics = sums.metrics()
    values = [0.2, -0.1, 0.0]
    ratios = [math.exp(x) for x in values]
    mean = sum(values) / 3
    assert metrics["log_ratio_mean"] == pytest.approx(mean)
    assert metrics["log_ratio_std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in values) / 3), rel=1e-6)
    assert metrics["kl_k3"] == pytest.approx(sum(r - 1 - x for r, x in zip(ratios, values, strict=True)) / 3, rel=1e-6)
    assert metrics["ratio_ess"] == pytest.approx(sum(ratios) ** 2 / (3 * sum(r * r for r in ratios)))
    assert metrics["clip_fraction_active"] == pytest.approx(1 / 3)
    assert metrics["filtered_log_ratio_rms"] == pytest.approx(math.sqrt(sum((x / 2) ** 2 for x in values) / 3))


def test_k3_keeps_its_digits_where_float32_loses_them():
    z = torch.full((1, 4), 1e-5)
    metrics = RatioSums.of(z, z, z > 1, z > 1, torch.ones(1, 4).bool()).metrics()
    assert metrics["kl_k3"] == pytest.approx(float(z[0, 0].double()) ** 2 / 2, rel=1e-4)


def test_metrics_of_nothing_are_absent_numbers_not_errors():
    metrics = RatioSums().metrics()
    assert all(math.isnan(value) for value in metrics.values())
