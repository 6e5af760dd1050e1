"""All filters beside the fixed one: against the plain recursion, the joint Gaussian, and each other."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kpo_cli.core import kalman_filter
from kpo_cli.core.filters import (
    FILTERS,
    AdaptiveFilter,
    AdaptiveHeteroKalman,
    AdaptiveKalman,
    Ema,
    HeteroKalman,
    Kalman,
    PrefixSum,
    RobustKalman,
    SteadyKalman,
    kalman_filter_varying,
)
from kpo_cli.core.noise import fit_walk, innovation_terms, walk_sums
from kpo_cli.core.recursion import Rows

BLOCK_EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025]
CAUSAL = {
    "identity": FILTERS["identity"](),
    "prefix_sum": PrefixSum(),
    "ema": Ema(gain=0.1),
    "steady_kalman": SteadyKalman(q=1e-2),
    "kalman": Kalman(q=1e-2),
    "kalman_p0": Kalman(q=1e-3, p0=0.7),
    "kalman_hetero": HeteroKalman(q=1e-3, v=0.5, gamma=2.8),
    "kalman_hetero_fitted": AdaptiveHeteroKalman(q=1e-3, gamma=1.5),
    "kalman_adaptive": AdaptiveKalman(q=1e-4),
    "kalman_adaptive_shaped": AdaptiveKalman(q=1e-4, gamma=1.7, constant=1e-3),
    "kalman_robust": RobustKalman(q=1e-3, v=0.2, kappa=1.5),
}


def noise_like(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def old_log_probs_like(seed, *shape):
    """Probabilities from nearly 0 to nearly 1: variances p^gamma over many orders of magnitude."""
    return -(10.0 ** (6 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1)).double() - 5))


def test_every_causal_filter_is_tested_here():
    assert {name.removesuffix("_p0").removesuffix("_shaped") for name in CAUSAL} == set(FILTERS) - {"sequence_mean"}


@pytest.mark.parametrize("length", BLOCK_EDGES)
@pytest.mark.parametrize("name", CAUSAL)
def test_equals_the_plain_recursion_at_the_edges_of_blocks(name, length):
    z, old = noise_like(length, 1, length), old_log_probs_like(length, 1, length)
    got = CAUSAL[name](z, torch.ones(1, length, dtype=torch.bool), old)[0]
    want = reference.filtered(name, CAUSAL[name], z[0].tolist(), old[0].tolist())
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(CAUSAL)),
    observed=st.lists(st.booleans(), min_size=1, max_size=80).filter(any),
    left=st.integers(0, 40),
    right=st.integers(0, 40),
    seed=st.integers(0, 2**20),
)
def test_gaps_padding_causality_and_the_batch(name, observed, left, right, seed):
    """One row with gaps beside a full row, a short row and an empty one, with junk wherever the mask is false."""
    ratio_filter, length = CAUSAL[name], len(observed)
    first = observed.index(True)
    z, old = noise_like(seed, length), old_log_probs_like(seed, length)
    truth = reference.filtered(name, ratio_filter, z[first:].tolist(), old[first:].tolist(), observed[first:])
    want = torch.tensor([0.0] * first + truth, dtype=torch.float64) * torch.tensor(observed)

    width = left + length + right
    junk = torch.tensor([float("nan"), float("inf"), -1e30], dtype=torch.float64)[torch.arange(width) % 3]
    mask = torch.zeros(4, width, dtype=torch.bool)
    mask[0, left : left + length] = torch.tensor(observed)
    mask[1], mask[2, :1] = True, True  # mask[3] stays empty
    batch, old_batch = junk.repeat(4, 1), junk.repeat(4, 1)
    batch[0, left : left + length], old_batch[0, left : left + length] = z, old
    batch[1:], old_batch[1:] = noise_like(seed + 7, 3, width), old_log_probs_like(seed + 7, 3, width)
    got = ratio_filter(batch, mask, old_batch)
    assert torch.allclose(got[0, left : left + length], want, rtol=1e-9, atol=1e-11)
    assert (got[~mask] == 0).all()
    for row in range(4):  # a batch is its rows
        alone = ratio_filter(batch[row : row + 1], mask[row : row + 1], old_batch[row : row + 1])
        assert torch.allclose(got[row : row + 1], alone, rtol=1e-11, atol=1e-13)
    cut = 1 + seed % width  # what comes later changes nothing
    early = ratio_filter(batch[:, :cut], mask[:, :cut], old_batch[:, :cut])
    assert torch.allclose(got[:, :cut], early, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("q", "p0"), [(1e-6, 0.0), (1e-2, 0.0), (1e-3, 0.5), (10.0, 0.0)])
def test_varying_noise_equals_the_posterior_of_the_joint_gaussian(q, p0):
    generator = np.random.default_rng(5)
    z, observed = generator.standard_normal(45), generator.random(45) < 0.7
    observed[0] = True
    variances = 10.0 ** generator.uniform(-3, 0, 45)
    want = reference.kalman_dense(z, q, variances, p0, observed)
    plain_want = reference.kalman_varying(z.tolist(), q, variances.tolist(), p0, observed.tolist())
    assert np.allclose(want, plain_want, rtol=1e-7, atol=1e-11)
    got = kalman_filter_varying(
        torch.tensor(z)[None], torch.tensor(observed)[None], q=q, variance=torch.tensor(variances)[None], p0=p0
    )
    assert np.allclose(got[0].numpy()[observed], np.array(want)[observed], rtol=1e-7, atol=1e-11)
    constant = kalman_filter(torch.tensor(z)[None], torch.tensor(observed)[None], q=q, v=0.3, p0=p0)
    dense = np.array(reference.kalman_dense(z, q, 0.3, p0, observed))
    assert np.allclose(constant[0].numpy()[observed], dense[observed], rtol=1e-8, atol=1e-12)


OVER_QUIET = [(1e45, 1.0, 0.0), (1e300, 1e-300, 0.0), (1e150, 1e140, 0.0), (1.0, 1e-320, 0.0)]
OVER_PRIOR = [(1.0, 1.0, 1e300), (1e-3, 1.0, 1e40), (1e-200, 1.0, 1e100)]


@pytest.mark.parametrize(("q", "v", "p0"), [*OVER_QUIET, *OVER_PRIOR])
def test_no_setting_makes_nan(q, v, p0):
    """With a gap and without, on both ways to the gains."""
    z, gap = noise_like(0, 1, 40), torch.ones(1, 40, dtype=torch.bool)
    gap[0, 5:8] = False
    for mask in (gap, torch.ones_like(gap)):
        want = torch.tensor(reference.kalman_varying(z[0].tolist(), q, [v] * 40, p0, mask[0].tolist()), dtype=z.dtype)
        hetero = HeteroKalman(q=q, v=v, gamma=0.0, p0=p0)(z, mask, z - 9)
        for got in (kalman_filter(z, mask, q=q, v=v, p0=p0), hetero):
            assert torch.allclose(got[0][mask[0]], want[mask[0]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FILTERS)
def test_no_rows_are_no_error(name):
    none = torch.zeros(0, 5)
    assert FILTERS[name]()(none, none.bool(), none).shape == (0, 5)


@settings(max_examples=25, deadline=None)
@given(st.floats(-10, 2), st.floats(-4, 1), st.sampled_from([0.0, 1e-3, 3.0]), st.integers(0, 2**20))
def test_filters_meet_where_they_should(log_q, log_v, p0, seed):
    q, v = 10.0 ** (log_q + log_v), 10.0**log_v
    z, old = noise_like(seed, 3, 70), old_log_probs_like(seed, 3, 70)
    mask = torch.rand(3, 70, generator=torch.Generator().manual_seed(seed)) < 0.8
    mask[0] = True  # one row without a gap
    mask[1] = torch.arange(70) < 50
    for rows in (slice(0, 2), slice(0, 3)):  # the closed form, and the general recursion
        zz, mm, oo = z[rows], mask[rows], old[rows]
        fixed = kalman_filter(zz, mm, q=q, v=v, p0=p0)
        close = {"rtol": 1e-8, "atol": 1e-8 * float(fixed.abs().max())}
        assert torch.allclose(
            kalman_filter_varying(zz, mm, q=q, variance=torch.full_like(zz, v), p0=p0), fixed, **close
        )
        assert torch.allclose(HeteroKalman(q=q, v=v, gamma=0.0, p0=p0)(zz, mm, oo), fixed, **close)
        for kappa in (math.inf, 1e30):
            assert torch.allclose(RobustKalman(q=q, v=v, kappa=kappa, p0=p0)(zz, mm, oo), fixed, **close)
        assert torch.equal(AdaptiveKalman(q=q, v=v, p0=p0)(zz, mm, oo), fixed)


def test_steady_is_where_the_fixed_filter_ends_up():
    z = noise_like(0, 1, 4000)
    mask = torch.ones(1, 4000, dtype=torch.bool)
    fixed, steady = kalman_filter(z, mask, q=1e-3, v=1.0), SteadyKalman(q=1e-3)(z, mask, z)
    assert (fixed - steady)[0, :10].abs().max() > 1e-3  # not at first, while the fixed filter is still sure of x_0 = 0
    assert torch.allclose(fixed[:, -1000:], steady[:, -1000:], rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CAUSAL)), st.floats(-3, 3), st.integers(0, 2**20))
def test_scale_equivariance(name, log_scale, seed):
    """z c gives x c. The robust filter knows how large z should be, so there q, v and p0 scale by c^2."""
    scale, z, old = 10.0**log_scale, noise_like(seed, 2, 60), old_log_probs_like(seed, 2, 60)
    mask = torch.ones(2, 60, dtype=torch.bool)
    base = scaled = CAUSAL[name]
    if name == "kalman_robust":
        scaled = RobustKalman(q=base.q * scale**2, v=base.v * scale**2, kappa=base.kappa, p0=base.p0 * scale**2)
    assert torch.allclose(scaled(z * scale, mask, old), base(z, mask, old) * scale, rtol=1e-8, atol=1e-10 * scale)


@pytest.mark.parametrize("make", [Kalman, HeteroKalman, RobustKalman, AdaptiveKalman, AdaptiveHeteroKalman])
def test_limits_of_q(make):
    z, old = noise_like(1, 2, 200), torch.full((2, 200), math.log(0.5), dtype=torch.float64)
    mask = torch.ones(2, 200, dtype=torch.bool)
    assert torch.allclose(make(q=1e12, v=1.0)(z, mask, old), z, atol=1e-9)  # q -> inf: the identity
    assert make(q=1e-15, v=1.0)(z, mask, old).abs().max() < 1e-8  # q -> 0: zero


@pytest.mark.parametrize("q", [1e-10, 1e-6, 1e-2, 1e2])
@pytest.mark.parametrize("p0", [0.0, 1.0])
def test_variances_over_twelve_orders_of_magnitude(q, p0):
    """The fixed filter's bound, 1e-6 of the row's largest, also holds for the general recursion at its extremes."""
    length = 32_768
    z = noise_like(3, 1, length, dtype=torch.float32)
    variance = 10.0 ** (-12 * torch.rand(1, length, generator=torch.Generator().manual_seed(4)).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kalman_filter_varying(z, torch.ones(1, length, dtype=torch.bool), q=q, variance=variance, p0=p0)
    want = torch.tensor(reference.kalman_varying(z[0].double().tolist(), q, variance[0].tolist(), p0)).double()
    assert got.dtype == torch.float32
    assert float((got[0].double() - want).abs().max() / want.abs().max()) <= 1e-6


@pytest.mark.parametrize("q", [1e-10, 1e-4, 1e2])
def test_robust_and_steady_at_32768_tokens(q):
    z = noise_like(5, 1, 32_768, dtype=torch.float32)
    mask = torch.ones(1, 32_768, dtype=torch.bool)
    row = z[0].double().tolist()
    for got, want in (
        (RobustKalman(q=q, v=1.0, kappa=1.0)(z, mask, z), reference.robust(row, q, 1.0, 1.0)),
        (SteadyKalman(q=q, v=1.0)(z, mask, z), reference.steady(row, q, 1.0)),
        (PrefixSum()(z, mask, z), np.cumsum(row).tolist()),
    ):
        truth = torch.tensor(want, dtype=torch.float64)
        assert float((got[0].double() - truth).abs().max() / truth.abs().max()) <= 1e-6


def test_robust_bounds_what_one_wild_token_does():
    z = torch.zeros(1, 40, dtype=torch.float64)
    z[0, 20] = 1e6
    mask = torch.ones(1, 40, dtype=torch.bool)
    x = RobustKalman(q=1e-4, v=1e-2, kappa=3.0)(z, mask, z)[0]
    plain_x = Kalman(q=1e-4, v=1e-2)(z, mask, z)[0]
    assert 0 < float(x[20]) < 3 * 0.1 * math.sqrt(1.2) * 0.1  # K kappa sqrt(P- + V) with K near 0.1
    assert float(plain_x[20]) > 1e4


def simulated(rows, length, q, v, seed=0):
    generator = np.random.default_rng(seed)
    states = generator.normal(0, math.sqrt(q), (rows, length)).cumsum(1) if q else np.zeros((rows, length))
    return torch.tensor(states + generator.normal(0, math.sqrt(v), (rows, length)))


@pytest.mark.parametrize(("q", "v"), [(1e-4, 1.0), (3e-5, 0.01), (0.2, 0.1)])
@pytest.mark.parametrize("gaps", [False, True])
def test_adaptive_recovers_known_noise(q, v, gaps):
    z = simulated(30, 400, q, v)
    mask = torch.arange(400) < torch.randint(200, 401, (30, 1), generator=torch.Generator().manual_seed(1))
    if gaps:
        mask &= torch.rand(30, 400, generator=torch.Generator().manual_seed(2)) < 0.9
        mask[:, 0] = True  # else the state has moved before the row begins
    fit = fit_walk(walk_sums(z, mask, old_log_probs_like(3, 30, 400)))
    assert not fit.on_floor
    assert abs(math.log(fit.q / q)) < 0.5
    assert fit.v * (1 + fit.shape.constant) == pytest.approx(v, rel=0.15)
    assert fit.shape.gamma == pytest.approx(0, abs=0.1)


def shaped_walk(rows, length, q, v, gamma, seed=0):
    """A walk of process noise q in noise v m^gamma, m from 1e-4 to 1; log-ratios, mask, old log-probabilities."""
    generator = np.random.default_rng(seed)
    miss = 10 ** generator.uniform(-4, 0, (rows, length)) * 0.999
    z = generator.normal(size=miss.shape) * np.sqrt(v * miss**gamma)
    z += np.cumsum(generator.normal(size=miss.shape) * math.sqrt(q), 1)
    return torch.tensor(z), torch.ones(rows, length, dtype=torch.bool), torch.tensor(np.log1p(-miss))


@pytest.mark.parametrize("q", [1e-7, 1e-5])
def test_adaptive_sees_a_drift_that_the_surest_tokens_show(q):
    """With one V for all tokens the most likely Q is 13 times the true 1e-7, or 0, as the sample has it."""
    z, mask, old = shaped_walk(100, 70, q, 0.86, 2.92)
    fitted, note = AdaptiveKalman().refit(AdaptiveKalman().sums(z, mask, old))
    assert note is None
    assert fitted.q == pytest.approx(q, rel=0.15)
    still, note = AdaptiveKalman().refit(AdaptiveKalman().sums(*shaped_walk(100, 70, 0.0, 0.86, 2.92)))
    assert note is not None
    assert still.gamma == pytest.approx(2.92, abs=0.1)


@pytest.mark.parametrize("gaps", [False, True])
def test_the_likelihood_of_innovations_is_that_of_the_joint_gaussian(gaps):
    generator = np.random.default_rng(3)
    n, q, v = 25, 0.02, 0.3
    z, shape = generator.normal(size=n), 10.0 ** generator.uniform(-6, 0, n)
    observed = generator.random(n) < (0.7 if gaps else 1.0)
    observed[0] = True
    t = np.arange(1, n + 1)
    covariance = q * np.minimum(t, t[:, None]) + v * np.diag(shape)
    seen = np.ix_(observed, observed)
    want = np.linalg.slogdet(covariance[seen])[1] + z[observed] @ np.linalg.solve(covariance[seen], z[observed])
    rows = Rows.of(torch.tensor(z)[None], torch.tensor(observed)[None])
    squares, logs = innovation_terms(rows, torch.tensor(shape)[None], q / v)
    assert float(squares.sum() / v + logs.sum()) + observed.sum() * math.log(v) == pytest.approx(want, rel=1e-9)


def test_adaptive_sums_add_up_and_say_when_there_is_no_drift():
    mask = torch.ones(12, 100, dtype=torch.bool)
    start = AdaptiveKalman(q=1e-3, v=1.0, floor=1e-8)
    assert isinstance(start, AdaptiveFilter)
    on_floor = []
    for seed in range(8, 16):
        z, old = simulated(12, 100, 0.0, 0.04, seed), torch.full((12, 100), -30.0)
        sums = start.sums(z, mask, old)
        if seed == 8:
            parts = start.sums(z[:7], mask[:7], old[:7]) + start.sums(z[7:], mask[7:], old[7:])
            assert torch.allclose(parts, sums, rtol=1e-10)
        fitted, note = start.refit(sums)
        assert fitted.v * (1 + fitted.constant) == pytest.approx(0.04, rel=0.1)
        assert fitted.q / fitted.v < 1e-3
        on_floor.append(note is not None)
        if note:
            assert note == "the adaptive filter sees no drift beyond noise; Q/v stays on its floor 1e-08"
            assert fitted.q / fitted.v == pytest.approx(1e-8)
    # The likelihood of pure noise has its maximum at q = 0 in about half of all samples, and near 0 in the others.
    assert 2 <= sum(on_floor) <= 6
    moved, note = start.refit(start.sums(simulated(12, 100, 1e-3, 0.04), mask, old))
    assert note is None
    assert moved.q / moved.v == pytest.approx(1e-3 / 0.04, rel=0.5)


@pytest.mark.parametrize("ratio_filter", [AdaptiveKalman(), AdaptiveHeteroKalman()])
def test_nothing_to_fit_changes_nothing(ratio_filter):
    """On-policy, z is 0 everywhere; a batch may also hold no valid token at all."""
    z, mask = torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool)
    for valid in (mask, ~mask):
        assert ratio_filter.refit(ratio_filter.sums(z, valid, z - 1)) == (ratio_filter, None)


@pytest.mark.parametrize("gamma", [0.5, 1.33, 2.8])
def test_fitted_gamma_is_recovered(gamma):
    old = old_log_probs_like(0, 40, 500).clamp(max=-1e-3)
    deviation = (0.3 * (-torch.expm1(old)) ** gamma).sqrt()
    z, mask = deviation * noise_like(1, 40, 500), torch.ones(40, 500, dtype=torch.bool)
    start = AdaptiveHeteroKalman(q=1e-3, v=2.0)
    fitted, note = start.refit(start.sums(z, mask, old))
    assert note is None
    assert fitted.gamma == pytest.approx(gamma, abs=0.02)
    assert fitted.v == pytest.approx(0.3, rel=0.05)
    assert fitted.q / fitted.v == pytest.approx(start.q / start.v)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Ema(gain=0), "gain=0"),
        (lambda: HeteroKalman(gamma=-1.0), "gamma=-1.0"),
        (lambda: HeteroKalman(miss_floor=0), "miss_floor=0"),
        (lambda: AdaptiveKalman(memory=1.0), "memory=1.0"),
        (lambda: AdaptiveKalman(floor=0), "floor=0"),
        (lambda: AdaptiveKalman(gamma=-1.0), "gamma=-1.0"),
        (lambda: AdaptiveKalman(constant=math.inf), "constant=inf"),
        (lambda: AdaptiveKalman(gamma=2.0), "needs a filter.constant"),
        (lambda: AdaptiveHeteroKalman(memory=-0.1), "memory=-0.1"),
        (lambda: RobustKalman(kappa=float("nan")), "kappa=nan"),
        (lambda: varying(torch.zeros(1, 2)), "variance must be above 0"),
        (lambda: varying(torch.full((1, 2), float("nan"))), "variance is nan at row 0, token 0"),
        (lambda: varying(torch.ones(1, 3)), "variance has shape"),
        (lambda: kalman_filter(torch.zeros(2, 0), torch.ones(2, 0), q=1.0, v=1.0), "no tokens"),
        (lambda: kalman_filter(torch.zeros(1, 1), torch.ones(1, 1, device="meta").bool(), q=1.0, v=1.0), "meta"),
    ],
)
def test_bad_settings_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def varying(variance):
    return kalman_filter_varying(torch.zeros(1, 2), torch.ones(1, 2), q=1.0, variance=variance)


@pytest.mark.parametrize("name", CAUSAL)
def test_autocast_and_narrow_inputs(name):
    """Autocast changes no bit; a bfloat16 input is filtered as the numbers it holds, in float64."""
    z, old = noise_like(2, 3, 70, dtype=torch.float32), old_log_probs_like(2, 3, 70)
    mask = torch.arange(70) < torch.tensor([[70], [40], [0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = CAUSAL[name](z, mask, old)
        narrow = CAUSAL[name](z.bfloat16(), mask, old)
    assert torch.equal(cast, CAUSAL[name](z, mask, old))
    if name != "identity":
        assert narrow.dtype == torch.float32
        assert torch.equal(narrow, CAUSAL[name](z.bfloat16().float(), mask, old))


@pytest.mark.parametrize("name", CAUSAL)
def test_filters_take_log_ratios_as_constants(name):
    z, mask = noise_like(0, 2, 40), torch.ones(2, 40, dtype=torch.bool)
    for valid in (mask, mask.index_fill(1, torch.tensor([3]), False)):
        assert name == "identity" or not CAUSAL[name](z.clone().requires_grad_(), valid, z).requires_grad
