"""Checks on the tensors that cross the border into core: each failure is one line that names the tensor."""

import torch
from torch import Tensor


def as_mask(mask: Tensor) -> Tensor:
    """`mask` as booleans; anything but 0 and 1 is refused."""
    if mask.dtype == torch.bool:
        return mask
    as_bool = mask.bool()
    if not bool((as_bool.to(mask.dtype) == mask).all()):
        raise ValueError("the mask must hold 0 and 1 (or booleans) only")
    return as_bool


def check_same_shape(**tensors: Tensor) -> None:
    """All tensors are (B, T) and of one shape; the first is the reference."""
    (name, first), *others = tensors.items()
    if first.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(first.shape)}; it must be (B, T), one row a response")
    for other_name, other in others:
        if other.shape != first.shape:
            raise ValueError(f"{other_name} has shape {tuple(other.shape)} but {name} has {tuple(first.shape)}")


def check_finite(name: str, values: Tensor, mask: Tensor) -> None:
    """`values` is floating point, and finite wherever `mask` (B, T) is true."""
    if not values.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {values.dtype}; it must be floating point")
    bad = mask & ~torch.isfinite(values)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{name} is {float(values[row, column])} at row {row}, token {column}, a valid token")
