"""Attention: which of torch's kernels runs, what a new shape costs, and torch's varlen attention beside our buckets."""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filters import milliseconds
from step import Clock, make_rows
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from gpu_parts import NOT_MEASURED, Numbers, Setting, largest, require, saved_model
from gpu_parts.numerics import LAYERS, TINY, largest_ratios, loaded_scorer, sizes_of
from kpo_cli.policy.attention import NAME, Layout, Packing, decode_attention, packed_attention
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.fidelity import Way
from kpo_cli.policy.kernels import choose_kernel, kernels_for
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import pack
from kpo_cli.policy.varlen import Installed, Kernel, Segments

OPERATION = "aten::_scaled_dot_product_"
"""How the operation behind scaled_dot_product_attention begins; the rest of its name is the backend."""


def backends(setting: Setting) -> Numbers:
    """What runs for our shapes, by the profiler; then 20 ragged shapes, each twice, with and without cuDNN."""
    half, wrong = torch.bfloat16, list[str]()
    for dtype in (half, torch.float32):
        for name, call in shapes_of_ours(setting, dtype).items():
            case, kernel = f"{name}, {str(dtype).removeprefix('torch.')}", kernel_of(call, setting)
            yield {case: kernel}
            wrong += [f"{case}: {kernel}"] if "Error: " in kernel else []
    without = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    kinds: dict[str, Callable[[], Any]] = {"without cuDNN": lambda: sdpa_kernel(without), "torch's choice": nullcontext}
    if setting.cuda:
        kinds["cuDNN alone"] = lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION])
    for number, (name, chosen) in enumerate(kinds.items()):
        for grad in (False, True):
            # Each has lengths of its own: a plan that another one made would be found again.
            lengths = [37 + 61 * i + 2 * number + grad for i in range(2 if setting.small else 20)]
            what = f"new shape, {name}, {'forward and backward' if grad else 'forward'}"
            try:
                with chosen():
                    first, second = new_shapes(lengths, setting, grad, setting.seconds / 10)
            except RuntimeError as error:
                yield {what: f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}
                continue
            yield {f"{what}: shapes": len(first), f"{what}: first, ms (mean)": statistics.mean(first)}
            yield {f"{what}: first, ms (most)": max(first), f"{what}: again, ms (mean)": statistics.mean(second)}
    require(wrong)


