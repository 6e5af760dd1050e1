"""Noise models of the ratio filters, fitted to recorded log-ratios; kept apart from the recursion that uses them.

    z_t = x_t + v_t,  v_t ~ N(0, V_t)      V_t = v (m_t^gamma + constant),  m_t = 1 - p_t      x_t - x_{t-1} ~ N(0, Q)

p_t is the old probability of the token. Walk and noise are fitted together: what a constant V cannot explain of the
sizes looks like noise everywhere, and a drift that the surest tokens show plainly is lost in it.

Every fit of an adaptive filter is made of sums over tokens on a fixed grid. Sums add up over batches and ranks, can be
forgotten at a rate, and are all the state that such a filter has.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kpo_cli.core.recursion import Rows, states_of_gains
from kpo_cli.core.scans import riccati_gains

GAMMA_GRID = tuple(0.1 * i for i in range(61))
"""Exponents from 0 to 6."""
LOG_Q_GRID = tuple(-10 + 0.5 * i for i in range(25))
"""log10(Q/v) from 1e-10 to 1e2."""
CONSTANT_GRID = (1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1e-1)
"""The constant part of the noise, of v; the smallest stands for none."""
FIT_TOKENS = 2**13
"""Of a batch, that a fit of an adaptive filter looks at: whole responses, evenly spread."""


@dataclass(frozen=True)
class Shape:
    """The noise of a token relative to v: m^gamma + constant."""

    gamma: float = 0.0
    constant: float = 0.0

    def __call__(self, miss: Tensor) -> Tensor:
        return miss.pow(self.gamma).add_(self.constant)


SAME = Shape()
"""The same noise for all tokens."""


@dataclass(frozen=True)
class WalkFit:
    """Most likely noise of the random walk in noise of any size."""

    q: float
    v: float
    shape: Shape
    on_floor: bool
    """True: no drift is visible beyond the noise; the likelihood is still rising where Q/v reaches the floor."""


def miss_of(old_log_probs: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """m (B, T) = 1 - p of tokens; 1 where probabilities were not recorded, so that every noise is constant."""
    if old_log_probs is None:
        return torch.ones(shape, dtype=torch.float64)
    return torch.expm1(old_log_probs.double()).neg_().clamp_(0, 1)


def innovation_terms(rows: Rows, shape: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """e_t^2 / S_t and ln S_t (B, T), zero outside the mask, of the walk with Q/v = `q` in noise of `shape` (B, T).

    The innovation e_t = z_t - x_{t-1} has the variance v S_t, S_t = P- + shape, so that the log-likelihood is
    -1/2 sum (ln 2 pi v + ln S_t + e_t^2 / (v S_t)). q = 0 is no drift.
    """
    if q == 0:
        innovation, variance = rows.z, shape
    else:
        gains, variance = gains_and_variance(rows, shape, q)
        innovation = innovations(rows.z, gains)
    return (
        torch.where(rows.mask, innovation.square() / variance, 0.0),
        torch.where(rows.mask, variance.log(), 0.0),
    )


def gains_and_variance(rows: Rows, shape: Tensor, q: float | Tensor, kept: float = 1.0) -> tuple[Tensor, Tensor]:
    """K_t and S_t (B, T), relative to v, of a state of which each token keeps `kept`.

    A walk, `kept` = 1, starts at 0; a state that fades is as far from 0 at its first token as at any other.
    """
    begun = (rows.age > 0).double()
    if kept < 1:
        begun += ((rows.age == 1) & rows.mask) * (kept**2 / (1 - kept**2))
    gains = riccati_gains(torch.where(rows.mask, 1 / shape, 0.0), begun * q, 0.0, kept)
    return gains, shape + _predicted(rows, gains * shape, q, kept)


def innovations(z: Tensor, gains: Tensor, kept: float = 1.0) -> Tensor:
    """z_t - kept x_{t-1} (B, T), right where a token is observed."""
    x = states_of_gains(z, gains, kept)
    return z - kept * torch.nn.functional.pad(x[:, :-1], (1, 0))


def _predicted(rows: Rows, posterior: Tensor, q: float | Tensor, kept: float) -> Tensor:
    """P- (B, T) from P of the last token that was observed, K V there and not (1 - K) P-, which cancels; q a token."""
    place = torch.arange(rows.mask.shape[1], device=rows.mask.device)
    last = torch.where(rows.mask, place, -1).cummax(1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    first = before < 0
    steps = torch.where(first, 1, place - before).double()  # an integer times q would be float32
    still = torch.where(first, 0.0, kept ** (2 * steps))
    grown = steps if kept == 1 else (1 - still) / (1 - kept**2)
    return still * posterior.gather(1, before.clamp(min=0)) + q * grown


def walk_sums(z: Tensor, mask: Tensor, old_log_probs: Tensor) -> Tensor:
    """Sums for `fit_walk` over rows (B, T), float64: N, N gamma, and by Q/v and constant sum e^2 / S and sum ln S.

    gamma is that of the batch itself, most likely without a drift: it is a matter of the many unsure tokens. How much
    noise the sure ones have is what drift and noise compete for, so these two are fitted together.
    """
    every = max(1, -(-int(mask.sum()) // FIT_TOKENS))
    rows = Rows.of(z[::every], mask[::every])
    miss = miss_of(torch.where(rows.mask, old_log_probs[::every], 0.0), rows.mask.shape)
    count = rows.mask.sum().double()
    gamma = gamma_without_drift(rows.z[rows.mask].square(), miss[rows.mask])
    grid = torch.cat([Shape(gamma, constant)(miss) for constant in CONSTANT_GRID])
    copies = Rows(rows.clean.repeat(len(CONSTANT_GRID), 1), rows.mask.repeat(len(CONSTANT_GRID), 1), rows.dtype)
    found = [count, count * gamma]
    for log_q in LOG_Q_GRID:
        terms = innovation_terms(copies, grid, 10.0**log_q)
        squares, logs = (part.view(len(CONSTANT_GRID), -1).sum(1) for part in terms)
        found += torch.stack([squares, logs], 1).flatten()
    return torch.stack(found).cpu()


def fit_walk(sums: Tensor, floor: float = 1e-10) -> WalkFit | None:
    """Q, v and noise that maximise the likelihood of the data behind `sums`; Q/v is not taken below `floor`.

    None where there is nothing to fit: no token, or log-ratios that are all 0.
    """
    count = float(sums[0])
    squares, logs = sums[2:].view(len(LOG_Q_GRID), len(CONSTANT_GRID), 2).unbind(-1)
    if not count or not float(squares[0, 0]):
        return None
    log_v = (squares / count).log()
    deviance = count * log_v + logs
    allowed = [i for i, log_q in enumerate(LOG_Q_GRID) if log_q >= math.log10(floor) - 1e-9]
    best, j = divmod(int(deviance[allowed].argmin()), len(CONSTANT_GRID))
    best += allowed[0]
    shape = Shape(float(sums[1]) / count, CONSTANT_GRID[j])
    on_floor = best == allowed[0]
    if best in (allowed[0], len(LOG_Q_GRID) - 1):
        q, v = 10.0 ** LOG_Q_GRID[best], math.exp(float(log_v[best, j]))
        return WalkFit(max(q, floor) * v, v, shape, on_floor)
    nodes = torch.arange(max(0, best - 2), min(len(LOG_Q_GRID), best + 3))
    places = torch.linspace(best - 1, best + 1, 201, dtype=torch.float64)
    weights = _interpolation(nodes.double(), places)
    at = int((weights @ deviance[nodes, j]).argmin())
    log_q = LOG_Q_GRID[0] + float(places[at]) * (LOG_Q_GRID[1] - LOG_Q_GRID[0])
    v = math.exp(float(weights[at] @ log_v[nodes, j]))
    return WalkFit(10**log_q * v, v, shape, on_floor)


def _interpolation(nodes: Tensor, places: Tensor) -> Tensor:
    """(places, nodes): the weights of Lagrange's polynomial through values at `nodes`."""
    others = [torch.cat([nodes[:i], nodes[i + 1 :]]) for i in range(len(nodes))]
    factors = [((places[:, None] - o) / (x - o)).prod(1) for x, o in zip(nodes, others, strict=True)]
    return torch.stack(factors, 1)


def gamma_without_drift(squares: Tensor, miss: Tensor) -> float:
    """The most likely exponent of z_t ~ N(0, v (m^gamma + constant)), from z^2 and m of each token; 0 if z is all 0."""
    if not float(squares.sum()):
        return 0.0
    log_miss = miss.clamp(min=1e-300).log()
    best, gamma = math.inf, 0.0
    for candidate in GAMMA_GRID:
        power = (candidate * log_miss).exp()
        for constant in CONSTANT_GRID:
            shape = power + constant
            deviance = len(squares) * math.log(float((squares / shape).mean())) + float(shape.log().sum())
            if deviance < best - 1e-9:  # the smallest of those that tie: at gamma = 0 all constants do
                best, gamma = deviance, candidate
    return gamma


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
