"""Ratio filters: what becomes of the log-ratio of a response before the surrogate sees it.

A filter maps `z` (B, T), the detached token log-ratios, `mask` (B, T), true on the tokens of the response, and
`old_log_probs` (B, T) to the filtered log-ratios (B, T), zero outside the mask. Responses are rows and time runs along
the last axis; a row is never mixed with another. A row begins at its first valid token, so padding on either side
changes nothing; a gap inside a row (tool output, say) is time that passes unobserved. All arithmetic is float64,
whatever comes in: the clip widths that follow are a few 1e-4, and float32 cumulative sums lose them.

The Kalman filter is that of He et al., arXiv 2602.10609 (KPO):

    x_t = x_{t-1} + w_t,  w_t ~ N(0, Q)        z_t = x_t + v_t,  v_t ~ N(0, V_t)        x_0 = 0, P_0 = p0
    predict  P- = P + Q        gain  K = P- / (P- + V_t)        update  x += K (z - x),  P = (1 - K) P-

With one V for all tokens only q = Q/V and p0/V matter for x, and the gain has a closed form (`kpo_cli.core.scans`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from kpo_cli.core import noise
from kpo_cli.core.checks import as_mask, check_same_shape, cleaned
from kpo_cli.core.recursion import (
    Rows,
    constant_gain_states,
    eta_of,
    kalman_gains,
    kalman_states,
    states_of_gains,
)
from kpo_cli.core.robust import saturated_scan
from kpo_cli.core.scans import riccati_gains


class RatioFilter(Protocol):
    """A frozen dataclass that is both the configuration of a filter and the filter."""

    @property
    def straight_through(self) -> bool:
        """True: the output is treated as a constant and the gradient is that of the raw log-probability."""

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Identity:
    """No filter: every token keeps its own log-ratio (GRPO and all token-level methods)."""

    straight_through: ClassVar[bool] = True

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        return torch.where(mask, z, 0.0)


@dataclass(frozen=True)
class SequenceMean:
    """The mean log-ratio of the response at each of its tokens: the logarithm of GSPO's s_i (2507.18071, eq. 7).

    `straight_through=False` is GSPO (the gradient flows through the mean), `True` is its token variant, GSPO-token
    (eq. 13 there). With one advantage per response the two have the same loss and the same gradient.
    """

    straight_through: bool = False

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        mask = as_mask(mask)
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(mask, z, 0.0).sum(-1, keepdim=True, dtype=torch.float64) / count
        return torch.where(mask, mean.to(torch.promote_types(z.dtype, torch.float32)), 0.0)


@dataclass(frozen=True)
class PrefixSum:
    """The log-ratio of the whole prefix, sum of z_1 .. z_t: what importance sampling of a prefix asks for (CTPO)."""

    straight_through: ClassVar[bool] = True

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        rows = Rows.of(z, mask)
        return rows.finished(rows.z.cumsum(-1))


@dataclass(frozen=True)
class Ema:
    """Exponential moving average with a constant `gain`, x += gain (z - x) at observed tokens, x_0 = 0."""

    gain: float = 0.03
    straight_through: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.gain <= 1:
            raise ValueError(f"filter.gain={self.gain} must be above 0 and at most 1")

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        rows = Rows.of(z, mask)
        return rows.filtered(lambda part: constant_gain_states(part, self.gain))


@dataclass(frozen=True)
class SteadyKalman:
    """The Kalman filter with its gain at the limit K_inf(Q/V) from the first token on: the null hypothesis for KPO."""

    q: float = 1e-6
    v: float = 1.0
    straight_through: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_noise(self.q, self.v, 0.0)

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        rows = Rows.of(z, mask)
        gain = -math.expm1(-eta_of(self.q / self.v))
        return rows.filtered(lambda part: constant_gain_states(part, gain))


@dataclass(frozen=True)
class Kalman:
    """The causal Kalman filter of KPO: process noise `q` (Q), observation noise `v` (V), prior variance `p0`."""

    q: float = 1e-6
    v: float = 1.0
    p0: float = 0.0
    straight_through: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_noise(self.q, self.v, self.p0)

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        return kalman_filter(z, mask, q=self.q, v=self.v, p0=self.p0)


@dataclass(frozen=True)
class HeteroKalman:
    """Kalman filter whose observation noise knows how sure the old policy was: V_t = v max(1 - p_t, miss_floor)^gamma.

    p_t is the old probability of the sampled token. Measured on ratios of small policies, this predicts held-out
    ratios far better than a constant V: a token that was nearly certain has nearly no noise. `miss_floor` keeps V_t
    above zero. Only q/v and gamma matter for x.
    """

    q: float = 1e-6
    v: float = 1.0
    gamma: float = 2.8
    miss_floor: float = 1e-4
    p0: float = 0.0
    straight_through: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_noise(self.q, self.v, self.p0)
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"filter.gamma={self.gamma} must be a finite number, at least 0")
        if not 0 < self.miss_floor <= 1:
            raise ValueError(f"filter.miss_floor={self.miss_floor} must be above 0 and at most 1")

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        mask = as_mask(mask)
        check_same_shape(z=z, mask=mask, old_log_probs=old_log_probs)
        miss = torch.expm1(cleaned(mask, old_log_probs=old_log_probs.detach())["old_log_probs"].double()).neg_()
        variance = miss.clamp_(min=self.miss_floor).pow_(self.gamma).mul_(self.v)
        return kalman_filter_varying(z, mask, q=self.q, variance=variance, p0=self.p0)


@runtime_checkable
class AdaptiveFilter(RatioFilter, Protocol):
    """A filter whose noise is fitted to recent log-ratios, once for each rollout batch.

    It stays frozen: `refit` returns another one. All its state is a vector of sums, which add up over ranks and
    micro-batches and are forgotten at the rate 1 - `memory`; the trainer keeps them and puts them in the checkpoint.
    """

    @property
    def memory(self) -> float: ...

    def sums(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor: ...

    def refit(self, sums: Tensor) -> tuple["AdaptiveFilter", str | None]:
        """The filter fitted to `sums`, and a line for the user where the fit says something unusual."""


@dataclass(frozen=True)
class AdaptiveKalman(Kalman):
    """Kalman filter with Q and the noise by maximum likelihood on recent off-policy log-ratios (`kpo_cli.core.noise`).

    V_t = v (m_t^gamma + constant) with m_t = 1 - p_t, p_t the old probability of the token, all of it fitted together.
    `q` and `v` are where it starts: `gamma` 0 and `constant` 0, the same V for all tokens. On real ratios the most
    likely Q may be 0, no drift beyond the noise; then Q/v is `floor`, and `refit` says so. `memory` is the weight of
    the past at each new batch.
    """

    floor: float = 1e-8
    memory: float = 0.8
    gamma: float = 0.0
    constant: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_memory(self.memory)
        if not 1e-10 <= self.floor <= 1:
            raise ValueError(f"filter.floor={self.floor} must be between 1e-10 and 1")
        for name in ("gamma", "constant"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"filter.{name}={getattr(self, name)} must be a finite number, at least 0")
        if self.gamma and not self.constant:
            raise ValueError(
                f"filter.gamma={self.gamma} needs a filter.constant above 0: a sure token has no other noise"
            )

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        if not self.gamma:
            return kalman_filter(z, mask, q=self.q, v=self.v * (1 + self.constant), p0=self.p0)
        mask = as_mask(mask)
        check_same_shape(z=z, mask=mask, old_log_probs=old_log_probs)
        miss = noise.miss_of(cleaned(mask, old_log_probs=old_log_probs.detach())["old_log_probs"], mask.shape)
        variance = noise.Shape(self.gamma, self.constant)(miss).mul_(self.v)
        return kalman_filter_varying(z, mask, q=self.q, variance=variance, p0=self.p0)

    def sums(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        return noise.walk_sums(z, mask, old_log_probs)

    def refit(self, sums: Tensor) -> tuple["AdaptiveKalman", str | None]:
        fit = noise.fit_walk(sums, self.floor)
        if fit is None:
            return self, None
        note = None
        if fit.on_floor:
            note = f"the adaptive filter sees no drift beyond noise; Q/v stays on its floor {self.floor:g}"
        return replace(self, q=fit.q, v=fit.v, gamma=fit.shape.gamma, constant=fit.shape.constant), note


@dataclass(frozen=True)
class AdaptiveHeteroKalman(HeteroKalman):
    """HeteroKalman with `gamma` by maximum likelihood on recent off-policy log-ratios; Q/V stays as given."""

    memory: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_memory(self.memory)

    def sums(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        return noise.miss_sums(z, old_log_probs, mask, self.miss_floor)

    def refit(self, sums: Tensor) -> tuple["AdaptiveHeteroKalman", str | None]:
        fit = noise.fit_miss(sums)
        if fit is None:
            return self, None
        v, gamma = fit
        return replace(self, q=self.q / self.v * v, v=v, gamma=gamma), None


@dataclass(frozen=True)
class RobustKalman:
    """Kalman filter whose innovations z - x are cut at `kappa` of their own standard deviations, sqrt(P- + V).

    A single wild token then moves x by at most K kappa sqrt(P- + V). Unlike in the plain filter the scale of `v`
    matters, not only Q/V: sqrt(v) should be about the spread of ordinary log-ratios.
    """

    q: float = 1e-10
    v: float = 1e-4
    kappa: float = 3.0
    p0: float = 0.0
    straight_through: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_noise(self.q, self.v, self.p0)
        if not self.kappa > 0:
            raise ValueError(f"filter.kappa={self.kappa} must be above 0")

    def __call__(self, z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
        rows = Rows.of(z, mask)
        gains = kalman_gains(rows, self.q / self.v, self.p0 / self.v)
        # P- + V = V / (1 - K), from K = P- / (P- + V).
        limit = self.kappa * torch.sqrt(self.v / (1 - gains))
        return rows.finished(saturated_scan(rows.z, gains, limit))


FILTERS: dict[str, Callable[..., RatioFilter]] = {
    "identity": Identity,
    "sequence_mean": SequenceMean,
    "prefix_sum": PrefixSum,
    "ema": Ema,
    "steady_kalman": SteadyKalman,
    "kalman": Kalman,
    "kalman_hetero": HeteroKalman,
    "kalman_hetero_fitted": AdaptiveHeteroKalman,
    "kalman_adaptive": AdaptiveKalman,
    "kalman_robust": RobustKalman,
}


def kalman_filter(z: Tensor, mask: Tensor, *, q: float, v: float, p0: float = 0.0) -> Tensor:
    """Filter log-ratios `z` (B, T) along each row; returns (B, T), zero where `mask` is false.

    The filter of a row starts at its first valid token (padding on either side changes nothing). A gap inside a row
    (tool output, say) is time that passes unobserved: predict, no update. Values outside the mask may be anything,
    NaN included. The result has z's dtype, or float32 if z is narrower, and no gradient (the filter runs on constants;
    an objective adds the gradient of the log-probabilities back).

    Raises ValueError for wrong shapes, noise that is not positive, or a non-finite z on a valid token.
    """
    _check_noise(q, v, p0)
    rows = Rows.of(z, mask)
    return rows.filtered(lambda part: kalman_states(part, q / v, p0 / v))


def kalman_filter_varying(z: Tensor, mask: Tensor, *, q: float, variance: Tensor, p0: float = 0.0) -> Tensor:
    """`kalman_filter` with an observation variance for each token, `variance` (B, T), positive where `mask` is true."""
    _check_noise(q, 1.0, p0)
    rows = Rows.of(z, mask)
    check_same_shape(z=z, variance=variance)
    clean = cleaned(rows.mask, variance=variance)["variance"].double()
    if bool((rows.mask & (clean <= 0)).any()):
        raise ValueError("variance must be above 0 on every valid token")
    precision = torch.where(rows.mask, (1 / clean).clamp(max=torch.finfo(torch.float64).max), 0.0)
    gains = riccati_gains(precision, (rows.age > 0).double() * q, p0)
    return rows.finished(states_of_gains(rows.z, gains))


def _check_noise(q: float, v: float, p0: float) -> None:
    for name, value in (("q", q), ("v", v)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"filter.{name}={value} must be a finite number above 0")
    if not (math.isfinite(p0) and p0 >= 0):
        raise ValueError(f"filter.p0={p0} must be a finite number, at least 0")


def _check_memory(memory: float) -> None:
    if not 0 <= memory < 1:
        raise ValueError(f"filter.memory={memory} must be at least 0 and below 1")


@dataclass(frozen=True)
class KalmanMeaning:
    """What a noise setting does, in words that carry over between response lengths."""

    q_over_v: float
    steady_gain: float
    """K after many tokens: the weight of the newest log-ratio."""
    time_constant: float
    """Tokens over which the steady filter forgets by a factor e: 1 / eta."""
    share_passed: float
    """Part of a constant log-ratio that shows at the last token of a response of the given length (p0 = 0)."""


def kalman_meaning(q: float, v: float, length: int) -> KalmanMeaning:
    """Steady gain, time constant (tokens) and share of a constant shift passed after `length` tokens, for p0 = 0."""
    eta = eta_of(q / v)
    # cosh(eta/2) / cosh(eta (t + 1/2)) with the growing exponential divided out.
    hidden = math.exp(-eta * length) * (1 + math.exp(-eta)) / (1 + math.exp(-eta * (2 * length + 1)))
    return KalmanMeaning(q / v, -math.expm1(-eta), 1 / eta, 1 - hidden)


def q_over_v_of(time_constant: float) -> float:
    """Q/V whose steady filter has the given time constant in tokens: 4 sinh^2(1 / (2 tau))."""
    if not (math.isfinite(time_constant) and time_constant > 0):
        raise ValueError(f"filter.time_constant={time_constant} must be a finite number of tokens above 0")
    return 4 * math.sinh(1 / (2 * time_constant)) ** 2