def shapes_of_ours(setting: Setting, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Calls of our own attention, as training and decoding make them."""
    heads, shared, size, rows, length = (4, 2, 16, 3, 24) if setting.small else (16, 8, 128, 8, 1000)
    made = partial(torch.randn, device=setting.device, dtype=dtype)
    places = torch.arange(rows * length).reshape(rows, length)
    packing = Packing.of(list(places), rows * length, torch.device(setting.device))
    q, k, v = (made(1, count, rows * length, size) for count in (heads, shared, shared))
    one, keys, values = made(rows, heads, 1, size), made(rows, shared, length, size), made(rows, shared, length, size)
    mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=setting.device)
    mask[:, ..., :5] = False
    return {
        "packed bucket": lambda: packed_attention(q, k, v, packing, None, None),
        "packed bucket with a window": lambda: packed_attention(q, k, v, packing, 8, None),
        "packed bucket, with gradients": lambda: packed_attention(q.requires_grad_(), k, v, packing, None, None),
        "decoding": lambda: decode_attention(one, keys, values, None, None),
        "decoding with a mask": lambda: decode_attention(one, keys, values, mask, None),
    }


def kernel_of(call: Callable[[], Tensor], setting: Setting) -> str:
    """The backend that torch chose, and on a GPU the kernel that took the longest; or the error."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.cuda else [])]
    try:
        call()
        with profile(activities=kinds) as seen:
            call()
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    events = seen.key_averages()
    names = sorted({event.key.removeprefix(OPERATION) for event in events if event.key.startswith(OPERATION)})
    if not setting.cuda:
        return f"{', '.join(names)} (cpu)"
    kernels = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    longest = max(kernels, key=lambda event: event.self_device_time_total, default=None)
    return f"{', '.join(names)}; {longest.key[:60] if longest else 'no kernel seen'}"


def new_shapes(lengths: list[int], setting: Setting, grad: bool, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of the first and of the second call at each length, until `seconds` are over."""
    clock, first, second = Clock(setting.device), [], []
    ends = clock.now() + seconds
    heads, shared, size = (4, 2, 16) if setting.small else (16, 8, 128)
    for length in lengths:
        if first and clock.now() > ends:
            break
        q, k, v = (
            torch.randn(3, count, length, size, device=setting.device, dtype=torch.bfloat16, requires_grad=grad)
            for count in (heads, shared, shared)
        )
        for times in (first, second):
            start = clock.now()
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if grad:
                out.backward(torch.ones_like(out))
            times.append(1e3 * (clock.now() - start))
    return first, second


def varlen(setting: Setting) -> Numbers:
    """torch's varlen attention and our buckets, both against plain float64; then z at lr = 0, and the time of both.

    On a CPU plain torch stands in for the kernel.
    """
    shape = TINY if setting.small else LAYERS
    path = saved_model(setting, num_hidden_layers=shape.layers, **sizes_of(shape))
    scorer = loaded_scorer(f"model.path='{path}'", f"model.device={setting.device}", "model.dtype=bfloat16")
    device = torch.device(setting.device)
    tried = (kernels_for(device, True) or ()) if setting.cuda else (plain_kernel(),)
    way = choose_kernel(scorer.model, Way(NAME, packed=True), tried)
    if way.kernel is None:
        raise AssertionError(*way.notes)
    yield {"kernel": called(way.kernel), "a bfloat16 policy gets": called(getattr(scorer.layout, "keywords", {}))}
    layouts: dict[str, Layout] = {"buckets": Packing.of, "varlen": partial(Segments.of, kernel=way.kernel)}
    wrong: list[str] = []
    yield from against_float64(setting, layouts, wrong)
    batch = make_rows(shape, shape.tokens)
    for recompute in (False, True):
        of_both = {
            name: largest_ratios(replace(scorer, layout=layout), batch, shape.tokens, recompute, 0.0)
            for name, layout in layouts.items()
        }
        for name, ratios in of_both.items():
            case = f"|z| at lr = 0, {name}{', recompute' if recompute else ''}"
            yield {case: largest(ratios)}
            wrong += [f"{case}: up to {largest(ratios):.2g}"] if any(ratios) else []
    yield from times(setting, layouts)
    require(wrong)


def plain_kernel() -> Kernel:
    """The one of the tests."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests/policy"))
    from varlen_reference import varlen_reference

    return varlen_reference


def called(kernel: Any) -> str:
    """What runs, and how it is called."""
    if isinstance(kernel, dict):
        return called(kernel["kernel"]) if kernel else "buckets"
    if not isinstance(kernel, Installed):
        return f"{NOT_MEASURED}: plain torch stands in"
    options = [name for name in ("flagged", "expanded", "unsplit") if getattr(kernel, name)]
    return f"torch {torch.__version__}: {', '.join(options) or 'as it is'}"


def against_float64(setting: Setting, layouts: dict[str, Layout], wrong: list[str]) -> Numbers:
    """Values and gradients of attention alone: prompts shared, heads grouped, responses without a token to see."""
    groups = ((5, (4, 9, 1)), (3, (7, 2))) if setting.small else ((256, (700, 90, 1, 512)), (100, (640, 33, 900)))
    heads, shared, size = (4, 2, 16) if setting.small else (16, 8, 128)
    device, batch = torch.device(setting.device), rows_of(groups)
    rows, tokens = rows_in(batch)
    draw = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(1, n, tokens, size, generator=draw).bfloat16().to(device) for n in (heads, shared, shared, heads)
    )
    g = g.transpose(1, 2)
    for window in (None, 4 if setting.small else 128):
        want = run(partial(plain, rows=rows, window=window), (q, k, v), g, torch.float64)
        case = "causal" if window is None else f"window of {window}"
        for name, layout in layouts.items():
            packing = pack(batch, device, layout).packing
            got = run(lambda q, k, v, of=packing, w=window: of.attend(q, k, v, w, None), (q, k, v), g, torch.bfloat16)
            off = [relative(a, b) for a, b in zip(got, want, strict=True)]
            yield {f"{name}, {case}: error of values": off[0]}
            yield {f"{name}, {case}: of q, k, v gradients": largest(off[1:])}
            wrong += [f"{name}, {case}: off by {largest(off):.2g}"] if not largest(off) < 0.02 else []


