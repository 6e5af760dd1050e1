"""Attention: which of torch's kernels runs, what a new shape costs, and torch's varlen attention beside our buckets."""

import inspect
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from filters import milliseconds
from step import Clock
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from gpu_parts import NOT_MEASURED, Numbers, Setting, largest, require
from kpo_cli.policy.attention import Packing, _band, decode_attention, packed_attention

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


@dataclass(frozen=True)
class Ragged:
    """Groups as training packs them: each prompt once, then its responses, which look at it and at themselves."""

    rows: list[Tensor]
    """The places of each row, prompt and response."""
    query_lengths: list[int]
    """Of each sequence, laid end to end: a prompt, or a response alone."""
    key_places: list[Tensor]
    """What each of these sequences looks at, itself included: its queries stand at the end (bottom right)."""

    @classmethod
    def of(cls, prompts: list[int], groups: list[list[int]]) -> "Ragged":
        rows, lengths, keys, tokens = [], [], [], 0
        for prompt, responses in zip(prompts, groups, strict=True):
            shared = torch.arange(tokens, tokens + prompt)
            lengths.append(prompt)
            keys.append(shared)
            tokens += prompt
            for response in responses:
                rows.append(torch.cat([shared, torch.arange(tokens, tokens + response)]))
                lengths.append(response)
                keys.append(rows[-1])
                tokens += response
        return cls(rows, lengths, keys)

    @property
    def tokens(self) -> int:
        return sum(self.query_lengths)


def varlen(setting: Setting) -> Numbers:
    """torch's varlen attention and our buckets, both against plain float64, in values and gradients."""
    sizes = ([5, 3], [[4, 9, 1], [7, 2]]) if setting.small else ([256, 100], [[700, 90, 311, 512], [640, 33, 900]])
    heads, shared, size = (4, 2, 16) if setting.small else (16, 8, 128)
    ragged = Ragged.of(*sizes)
    draw = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(ragged.tokens, n, size, generator=draw).bfloat16().to(setting.device)
        for n in (heads, shared, shared, heads)
    )
    packing = Packing.of(ragged.rows, ragged.tokens, torch.device(setting.device))
    wrong: list[str] = []
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    for window in (None, 4 if setting.small else 128):
        want = run(partial(plain, ragged=ragged, window=window), (q, k, v), g, torch.float64)
        case = "causal" if window is None else f"window of {window}"
        ways = {"buckets": partial(buckets, packing=packing, window=window)}
        if setting.cuda:
            ways["varlen"] = partial(torch_varlen, ragged=ragged, window=window)
        else:  # a second plain way, with the alignment that varlen is documented to have
            ways["one sequence at a time"] = partial(one_at_a_time, ragged=ragged, window=window)
            yield {f"varlen, {case}": f"{NOT_MEASURED}: a CPU has none"}
        for name, way in ways.items():
            off = [relative(a, b) for a, b in zip(run(way, (q, k, v), g, dtype), want, strict=True)]
            yield {f"{name}, {case}: error of values": off[0]}
            yield {f"{name}, {case}: of q, k, v gradients": largest(off[1:])}
            bound = 0.02 if setting.cuda else 1e-5
            wrong += [f"{name}, {case}: off by {largest(off):.2g}"] if not largest(off) < bound else []
        if setting.cuda:
            calls = {name: partial(run, way, (q, k, v), g, dtype) for name, way in ways.items()}
            times = {name: milliseconds(call, setting.device, 5) for name, call in calls.items()}
            yield {f"{name}, {case}, forward and backward, ms": spent for name, spent in times.items()}
            yield {f"{case}: varlen / buckets, time": times["varlen"] / times["buckets"]}
    require(wrong)


def run(way: Callable[..., Tensor], inputs: tuple[Tensor, ...], g: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The output (M, heads, size) of a way and the gradients of its three inputs."""
    leaves = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in inputs)
    out = way(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def plain(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, window: int | None) -> Tensor:
    """The definition, a row at a time with its whole prompt: softmax over the tokens before, written out."""
    out = torch.zeros_like(q)
    for row in ragged.rows:
        row = row.to(q.device)
        keys, values = (t[row].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[row], keys) / math.sqrt(q.shape[-1])
        place = torch.arange(len(row), device=q.device)
        back = place[:, None] - place
        seen = (back >= 0) & (back < (window or len(row)))
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), values)
        # A prompt's tokens come out the same in each of its rows: written over, so that gradients count them once.
        out = out.index_copy(0, row, attended)
    return out


def buckets(q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None) -> Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return packed_attention(q, k, v, packing, window, None)[0]


def one_at_a_time(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, window: int | None) -> Tensor:
    """What varlen attention is said to do, a sequence at a time: its queries are the last of its keys."""
    outputs = []
    for queries, places in zip(q.split(ragged.query_lengths), ragged.key_places, strict=True):
        keys, values = k[places], v[places]
        seen = _band(len(places), window or len(places), q.device)[-len(queries) :]
        heads = (t.transpose(0, 1)[None] for t in (queries, keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, window: int | None) -> Tensor:
    """Asked for by signature: torch 2.10 takes is_causal, 2.11 window_size, later ones enable_gqa as well."""
    from torch.nn.attention.varlen import varlen_attn

    places = torch.cat(ragged.key_places).to(q.device)
    lengths = [ragged.query_lengths, [len(keys) for keys in ragged.key_places]]
    ends = [torch.tensor([0, *n]).cumsum(0).to(q.device, torch.int32) for n in lengths]
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise NotImplementedError(f"varlen_attn of torch {torch.__version__} has no window")
    return varlen_attn(q, k[places], v[places], *ends, *map(max, lengths), **options)
