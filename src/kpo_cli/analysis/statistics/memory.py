"""How long what the past says lasts: a random walk against states that fade.

A state of which each token keeps exp(-1/M) fades within M tokens, its memory. Noise that hangs together over a few
tokens is one of those; a walk never fades, and a state without memory is more noise, which a formula of the noise may
lack. Each is fitted beside a level of each response, which may have any size, and a mean of each place, so that neither
can pass for a long memory. What is fitted on one half of the prompts is judged on the other, both ways: prompts are
independent, so the mean gain and its standard error over prompts tell whether one predicts better than another.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit

from kpo_cli.analysis.statistics.family import LEVEL
from kpo_cli.analysis.statistics.likelihood import Likelihood, clusters_of
from kpo_cli.analysis.statistics.noise_models import place_means, without
from kpo_cli.core import noise
from kpo_cli.core.recursion import Rows
from kpo_cli.runs.ratios import Ratios

SHORTEST = 0.5
"""Tokens; the trial memories double from here on up to a whole response."""
SHORT = 0.125
"""Of the mean length of a response: a memory of up to so much is short."""
LEAST = 1.0
"""Nats in all: less is no gain, whatever its error."""
COARSE, FINE = np.linspace(-24.0, 12.0, 13), np.linspace(-1.0, 1.0, 7)
"""Trial values of ln(Q/v), and steps around the best of them, finer twice."""


def contest(batch: Ratios) -> dict[str, Any] | None:
    """A walk against states that fade, each fitted on one half of the prompts and judged on the other, both ways.

    `fading`: what the most likely state that fades gains over a walk and over one without memory, whichever is more
    likely; `walk`: what a walk gains over the most likely state of a memory up to `short`, or of none; nats a token,
    with `_error`, the standard error over prompts, and `_seen`, whether the gain is one. `tokens`: the memory of the
    state that fades. None for a single prompt, and where nothing varies within responses.
    """
    clusters, length = clusters_of(batch), float(batch.lengths.mean())
    if not clusters.any():
        return None
    first = clusters % 2 == 0
    halves = [_half(batch.rows(fitted), batch.rows(~fitted), length) for fitted in (first, ~first)]
    known = [half for half in halves if half is not None]
    if len(known) < 2:
        return None
    judged = np.concatenate([clusters[~first], clusters[first]])
    memory = math.sqrt(known[0].memory * known[1].memory)
    found: dict[str, Any] = {"tokens": memory, "short": max(SHORT * length, SHORTEST)}
    for name in ("fading", "walk"):
        difference = np.concatenate([getattr(half, name) for half in known])
        found |= _judged(name, np.bincount(judged, difference).astype(np.float64), float(batch.lengths.sum()))
    return found


def _judged(name: str, gains: NDArray[np.float64], tokens: float) -> dict[str, Any]:
    """From the gains of prompts: the mean, its error, and whether it is one: one-sided, Student's t."""
    number = len(gains)
    error = float(gains.std(ddof=1)) * math.sqrt(number)
    seen = gains.sum() > max(LEAST, float(stdtrit(number - 1, 1 - LEVEL)) * error)
    return {name: float(gains.sum()) / tokens, f"{name}_error": error / tokens, f"{name}_seen": bool(seen)}


@dataclass(frozen=True)
class _Half:
    memory: float
    fading: NDArray[np.float64]
    walk: NDArray[np.float64]
    """(B,): the gain of each response that was not fitted, in nats."""


