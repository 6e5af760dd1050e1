import math

import pytest
import torch
from reference import method_loss

from kpo_cli.core import Denominators, list_methods, load_objective

TIGHT = {"eps_low": 3e-4, "eps_high": 4e-4}
PARAMETERS = {
    "grpo": {"eps_low": 0.2, "eps_high": 0.2},
    "grpo_tight": TIGHT,
    "gspo": TIGHT,
    "token_clip": {"eps_low": 0.2, "eps_high": 0.2},
    "kpo": {**TIGHT, "q": 1e-2, "v": 1.0},
    "kpo_unclipped": {"q": 1e-2, "v": 1.0},
    "ema_kpo": {**TIGHT, "q": 1e-2, "v": 1.0},
    "robust_kpo": {**TIGHT, "q": 1e-3, "v": 1e-2, "kappa": 2.0},
    "gspo_token": TIGHT,
    "gmpo": {"eps_low": 0.3, "eps_high": 0.3},
    "dapo": {"eps_low": 0.2, "eps_high": 0.28},
    "dr_grpo": {"eps_low": 0.2, "eps_high": 0.2, "length": 20},
    "cispo": {"cap": 1.3},
    "sapo": {"tau_positive": 1.0, "tau_negative": 1.05},
    "ctpo": {"eps_low": 0.025, "eps_high": 0.05},
    "vespo": {},
    "dppo": {"delta": 0.15},
}
NEVER_CUT = {"kpo_unclipped", "sapo", "vespo"}
ADVANTAGES = [1.3, -0.7, 0.0, 2.0, -1.1, 0.4]
LENGTHS = [5, 1, 7, 12, 3, 9]


