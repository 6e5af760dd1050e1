"""Numbers of an evaluation and how far to trust them: verdicts in, estimates out.

`correct` is (Q, n) of booleans: n samples of each of Q problems. Intervals treat the problems as a draw from all
problems that could have been asked, and the samples of a problem as a draw from the policy; both kinds of chance are
in the spread between problems, so drawing whole problems covers both. The usual p +- 1.96 sqrt(p (1-p) / (Q n))
counts the n samples of a problem as if they were n problems: on AIME it is several times too narrow.
docs/claims.md has what the intervals cover and what the tests find, by simulation.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, expit, logit, stdtrit

Array = NDArray[np.float64]
DRAWS = 10_000
FEWEST = 6
"""Sign flips of fewer differences than this never give p < 0.05: the smallest of five is 2 / 2^5."""


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float


def avg_at_k(correct: Array, seed: int) -> Estimate:
    """Mean accuracy over all samples, with a 95% interval over problems."""
    return mean_over_problems(correct.mean(axis=1), seed)


def pass_at_k(correct: Array, k: int, seed: int) -> Estimate:
    """Chance that one of k samples is right: 1 - C(n - c, k) / C(n, k), mean over problems (2107.03374, eq. 1).

    Unbiased, unlike 1 - (1 - c/n)^k. Needs k <= n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples of a problem, there are {n}")
    right = correct.sum(axis=1).astype(int)
    return mean_over_problems(np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in right]), seed)