def _half(fitted: Ratios, judged: Ratios, length: float) -> _Half | None:
    fit = Likelihood(fitted).walk(shaped=True)
    if fit is None:
        return None
    v_t = fit.v * fit.shape(Likelihood(fitted).miss).numpy()
    means, error = place_means(fitted, v_t + _spread(fitted, v_t))
    here, there = (_States(without(part, means), fit.shape, error / fit.v) for part in (fitted, judged))
    if not (here.varies and there.varies):
        return None
    doubling = [SHORTEST * 2.0**i for i in range(1 + int(math.log2(max(length / SHORTEST, 1))))]
    points = {memory: here.most_likely(memory) for memory in (0.0, *doubling, math.inf)}

    def best(memories: Iterable[float]) -> float:
        return min(memories, key=lambda memory: points[memory].deviance)

    memory, rival = best(doubling), best((0.0, math.inf))
    short = best(m for m in points if m <= max(SHORT * length, SHORTEST))
    for finer in (0.5, 0.25):
        near = (memory * 2**-finer, memory * 2**finer)
        points |= {m: here.most_likely(m) for m in near}
        memory = best((memory, *near))
    gained = {m: there.log_likelihood(points[m], m) for m in (memory, rival, short, math.inf)}
    return _Half(memory, gained[memory] - gained[rival], gained[math.inf] - gained[short])


def _spread(batch: Ratios, variance: NDArray[np.float64]) -> float:
    """The variance of the means of responses: where levels and walks lie apart, no place is as sure as its noise."""
    weight = np.where(batch.mask, 1 / variance, 0.0)
    return float(((weight * batch.log_ratio).sum(1) / weight.sum(1)).var())


@dataclass(frozen=True)
class _Point:
    log_q: float
    v: float
    deviance: float


class _States:
    """The likelihood of one set of responses without their levels: of what a level of any size leaves of each."""

    def __init__(self, batch: Ratios, shape: noise.Shape, place_error: NDArray[np.float64]) -> None:
        """`place_error` (T,): what the means of places may be off by, beside the noise of a token."""
        likelihood = Likelihood(batch)
        place = np.minimum(np.maximum(batch.mask.cumsum(1) - 1, 0), len(place_error) - 1)
        self.rows, self.shape = likelihood.rows, shape(likelihood.miss) + torch.from_numpy(place_error[place])
        self.number = np.maximum(likelihood.number - 1, 0)

    @property
    def varies(self) -> bool:
        """Whether levels leave anything."""
        z, mask = self.rows.z, self.rows.mask
        highest, lowest = (torch.where(mask, z, end).aminmax(dim=1) for end in (-math.inf, math.inf))
        return bool((highest.max > lowest.min).any())

    def most_likely(self, memory: float) -> _Point:
        centre, trials = 0.0, COARSE
        for step in (3.0, 1.0, 0.0):
            squares, logs = self.terms(centre + trials, memory)
            total = self.number.sum()
            with np.errstate(divide="ignore"):
                deviance = total * np.log(squares.sum(1) / total) + logs.sum(1)
            best = int(deviance.argmin())
            centre, v, least = float(centre + trials[best]), float(squares[best].sum() / total), float(deviance[best])
            trials = FINE * step
        return _Point(centre, v, least)

    def log_likelihood(self, point: _Point, memory: float) -> NDArray[np.float64]:
        """(B,)"""
        squares, logs = self.terms(np.array([point.log_q]), memory)
        return -0.5 * (self.number * math.log(2 * math.pi * point.v) + logs[0] + squares[0] / point.v)

    def terms(self, log_q: NDArray[np.float64], memory: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(G, B): sum e^2 / S and sum ln S for each Q/v, with the level integrated out over a flat prior.

        The innovations are linear in the log-ratios, so a level c leaves e(z) - c e(1); Harville (1974).
        """
        copies, kept = len(log_q), math.exp(-1 / memory) if memory else 0.0
        rows = Rows(self.rows.z.repeat(copies, 1), self.rows.mask.repeat(copies, 1), torch.float64)
        q = torch.from_numpy(np.exp(log_q)).repeat_interleave(len(self.rows.mask))[:, None]
        gains, variance = noise.gains_and_variance(rows, self.shape.repeat(copies, 1), q, kept)
        weight = rows.mask / variance
        of_z, of_one = (noise.innovations(x, gains, kept) for x in (rows.z, rows.mask.double()))
        level = (weight * of_one.square()).sum(1)
        squares = (weight * of_z.square()).sum(1) - (weight * of_z * of_one).sum(1).square() / level
        logs = torch.where(rows.mask, variance.log(), 0.0).sum(1) + level.log()
        return squares.view(copies, -1).numpy(), logs.view(copies, -1).numpy()
