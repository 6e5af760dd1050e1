"""The Kalman recursion over rows of tokens, in float64; filters and noise models both stand on it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kpo_cli.core.checks import as_mask, check_same_shape, cleaned
from kpo_cli.core.scans import CERTAIN, affine_scan, closed_form_terms, exponential_scan, riccati_gains

CACHED_TOKENS = 2**16
"""Tokens that a CPU filters at once: half a megabyte a temporary. Measured 2 to 4 times faster than 2 MB and more."""


def eta_of(q_over_v: float) -> float:
    """The filter's rate in 1/tokens; its steady gain is 1 - exp(-eta) and its time constant 1/eta."""
    return 2 * math.asinh(math.sqrt(q_over_v) / 2)


@dataclass(frozen=True)
class Rows:
    """Responses as rows of log-ratios, checked."""

    clean: Tensor
    """(B, T) log-ratios as they came, zero where `mask` is false, without a gradient."""
    mask: Tensor
    """(B, T) bool."""
    dtype: torch.dtype
    """That of the result: the input's, or float32 if it is narrower."""

    @classmethod
    def of(cls, z: Tensor, mask: Tensor) -> "Rows":
        """Raises ValueError for shapes and dtypes that do not fit and for a non-finite z on a valid token."""
        mask = as_mask(mask)
        check_same_shape(z=z, mask=mask)
        return cls(cleaned(mask, z=z.detach())["z"], mask, torch.promote_types(z.dtype, torch.float32))

    @cached_property
    def z(self) -> Tensor:
        """(B, T) float64."""
        return self.clean.double()

    @cached_property
    def age(self) -> Tensor:
        """(B, T) int64, the number of valid tokens up to and including each token; 0 before a row begins."""
        return self.mask.cumsum(-1)

    @cached_property
    def _begins(self) -> Tensor:
        """(B, T - 1) bool: a valid token after one that is not."""
        return self.mask[:, 1:] > self.mask[:, :-1]

    @cached_property
    def prefix(self) -> bool:
        """True if the valid tokens of every row are its first ones: padding on the right alone."""
        return int(torch.count_nonzero(self._begins)) == 0

    @cached_property
    def gapless(self) -> bool:
        """True if the valid tokens of every row stand next to each other."""
        return self.prefix or bool((self._begins.sum(-1) + self.mask[:, 0] <= 1).all())

    def by_age(self, values: Tensor) -> Tensor:
        """values[age] of gapless rows, right on valid tokens: (B, T), or (T,) where all rows share it."""
        return values[1:] if self.prefix else values[self.age]

    def finished(self, x: Tensor) -> Tensor:
        """`x` zero outside the mask, in the result's dtype."""
        return torch.where(self.mask, x.to(self.dtype), 0.0)

    def filtered(self, states: Callable[["Rows"], Tensor]) -> Tensor:
        """`states` of all rows, finished; on a CPU a few rows at a time, so that float64 temporaries stay in cache."""
        at_once = max(1, CACHED_TOKENS // self.mask.shape[1])
        if self.mask.is_cuda or at_once >= len(self.mask):
            return self.finished(states(self))
        out = torch.empty_like(self.clean, dtype=self.dtype)
        for start in range(0, len(self.mask), at_once):
            some = slice(start, start + at_once)
            part = Rows(self.clean[some], self.mask[some], self.dtype)
            out[some] = part.finished(states(part))
        return out


def kalman_gains(rows: Rows, q: float, p0: float) -> Tensor:
    """Gains K_t (B, T), zero where nothing is observed; noise relative to V."""
    q, p0 = min(q, CERTAIN), min(p0, CERTAIN)
    if rows.gapless:
        h, g = closed_form_terms(eta_of(q), p0, rows.mask.shape[-1], rows.mask.device)
        return torch.where(rows.mask, rows.by_age(h / g), 0.0)
    return riccati_gains(rows.mask.double(), (rows.age > 0).double() * q, p0)


def kalman_states(rows: Rows, q: float, p0: float) -> Tensor:
    """Filtered states x_t (B, T) with constant noise, relative to V."""
    if not rows.gapless:
        return states_of_gains(rows.z, kalman_gains(rows, q, p0))
    q, p0 = min(q, CERTAIN), min(p0, CERTAIN)
    eta = eta_of(q)
    weight_in, weight_out = closed_form_terms(eta, p0, rows.mask.shape[-1], rows.mask.device)
    return exponential_scan(rows.z * rows.by_age(weight_in), -eta).div_(rows.by_age(weight_out))


def constant_gain_states(rows: Rows, gain: float) -> Tensor:
    """x_t of an exponential moving average that holds where nothing is observed."""
    if gain < 1 and rows.gapless:
        return exponential_scan(gain * rows.z, math.log1p(-gain))
    return states_of_gains(rows.z, rows.mask.double() * gain)


def states_of_gains(z: Tensor, gains: Tensor, kept: float = 1.0) -> Tensor:
    """x_t (B, T) = kept (1 - K_t) x_{t-1} + K_t z_t."""
    return affine_scan(kept * (1 - gains), gains * z)
