"""The Kalman recursion over rows of tokens, on prepared float64 tensors; filters and noise models both stand on it."""

import math

import torch
from torch import Tensor

from kpo_cli.core.checks import as_mask, check_finite, check_same_shape
from kpo_cli.core.scans import affine_scan, closed_form_terms, exponential_scan, riccati_gains


def eta_of(q_over_v: float) -> float:
    """The filter's rate in 1/tokens; its steady gain is 1 - exp(-eta) and its time constant 1/eta."""
    return 2 * math.asinh(math.sqrt(q_over_v) / 2)


def prepared(z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z in float64 and zero where invalid, the mask as booleans, and `age`, the number of valid tokens so far."""
    mask = as_mask(mask)
    check_same_shape(z=z, mask=mask)
    check_finite("z", z, mask)
    return torch.where(mask, z, 0.0).double(), mask, mask.cumsum(-1)


def finished(x: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """x zero outside the mask, in `dtype` or float32 if that is narrower."""
    return torch.where(mask, x, 0.0).to(torch.promote_types(dtype, torch.float32))


def gapless(mask: Tensor, age: Tensor) -> bool:
    """True if the valid tokens of every row stand next to each other."""
    first = mask.int().argmax(-1, keepdim=True)
    column = torch.arange(mask.shape[-1], device=mask.device)
    return bool(((column - first + 1 == age) | ~mask).all())


def kalman_gains(mask: Tensor, age: Tensor, q: float, p0: float) -> Tensor:
    """Gains K_t (B, T), zero where nothing is observed; noise relative to V."""
    if gapless(mask, age):
        h, g = closed_form_terms(eta_of(q), p0, mask.shape[-1], mask.device)
        return torch.where(mask, (h / g)[age], 0.0)
    return riccati_gains(mask.double(), (age > 0).double() * q, p0)


def kalman_states(z: Tensor, mask: Tensor, age: Tensor, q: float, p0: float) -> Tensor:
    """Filtered states x_t (B, T) with constant noise, relative to V."""
    if not gapless(mask, age):
        return states_of_gains(z, kalman_gains(mask, age, q, p0))
    eta = eta_of(q)
    weight_in, weight_out = closed_form_terms(eta, p0, z.shape[-1], z.device)
    return exponential_scan(weight_in[age] * z, -eta) / weight_out[age]


def constant_gain_states(z: Tensor, mask: Tensor, age: Tensor, gain: float) -> Tensor:
    """x_t of an exponential moving average that holds where nothing is observed."""
    if gain < 1 and gapless(mask, age):
        return exponential_scan(gain * z, math.log1p(-gain))
    return states_of_gains(z, mask.double() * gain)


def states_of_gains(z: Tensor, gains: Tensor) -> Tensor:
    return affine_scan(1 - gains, gains * z)
