"""Ratios that overflow, numbers that float32 would round, and what an objective costs."""

import math

import pytest
import torch
from test_objectives import PARAMETERS, value_and_gradient

from kpo_cli.core import Denominators, MaskedImportance, TruncatedImportance, load_objective
from kpo_cli.core.surrogates import Clip, SoftGate


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("shift", [-200.0, 200.0])
@pytest.mark.parametrize("method", PARAMETERS)
def test_an_overflowing_ratio_never_makes_nan(method, shift, advantage):
    """exp(200) is inf in float32. Where the limit or A = 0 makes the ratio irrelevant, loss and gradient are finite."""
    old = torch.full((1, 6), -1.0 - max(shift, 0))
    log_probs = old + shift
    mask = torch.tensor([[True] * 5 + [False]])
    out, gradient = value_and_gradient(
        load_objective(method, **PARAMETERS[method]), log_probs, old, torch.tensor([advantage]), mask
    )
    assert not out.loss.isnan()
    assert not gradient.isnan().any()
    if advantage == 0:
        assert out.loss == 0
        assert (gradient == 0).all()
    # A ratio above every limit grows without bound only where PPO leaves it: A < 0, or no limit at all.
    bounded = {"token_clip", "cispo", "sapo", "vespo", "ctpo"}
    if shift < 0 or (advantage > 0 and method != "kpo_unclipped") or method in bounded:
        assert out.loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("correction", [TruncatedImportance(), MaskedImportance()])
def test_an_overflowing_mismatch_is_cut(correction):
    old, rollout = torch.full((1, 3), -1.0), torch.full((1, 3), -300.0)
    objective = load_objective("grpo", correction=correction)
    out, gradient = value_and_gradient(objective, old, old, torch.ones(1), torch.ones(1, 3), rollout_log_probs=rollout)
    weight = 2.0 if isinstance(correction, TruncatedImportance) else 0.0
    assert out.loss == -weight
    assert gradient.sum() == -weight
    assert out.metrics["correction_cut_fraction"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clip_width_is_not_rounded(dtype):
    """1 + 3e-4 keeps three digits of the width in float32; the limit is decided in log space, with all of them."""
    surrogate = Clip(eps_low=3e-4, eps_high=4e-4)
    edge = torch.tensor([math.log1p(4e-4), math.log1p(-3e-4)], dtype=torch.float64)
    log_ratio = torch.stack([edge * (1 - 1e-6), edge * (1 + 1e-6)]).to(dtype)
    out = surrogate(log_ratio, log_ratio, torch.tensor([1.0, -1.0], dtype=dtype).expand(2, 2), torch.ones(2, 2).bool())
    assert out.active.tolist() == [[False, False], [True, True]]
    assert out.outside.tolist() == [[False, False], [True, True]]


def test_a_lower_width_of_one_never_binds():
    log_ratio = torch.tensor([[-50.0, 1.0]])
    out = Clip(eps_low=1.0, eps_high=0.2)(log_ratio, log_ratio, -torch.ones(1, 2), torch.ones(1, 2).bool())
    assert out.active.tolist() == [[False, False]]
    assert out.loss.tolist()[0] == pytest.approx([0.0, math.e])


def test_two_numbers_by_condition_keep_their_digits_in_float64():
    """`torch.where` of two plain numbers is float32: 1.05 would come out as 1.0499999523."""
    log_ratio = torch.zeros(1, 2, dtype=torch.float64)
    log_ratio[:] = 0.1
    out = SoftGate(tau_positive=1.0, tau_negative=1.05)(
        log_ratio, log_ratio, torch.tensor([[1.0, -1.0]]).double(), torch.ones(1, 2).bool()
    )
    for got, tau, a in zip(out.loss[0].tolist(), (1.0, 1.05), (1, -1), strict=True):
        assert got == pytest.approx(-a * 4 / tau / (1 + math.exp(-tau * math.expm1(0.1))), rel=1e-14)


@pytest.mark.parametrize("method", ["gspo", "gmpo", "vespo"])
def test_a_mean_over_a_long_response_keeps_its_digits(method):
    """Large ratios of both signs that nearly cancel: what is left is compared with clip widths of 3e-4."""
    z = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)) * 0.05
    z -= z.double().mean(-1, keepdim=True).float() - 1e-5
    log_probs = torch.full_like(z, -1.0)
    old = log_probs - z
    advantages, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 4096)
    narrow, gradient = value_and_gradient(load_objective(method), log_probs, old, advantages, mask)
    wide, want = value_and_gradient(load_objective(method), log_probs.double(), old.double(), advantages.double(), mask)
    assert torch.allclose(narrow.filtered_log_ratio.double(), wide.filtered_log_ratio, rtol=1e-6, atol=1e-9)
    assert torch.allclose(gradient.double(), want, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("method", PARAMETERS)
def test_an_empty_part_of_a_mini_batch_adds_nothing(method):
    """A rank or micro-batch may hold no valid token while the mini-batch does."""
    junk = torch.full((2, 4), float("nan"))
    out, gradient = value_and_gradient(
        load_objective(method, **PARAMETERS[method]),
        junk,
        junk,
        torch.ones(2),
        torch.zeros(2, 4),
        denominators=Denominators(3, 20),
    )
    assert out.loss == 0
    assert (gradient == 0).all()
    assert out.sums.tokens == 0


class Counter(torch.overrides.TorchFunctionMode):
    """Counts the times that a value is brought from the device to Python, each of which waits for the device."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.count += name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "most"), [("grpo", 3), ("kpo", 5), ("gspo", 3), ("vespo", 3)])
def test_an_objective_waits_for_the_device_a_few_times_only(method, most):
    """The checks, the denominators and the metrics: one wait each. The filter has its own checks."""
    z, mask = torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.bool)
    with Counter() as counter:
        load_objective(method)(log_probs=z, old_log_probs=z, advantages=torch.ones(2), response_mask=mask)
    assert counter.count <= most
