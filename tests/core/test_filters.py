import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import kalman, kalman_dense

from kpo_cli.core import kalman_filter, kalman_meaning, q_over_v_of
from kpo_cli.core.filters import Identity, Kalman, SequenceMean
from kpo_cli.core.scans import exponential_scan

RATIOS = [1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e2]


def full(z):
    return torch.ones(z.shape, dtype=torch.bool)


def vector_reference(z, q, p0=0.0):
    """The float64 recursion over tokens, vectorised over rows (tests/core/reference.py has the plain one)."""
    x = torch.zeros(z.shape[0], dtype=torch.float64)
    p, out = x + p0, []
    for t in range(z.shape[1]):
        p = p + q
        gain = p / (p + 1)
        x = x + gain * (z[:, t].double() - x)
        p = (1 - gain) * p
        out.append(x)
    return torch.stack(out, 1)


def relative_error(got, want):
    """Largest error of a row relative to the row's largest |x|."""
    return float(((got.double() - want).abs() / want.abs().amax(1, keepdim=True).clamp(min=1e-300)).max())


@pytest.mark.parametrize("q", RATIOS)
@pytest.mark.parametrize("p0", [0.0, 1e-3, 2.0])
def test_kalman_equals_the_float64_recursion(q, p0):
    z = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)) * 0.1
    got = kalman_filter(z, full(z), q=q, v=1.0, p0=p0)
    assert got.dtype == torch.float32
    assert relative_error(got, vector_reference(z, q, p0)) <= 1e-6
    # Float32 rounding of the result is all that is lost: in float64 the two agree far closer.
    assert relative_error(kalman_filter(z.double(), full(z), q=q, v=1.0, p0=p0), vector_reference(z, q, p0)) <= 1e-11


@pytest.mark.parametrize("q", [1e-10, 1e-6, 1e2])
def test_kalman_is_exact_at_32768_tokens(q):
    z = torch.randn(1, 32768, generator=torch.Generator().manual_seed(1))
    assert relative_error(kalman_filter(z, full(z), q=q, v=1.0), vector_reference(z, q)) <= 1e-6


@pytest.mark.parametrize(("q", "v", "p0"), [(1e-6, 1.0, 0.0), (0.3, 2.0, 0.0), (1e-4, 1e-2, 0.5), (5.0, 0.1, 0.0)])
def test_kalman_equals_the_posterior_of_the_joint_gaussian(q, v, p0):
    z = [math.sin(1.7 * t) + 0.1 * t for t in range(40)]
    want = kalman_dense(z, q, v, p0)
    assert np.allclose(kalman(z, q, v, p0), want, rtol=1e-9, atol=1e-12)  # the two references agree with each other
    got = kalman_filter(torch.tensor([z], dtype=torch.float64), torch.ones(1, 40).bool(), q=q, v=v, p0=p0)
    assert np.allclose(got[0].numpy(), want, rtol=1e-9, atol=1e-12)


def test_kalman_by_hand():
    # Q = V = 1: gains 1/2 and 3/5, so x = 0.1 and 0.1 + 0.6 (-0.1 - 0.1) = -0.02.
    got = kalman_filter(torch.tensor([[0.2, -0.1]]), torch.ones(1, 2).bool(), q=1.0, v=1.0)
    assert torch.allclose(got, torch.tensor([[0.1, -0.02]]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.floats(-9, 1), st.integers(0, 2**31), st.data())
def test_kalman_is_causal_and_blind_to_padding(length, log_q, seed, data):
    q = 10.0**log_q
    z = torch.randn(2, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    base = kalman_filter(z, full(z), q=q, v=1.0)
    cut = data.draw(st.integers(1, length))
    close = {"rtol": 1e-12, "atol": 1e-13 * float(base.abs().max())}
    assert torch.allclose(kalman_filter(z[:, :cut], full(z[:, :cut]), q=q, v=1.0), base[:, :cut], **close)
    left, right = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 70))
    junk = torch.tensor([float("nan"), float("inf"), 1e30])
    padded = junk[torch.arange(left + length + right) % 3].repeat(2, 1).double()
    padded[:, left : left + length] = z
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    mask[:, left : left + length] = True
    got = kalman_filter(padded, mask, q=q, v=1.0)
    assert torch.allclose(got[:, left : left + length], base, **close)
    assert (got[~mask] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(-8, 1), st.floats(-3, 3), st.integers(0, 2**31))
