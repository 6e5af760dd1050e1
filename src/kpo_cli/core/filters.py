"""Ratio filters: what becomes of the log-ratio of a response before the surrogate sees it.

A filter maps `z` (B, T), the detached token log-ratios, and `mask` (B, T), true on the tokens of the response, to
the filtered log-ratios (B, T), zero outside the mask. Responses are rows and time runs along the last axis; a row
is never mixed with another. All arithmetic is float64, whatever comes in: the clip widths that follow are a few
1e-4, and float32 cumulative sums lose them.

The Kalman filter is that of He et al., arXiv 2602.10609 (KPO):

    x_t = x_{t-1} + w_t,  w_t ~ N(0, Q)        z_t = x_t + v_t,  v_t ~ N(0, V)        x_0 = 0, P_0 = p0

Only q = Q/V and p0/V matter for x. With eta = 2 asinh(sqrt(q)/2) and lambda = exp(-eta) its gain has a closed
form, so the recursion is an exponential moving average with known weights on the way in and out (`_gain_terms`),
and that is a chunked scan (`exponential_scan`) instead of a loop over tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kpo_cli.core.checks import as_mask, check_finite, check_same_shape

CHUNK = 32
"""Tokens per block of the scan. 16 to 64 measure alike; 32 is the middle."""


class RatioFilter(Protocol):
    """A frozen dataclass that is both the configuration of a filter and the filter."""

    @property
    def straight_through(self) -> bool:
        """True: the output is treated as a constant and the gradient is that of the raw log-probability."""

    def __call__(self, z: Tensor, mask: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Identity:
    """No filter: every token keeps its own log-ratio (GRPO and all token-level methods)."""

    straight_through: ClassVar[bool] = True

    def __call__(self, z: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, z, 0.0)


@dataclass(frozen=True)
class SequenceMean:
    """The mean log-ratio of the response at each of its tokens: the logarithm of GSPO's s_i (2507.18071, eq. 7).

    `straight_through=False` is GSPO (the gradient flows through the mean), `True` is its token variant, GSPO-token
    (eq. 13 there). With one advantage per response the two have the same loss and the same gradient.
    """

    straight_through: bool = False

    def __call__(self, z: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(mask, z, 0.0).sum(-1, keepdim=True) / count
        return torch.where(mask, mean, 0.0)


@dataclass(frozen=True)
class Kalman:
    """The causal Kalman filter of KPO: process noise `q` (Q), observation noise `v` (V), prior variance `p0`."""

    q: float = 1e-6
    v: float = 1.0
    p0: float = 0.0
    straight_through: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, low in (
            ("q", self.q, "above 0"),
            ("v", self.v, "above 0"),
            ("p0", self.p0, "at least 0"),
        ):
            if not math.isfinite(value) or value < 0 or (value == 0 and low == "above 0"):
                raise ValueError(f"filter.{name}={value} must be a finite number {low}")

    def __call__(self, z: Tensor, mask: Tensor) -> Tensor:
        return kalman_filter(z, mask, q=self.q, v=self.v, p0=self.p0)


FILTERS: dict[str, Callable[..., RatioFilter]] = {
    "identity": Identity,
    "sequence_mean": SequenceMean,
    "kalman": Kalman,
}


def kalman_filter(z: Tensor, mask: Tensor, *, q: float, v: float, p0: float = 0.0) -> Tensor:
    """Filter log-ratios `z` (B, T) along each row; returns (B, T), zero where `mask` is false.

    The filter of a row starts at its first valid token (padding on either side changes nothing). A gap inside a row
    (tool output, say) is time that passes unobserved: predict, no update. Values outside the mask may be anything,
    NaN included. The result has z's dtype, or float32 if z is narrower.

    Raises ValueError for wrong shapes, noise that is not positive, or a non-finite z on a valid token.
    """
    _check_noise(q, v, p0)
    mask = as_mask(mask)
    check_same_shape(z=z, mask=mask)
    check_finite("z", z, mask)
    values = torch.where(mask, z, 0.0).to(torch.float64)
    age = mask.cumsum(-1)  # 1 at the first valid token
    first = mask.int().argmax(-1, keepdim=True)
    column = torch.arange(z.shape[-1], device=z.device)
    gapless = bool(((column - first + 1 == age) | ~mask).all())
    x = _filter_gapless(values, age, q / v, p0 / v) if gapless else _filter_serial(values, mask, age, q / v, p0 / v)
    return torch.where(mask, x, 0.0).to(torch.promote_types(z.dtype, torch.float32))


def _check_noise(q: float, v: float, p0: float) -> None:
    for name, value in (("q", q), ("v", v)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"filter.{name}={value} must be a finite number above 0")
    if not (math.isfinite(p0) and p0 >= 0):
        raise ValueError(f"filter.p0={p0} must be a finite number, at least 0")


def _filter_gapless(z: Tensor, age: Tensor, q: float, p0: float) -> Tensor:
    eta = 2 * math.asinh(math.sqrt(q) / 2)
    weight_in, weight_out = _gain_terms(eta, p0, z.shape[-1], z.device)
    return exponential_scan(weight_in[age] * z, -eta) / weight_out[age]


def _gain_terms(eta: float, p0: float, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """h_t and g_t for t = 0 .. length with gain K_t = h_t / g_t, and g_t x_t = lambda g_{t-1} x_{t-1} + h_t z_t.

    With d_t the denominator of the Riccati recursion, d_t = a e^(eta t) + (1 - a) e^(-eta t), these are
    g_t = d_t e^(-eta t) and h_t = (d_t - d_{t-1}) e^(-eta t); the scaling keeps both within a few units of 1 at any
    length. `expm1` and `excess` = 2a - 1 keep full precision where q is tiny and the plain form cancels.
    """
    t = torch.arange(length + 1, dtype=torch.float64, device=device)
    excess = math.tanh(eta / 2) + (p0 / math.sinh(eta) if p0 else 0.0)
    b = (1 - excess) / 2  # 1 - a
    g = 1 + b * torch.expm1(-2 * eta * t)
    h = -math.expm1(-eta) * (excess - b * torch.expm1(-(2 * t - 1) * eta))
    return h, g


def exponential_scan(u: Tensor, log_decay: float) -> Tensor:
    """y_t = exp(log_decay) y_{t-1} + u_t along the last axis of `u` (B, T), float64, y_0 = 0.

    Inside a block of CHUNK tokens it is one product with a constant lower-triangular Toeplitz matrix; the block ends
    obey the same recursion with the decay of a whole block, so the function calls itself on them.
    """
    rows, length = u.shape
    blocks = -(-length // CHUNK)
    lag = torch.arange(CHUNK, dtype=u.dtype, device=u.device)
    toeplitz = torch.exp(log_decay * (lag[None, :] - lag[:, None]).clamp(min=0)).triu()  # [from, to]
    padded = torch.nn.functional.pad(u, (0, blocks * CHUNK - length)).view(rows, blocks, CHUNK)
    y = padded @ toeplitz
    if blocks > 1:
        ends = exponential_scan(y[:, :, -1], log_decay * CHUNK)
        y[:, 1:] += ends[:, :-1, None] * torch.exp(log_decay * (lag + 1))
    return y.reshape(rows, blocks * CHUNK)[:, :length]


def _filter_serial(z: Tensor, mask: Tensor, age: Tensor, q: float, p0: float) -> Tensor:
    """The recursion token by token, for rows with unobserved tokens inside."""
    x = torch.zeros_like(z[:, 0])
    p = torch.full_like(x, p0)
    out = []
    for t in range(z.shape[-1]):
        p = torch.where(age[:, t] > 0, p + q, p)
        gain = torch.where(mask[:, t], p / (p + 1), 0.0)
        x = x + gain * (z[:, t] - x)
        p = (1 - gain) * p
        out.append(x)
    return torch.stack(out, dim=-1)


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
    ratio = q / v
    eta = 2 * math.asinh(math.sqrt(ratio) / 2)
    # cosh(eta/2) / cosh(eta (t + 1/2)) with the growing exponential divided out.
    hidden = math.exp(-eta * length) * (1 + math.exp(-eta)) / (1 + math.exp(-eta * (2 * length + 1)))
    return KalmanMeaning(ratio, -math.expm1(-eta), 1 / eta, 1 - hidden)


def q_over_v_of(time_constant: float) -> float:
    """Q/V whose steady filter has the given time constant in tokens: 4 sinh^2(1 / (2 tau))."""
    if not (math.isfinite(time_constant) and time_constant > 0):
        raise ValueError(f"filter.time_constant={time_constant} must be a finite number of tokens above 0")
    return 4 * math.sinh(1 / (2 * time_constant)) ** 2
