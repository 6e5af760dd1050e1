"""Is it right on this device: parts whose truth is float64, or zero."""

import itertools
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filters import log_ratios, milliseconds, relative_error
from step import MINI_BATCHES, Shape, make_model, make_rows
from torch import Tensor

from gpu_parts import NOT_MEASURED, Numbers, Setting, composed, largest, require, saved_model
from kpo_cli.core import linear_log_probs, load_objective
from kpo_cli.core.filters import FILTERS
from kpo_cli.core.robust import _triton_kernel, launch_triton, saturated_scan_torch
from kpo_cli.policy.batch import Batch
from kpo_cli.policy.load import load_policy, narrow
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.sharding import full, trained_weights
from kpo_cli.training.step import Updater

TINY = Shape(64, 2, 4, 2, 32, 128, 256, 160, 6)
LAYERS = Shape(1024, 4, 16, 8, 128, 3072, 256, 4096, 64)
"""Four of Qwen3-0.6B's, over bytes: real shapes for attention and matrix products."""


def on_policy(setting: Setting) -> Numbers:
    """The largest |z| of an update whose learning rate is 0: the policy stays, and z is 0 in every mini-batch."""
    shape = TINY if setting.small else LAYERS
    path = saved_model(setting, num_hidden_layers=shape.layers, **sizes_of(shape))
    batch = make_rows(shape, shape.tokens)
    wrong: list[str] = []
    for dtype in ("bfloat16", "float32"):
        for rank in (0, 8):
            scorer = loaded_scorer(
                f"model.path='{path}'",
                f"model.device={setting.device}",
                f"model.dtype={dtype}",
                f"model.lora.rank={rank}",
            )
            for packed in (True, False):
                for recompute in (False, True):
                    case = f"{dtype}{', LoRA' if rank else ''}, {'packed' if packed else 'padded'}"
                    case += ", recompute" if recompute else ""
                    ratios = largest_ratios(replace(scorer, packed=packed), batch, shape.tokens, recompute, 0.0)
                    wrong += [f"{case}: |z| up to {largest(ratios):.2g}"] if any(ratios) else []
                    yield {f"|z|, {case}": largest(ratios)}
            moved = largest_ratios(scorer, batch, shape.tokens, False, 1e-3)[-1]
            wrong += [f"{dtype}: z stays 0 at a learning rate of 1e-3"] if moved == 0 else []
            yield {f"|z|, {dtype}{', LoRA' if rank else ''}, for comparison at lr = 1e-3": moved}
    require(wrong)


def sizes_of(shape: Shape) -> dict[str, int]:
    """Of a layer."""
    wide = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "head_dim": shape.head_dim}
    return wide | {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}


def loaded_scorer(*overrides: str) -> Scorer:
    """As `kpo train` makes it."""
    policy = load_policy(composed(*overrides).model)
    if policy.way.unpacked_because:
        raise AssertionError(policy.way.unpacked_because)
    policy.narrow()
    return policy.way.scorer(policy.model, 1.0, policy.half)


