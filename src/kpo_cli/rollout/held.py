"""What the engine holds against what was pushed into it, number by number.

The engine stores some of a model's weights together: rows of q, k and v in one tensor, of gate and up in another, and a
vocabulary with rows to spare. Which, its model says in `packed_modules_mapping`; the rest is under the same names. This
is worked out here by names and shapes alone, so that it owes nothing to the code that copied the weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**25
"""Numbers that are compared at a time: two copies of so many are made."""
PADDING = 64
"""A vocabulary is filled up to a multiple of so many rows."""
COLUMNS = 16
"""Of a matrix whose plain form is gone, as on a CPU."""


@dataclass
class Comparison:
    """Names of the engine's tensors."""

    equal: set[str] = field(default_factory=set)
    differing: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    """Not, or not wholly, among what was pushed, as far as names and shapes tell."""


@dataclass
class _Held:
    """A tensor of the engine while parts of it are compared."""

    rows: int = 0
    """Compared so far, from the first."""
    parts: int = 0
    differs: Tensor | None = None
    complete: bool = False


@torch.no_grad()
def compare(model: Any, pushed: Iterable[tuple[str, Tensor]], dtype: torch.dtype, seed: int) -> Comparison:
    """The engine's `model` against all weights `pushed` under their names in transformers, rounded to `dtype`.

    Every number is compared, at the cost of reading all of them once; nothing larger than `BLOCK` numbers is allocated.
    On a CPU vLLM keeps matrices in a form of its library's alone: of those `COLUMNS` columns are read back, drawn by
    `seed`, by multiplying with unit vectors, which rounds nothing.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    fused = _fused(getattr(model, "packed_modules_mapping", {}))
    held = {name: _Held() for name in parameters}
    for name, tensor in pushed:
        target, part, parts = _target(name, parameters, fused)
        if target is None:
            continue
        state, parameter = held[target], parameters[target]
        packed = getattr(modules[target.rpartition(".")[0]], "cpu_linear", None)
        if state.parts != part or (parameter.numel() and not _fits(parameter, tensor, state.rows)):
            state.parts = -1  # out of order, or of another shape: it will not be complete
            continue
        different = _differs(parameter, tensor, state.rows, dtype) if parameter.numel() else None
        if packed is not None and tensor.dim() == 2:
            column = _columns_differ(packed, parameter, tensor, state.rows, dtype, seed)
            different = column if different is None else different | column
        if different is None:
            continue
        state.differs = different if state.differs is None else state.differs | different
        state.parts, state.rows = part + 1, state.rows + (len(tensor) if tensor.dim() else 0)
        spare = len(parameter) - state.rows if tensor.dim() and parameter.numel() else 0
        state.complete = state.parts == parts and spare < (PADDING if parts == 1 else 1)
    return _verdict(held)


def _verdict(held: dict[str, _Held]) -> Comparison:
    found = Comparison()
    complete = {name: state.differs for name, state in held.items() if state.complete and state.differs is not None}
    flags = torch.stack(list(complete.values())).tolist() if complete else []  # the one time that we wait for a GPU
    for name, differs in zip(complete, flags, strict=True):
        (found.differing if differs else found.equal).add(name)
    found.unknown = held.keys() - complete.keys()
    return found


def _fused(mapping: Mapping[str, list[str]]) -> dict[str, tuple[str, int, int]]:
    """By the name of a layer in transformers: the engine's name for it, its place there, and of how many."""
    return {part: (whole, place, len(parts)) for whole, parts in mapping.items() for place, part in enumerate(parts)}


def _target(
    name: str, parameters: Mapping[str, Any], fused: Mapping[str, tuple[str, int, int]]
) -> tuple[str | None, int, int]:
    """The engine's tensor that a pushed one is part of, which part, and of how many."""
    if name in parameters:
        return name, 0, 1
    path, _, kind = name.rpartition(".")
    parent, _, layer = path.rpartition(".")
    if layer in fused:
        whole, place, count = fused[layer]
        target = f"{parent}.{whole}.{kind}"
        if target in parameters:
            return target, place, count
    return None, 0, 0


def _fits(parameter: Tensor, tensor: Tensor, row: int) -> bool:
    if tensor.dim() == 0 or parameter.dim() != tensor.dim():
        return parameter.shape == tensor.shape
    return parameter.shape[1:] == tensor.shape[1:] and row + len(tensor) <= len(parameter)


def _differs(parameter: Tensor, tensor: Tensor, row: int, dtype: torch.dtype) -> Tensor:
    """A flag, on the device."""
    if tensor.dim() == 0:
        return _unequal(parameter, tensor.to(dtype).to(parameter.dtype))
    flag = torch.zeros((), dtype=torch.bool, device=parameter.device)
    step = max(1, BLOCK // max(1, tensor[0].numel()))
    for start in range(0, len(tensor), step):
        want = tensor[start : start + step].to(parameter.device).to(dtype).to(parameter.dtype)
        flag |= _unequal(parameter[row + start : row + start + len(want)], want)
    return flag


def _unequal(held: Tensor, want: Tensor) -> Tensor:
    """A flag, on the device. NaN that was pushed is NaN that is held: that weights are broken is for others to say."""
    return ((held != want) & ~(held.isnan() & want.isnan())).any()


def _columns_differ(packed: Any, parameter: Tensor, tensor: Tensor, row: int, dtype: torch.dtype, seed: int) -> Tensor:
    """The same for some columns of a matrix of which only multiplying with it is left."""
    draw = torch.Generator().manual_seed(seed)
    columns = torch.randint(tensor.shape[1], (COLUMNS,), generator=draw)
    units = torch.nn.functional.one_hot(columns, tensor.shape[1]).to(dtype)
    read = packed(units, parameter, None)[:, row : row + len(tensor)]
    want = tensor[:, columns].t().to(dtype).to(read.dtype)
    want = want.masked_fill(tensor.isnan().any(1), torch.nan)  # which no zero of a unit vector hides
    return _unequal(read, want) if read.shape == want.shape else torch.tensor(True)