def mean_over_problems(values: Array, seed: int, limits: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """Mean of one number a problem (Q,) within `limits`, with a 95% interval over problems.

    The Bayesian bootstrap (Rubin 1981) with a made-up problem: problems are weighted by exponential random numbers, and
    for each end of the interval one more stands beside them, as far out on that side as an unseen one might be. For
    zeros and ones and few of one kind that is Clopper and Pearson's interval; of any numbers it is Gaffke's (2005),
    but for two things. The made-up problem lies no further from the median than the distances there are suggest (the
    mean distance, larger ones counting more, and one of the whole range among them), and as more problems deviate its
    weight falls from 1 to 1/2, which is Jeffreys' interval.
    """
    median = float(np.median(values))
    distance = np.abs(values - median)
    furthest = max(limits[1] - median, median - limits[0])
    total, squares = float(distance.sum()), float((distance**2).sum())
    reach = (squares + furthest**2) / (total + furthest)
    low = min(max(limits[0], median - reach), float(values.min()))
    high = max(min(limits[1], median + reach), float(values.max()))
    rng = np.random.default_rng([seed, len(values)])
    distinct, counts = np.unique(values, return_counts=True)
    weights = rng.standard_gamma(counts, (DRAWS, len(counts)))  # of equal values together
    weight, weighted = weights.sum(axis=1), weights @ distinct
    made_up = rng.standard_gamma(0.5 + 5 / (10 + deviating(values)), DRAWS)
    ends = [(weighted + made_up * end) / (weight + made_up) for end in (low, high)]
    return Estimate(float(values.mean()), float(np.quantile(ends[0], 0.025)), float(np.quantile(ends[1], 0.975)))


def deviating(values: Array) -> float:
    """How many problems deviate from the median: their effective number (Kish), as a large distance counts more."""
    distance = np.abs(values - np.median(values))
    squares = float((distance**2).sum())
    return float(distance.sum()) ** 2 / squares if squares else 0.0


@dataclass(frozen=True)
class Paired:
    """Difference of two policies on the same problems, first minus second."""

    difference: Estimate
    p_value: float
    """Of the exchange of the two within each problem: the chance of a difference this large if nothing differs."""
    detectable: float
    """The smallest true difference that this comparison would find (two-sided 5%) four times out of five; NaN where
    too few problems differ to say, or no difference would be found so often."""


def paired(first: Array, second: Array, samples: int, seed: int) -> Paired:
    """Compare mean accuracies a problem, (Q,) each, of `samples` samples."""
    d = first - second
    tells = np.count_nonzero(d) >= FEWEST and np.ptp(d) > 0
    detectable = _detectable(first, second, samples) if tells else math.nan
    return Paired(mean_over_problems(d, seed, (-1.0, 1.0)), _sign_flip_p(d, seed), detectable)


def _detectable(first: Array, second: Array, samples: int) -> float:
    """The mean difference that is found with a power of 80%, if the odds of every problem were multiplied alike.

    The spread between problems grows with the effect: those that are solved now and then move, the others do not. It is
    that of the differences seen, and what the shift adds. Towards the side with more room.
    """
    count, spread = len(first), float((first - second).var(ddof=1))
    odds = logit(((first + second) * samples + 0.5) / (2 * samples + 1))  # never 0 or 1
    before = expit(odds)
    side = 1 if before.mean() <= 0.5 else -1
    needed = _needed(first - second)

    def gains(shift: float) -> tuple[float, float]:
        """Mean difference of the shifted problems, and its standard error."""
        after = expit(odds + side * shift)
        noise = float((after * (1 - after) - before * (1 - before)).mean()) / samples
        variance = spread + float((after - before).var()) + max(noise, 0.0)
        return abs(float((after - before).mean())), math.sqrt(variance / count)

    def excess(shift: float) -> float:
        mean, error = gains(shift)
        return mean - needed * error

    return gains(brentq(excess, 0.0, 10.0, xtol=1e-4))[0] if excess(10.0) > 0 else math.nan


def _needed(d: Array) -> float:
    """The effect in standard errors, both as estimated here, that a later comparison finds four times out of five.

    z such that z errors and the noise of the mean exceed t errors as estimated there: both estimates vary, the more the
    heavier the tails of d.
    """
    squares = (d - d.mean()) ** 2
    v = (float(len(d) * (squares**2).sum() / squares.sum() ** 2) - 1) / (4 * len(d))  # variance of log standard error
    t, q = float(stdtrit(len(d) - 1, 0.975)), 0.841621**2  # (z - t)^2 = q (1 + v (z^2 + t^2))
    return (t + math.sqrt(t * t - (1 - q * v) * (t * t - q * (1 + v * t * t)))) / (1 - q * v)


def _sign_flip_p(d: Array, seed: int) -> float:
    rng = np.random.default_rng([seed, len(d), 1])
    observed, hits = abs(float(d.sum())), 0
    for _ in range(DRAWS // 1000):
        signs = 2.0 * rng.integers(0, 2, (1000, len(d)), np.int8) - 1
        hits += int((np.abs(signs @ d) >= observed - 1e-9).sum())
    return (hits + 1) / (DRAWS + 1)


def majority(answers: list[list[str | None]], correct: Array, seed: int) -> Estimate:
    """maj@n: is the most frequent answer right? `answers` are normalised, None where a sample gave none.

    Tied answers count by the share of them that is right, which is what drawing one of them would give on average.
    """
    scores = []
    for row, verdicts in zip(answers, correct, strict=True):
        votes: dict[str, list[bool]] = {}
        for answer, verdict in zip(row, verdicts, strict=True):
            if answer is not None:
                votes.setdefault(answer, []).append(bool(verdict))
        most = max(map(len, votes.values()), default=0)
        # Equal normalised texts get equal verdicts, but for grader failures: then the answer is right if once found so.
        winners = [any(verdicts) for verdicts in votes.values() if len(verdicts) == most]
        scores.append(sum(winners) / len(winners) if winners else 0.0)
    return mean_over_problems(np.array(scores), seed)


def proportion(share: float, count: int) -> tuple[float, float]:
    """Exact 95% interval of a share of `count` trials (Clopper and Pearson 1934): never too narrow."""
    right = round(share * count)
    low = float(betaincinv(right, count - right + 1, 0.025)) if right else 0.0
    high = float(betaincinv(right + 1, count - right, 0.975)) if right < count else 1.0
    return low, high
