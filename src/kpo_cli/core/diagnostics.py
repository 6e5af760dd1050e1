"""Sums over tokens from which the ratio metrics are made.

Metrics that are ratios of sums (a standard deviation, an effective sample size) cannot be averaged over
micro-batches or ranks. So the sums are kept, added up, and turned into metrics once, at the end.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean that is not divided yet, so that parts can be added."""

    total: float
    number: float

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> "Mean":
        """Over the valid tokens; tensors (B, T)."""
        total = torch.where(mask, values.detach(), 0.0).sum(dtype=torch.float64)
        return cls(*torch.stack([total, mask.sum().double()]).tolist())

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.number + other.number)

    @property
    def value(self) -> float:
        return self.total / self.number if self.number else float("nan")


@dataclass(frozen=True)
class RatioSums:
    """Sums over valid tokens, in float64, of the raw log-ratio z and of what the surrogate cut; they add up."""

    tokens: float = 0.0
    z: float = 0.0
    z_squared: float = 0.0
    k3: float = 0.0
    ratio: float = 0.0
    ratio_squared: float = 0.0
    filtered_squared: float = 0.0
    clip_active: float = 0.0
    clip_outside: float = 0.0

    @classmethod
    def of(cls, z: Tensor, filtered: Tensor, active: Tensor, outside: Tensor, mask: Tensor) -> "RatioSums":
        """All tensors (B, T); tokens outside `mask` are left out. One wait for the device."""
        z, filtered = torch.where(mask, z, 0.0).double(), torch.where(mask, filtered, 0.0).double()
        tokens, excess = mask.sum().double(), torch.expm1(z)  # r - 1
        # z as used here is log(pi_theta / pi_old); k3 of KL(pi_old || pi_theta) is r - 1 - z, which expm1 keeps
        # exact below |z| = 1e-3, where float32 returns noise.
        sums = [
            tokens,
            z.sum(),
            z.square().sum(),
            (excess - z).sum(),
            tokens + excess.sum(),
            tokens + (excess * (2 + excess)).sum(),  # r^2 - 1
            filtered.square().sum(),
            (active & mask).sum().double(),
            (outside & mask).sum().double(),
        ]
        return cls(*torch.stack(sums).tolist())

    def __add__(self, other: "RatioSums") -> "RatioSums":
        return RatioSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def metrics(self) -> dict[str, float]:
        """The metrics of docs/metrics.md that describe ratios; NaN where there was no token."""
        n = self.tokens or float("nan")
        variance = self.z_squared / n - (self.z / n) ** 2
        return {
            "kl_k3": self.k3 / n,
            "log_ratio_mean": self.z / n,
            "log_ratio_std": (0.0 if variance < 0 else variance) ** 0.5,
            "filtered_log_ratio_rms": (self.filtered_squared / n) ** 0.5,
            "ratio_ess": self.ratio**2 / (n * (self.ratio_squared or 1.0)),
            "clip_fraction_active": self.clip_active / n,
            "clip_fraction_outside": self.clip_outside / n,
        }