def example(seed=0, scale=0.3, dtype=torch.float64):
    """A padded batch of six responses, NaN outside the mask, and the same as plain lists."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(6, 12, generator=generator, dtype=torch.float64) * 3
    old = log_probs + scale * torch.randn(6, 12, generator=generator, dtype=torch.float64)
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    rows = [[x[i, : LENGTHS[i]].tolist() for i in range(6)] for x in (log_probs, old)]
    nan = torch.where(mask, 0.0, float("nan"))
    advantages = torch.tensor(ADVANTAGES, dtype=dtype)
    return (log_probs + nan).to(dtype), (old + nan).to(dtype), advantages, mask, rows


def value_and_gradient(objective, log_probs, old, advantages, mask, **kwargs):
    leaf = log_probs.clone().requires_grad_()
    out = objective(log_probs=leaf, old_log_probs=old, advantages=advantages, response_mask=mask, **kwargs)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out, gradient


def test_every_method_is_tested_here():
    assert set(PARAMETERS) == set(list_methods())


@pytest.mark.parametrize("method", PARAMETERS)
@pytest.mark.parametrize("scale", [1e-4, 0.3])
def test_value_and_gradient_equal_the_plain_derivation(method, scale):
    log_probs, old, advantages, mask, rows = example(scale=scale)
    objective = load_objective(method, **PARAMETERS[method])
    out, gradient = value_and_gradient(objective, log_probs, old, advantages, mask)
    loss, want, cut = method_loss(method, *rows, ADVANTAGES, **PARAMETERS[method])
    assert out.loss.item() == pytest.approx(loss, rel=1e-11)
    for i, length in enumerate(LENGTHS):
        assert gradient[i, :length].tolist() == pytest.approx(want[i], rel=1e-11, abs=1e-15)
        assert out.clipped[i, :length].tolist() == cut[i]
        assert (gradient[i, length:] == 0).all()
    if scale == 0.3 and method not in NEVER_CUT:
        assert any(map(any, cut))  # the example has something to clip
        assert not all(map(all, cut))


def test_grpo_by_hand():
    # Ratios 1.1, 0.7 with A = 1 (nothing cut: 0.7 is below 1 - 0.2, but the minimum keeps it), 1.5 with A = -1 (kept)
    # and 1.5 with A = 1 (cut to 1.2).
    z = torch.tensor([[1.1, 0.7], [1.5, 1.0], [1.5, 1.0]]).log()
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    out, gradient = value_and_gradient(
        load_objective("grpo"), z, torch.zeros(3, 2), torch.tensor([1.0, -1.0, 1.0]), mask
    )
    assert out.loss.item() == pytest.approx((-(1.1 + 0.7) / 2 + 1.5 - 1.2) / 3, rel=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([-1.1 / 6, -0.7 / 6, 0.5, 0.0, 0.0, 0.0], rel=1e-6)
    assert out.clipped.tolist() == [[False, False], [False, False], [True, False]]
    assert out.metrics["clip_fraction_active"] == pytest.approx(1 / 4)
    assert out.metrics["clip_fraction_outside"] == pytest.approx(3 / 4)


def test_kpo_by_hand():
    # Q = V = 1 gives x = 0.1, -0.02 (test_filters); widths 0.05: the first token (A = 1) is cut, the second is not.
    objective = load_objective("kpo", q=1.0, v=1.0, eps_low=0.05, eps_high=0.05)
    z = torch.tensor([[0.2, -0.1]])
    out, gradient = value_and_gradient(objective, z, torch.zeros(1, 2), torch.tensor([1.0]), torch.ones(1, 2))
    assert out.loss.item() == pytest.approx(-(1.05 + math.exp(-0.02)) / 2, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.0, -math.exp(-0.02) / 2], rel=1e-6)
    assert out.filtered_log_ratio[0].tolist() == pytest.approx([0.1, -0.02], rel=1e-5)


@pytest.mark.parametrize("method", PARAMETERS)
def test_loss_and_gradient_do_not_depend_on_padding_or_parts(method):
    """Padding on either side, micro-batches of one to six rows, and ranks that each hold a part."""
    log_probs, old, advantages, mask, _ = example(dtype=torch.float32)
    objective = load_objective(method, **PARAMETERS[method])
    whole, gradient = value_and_gradient(objective, log_probs, old, advantages, mask)
    pad = (5, 9)
    padded = [torch.nn.functional.pad(x, pad, value=float("nan")) for x in (log_probs, old)]
    out, padded_gradient = value_and_gradient(
        objective, *padded, advantages, torch.nn.functional.pad(mask, pad, value=False)
    )
    assert torch.allclose(out.loss, whole.loss, rtol=1e-6)
    assert torch.allclose(padded_gradient[:, 5:-9], gradient, rtol=1e-5, atol=1e-9)
    for size in range(1, 6):
        parts = [slice(start, start + size) for start in range(0, 6, size)]
        results = [
            value_and_gradient(
                objective, log_probs[p], old[p], advantages[p], mask[p], denominators=Denominators.of(mask)
            )
            for p in parts
        ]
        assert sum(out.loss.item() for out, _ in results) == pytest.approx(whole.loss.item(), rel=1e-5, abs=1e-7)
        assert torch.allclose(torch.cat([g for _, g in results]), gradient, rtol=1e-5, atol=1e-9)
        sums = sum((out.sums for out, _ in results[1:]), results[0][0].sums)
        assert sums.metrics() == pytest.approx(whole.metrics, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", PARAMETERS)
def test_on_policy_all_methods_are_the_same_policy_gradient(method):
    log_probs, _, advantages, mask, _ = example()
    _, gradient = value_and_gradient(load_objective(method), log_probs, log_probs.detach(), advantages, mask)
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)[:, None]
    if method == "dr_grpo":
        lengths = torch.full((6, 1), 1024.0, dtype=torch.float64)
    elif method in ("dapo", "cispo", "ctpo", "vespo", "dppo"):
        lengths = torch.full((6, 1), sum(LENGTHS) / 6, dtype=torch.float64)
    want = torch.where(mask, -advantages[:, None] / lengths / 6, 0.0)
    assert torch.allclose(gradient, want, rtol=1e-12)


@pytest.mark.parametrize("method", PARAMETERS)
def test_autocast_changes_nothing(method):
    log_probs, old, advantages, mask, _ = example(dtype=torch.float32, scale=1e-3)
    objective = load_objective(method, **PARAMETERS[method])
    plain, gradient = value_and_gradient(objective, log_probs, old, advantages, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, autocast_gradient = value_and_gradient(objective, log_probs, old, advantages, mask)
    assert torch.equal(plain.loss, out.loss)
    assert torch.equal(gradient, autocast_gradient)


def test_token_advantages_are_used_token_by_token():
    log_probs, old, advantages, mask, _ = example()
    objective = load_objective("grpo")
    by_row, _ = value_and_gradient(objective, log_probs, old, advantages, mask)
    by_token, _ = value_and_gradient(objective, log_probs, old, advantages[:, None].expand(6, 12), mask)
    assert torch.equal(by_row.loss, by_token.loss)
    changed = advantages[:, None].repeat(1, 12)
    changed[0, 0] = 5.0
    other, gradient = value_and_gradient(objective, log_probs, old, changed, mask)
    assert not torch.equal(by_row.loss, other.loss)
    ratio = float((log_probs - old)[0, 0].exp())
    assert float(gradient[0, 0]) == pytest.approx(-5.0 * ratio / 5 / 6 if ratio <= 1.2 else 0.0)


def test_straight_through_equals_moving_the_old_log_probs():
    """A filter equals sg[log_probs - x] in place of old_log_probs in front of an unmodified clip."""
    log_probs, old, advantages, mask, _ = example(scale=1e-2)
    objective = load_objective("kpo", q=1e-2)
    out, gradient = value_and_gradient(objective, log_probs, old, advantages, mask)
    moved = torch.where(mask, log_probs - out.filtered_log_ratio, 0.0)
    plain, want = value_and_gradient(load_objective("grpo_tight"), log_probs, moved, advantages, mask)
    assert torch.allclose(out.loss, plain.loss, rtol=1e-12)
    assert torch.allclose(gradient, want, rtol=1e-9)


def test_overrides_reach_their_stage():
    objective = load_objective("kpo", time_constant=30, v=2.0, eps_low=0.01)
    assert objective.ratio_filter.q == pytest.approx(2.0 * 4 * math.sinh(1 / 60) ** 2)
    assert objective.surrogate.eps_low == 0.01
    assert objective.surrogate.eps_high == 4e-4
    assert objective == load_objective("kpo", time_constant=30, v=2.0, eps_low=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_objective("kpoo"), "unknown method 'kpoo'; did you mean 'kpo'"),
        (lambda: load_objective("kpo", qq=1), "kpo has no parameter 'qq'; did you mean 'q'"),
        (lambda: load_objective("grpo", q=1), "grpo has no parameter 'q'"),
        (lambda: load_objective("kpo", q=1e-6, time_constant=30), "keep one"),
        (lambda: load_objective("kpo", time_constant=-3), "time_constant=-3"),
        (lambda: load_objective("grpo", eps_low=0), "eps_low=0"),
        (lambda: load_objective("grpo", eps_high=-0.1), "eps_high=-0.1"),
    ],
)
def test_bad_parameters_name_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def bad(**changes):
    log_probs, old, advantages, mask, _ = example(dtype=torch.float32)
    return {
        "log_probs": log_probs,
        "old_log_probs": old,
        "advantages": advantages,
        "response_mask": mask,
    } | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(old_log_probs=torch.zeros(6, 11)), r"old_log_probs has shape \(6, 11\) but log_probs has \(6, 12\)"),
        (bad(advantages=torch.zeros(5)), "advantages has shape"),
        (bad(response_mask=torch.zeros(6, 12)), "response_mask is empty"),
        (bad(log_probs=torch.full((6, 12), float("nan"))), "log_probs is nan at row 0, token 0"),
        (bad(old_log_probs=torch.full((6, 12), float("-inf"))), "old_log_probs is -inf"),
        (bad(advantages=torch.full((6,), float("inf"))), "advantages is inf"),
        (bad(log_probs=torch.zeros(6, 12, dtype=torch.long)), "floating point"),
        (bad(log_probs=torch.zeros(12)), r"it must be \(B, T\)"),
    ],
)
def test_bad_tensors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_objective("grpo")(**arguments)
