"""Which kernel of packed attention a model gets in 16 bits, found by trying.

What a model is was settled in float32 (`policy/fidelity.py`); a kernel that takes 16 bits alone cannot be held against
that to 1e-4 nats. So it is held against buckets in float64, at attention itself: in every setting that the model's
layers ask for, on made-up queries, keys and values, in value and gradient, where rounding is all that may differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kpo_cli.policy.attention import Packing
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.fidelity import Way
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import Scorer, pack
from kpo_cli.policy.varlen import Installed, Kernel, Segments, installed_kernels
from kpo_cli.runs.directory import first_line

ROUNDING = 0.02
"""What 16 bits leave of values and gradients, relative: a few times what their last bit is worth."""
SPREAD = 1.5
"""Of the made-up scores, so that what a softmax does with them shows."""
SHORT = 50
"""Tokens of a window, at most, so that it shows."""
ROWS = ((150, (200, 1, 71)), (1, (130, 1)), (40, (1,)))
"""Prompts and responses of the trial: longer than a kernel's tiles, unlike, and without any token of their own."""
FEW = ((3, (4, 2)),)
"""To hear what a model asks for."""


@dataclass(frozen=True)
class Asked:
    """What a layer asks of attention."""

    heads: int
    key_heads: int
    size: int
    value_size: int
    window: int | None
    scaling: float | None


@dataclass
class _Listening:
    """Buckets, and what they were asked for."""

    buckets: Packing
    asked: set[Asked] = field(default_factory=set)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float | None) -> Tensor:
        self.asked.add(Asked(query.shape[1], key.shape[1], query.shape[3], value.shape[3], window, scaling))
        return self.buckets.attend(query, key, value, window, scaling)


def kernels_for(device: torch.device, half: bool) -> tuple[Installed, ...] | None:
    """Those to try for a forward pass, in bfloat16 if `half`; None where there can be none: on a CPU, or in float32."""
    return installed_kernels() if half and device.type == "cuda" else None


def choose_kernel(model: Any, way: Way, kernels: Sequence[Kernel] | None) -> Way:
    """A packed `way` with the first of `kernels` that is right for `model`; with buckets and a note if none is."""
    if kernels is None or not way.packed:
        return way
    reason: str | None = "the installed torch has none with a scale and windows"
    asked = _asked(model)
    for kernel in kernels:
        reason = next(filter(None, (_difference(kernel, each, model.device) for each in asked)), None)
        if reason is None:
            return replace(way, kernel=kernel)
    note = f"note: packed attention pads its rows a little, without torch's varlen attention ({reason}): slower"
    return replace(way, notes=(*way.notes, note))


@torch.no_grad()
def _asked(model: Any) -> list[Asked]:
    heard: list[_Listening] = []

    def listening(*rows: Any) -> _Listening:
        heard.append(_Listening(Packing.of(*rows)))
        return heard[-1]

    Scorer(model, 1.0, packed=True, layout=listening)(_rows(FEW))
    return sorted(heard[0].asked, key=str)


def _difference(kernel: Kernel, asked: Asked, device: torch.device) -> str | None:
    """Why a kernel cannot be taken; None if it can."""
    batch, draw = _rows(ROWS), torch.Generator().manual_seed(0)
    buckets, segments = (
        pack(batch, device, layout).packing for layout in (Packing.of, partial(Segments.of, kernel=kernel))
    )
    tokens = pack(batch, device).input_ids.numel()

    def drawn(heads: int, size: int) -> Tensor:
        return torch.randn(1, heads, tokens, size, generator=draw).to(device, torch.bfloat16)

    query, key = drawn(asked.heads, asked.size), drawn(asked.key_heads, asked.size)
    value, upper = drawn(asked.key_heads, asked.value_size), drawn(asked.heads, asked.value_size).transpose(1, 2)
    query *= SPREAD / ((asked.scaling or asked.size**-0.5) * asked.size**0.5)
    window = asked.window and min(asked.window, SHORT)
    inputs = (query, key, value)
    try:
        truth = _attended(buckets, [t.double() for t in inputs], window, asked.scaling, upper)
        found = _attended(segments, inputs, window, asked.scaling, upper)
        with torch.no_grad():
            again = segments.attend(*inputs, window, asked.scaling)
    except Exception as error:  # of a kernel that this device, these sizes or this torch do not have
        return f"{type(error).__name__}: {first_line(error)}"
    off = torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(found, truth, strict=True)])
    if not bool((off < ROUNDING).all()):
        return f"off by {float(off.nan_to_num(torch.inf).max()):.2g}"
    # What makes the ratio of a policy to itself 1: the pass for old log-probabilities has no gradients.
    return None if torch.equal(found[0], again) else "other values with gradients than without"


def _attended(
    rows: Any, inputs: Sequence[Tensor], window: int | None, scaling: float | None, upper: Tensor
) -> tuple[Tensor, ...]:
    """Values, and the gradients of queries, keys and values."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out = rows.attend(*leaves, window, scaling)
    return out.detach(), *torch.autograd.grad(out, leaves, upper.to(out.dtype))


def _rows(lengths: Sequence[tuple[int, Sequence[int]]]) -> Batch:
    groups = [[Response([0] * n, [0.0] * n, True) for n in responses] for _, responses in lengths]
    nothing = torch.zeros(sum(map(len, groups)))
    return make_batch([[0] * prompt for prompt, _ in lengths], groups, nothing, nothing)
