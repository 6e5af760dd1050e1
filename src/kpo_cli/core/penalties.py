"""What may stand beside the surrogate: a reference KL, an entropy bonus, and a correction for the sampling engine.

None of them touches z. The sampling engine's probability mu of a token differs a little from pi_old, the trainer's
own with the same weights; the correction reweights the loss by pi_old / mu, whatever the ratio filter does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceKL:
    """coefficient * k(log pi - log pi_ref) added to every token's loss (estimators of Schulman, 2020).

    With d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (GRPO's, 2402.03300, eq. 4). All estimate
    KL(pi || pi_ref) in value when tokens come from pi. As a loss they differ: the gradient of k1 is zero in
    expectation, that of k2 is the gradient of the KL, that of k3 is that of the reverse KL.
    """

    coefficient: float
    estimator: str = "k3"

    def __post_init__(self) -> None:
        if not 0 < self.coefficient < float("inf"):
            raise ValueError(f"the KL coefficient {self.coefficient} must be a finite number above 0")
        if self.estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"unknown KL estimator {self.estimator!r}; choose from k1, k2, k3")

    def __call__(self, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
        """The estimate for each token (B, T), without the coefficient."""
        difference = log_probs - ref_log_probs
        if self.estimator == "k1":
            return difference
        if self.estimator == "k2":
            return difference.square() / 2
        # expm1 keeps the digits that exp(-d) - 1 + d loses below |d| = 1e-3.
        return torch.expm1(-difference) + difference


class Correction(NamedTuple):
    """Weights for the token losses; both tensors are (B, T)."""

    weight: Tensor
    cut: Tensor
    """True where the weight was truncated or set to zero."""


class MismatchCorrection(Protocol):
    def __call__(self, log_weight: Tensor) -> Correction: ...


@dataclass(frozen=True)
class TruncatedImportance:
    """min(pi_old / mu, cap): truncated importance sampling (TIS), cap 2."""

    cap: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.cap < float("inf"):
            raise ValueError(f"cap={self.cap} must be a finite number above 0")

    def __call__(self, log_weight: Tensor) -> Correction:
        weight = log_weight.exp()
        return Correction(weight.clamp(max=self.cap), weight > self.cap)


@dataclass(frozen=True)
class MaskedImportance:
    """pi_old / mu where it lies in [low, high], else 0: tokens that the two engines disagree about are left out."""

    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < 1 < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: low must be below 1 and high above it")

    def __call__(self, log_weight: Tensor) -> Correction:
        weight = log_weight.exp()
        cut = (weight < self.low) | (weight > self.high)
        return Correction(torch.where(cut, 0.0, weight), cut)


CORRECTIONS: dict[str, Callable[..., MismatchCorrection]] = {
    "truncate": TruncatedImportance,
    "mask": MaskedImportance,
}


def mismatch_log_weight(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, sequence_level: bool) -> Tensor:
    """log(pi_old / mu) (B, T), zero outside the mask; for sequence-level methods the response's mean at each token,
    the logarithm of the geometric mean of its weights."""
    difference = torch.where(mask, old_log_probs - rollout_log_probs, 0.0)
    if not sequence_level:
        return difference
    mean = difference.sum(-1, keepdim=True, dtype=torch.float64) / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, mean.to(difference.dtype), 0.0)
