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
    """All tensors are (B, T) with T > 0, of one shape and on one device; the first is the reference."""
    (name, first), *others = tensors.items()
    if first.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(first.shape)}; it must be (B, T), one row a response")
    if first.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(first.shape)}: no tokens")
    for other_name, other in others:
        if other.shape != first.shape:
            raise ValueError(f"{other_name} has shape {tuple(other.shape)} but {name} has {tuple(first.shape)}")
        if other.device != first.device:
            raise ValueError(f"{other_name} is on {other.device} but {name} on {first.device}")


def cleaned(mask: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
    """Tensors (B, T) with zeros outside `mask`, whatever stood there; floating point and finite inside it.

    `where` and not a product: NaN * 0 is NaN. One sum a tensor and one wait for the device in all say whether
    everything is finite: a sum is finite only if its terms are.
    """
    for name, values in tensors.items():
        if not values.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {values.dtype}; it must be floating point")
    clean = {name: torch.where(mask, values, 0.0) for name, values in tensors.items()}
    totals = torch.stack([values.detach().sum(dtype=torch.float64) for values in clean.values()])
    if not bool(totals.isfinite().all()):
        _name_the_bad_one(mask, tensors)
    return clean


def _name_the_bad_one(mask: Tensor, tensors: dict[str, Tensor]) -> None:
    for name, values in tensors.items():
        bad = mask & ~torch.isfinite(values)
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            raise ValueError(f"{name} is {float(values[row, column])} at row {row}, token {column}, a valid token")
