"""Surrogates: from ratio and advantage to a loss for each token.

A surrogate is called with `log_ratio` (B, T), whose value is the filtered log-ratio and whose gradient is that of the
log-probability, with `log_probs` (B, T), `advantages` (B, T) and `mask` (B, T), and returns a `TokenLoss`. Everything
is float32 or wider and zero outside the mask. A loss is to be minimised.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

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
    @property
    def sequence_level(self) -> bool:
        """True: one weight a response, so a mismatch correction is one weight a response as well."""

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss: ...


def _check_widths(eps_low: float, eps_high: float) -> None:
    if not 0 < eps_low <= 1:
        raise ValueError(f"eps_low={eps_low} must be above 0 and at most 1: the ratio is kept above 1 - eps_low")
    if not 0 < eps_high < float("inf"):
        raise ValueError(f"eps_high={eps_high} must be above 0: the ratio is kept below 1 + eps_high")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} must be a finite number above 0")


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Numbers by condition, in the dtype of `like`: `where` of two plain numbers would round them to float32."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def _ratio(log_ratio: Tensor, unused: Tensor) -> Tensor:
    """exp(log_ratio); 1 without a gradient where `unused`.

    What the loss does not use must not be computed: where exp overflows, 0 * inf makes NaN of a loss of 0 or, on the
    way back, of a gradient of 0.
    """
    return torch.where(unused, 0.0, log_ratio).exp()


@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate, -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), no dual clip (1707.06347, eq. 7)."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    sequence_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_widths(self.eps_low, self.eps_high)

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        # In log space, where a float32 near 0 keeps all its digits; 1 + 3e-4 has lost four of them.
        low = math.log1p(-self.eps_low) if self.eps_low < 1 else -math.inf
        above, below = log_ratio > math.log1p(self.eps_high), log_ratio < low
        positive = advantages > 0
        active = mask & ((above & positive) | (below & (advantages < 0)))
        # A choice instead of a minimum: a cut token's gradient is exactly zero, a kept one's is whole.
        bound = _choose(positive, 1 + self.eps_high, 1 - self.eps_low, log_ratio)
        limited = torch.where(active, bound, _ratio(log_ratio, active | (advantages == 0)))
        return TokenLoss(torch.where(mask, -advantages * limited, 0.0), active, mask & (above | below))


@dataclass(frozen=True)
class Unclipped:
    """-r A, no limit at all (KPO-unclipped, 2602.10609)."""

    sequence_level: ClassVar[bool] = False

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        none = torch.zeros_like(mask)
        return TokenLoss(torch.where(mask, -advantages * _ratio(log_ratio, advantages == 0), 0.0), none, none)


@dataclass(frozen=True)
class TruncatedWeight:
    """-sg[clip(r, 1 - eps_low, 1 + eps_high)] A log pi: each token's weight is truncated, its gradient never cut."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    sequence_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_widths(self.eps_low, self.eps_high)

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        ratio = log_ratio.detach().exp()
        weight = ratio.clamp(1 - self.eps_low, 1 + self.eps_high)
        outside = mask & ((ratio > 1 + self.eps_high) | (ratio < 1 - self.eps_low))
        return TokenLoss(torch.where(mask, -weight * advantages * log_probs, 0.0), outside, outside)


@dataclass(frozen=True)
class CappedWeight:
    """-sg[min(r, cap)] A log pi: only large weights are cut, and no token loses its gradient (CISPO, 2506.13585)."""

    cap: float = 5.0
    sequence_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("cap", self.cap)

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        ratio = log_ratio.detach().exp()
        outside = mask & (ratio > self.cap)
        loss = torch.where(mask, -ratio.clamp(max=self.cap) * advantages * log_probs, 0.0)
        return TokenLoss(loss, outside, outside)


@dataclass(frozen=True)
class GeometricMean:
    """-s A with s = exp(mean_t c_t) at each token of a response (GMPO, 2507.20673, eq. 4).

    c_t is the log-ratio limited in the direction in which the advantage pushes: min(z_t, eps_high) where A > 0,
    max(z_t, -eps_low) where A < 0. The limit acts before the mean, so this surrogate reduces over the response itself.
    """

    eps_low: float = 0.4
    eps_high: float = 0.4
    sequence_level: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive("eps_low", self.eps_low)
        _check_positive("eps_high", self.eps_high)

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        above, below = log_ratio > self.eps_high, log_ratio < -self.eps_low
        active = mask & ((above & (advantages > 0)) | (below & (advantages < 0)))
        limited = torch.where(active, log_ratio.detach().clamp(-self.eps_low, self.eps_high), log_ratio)
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        mean = (torch.where(mask, limited, 0.0).sum(-1, keepdim=True, dtype=torch.float64) / count).to(log_ratio.dtype)
        loss = -advantages * _ratio(mean, advantages == 0)
        return TokenLoss(torch.where(mask, loss, 0.0), active, mask & (above | below))