def test_kalman_is_linear_and_depends_on_q_over_v_alone(log_q, log_scale, seed):
    q, scale = 10.0**log_q, 10.0**log_scale
    z = torch.randn(2, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    base = kalman_filter(z, full(z), q=q, v=1.0)
    assert torch.allclose(kalman_filter(scale * z, full(z), q=q, v=1.0), scale * base, rtol=1e-11, atol=1e-12 * scale)
    assert torch.allclose(kalman_filter(z, full(z), q=q * scale, v=scale), base, rtol=1e-9, atol=1e-12)


def test_kalman_limits():
    z = torch.randn(2, 200, dtype=torch.float64)
    assert torch.allclose(kalman_filter(z, full(z), q=1e12, v=1.0), z, atol=1e-9)  # q -> inf: identity
    assert kalman_filter(z, full(z), q=1e-15, v=1.0).abs().max() < 1e-9  # q -> 0: zero


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60).filter(any), st.floats(-8, 1), st.integers(0, 2**31))
def test_a_gap_is_time_that_passes_unobserved(observed, log_q, seed):
    q = 10.0**log_q
    z = torch.randn(1, len(observed), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.tensor([observed])
    first = observed.index(True)
    want = [0.0] * first + kalman(z[0, first:].tolist(), q, 1.0, observed=observed[first:])
    got = kalman_filter(torch.where(mask, z, float("nan")), mask, q=q, v=1.0)[0].tolist()
    for t, seen in enumerate(observed):
        assert got[t] == pytest.approx(want[t] if seen else 0.0, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_narrow_inputs_cost_nothing(dtype):
    z = torch.randn(4, 300) * 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kalman_filter(z, full(z), q=1e-3, v=1.0), kalman_filter(z.clone(), full(z), q=1e-3, v=1.0))
        assert relative_error(kalman_filter(z, full(z), q=1e-3, v=1.0), vector_reference(z, 1e-3)) <= 1e-6
    narrow = kalman_filter(z.to(dtype), full(z), q=1e-3, v=1.0)
    assert narrow.dtype == torch.float32
    assert relative_error(narrow, vector_reference(z.to(dtype), 1e-3)) <= 1e-6


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1024, 1025, 40_000])
def test_the_scan_equals_its_recursion(length):
    u = torch.randn(2, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    y, want = torch.zeros(2, dtype=torch.float64), []
    for t in range(length):
        y = math.exp(-0.01) * y + u[:, t]
        want.append(y)
    assert torch.allclose(exponential_scan(u, -0.01), torch.stack(want, 1), rtol=1e-11, atol=1e-12)


def test_what_a_setting_means():
    # The figures of the method: 12% of a constant after 512 tokens, 35% after 1,000, 97% after 4,096.
    for length, share in ((512, 0.118), (1000, 0.352), (4096, 0.967)):
        constant = torch.full((1, length), 0.7, dtype=torch.float64)
        shown = float(kalman_filter(constant, full(constant), q=1e-6, v=1.0)[0, -1]) / 0.7
        assert kalman_meaning(1e-6, 1.0, length).share_passed == pytest.approx(shown, rel=1e-9)
        assert shown == pytest.approx(share, abs=1e-3)
    meaning = kalman_meaning(2e-3, 2.0, 100)
    gain = 0.0
    p = 0.0
    for _ in range(5000):
        p += 1e-3
        gain = p / (p + 1)
        p *= 1 - gain
    assert meaning.steady_gain == pytest.approx(gain, rel=1e-9)
    assert q_over_v_of(meaning.time_constant) == pytest.approx(1e-3, rel=1e-9)


def test_sequence_mean_and_identity():
    z = torch.tensor([[1.0, 3.0, float("nan")], [2.0, 4.0, 6.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert SequenceMean()(z, mask, z).tolist() == [[2.0, 2.0, 0.0], [4.0, 4.0, 4.0]]
    assert Identity()(z, mask, z).tolist() == [[1.0, 3.0, 0.0], [2.0, 4.0, 6.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": 0.0}, "filter.q=0.0 must be a finite number above 0"),
        ({"q": float("nan")}, "filter.q=nan"),
        ({"v": -1.0}, "filter.v=-1.0"),
        ({"p0": float("inf")}, "filter.p0=inf"),
    ],
)
def test_bad_noise_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Kalman(**arguments)


@pytest.mark.parametrize(
    ("z", "mask", "message"),
    [
        (torch.zeros(3), torch.ones(3), r"\(3,\); it must be \(B, T\)"),
        (torch.zeros(2, 3), torch.ones(2, 4), "mask has shape"),
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), "floating point"),
        (torch.tensor([[0.0, float("nan")]]), torch.ones(1, 2), "z is nan at row 0, token 1"),
        (torch.zeros(1, 2), torch.tensor([[0.5, 1.0]]), "0 and 1"),
    ],
)
def test_bad_tensors_are_refused(z, mask, message):
    with pytest.raises(ValueError, match=message):
        kalman_filter(z, mask, q=1.0, v=1.0)


@pytest.mark.parametrize(("q", "v"), [(0.0, 1.0), (1.0, 0.0), (-1.0, -1.0), (float("nan"), 1.0)])
def test_the_function_refuses_bad_noise_too(q, v):
    with pytest.raises(ValueError, match="must be a finite number above 0"):
        kalman_filter(torch.zeros(1, 2), torch.ones(1, 2), q=q, v=v)
