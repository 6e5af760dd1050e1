"""Noise models of the ratio filters, fitted to recorded log-ratios; kept apart from the recursion that uses them.

Every fit is made of sums over tokens on a fixed grid of its one nonlinear parameter. Sums add up over batches and
ranks, can be forgotten at a rate, and are all the state that an adaptive filter has.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kpo_cli.core.recursion import Rows, kalman_gains, kalman_states

LOG_Q_GRID = tuple(-10 + 0.2 * i for i in range(61))
"""log10(Q/V) from 1e-10 to 1e2."""
GAMMA_GRID = tuple(0.1 * i for i in range(61))
"""Exponents from 0 to 6."""


@dataclass(frozen=True)
class DriftFit:
    """Maximum-likelihood noise of the random walk in noise."""

    q: float
    v: float
    log_q_over_v_error: float
    """Standard error of ln(Q/V), from the curvature of the likelihood; infinite where the optimum is on the floor."""
    on_floor: bool
    """True: no drift is visible beyond the noise; the likelihood is still rising where Q/V reaches the floor."""


def drift_sums(z: Tensor, mask: Tensor) -> Tensor:
    """Sums for `fit_drift` over rows `z` (B, T): (1 + 2 G,) float64 of N, sum e^2 (1 - K) and sum ln(1 - K) by grid.

    With innovations e_t and gains K_t of a trial q = Q/V and V profiled out, V(q) = sum e_t^2 (1 - K_t) / N and
    -2 log L(q) = N (ln 2 pi V(q) + 1) - sum ln(1 - K_t).
    """
    rows = Rows.of(z, mask)
    squares, logs = [], []
    for log_q in LOG_Q_GRID:
        gain = kalman_gains(rows, 10.0**log_q, 0.0)
        # The innovation e is z minus the estimate before it: x_t - x_{t-1} = K e, so e (1 - K) = z - x_t.
        residual = torch.where(rows.mask, rows.z - kalman_states(rows, 10.0**log_q, 0.0), 0.0)
        squares.append((residual.square() / (1 - gain)).sum())
        logs.append(torch.log1p(-gain).sum())
    return torch.stack([rows.mask.sum().double(), *squares, *logs]).cpu()


def fit_drift(sums: Tensor, floor: float = 1e-10) -> DriftFit | None:
    """Q and V that maximise the likelihood of the data behind `sums`; Q/V is not taken below `floor`.

    None where there is nothing to fit: no token, or log-ratios that are all 0.
    """
    count, size = float(sums[0]), len(LOG_Q_GRID)
    if not count or not float(sums[1]):
        return None
    variance = (sums[1 : 1 + size] / count).tolist()
    deviance = [count * math.log(v) - log for v, log in zip(variance, sums[1 + size :].tolist(), strict=True)]
    allowed = [i for i in range(size) if LOG_Q_GRID[i] >= math.log10(floor) - 1e-9]
    best = min(allowed, key=deviance.__getitem__)
    if best in (allowed[0], size - 1):
        q = 10.0 ** LOG_Q_GRID[best]
        return DriftFit(q * variance[best], variance[best], math.inf, on_floor=best == allowed[0])
    left, middle, right = deviance[best - 1 : best + 2]
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature
    log_q = LOG_Q_GRID[best] + 0.2 * shift
    neighbour = variance[best + (1 if shift > 0 else -1)]
    v = variance[best] ** (1 - abs(shift)) * neighbour ** abs(shift)
    # Observed information: half the second derivative of the deviance with respect to ln q.
    step = 0.2 * math.log(10)
    return DriftFit(10**log_q * v, v, math.sqrt(2 / (curvature / step**2)), on_floor=False)


def miss_sums(z: Tensor, old_log_probs: Tensor, mask: Tensor, miss_floor: float) -> Tensor:
    """Sums for `fit_miss`: (2 + G,) float64 of N, sum ln m and sum z^2 / m^gamma with m = max(1 - p, miss_floor)."""
    miss = -torch.expm1(old_log_probs[mask].double())
    log_miss = miss.clamp(min=miss_floor).log()
    squares = z[mask].double().square()
    grid = [(squares * (-gamma * log_miss).exp()).sum() for gamma in GAMMA_GRID]
    return torch.stack([mask.sum().double(), log_miss.sum(), *grid]).cpu()


def fit_miss(sums: Tensor) -> tuple[float, float] | None:
    """(v, gamma) of V_t = v m_t^gamma that maximise the Gaussian likelihood of z_t ~ N(0, V_t).

    None where there is nothing to fit: no token, or log-ratios that are all 0.
    """
    count, log_miss = float(sums[0]), float(sums[1])
    if not count or not float(sums[2]):
        return None
    log_v = [math.log(float(s) / count) for s in sums[2:]]
    deviance = [count * v + gamma * log_miss for v, gamma in zip(log_v, GAMMA_GRID, strict=True)]
    best = min(range(len(GAMMA_GRID)), key=deviance.__getitem__)
    if best in (0, len(GAMMA_GRID) - 1):
        return math.exp(log_v[best]), GAMMA_GRID[best]
    left, middle, right = deviance[best - 1 : best + 2]
    shift = 0.5 * (left - right) / (left - 2 * middle + right)
    neighbour = log_v[best + (1 if shift > 0 else -1)]
    return math.exp(log_v[best] + abs(shift) * (neighbour - log_v[best])), GAMMA_GRID[best] + 0.1 * shift