@dataclass(frozen=True)
class SoftGate:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A (SAPO, 2511.20347): a slope of 1 at r = 1, fading out."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    sequence_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("tau_positive", self.tau_positive)
        _check_positive("tau_negative", self.tau_negative)

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        tau = _choose(advantages > 0, self.tau_positive, self.tau_negative, log_ratio)
        # The gate is flat long before exp overflows, at 88 in float32.
        gate = 4 / tau * torch.sigmoid(tau * (log_ratio.clamp(max=80).exp() - 1))
        none = torch.zeros_like(mask)
        return TokenLoss(torch.where(mask, -gate * advantages, 0.0), none, none)


@dataclass(frozen=True)
class GrowingBand:
    """PPO clip of a prefix ratio in a log-space band that grows as sqrt(t) (CTPO, 2605.07331, and its authors' code).

    At the t-th token of the response log r is kept in [-eps_low sqrt(t), eps_high sqrt(t)], one-sided by the sign of A
    as in PPO; where A < 0 the loss is also bounded from above, at eps_high sqrt(t) (a dual clip that grows as well).
    """

    eps_low: float = 0.025
    eps_high: float = 0.05
    sequence_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("eps_low", self.eps_low)
        _check_positive("eps_high", self.eps_high)

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        root = mask.cumsum(-1).to(log_ratio.dtype).sqrt()
        low, high = -self.eps_low * root, self.eps_high * root
        above, below = log_ratio > high, log_ratio < low
        active = mask & ((above & (advantages != 0)) | (below & (advantages < 0)))
        limited = torch.where(active, torch.clamp(log_ratio.detach(), low, high), log_ratio)
        loss = -advantages * _ratio(limited, advantages == 0)
        return TokenLoss(torch.where(mask, loss, 0.0), active, mask & (above | below))


@dataclass(frozen=True)
class SequenceKernel:
    """-sg[phi(W)] A log pi with phi(W) = W^k exp(lambda (1 - W)), W the whole response's ratio (VESPO, 2602.10693).

    W is a product over all tokens, not normalised by length; its logarithm is kept in [-18.42, 20] as in the authors'
    code. phi(1) = 1, and phi fades out on both sides, by the sign of A at different speeds.
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    sequence_level: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            _check_positive(name, getattr(self, name))

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        total = torch.where(mask, log_ratio.detach(), 0.0).sum(-1, keepdim=True, dtype=torch.float64)
        log_weight = total.clamp(math.log(1e-8), 20.0).to(log_ratio.dtype)
        positive = advantages >= 0
        k = _choose(positive, self.k_positive, self.k_negative, log_weight)
        rate = _choose(positive, self.lambda_positive, self.lambda_negative, log_weight)
        phi = (k * log_weight + rate * (1 - log_weight.exp())).exp()
        none = torch.zeros_like(mask)
        return TokenLoss(torch.where(mask, -phi * advantages * log_probs, 0.0), none, none)


@dataclass(frozen=True)
class ProbabilityMask:
    """-sg[r] A log pi, without the tokens whose probability p moved too far where A pushes (DPPO, 2602.04879).

    A token is left out if p - q > delta with A > 0, or p - q < -delta with A <= 0: |p - q| is the total variation
    between the two policies on {this token, any other}. The paper measures q and r against the sampling engine;
    here q is the old policy as the trainer computes it, and the engine's mismatch is corrected apart.
    """

    delta: float = 0.15
    sequence_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ValueError(f"delta={self.delta} must be between 0 and 1: it is a difference of probabilities")

    def __call__(self, log_ratio: Tensor, log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        z, p = log_ratio.detach(), log_probs.detach().exp()
        # p - q = p (1 - exp(-z)), which keeps its digits where p and q are close.
        moved = -p * torch.expm1(-z)
        far = mask & (moved.abs() > self.delta)
        active = far & torch.where(advantages > 0, moved > 0, moved < 0)
        weight = torch.where(active, 0.0, _ratio(z, active | (advantages == 0)))
        return TokenLoss(torch.where(mask, -weight * advantages * log_probs, 0.0), active, far)


SURROGATES: dict[str, Callable[..., Surrogate]] = {
    "clip": Clip,
    "unclipped": Unclipped,
    "truncated_weight": TruncatedWeight,
    "capped_weight": CappedWeight,
    "geometric_mean": GeometricMean,
    "soft_gate": SoftGate,
    "growing_band": GrowingBand,
    "sequence_kernel": SequenceKernel,
    "probability_mask": ProbabilityMask,
}
