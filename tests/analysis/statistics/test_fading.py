"""States that fade, beside a level of each response: likelihoods against dense matrices, and what is made of them."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from kpo_cli.analysis.statistics.memory import _States, contest
from kpo_cli.core import noise
from kpo_cli.core.recursion import Rows
from kpo_cli.runs.ratios import Ratios

GAMMA = noise.Shape(1.5, 0.02)


def batch_of(z, mask=None, old=None, prompts=None):
    mask = np.ones(z.shape, bool) if mask is None else mask
    prompts = np.arange(len(z)) if prompts is None else prompts
    return Ratios(log_ratio=z, mask=mask, step=np.zeros(len(z), int), old_log_probs=old, prompt_index=prompts)


def with_gaps(seed, rows=5, width=47):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, width)) < 0.7
    miss = rng.uniform(0.01, 0.99, mask.shape)
    return batch_of(np.where(mask, rng.normal(size=mask.shape), 0.0), mask, np.log1p(-miss)), miss


def covariance(place, size, q, kept):
    """Of a state at `place`s of a response and noise of `size`; a walk starts at 0 before the first of them."""
    apart = np.abs(place[:, None] - place)
    since = np.minimum(place[:, None], place) - place[0] + 1
    state = q * since if kept == 1 else q * kept**apart / (1 - kept**2)
    return state + np.diag(size)


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.6, 0.97, 1.0])
@pytest.mark.parametrize("q", [1e-4, 0.3, 200.0])
def test_innovations_are_those_of_the_dense_covariance(kept, q):
    """Three blocks of the scan, and gaps: what is not observed makes the state fade all the same."""
    batch, miss = with_gaps(3, width=80)
    rows, shape = Rows.of(torch.from_numpy(batch.log_ratio), torch.from_numpy(batch.mask)), GAMMA(torch.tensor(miss))
    gains, variance = noise.gains_and_variance(rows, shape, q, kept)
    innovation = noise.innovations(rows.z, gains, kept)
    found = stats.norm(0, variance.sqrt().numpy()).logpdf(innovation.numpy())
    for row, valid in enumerate(batch.mask):
        place = np.flatnonzero(valid)
        dense = covariance(place, shape[row, place].numpy(), q, kept)
        expected = stats.multivariate_normal(np.zeros(len(place)), dense).logpdf(batch.log_ratio[row, place])
        assert found[row, place].sum() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("memory", [0.0, 0.5, 3.0, math.inf])
def test_levels_leave_the_likelihood_of_contrasts(memory):
    """Of every difference between tokens: what is left of a normal vector once its mean may be anything."""
    batch, miss = with_gaps(4)
    states = _States(batch, GAMMA, np.zeros(47))
    log_q, v = np.array([-3.0, 0.5]), 0.7
    squares, logs = states.terms(log_q, memory)
    kept = math.exp(-1 / memory) if memory else 0.0
    for row, valid in enumerate(batch.mask):
        place = np.flatnonzero(valid)
        contrasts = np.diff(np.eye(len(place)), axis=0)
        for k, q in enumerate(np.exp(log_q)):
            dense = v * covariance(place, GAMMA(torch.tensor(miss))[row, place].numpy(), q, kept)
            left = stats.multivariate_normal(np.zeros(len(contrasts)), contrasts @ dense @ contrasts.T)
            expected = left.logpdf(contrasts @ batch.log_ratio[row, place])
            found = -0.5 * (states.number[row] * math.log(2 * math.pi * v) + logs[k, row] + squares[k, row] / v)
            assert found == pytest.approx(expected, rel=1e-9)


def test_a_level_of_any_size_changes_nothing():
    rng = np.random.default_rng(0)
    z, prompts = rng.normal(size=(24, 40)), np.arange(24) // 2
    one, other = (contest(batch_of(x, prompts=prompts)) for x in (z, z + 100 * rng.normal(size=(24, 1))))
    assert one["walk_seen"] == other["walk_seen"] is False
    assert one["fading_seen"] == other["fading_seen"] is False


@pytest.mark.parametrize("memory", [1.0, 6.0, 20.0])
def test_the_memory_of_an_autoregression_is_found(memory):
    rng, kept = np.random.default_rng(1), math.exp(-1 / memory)
    z = rng.normal(size=(64, 80))
    for t in range(1, 80):
        z[:, t] = kept * z[:, t - 1] + math.sqrt(1 - kept**2) * z[:, t]
    found = contest(batch_of(z + rng.normal(size=(64, 1)), prompts=np.arange(64) // 4))
    assert found["fading_seen"]
    assert found["tokens"] == pytest.approx(memory, rel=0.25)
    assert found["walk_seen"] == (memory > found["short"])


def test_a_walk_gains_over_short_memories_and_nothing_over_it():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(64, 80)) + 0.1 * np.cumsum(rng.normal(size=(64, 80)), 1)
    found = contest(batch_of(z, prompts=np.arange(64) // 4))
    assert found["walk_seen"]
    assert not found["fading_seen"]
    assert found["short"] == 10


def test_noise_of_a_size_that_the_model_lacks_is_no_memory():
    """Sure tokens with ten times the noise of their formula now and then: a state that fades at once would fit that."""
    rng = np.random.default_rng(6)
    miss = 0.999 * 10 ** rng.uniform(-3, 0, (64, 60))
    z = rng.normal(size=miss.shape) * (miss**1.5 + 0.02 * (rng.random(miss.shape) < 0.2))
    found = contest(batch_of(z, old=np.log1p(-miss), prompts=np.arange(64) // 4))
    assert not found["fading_seen"]
    assert not found["walk_seen"]


def test_one_prompt_tells_nothing():
    z = np.random.default_rng(5).normal(size=(8, 30))
    assert contest(batch_of(z, prompts=np.zeros(8, int))) is None
    assert contest(batch_of(0 * z)) is None
    assert contest(batch_of(z[:, :1])) is None
    assert contest(batch_of(0 * z + np.arange(8)[:, None])) is None