def times(setting: Setting, layouts: dict[str, Layout]) -> Numbers:
    """Forward and backward, at 16,384 packed tokens of the 0.6B shape; and of the gather alone, by its two ways."""
    groups = ((6, (4, 9, 17)), (6, (5, 8, 2))) if setting.small else ((256, tuple(range(257, 3778, 503))),)
    heads, shared, size = (4, 2, 16) if setting.small else (16, 8, 128)
    device, batch = torch.device(setting.device), rows_of(groups)
    rows, tokens = rows_in(batch)
    q, k, v, g = (
        torch.randn(1, n, tokens, size, device=device, dtype=torch.bfloat16) for n in (heads, shared, shared, heads)
    )
    g = g.transpose(1, 2)
    spent = {}
    for name, layout in layouts.items():
        packing = pack(batch, device, layout).packing
        attend = partial(run, lambda q, k, v, of=packing: of.attend(q, k, v, None, None), (q, k, v), g, torch.bfloat16)
        spent[name] = milliseconds(attend, setting.device, 5)
        yield {f"{name}, {tokens:,} tokens, forward and backward, ms": spent[name]}
    yield {f"varlen / buckets, {tokens:,} tokens, time": spent["varlen"] / spent["buckets"]}
    places = torch.cat(rows).to(device)
    flat = torch.randn(tokens, shared * size, device=device, dtype=torch.bfloat16)
    ways = {"F.embedding": lambda t: F.embedding(places, t), "index_select": lambda t: t.index_select(0, places)}
    for name, way in ways.items():
        gather = partial(run, way, (flat,), flat.new_ones(len(places), shared * size), torch.bfloat16)
        yield {f"keys gathered by {name}, forward and backward, ms": milliseconds(gather, setting.device, 5)}


def rows_of(groups: Sequence[tuple[int, Sequence[int]]]) -> Batch:
    """From (tokens of a prompt, tokens of each response); which tokens they are does not matter here."""
    answers = [[Response([1] * n, [0.0] * n, True) for n in responses] for _, responses in groups]
    nothing = torch.zeros(sum(map(len, answers)))
    return make_batch([[1] * prompt for prompt, _ in groups], answers, nothing, nothing)


def rows_in(batch: Batch) -> tuple[list[Tensor], int]:
    """The places of each row's tokens, and how many there are."""
    laid: Any = pack(batch, torch.device("cpu"), lambda rows, tokens, _: (rows, tokens))  # type: ignore[arg-type, return-value]
    return laid.packing  # type: ignore[no-any-return]


def run(way: Callable[..., Tensor], inputs: tuple[Tensor, ...], g: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The output of a way and, from its gradient `g`, those of the inputs."""
    leaves = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in inputs)
    out = way(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def plain(q: Tensor, k: Tensor, v: Tensor, rows: list[Tensor], window: int | None) -> Tensor:
    """The definition, a row at a time with its whole prompt: softmax over the tokens before, written out."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    out = torch.zeros_like(q)
    for row in rows:
        row = row.to(q.device)
        keys, values = (t[row].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[row], keys) / math.sqrt(q.shape[-1])
        place = torch.arange(len(row), device=q.device)
        back = place[:, None] - place
        seen = (back >= 0) & (back < (window or len(row)))
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), values)
        # A prompt's tokens come out the same in each of its rows: written over, so that gradients count them once.
        out = out.index_copy(0, row, attended)
    return out[None]