def largest_ratios(scorer: Scorer, batch: Batch, tokens: int, recompute: bool, lr: float) -> list[float]:
    """Largest |z| of each mini-batch; the first is 0 by construction. Mini-batches have two micro-batches."""
    model = scorer.model
    recompute_layers(model, recompute)
    optimizer = torch.optim.AdamW(trained_weights(model), lr=lr, fused=True)
    objective = load_objective("kpo")
    updater = Updater(scorer, optimizer, objective, MINI_BATCHES, tokens // 2 + 1, 1.0, mask_truncated=False)
    record = updater.update(batch, for_record=True)
    return [float(record.log_ratio[record.mini_batch_index == i].abs().max()) for i in range(MINI_BATCHES)]


def layouts(setting: Setting) -> Numbers:
    """Log-probabilities and gradients, packed and padded, against a plain float64 model, one row at a time."""
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = TINY if setting.small else replace(TINY, hidden=256, heads=8, kv_heads=4, layers=4)
    batch = make_rows(shape, shape.tokens)
    batch = batch.rows(torch.arange(len(batch) // MINI_BATCHES))
    model = make_model(shape, setting.device)
    weights = torch.linspace(-1, 1, batch.response_mask.numel()).reshape(batch.response_mask.shape)
    weights = (weights * batch.response_mask).to(setting.device)
    truth = values_and_gradients(plain_double(model), weights, lambda of: plain_log_probs(of, batch))
    wrong: list[str] = []
    bounds = {"float32": 1e-4, "bfloat16": 0.3}
    for dtype, packed in itertools.product(bounds, (True, False)):
        own = deepcopy(model)
        if dtype == "bfloat16":
            narrow(own, torch.bfloat16)
        scorer = Scorer(own, 1.0, dtype == "bfloat16", packed)
        got = values_and_gradients(own, weights, lambda _, scorer=scorer: scorer(batch)[0])
        values, gradients = errors(got, truth)
        case = f"{dtype}, {'packed' if packed else 'padded'}"
        yield {f"{case}: largest error of a log-prob, nats": values, f"{case}: worst gradient, relative": gradients}
        if not largest((values, gradients)) < bounds[dtype]:
            wrong.append(f"{case}: off by {values:.2g} and {gradients:.2g}")
    yield tf32(setting, shape, batch)
    require(wrong)


def tf32(setting: Setting, shape: Shape, batch: Batch) -> dict[str, float | str]:
    """What the packability probe would see where TF32 is on."""
    name = "float32 with TF32: packed - padded, nats"
    if not setting.cuda:
        return {name: NOT_MEASURED}
    model = make_model(shape, setting.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    with torch.no_grad():
        packed, padded = (Scorer(model, 1.0, False, layout)(batch)[0] for layout in (True, False))
    return {name: float((packed - padded)[batch.response_mask.to(packed.device)].abs().max())}


def plain_double(model: Any) -> Any:
    """A float64 copy with transformers' own eager attention, and norms that do not go through float32 as its own do."""
    copy = type(model)(deepcopy(model.config)).to(model.device, torch.float64).eval()
    copy.load_state_dict(model.state_dict())
    copy.set_attn_implementation("eager")
    for name, norm in list(copy.named_modules()):
        if name.endswith("norm"):
            exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
            exact.weight = norm.weight
            copy.set_submodule(name, exact)
    return copy


def plain_log_probs(model: Any, batch: Batch) -> Tensor:
    """(N, T): no padding, no packing, no masks, nothing of ours."""
    rows = []
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row, : int(batch.prompt_lengths[row])]
        response = batch.response_ids[row][batch.response_mask[row]]
        ids = torch.cat([prompt, response])[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
        rows.append(torch.nn.functional.pad(chosen, (0, batch.response_mask.shape[1] - len(response))))
    return torch.stack(rows)


def values_and_gradients(
    model: Any, weights: Tensor, score: Callable[[Any], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    values = score(model)
    model.zero_grad()
    (values * weights).sum().backward()
    gradients = {name: full(parameter.grad).double() for name, parameter in model.named_parameters()}
    return values.detach().double() * (weights != 0), gradients


def errors(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> tuple[float, float]:
    """Largest of a log-prob, and the worst |g - g*| / |g*| of a weight tensor."""
    relative = [float((got[1][name] - g).norm() / g.norm()) for name, g in want[1].items()]
    return float((got[0] - want[0]).abs().max()), largest(relative)


def log_probs(setting: Setting) -> Numbers:
    """`linear_log_probs` against float64: values, entropies, and the gradients of both together."""
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens, width, vocabulary = (96, 64, 1000) if setting.small else (1024, 1024, 151_936)
    draw = torch.Generator(setting.device).manual_seed(0)
    hidden, weight = (
        scale * torch.randn(n, width, device=setting.device, generator=draw)
        for n, scale in ((tokens, 1.0), (vocabulary, 3 * width**-0.5))
    )
    # Rounded to bfloat16 once, so that the error shown is of our arithmetic and not of the inputs.
    hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()
    ids = torch.randint(vocabulary, (tokens,), device=setting.device, generator=draw)
    mix = torch.linspace(-1, 1, tokens, device=setting.device, dtype=torch.float64)
    want = plain_stage(hidden.double(), weight.double(), ids, mix)
    wrong: list[str] = []
    bounds = {"float32": (1e-4, 1e-4), "bfloat16": (1e-3 if setting.cuda else 0.1, 0.02)}
    for dtype, bound in bounds.items():
        got = our_stage(hidden.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype)), ids, mix, tokens // 3)
        for name, one, other in zip(("log-prob", "entropy", "d hidden", "d weight"), got, want, strict=True):
            gradient = name.startswith("d ")
            off = (one.double() - other).norm() / other.norm() if gradient else (one.double() - other).abs().max()
            yield {f"{dtype}: {name}, {'relative' if gradient else 'nats'}": float(off)}
            wrong += [f"{dtype} {name}: off by {off:.2g}"] if not off < bound[gradient] else []
    require(wrong)


def plain_stage(hidden: Tensor, weight: Tensor, ids: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
    """As it is written: all logits at once. A quarter of the tokens at a time where they are many: gradients add up."""
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    values, entropies = [], []
    for part in torch.arange(len(ids), device=ids.device).split(256):
        log_p = (leaves[0][part] @ leaves[1].T).log_softmax(-1)
        chosen, entropy = log_p.gather(-1, ids[part, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        (mix[part] * (chosen + 0.1 * entropy)).sum().backward()
        values.append(chosen.detach())
        entropies.append(entropy.detach())
    return torch.cat(values), torch.cat(entropies), *(leaf.grad for leaf in leaves)  # type: ignore[arg-type]


def our_stage(hidden: Tensor, weight: Tensor, ids: Tensor, mix: Tensor, chunk: int) -> tuple[Tensor, ...]:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    chosen, entropy = linear_log_probs(*leaves, ids, 1.0, entropy_gradient=True, chunk=chunk)
    gradients = torch.autograd.grad((mix.float() * (chosen + 0.1 * entropy)).sum(), leaves)
    return chosen.detach(), entropy.detach(), *gradients


def filters(setting: Setting) -> Numbers:
    """Every filter against the plain recursion of tests/core/reference.py; then the robust one's kernel."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests/core"))
    import reference

    rows, length = (2, 200) if setting.small else (4, 4096)
    z, mask = log_ratios(rows, length, setting.device)
    old = -torch.rand(rows, length, device=setting.device)
    wrong: list[str] = []
    for name, make in FILTERS.items():
        ratio_filter = make()
        got, off = ratio_filter(z.double(), mask, old.double()), []
        for row in range(rows):
            count = int(mask[row].sum())
            plain = reference.filtered(name, ratio_filter, z[row, :count].tolist(), old[row, :count].tolist())
            want = torch.tensor([plain], dtype=torch.float64)
            off.append(relative_error(got[row, None, :count].cpu(), want))
        wrong += [f"{name}: off by {largest(off):.2g}"] if not largest(off) < 1e-9 else []
        yield {f"{name}: largest error, relative": largest(off)}
    yield from robust_kernel(setting, wrong)
    require(wrong)


def robust_kernel(setting: Setting, wrong: list[str]) -> Numbers:
    """Triton's loop against plain torch on the same numbers, and the time of both for a batch of real size."""
    kernel = _triton_kernel() if setting.cuda else None
    if kernel is None:
        yield {"robust, Triton": NOT_MEASURED if not setting.cuda else f"{NOT_MEASURED}: triton is not installed"}
        return
    z = torch.randn(64, 2048 if not setting.small else 128, device=setting.device, dtype=torch.float64)
    gains, limit = torch.rand_like(z), 0.1 + torch.rand_like(z)
    plain = saturated_scan_torch(z, gains, limit)
    off = float((launch_triton(kernel, z, gains, limit) - plain).abs().max())
    wrong += [f"Triton differs from torch by {off:.2g}"] if not off <= 1e-12 else []
    yield {"robust, Triton - torch": off}
    yield {"robust, Triton, ms": milliseconds(lambda: launch_triton(kernel, z, gains, limit), setting.device, 5)}
    yield {"robust, torch, ms": milliseconds(lambda: saturated_scan_torch(z, gains, limit), setting.device, 1)}
