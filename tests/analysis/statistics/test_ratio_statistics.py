"""The statistics made of sums: against closed forms, scipy, and token-by-token sums."""

import math

import brute
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from kpo_cli.analysis import sign_statistics
from kpo_cli.analysis.statistics.spectrum import longest_stretch, spectra
from kpo_cli.analysis.statistics.sums import autocorrelations, lag_sums, response_sums, statistics


def pooled(z, mask, dead_zone=0.0, cutoff=0.05):
    z = np.where(mask, z, 0.0)
    return response_sums(z, mask, dead_zone, spectra(z, mask, cutoff).low).sum(0)


def ragged(seed: int = 0, rows: int = 12, width: int = 60):
    rng = np.random.default_rng(seed)
    mask = np.arange(width) < rng.integers(width // 3, width + 1, rows)[:, None]
    mask &= rng.random((rows, width)) > 0.02  # gaps
    z = rng.standard_t(3, (rows, width)) * 0.05 * (rng.random((rows, width)) > 0.1)
    return np.where(mask, z, 0.0), mask


def test_moments_are_scipys():
    z, mask = ragged()
    found, tokens = statistics(pooled(z, mask)), z[mask]
    assert found["mean"] == pytest.approx(tokens.mean())
    assert found["std"] == pytest.approx(tokens.std())
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(tokens, fisher=False))
    ratio = np.exp(tokens)
    assert found["effective_sample_size"] == pytest.approx(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()))
    assert found["kl_k3"] == pytest.approx((ratio - 1 - tokens).mean())


def test_k3_keeps_its_digits_where_ratios_are_nearly_one():
    z = np.full((2, 10), 1e-6)
    assert statistics(pooled(z, np.ones_like(z, bool)))["kl_k3"] == pytest.approx(0.5e-12, rel=1e-4)


@pytest.mark.parametrize("dead_zone", [0.0, 0.05])
def test_signs_agree_with_sign_statistics(dead_zone: float):
    z, mask = ragged(1)
    found, expected = statistics(pooled(z, mask, dead_zone)), sign_statistics(z, mask, dead_zone)
    for name in (
        "switch_frequency",
        "switch_frequency_two_state",
        "mean_run_length",
        "mean_off_policy_run_length",
    ):
        assert found[name] == pytest.approx(getattr(expected, name))


@pytest.mark.parametrize("cutoff", [0.05, 0.2])
def test_low_frequency_energy_is_the_share_of_the_periodogram(cutoff: float):
    z, mask = ragged(2)
    shares = []
    for row, valid in zip(z, mask, strict=True):
        blocks = brute.stretches(row, valid)
        longest = max(blocks, key=len)
        shares.append(brute.periodogram_share(longest, cutoff))
    found = spectra(z, mask, cutoff).low
    assert found == pytest.approx([math.nan if share is None else share for share in shares], nan_ok=True)
    known = [share for share in shares if share is not None]
    assert statistics(pooled(z, mask, cutoff=cutoff))["low_frequency_energy"] == pytest.approx(np.mean(known))


def test_slow_waves_are_low_and_fast_ones_are_not():
    t = np.arange(100)
    z = np.stack([np.sin(2 * np.pi * 0.02 * t), np.sin(2 * np.pi * 0.3 * t), np.full(100, 0.1)])
    low = spectra(z, np.ones_like(z, bool), 0.05).low
    assert low[:2] == pytest.approx([1, 0], abs=1e-12)
    assert math.isnan(low[2])


def test_the_spectrum_of_white_noise_is_flat():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 50))
    found = spectra(z, np.arange(50) < rng.integers(30, 51, (4000, 1)), 0.05)
    assert found.power.sum(1) == pytest.approx(1)
    assert found.power[:, 0].sum() == 0  # 0.02 cycles per token and less: no Fourier frequency of 50 tokens
    assert found.power[:, 1:].sum(0) / found.white[:, 1:].sum(0) == pytest.approx(1, abs=0.06)


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 10))))
def test_the_longest_stretch_is_the_longest(mask):
    start, length = longest_stretch(mask)
    for row, first, n in zip(mask, start, length, strict=True):
        blocks = brute.stretches(np.ones(len(row)), row)
        assert n == max((len(block) for block in blocks), default=0)
        assert row[first : first + n].all()


@pytest.mark.parametrize("gaps", [True, False])
def test_autocorrelation_is_the_mean_product_over_pairs_without_a_gap(gaps: bool):
    z, mask = ragged(3)
    if not gaps:
        mask = np.arange(mask.shape[1]) < mask.sum(1)[:, None]
        z = np.where(mask, z, 0.0)
    found = autocorrelations(pooled(z, mask), lag_sums(z, mask, 0.0, 6))
    for lag in range(1, 7):
        assert found["z"][lag - 1] == pytest.approx(brute.autocorrelation(z, mask, lag))
        assert found["sign"][lag - 1] == pytest.approx(brute.autocorrelation(np.sign(z), mask, lag))
    single = statistics(pooled(z, mask))
    assert single["autocorrelation"] == pytest.approx(found["z"][0])
    assert single["sign_autocorrelation"] == pytest.approx(found["sign"][0])


def test_an_autoregression_has_autocorrelation_phi_to_the_lag():
    rng = np.random.default_rng(4)
    z = rng.normal(size=(2000, 200))
    z[:, 0] /= math.sqrt(1 - 0.8**2)
    for t in range(1, 200):
        z[:, t] += 0.8 * z[:, t - 1]
    mask = np.ones_like(z, bool)
    found = autocorrelations(pooled(z, mask), lag_sums(z, mask, 0.0, 5))["z"]
    assert found == pytest.approx(0.8 ** np.arange(1, 6), abs=0.01)


def test_lags_longer_than_the_responses_have_no_autocorrelation():
    z = np.random.default_rng(0).normal(size=(3, 4))
    found = autocorrelations(pooled(z, np.ones_like(z, bool)), lag_sums(z, np.ones_like(z, bool), 0.0, 6))
    assert np.isfinite(found["z"][:3]).all()
    assert np.isnan(found["z"][3:]).all()


def test_statistics_of_nothing_are_nan():
    z = np.zeros((2, 3))
    assert all(np.isnan(value) for value in statistics(pooled(z, np.zeros_like(z, bool))).values())
    constant = statistics(pooled(np.full((2, 30), 0.1), np.ones((2, 30), bool)))
    assert constant["std"] == 0
    assert math.isnan(constant["autocorrelation"])
