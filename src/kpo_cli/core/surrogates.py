"""Surrogates: from ratio and advantage to a loss for each token.

A surrogate is called with `log_ratio` (B, T), whose value is the filtered log-ratio and whose gradient is that of the
log-probability, with `log_probs` (B, T), `advantages` (B, T) and `mask` (B, T), and returns a `TokenLoss`. Everything
is float32 or wider and zero outside the mask. A loss is to be minimised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TokenLoss(NamedTuple):
    """What a surrogate makes of a batch; every tensor is (B, T)."""

    loss: Tensor
    active: Tensor
    """True where the limit decides the loss: the token's gradient is cut (or its weight truncated)."""
    outside: Tensor
    """True where the ratio lies outside the interval, whatever the sign of the advantage."""


class Surrogate(Protocol):
    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss: ...


def _check_widths(eps_low: float, eps_high: float) -> None:
    if not 0 < eps_low <= 1:
        raise ValueError(f"eps_low={eps_low} must be above 0 and at most 1: the ratio is kept above 1 - eps_low")
    if not 0 < eps_high < float("inf"):
        raise ValueError(f"eps_high={eps_high} must be above 0: the ratio is kept below 1 + eps_high")


@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate, -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), no dual clip (1707.06347, eq. 7)."""

    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self) -> None:
        _check_widths(self.eps_low, self.eps_high)

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        ratio = log_ratio.exp()
        above, below = ratio > 1 + self.eps_high, ratio < 1 - self.eps_low
        active = mask & ((above & (advantages > 0)) | (below & (advantages < 0)))
        # A choice instead of a minimum: a cut token's gradient is exactly zero, a kept one's is whole.
        limited = torch.where(active, ratio.detach().clamp(1 - self.eps_low, 1 + self.eps_high), ratio)
        return TokenLoss(torch.where(mask, -advantages * limited, 0.0), active, mask & (above | below))


@dataclass(frozen=True)
class Unclipped:
    """-r A, no limit at all (KPO-unclipped, 2602.10609)."""

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        none = torch.zeros_like(mask)
        return TokenLoss(torch.where(mask, -advantages * log_ratio.exp(), 0.0), none, none)


@dataclass(frozen=True)
class TruncatedWeight:
    """-sg[clip(r, 1 - eps_low, 1 + eps_high)] A log pi: each token's weight is truncated, its gradient never cut."""

    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self) -> None:
        _check_widths(self.eps_low, self.eps_high)

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        ratio = log_ratio.detach().exp()
        weight = ratio.clamp(1 - self.eps_low, 1 + self.eps_high)
        outside = mask & ((ratio > 1 + self.eps_high) | (ratio < 1 - self.eps_low))
        return TokenLoss(torch.where(mask, -weight * advantages * log_probs, 0.0), outside, outside)


SURROGATES: dict[str, Callable[..., Surrogate]] = {
    "clip": Clip,
    "unclipped": Unclipped,
    "truncated_weight": TruncatedWeight,
}
