"""Maximum likelihood with a walk and without: optimum, errors, and what a grid or a single V would have missed."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from kpo_cli.analysis.statistics.likelihood import Likelihood, clusters_of
from kpo_cli.analysis.statistics.noise_models import NoiseModel, held_out
from kpo_cli.runs.ratios import Ratios


def batch_of(z, old=None, prompts=None, step=None):
    step = np.zeros(len(z), int) if step is None else step
    return Ratios(log_ratio=z, mask=np.ones(z.shape, bool), step=step, old_log_probs=old, prompt_index=prompts)


def shaped(seed, rows, q):
    """V_t = 0.86 m^2.92, m from 1e-4 to 1, beside a walk."""
    rng = np.random.default_rng(seed)
    miss = 0.999 * 10 ** rng.uniform(-4, 0, (rows, 70))
    z = rng.normal(size=miss.shape) * np.sqrt(0.86 * miss**2.92)
    return batch_of(z + np.cumsum(rng.normal(size=miss.shape) * math.sqrt(q), 1), np.log1p(-miss))


def walks(seed, rows, length, q, v):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, length)) * math.sqrt(v) + np.cumsum(rng.normal(size=(rows, length)), 1) * math.sqrt(q)


def test_a_walk_in_shaped_noise_is_found_with_its_size():
    """With one V for all tokens, Q comes out 13 times too large and cannot be told from 0."""
    likelihood = Likelihood(shaped(0, 150, 1e-7))
    fit = likelihood.walk(shaped=True)
    assert abs(math.log(fit.q / 1e-7)) < 3 * fit.log_q_error < 0.3
    assert abs(math.log(fit.v / 0.86)) < 3 * fit.log_v_error < 0.3
    assert fit.shape.gamma == pytest.approx(2.92, abs=0.05)
    assert likelihood.still(shaped=True).deviance - fit.deviance > 10_000
    assert likelihood.walk(shaped=False).log_q_error > 0.5


def test_noise_of_any_size_is_no_walk():
    fits = [Likelihood(shaped(seed, 40, 0.0)).walk(shaped=True) for seed in range(4)]
    for seed, fit in enumerate(fits):
        still = Likelihood(shaped(seed, 40, 0.0)).still(shaped=True)
        assert still.deviance - fit.deviance < 6  # that of a walk which is not there is a few units at most


def test_the_optimum_is_scipys():
    z = walks(1, 20, 40, 3.0, 1.0)
    t = np.arange(1, 41)

    def loss(point):
        q, v = np.exp(point)
        covariance = q * np.minimum(t, t[:, None]) + v * np.eye(40)
        return -stats.multivariate_normal(np.zeros(40), covariance).logpdf(z).sum()

    best = optimize.minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-8})
    fit = Likelihood(batch_of(z)).walk(shaped=False)
    assert math.log(fit.q) == pytest.approx(best.x[0], abs=1e-3)
    assert math.log(fit.v) == pytest.approx(best.x[1], abs=1e-3)


def test_errors_are_the_spread_of_the_estimates():
    """At Q/V = 3 the innovations say more of Q + V than of V: given Q/V, ln V would have an error 4 times too small."""
    fits = [Likelihood(batch_of(walks(seed, 40, 60, 3.0, 1.0))).walk(shaped=False) for seed in range(30)]
    for name, values in (("log_v_error", [f.v for f in fits]), ("log_q_error", [f.q for f in fits])):
        spread = np.log(values).std(ddof=1)
        assert np.mean([getattr(f, name) for f in fits]) == pytest.approx(spread, rel=0.4)
    assert np.log([f.v for f in fits]).mean() == pytest.approx(0, abs=0.07)


def test_prompts_are_what_is_independent():
    """Eight responses that are one and the same eight times say no more than one does."""
    z = walks(2, 30, 40, 0.5, 1.0)
    prompts = np.arange(30).repeat(8)
    alone, copied = (
        Likelihood(batch_of(z)).walk(False),
        Likelihood(batch_of(z.repeat(8, 0), prompts=prompts)).walk(False),
    )
    assert copied.log_q_error == pytest.approx(alone.log_q_error, rel=0.02)
    assert clusters_of(batch_of(z.repeat(8, 0), prompts=prompts)).tolist() == prompts.tolist()
    gains = []
    for values, group in ((z, np.arange(30)), (z.repeat(8, 0), prompts)):
        step = np.repeat([1, 2], len(values) // 2)
        models = held_out(batch_of(values, prompts=group, step=step))["models"]
        gains.append((models["random_walk"]["gain_of_walk"], models["random_walk"]["gain_of_walk_error"]))
    assert gains[1] == pytest.approx(gains[0], rel=1e-6)


def test_a_mean_for_each_place_is_a_rival_of_a_walk():
    rng = np.random.default_rng(4)
    place = np.arange(50)
    z = rng.normal(size=(80, 50)) + np.sin(place / 8)
    models = held_out(batch_of(z, prompts=np.arange(80)))["models"]
    assert models["places"]["gain_over_constant_noise"] > models["random_walk"]["gain_over_constant_noise"] + 0.02
    expected = stats.norm(np.sin(place / 8), 1.0).logpdf(z)
    assert NoiseModel("", 1.0, profile=np.sin(place / 8)).log_likelihood(batch_of(z)) == pytest.approx(expected)
