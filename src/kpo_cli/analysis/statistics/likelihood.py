"""Maximum likelihood of noise models with and without a walk, to the optimum, with errors that hold for heavy tails.

The models are those of `kpo_cli.core.noise`: a walk of process noise Q in noise V_t = v (m_t^gamma + constant).
Newton's method starts from the grid of the adaptive filter; v has its optimum in closed form. Errors come from the
curvature in all parameters together, and from how much the scores of clusters vary ("sandwich"), so that neither
Gaussian tails nor independent responses are assumed.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kpo_cli.core import noise
from kpo_cli.core.recursion import Rows
from kpo_cli.runs.ratios import Ratios

Vector = NDArray[np.float64]

LOWEST, HIGHEST = np.array([-25.0, 0.0, -28.0]), np.array([12.0, 8.0, 0.0])
"""Of ln(Q/v), gamma and ln constant."""
STEP = np.array([0.05, 0.02, 0.05])
"""Of the finite differences."""
WALK, GAMMA, CONSTANT = range(3)
ROUNDS = 25


@dataclass(frozen=True)
class Terms:
    """Of each response: the sums of e^2 / S and of ln S."""

    squares: Vector
    logs: Vector


@dataclass(frozen=True)
class Fit:
    """A noise model; `q` = 0 is no walk."""

    v: float
    q: float = 0.0
    shape: noise.Shape = noise.SAME
    log_q_error: float = math.inf
    log_v_error: float = math.inf
    log_q_over_v_error: float = math.inf
    """Standard errors; infinite where they are not known."""
    deviance: float = math.inf
    """-2 log L, up to a constant of the data."""


class Likelihood:
    """Of one set of responses."""

    def __init__(self, batch: Ratios) -> None:
        self.rows = Rows.of(torch.from_numpy(batch.log_ratio.astype(np.float64)), torch.from_numpy(batch.mask))
        old = batch.old_log_probs
        self.has_probabilities = old is not None
        self.miss = noise.miss_of(None if old is None else torch.from_numpy(old), batch.mask.shape)
        self.number = batch.lengths.astype(np.float64)
        self.clusters = clusters_of(batch)

    def still(self, shaped: bool) -> Fit | None:
        """The most likely noise without a walk, of a size that depends on the old probability or not."""
        valid = self.rows.mask
        squares = self.rows.z[valid].square()
        if not float(squares.sum()):
            return None
        gamma = noise.gamma_without_drift(squares, self.miss[valid]) if shaped and self.has_probabilities else 0.0
        return self.climb(np.array([-np.inf, gamma, math.log(1e-6)]), (GAMMA, CONSTANT) if gamma else ())

    def walk(self, shaped: bool) -> Fit | None:
        """The most likely walk and noise together; one that gains nothing has q = 0. None if z is all 0."""
        still, start = self.still(shaped), self._start
        if still is None or start is None:
            return None
        point = np.array([math.log(start.q / start.v), 0.0, -25.0])
        free: tuple[int, ...] = (WALK,)
        if still.shape.gamma:
            shape = still.shape if start.on_floor else start.shape
            point[GAMMA], point[CONSTANT] = shape.gamma, math.log(max(shape.constant, 1e-12))
            free = (WALK, GAMMA, CONSTANT)
        moving = self.climb(point, free)
        moves = moving.deviance < still.deviance and math.log(moving.q / moving.v) > LOWEST[WALK] + 1
        return moving if moves else still

    @cached_property
    def _start(self) -> noise.WalkFit | None:
        return noise.fit_walk(noise.walk_sums(self.rows.z, self.rows.mask, torch.log1p(-self.miss)))

    def terms(self, point: Vector) -> Terms:
        q = 0.0 if math.isinf(point[WALK]) else math.exp(point[WALK])
        shape = noise.Shape(point[GAMMA], math.exp(point[CONSTANT]) if point[GAMMA] else 0.0)
        squares, logs = noise.innovation_terms(self.rows, shape(self.miss), q)
        return Terms(squares.sum(1).numpy(), logs.sum(1).numpy())

    def deviance(self, terms: Terms) -> float:
        n = self.number.sum()
        return float(n * math.log(terms.squares.sum() / n) + terms.logs.sum())

    def climb(self, point: Vector, free: tuple[int, ...]) -> Fit:
        """The optimum in the free parameters near `point`."""
        for _ in range(ROUNDS):
            around = self._around(point, free)
            slope, curvature = _differences({move: self.deviance(terms) for move, terms in around.items()}, free)
            here = self.deviance(around[()])
            step = np.clip(-_solved(curvature, slope), -20 * STEP[list(free)], 20 * STEP[list(free)])
            moved = self._improved(point, step, free, here)
            if moved is None:
                break
            point, gain = moved
            if gain < 1e-7:
                break
        return self._fit(point, free)

    def _improved(self, point: Vector, step: Vector, free: tuple[int, ...], here: float) -> tuple[Vector, float] | None:
        """The step, or the first of its halves that gains; and what it gains."""
        for _ in range(8):
            candidate = point.copy()
            candidate[list(free)] += step
            candidate = np.where(np.isinf(point), point, np.clip(candidate, LOWEST, HIGHEST))
            if (gain := here - self.deviance(self.terms(candidate))) > 0:
                return candidate, gain
            step = step / 2
        return None

    def _around(self, point: Vector, free: tuple[int, ...]) -> dict[tuple[int, ...], Terms]:
        """Terms at the point (), one step along each parameter (+-(i + 1),), and along each pair, both up or down."""
        moves = [(), *((s * (i + 1),) for i in free for s in (1, -1))]
        moves += [(s * (i + 1), s * (j + 1)) for i, j in combinations(free, 2) for s in (1, -1)]
        found = {}
        for move in moves:
            there = point.copy()
            for m in move:
                there[abs(m) - 1] += math.copysign(STEP[abs(m) - 1], m)
            found[move] = self.terms(there)
        return found

    def _fit(self, point: Vector, free: tuple[int, ...]) -> Fit:
        around = self._around(point, free)
        v = float(around[()].squares.sum() / self.number.sum())
        shape = noise.Shape(float(point[GAMMA]), math.exp(point[CONSTANT]) if point[GAMMA] else 0.0)
        q = 0.0 if math.isinf(point[WALK]) else v * math.exp(point[WALK])
        fit = Fit(v, q, shape, deviance=self.deviance(around[()]))
        errors = self._errors(around, free, v)
        if errors is None:
            return fit
        log_q, log_v, both = errors
        return replace(fit, log_q_error=log_q, log_v_error=log_v, log_q_over_v_error=both)

    def _errors(
        self, around: dict[tuple[int, ...], Terms], free: tuple[int, ...], v: float
    ) -> tuple[float, float, float] | None:
        """Of ln Q, ln v and ln(Q/v), from H^-1 (sum over clusters of their scores' products) H^-1.

        The parameters are the free ones and ln v. One that the data hardly hold (a curvature below 1: an error above
        1) is taken as it is, as the constant noise is where there is none; if it is the walk, nothing is known of it.
        None with one cluster.
        """
        # -log L of each response at v: 1/2 (n ln v + logs + squares / v).
        losses = {move: 0.5 * (t.logs + t.squares / v) for move, t in around.items()}
        slopes = [(losses[(i + 1,)] - losses[(-i - 1,)]) / (2 * STEP[i]) for i in free]
        slopes.append(0.5 * (self.number - around[()].squares / v))
        size = len(free)
        curvature = np.empty((size + 1, size + 1))
        curvature[:size, :size] = _differences({move: float(x.sum()) for move, x in losses.items()}, free)[1]
        for k, i in enumerate(free):
            mixed = -(around[(i + 1,)].squares.sum() - around[(-i - 1,)].squares.sum()) / (4 * STEP[i] * v)
            curvature[size, k] = curvature[k, size] = mixed
        curvature[size, size] = 0.5 * around[()].squares.sum() / v
        count = int(self.clusters.max()) + 1
        if count < 2:
            return None
        held = [k for k in range(size) if curvature[k, k] > 1] + [size]
        scores = np.stack([np.bincount(self.clusters, slopes[k], count) for k in held], 1)
        spread = scores.T @ scores * (count / (count - 1))
        inverse = _solved(curvature[np.ix_(held, held)], np.eye(len(held)))
        cov = inverse @ spread @ inverse.T
        log_v = math.sqrt(cov[-1, -1])
        if WALK not in [free[k] for k in held[:-1]]:
            return math.inf, log_v, math.inf
        # The walk is the first parameter; ln Q = ln(Q/v) + ln v.
        return math.sqrt(max(cov[0, 0] + 2 * cov[0, -1] + cov[-1, -1], 0.0)), log_v, math.sqrt(cov[0, 0])


def clusters_of(batch: Ratios) -> NDArray[np.int64]:
    """(B,): which responses belong together, those to one prompt of one step; each alone where that is not known."""
    if batch.prompt_index is None:
        return np.arange(len(batch))
    both = np.stack([batch.step, batch.prompt_index], 1)
    return np.unique(both, axis=0, return_inverse=True)[1].ravel()


def _differences(values: dict[tuple[int, ...], float], free: tuple[int, ...]) -> tuple[Vector, Vector]:
    """Gradient and Hessian of what has `values` around a point."""
    size, middle = len(free), values[()]
    slope, curvature = np.empty(size), np.empty((size, size))
    for k, i in enumerate(free):
        up, down = values[(i + 1,)], values[(-i - 1,)]
        slope[k] = (up - down) / (2 * STEP[i])
        curvature[k, k] = (up - 2 * middle + down) / STEP[i] ** 2
    for k, m in combinations(range(size), 2):
        i, j = free[k], free[m]
        both = values[(i + 1, j + 1)] + values[(-i - 1, -j - 1)] - 2 * middle
        single = curvature[k, k] * STEP[i] ** 2 + curvature[m, m] * STEP[j] ** 2
        curvature[k, m] = curvature[m, k] = (both - single) / (2 * STEP[i] * STEP[j])
    return slope, curvature


def _solved(matrix: Vector, right: Any) -> Vector:
    """matrix^-1 right, bent upwards where it is not convex; directions without curvature stay where they are."""
    values, vectors = np.linalg.eigh(matrix)
    size = np.abs(values)
    inverse = np.divide(1.0, size, out=np.zeros_like(size), where=size > 1e-9 * size.max(initial=0.0))
    return np.asarray(vectors @ (inverse[:, None] * (vectors.T @ np.atleast_2d(right.T).T))).reshape(np.shape(right))
