"""Numbers of an evaluation and how far to trust them. Pure numpy: verdicts in, estimates out.

`correct` is (Q, n) of booleans: n samples of each of Q problems. Intervals treat the problems as a draw from all
problems that could have been asked, and the samples of a problem as a draw from the policy; both kinds of chance are
in the spread between problems, so resampling whole problems covers both. The usual p +- 1.96 sqrt(p (1-p) / (Q n))
counts the n samples of a problem as if they were n problems: on AIME it is several times too narrow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 10_000
FEW = 5
"""Fewer problems than this beside the most common value are too few to bootstrap."""


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


def mean_over_problems(values: Array, seed: int) -> Estimate:
    """Mean of one number a problem (Q,) in [0, 1], with a 95% bootstrap interval over problems.

    The percentiles are widened for few problems (Hesterberg 2015, section 5.3.3): the plain bootstrap forgets the
    factor sqrt(Q / (Q - 1)) and Student's t. Where all but a few problems have the same value, as on a benchmark that
    is all but unsolved, there is too little to resample and the interval is Wilson's for Q trials: no numbers in
    [0, 1] with this mean spread more than Q zeros and ones.
    """
    count, value = len(values), float(values.mean())
    if _deviating(values) < FEW:
        return Estimate(value, *wilson(value, count))
    means = bootstrap(values, np.mean, seed)
    tail = 100 * _normal_cdf(-math.sqrt(count / (count - 1)) * _student_quantile(count - 1))
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def bootstrap(values: Array, statistic: Callable[..., Array], seed: int) -> Array:
    """`statistic` of DRAWS resamples of the problems."""
    rng = np.random.default_rng([seed, len(values)])
    chunks = [rng.integers(0, len(values), (1000, len(values))) for _ in range(DRAWS // 1000)]
    return np.concatenate([statistic(values[chunk], axis=1) for chunk in chunks])


@dataclass(frozen=True)
class Paired:
    """Difference of two policies on the same problems, first minus second."""

    difference: Estimate
    p_value: float
    """Of the exchange of the two within each problem: the chance of a difference this large if nothing differs."""
    detectable: float
    """The smallest true difference that this comparison would find (two-sided 5%) four times out of five; NaN where
    too few problems differ to know a spread."""


def paired(first: Array, second: Array, seed: int) -> Paired:
    """Compare mean accuracies a problem, (Q,) each."""
    d = first - second
    count = len(d)
    value = float(d.mean())
    if _deviating(d) < FEW:
        margin = wilson(0.0, count)[1]  # so large a share of problems may behave otherwise, unseen
        low, high = max(-1.0, value - margin), min(1.0, value + margin)
        return Paired(Estimate(value, low, high), _sign_flip_p(d, seed), math.nan)
    means = bootstrap(d, np.mean, seed)
    tail = 100 * _normal_cdf(-math.sqrt(count / (count - 1)) * _student_quantile(count - 1))
    low, high = np.percentile(means, [tail, 100 - tail])
    detectable = (1.959964 + 0.841621) * float(d.std(ddof=1)) / math.sqrt(count)
    return Paired(Estimate(value, float(low), float(high)), _sign_flip_p(d, seed), detectable)


def _deviating(values: Array) -> int:
    """How many problems do not have the most common value."""
    return len(values) - int(np.unique(values, return_counts=True)[1].max())


def _sign_flip_p(d: Array, seed: int) -> float:
    rng = np.random.default_rng([seed, len(d), 1])
    observed, hits = abs(float(d.mean())), 0
    for _ in range(DRAWS // 1000):
        signs = rng.choice(np.array([-1.0, 1.0]), (1000, len(d)))
        hits += int((np.abs((signs * d).mean(axis=1)) >= observed - 1e-12).sum())
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


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion of `count` trials (Wilson 1927); it holds at 0 and 1, where the normal one fails."""
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _student_quantile(freedom: int) -> float:
    """97.5% quantile of Student's t by bisection of its distribution (numerical integration, 1e-6)."""
    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < 0.975 else (low, middle)
    return (low + high) / 2


def _student_cdf(x: float, freedom: int) -> float:
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    grid = np.linspace(0.0, x, 2001)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(grid**2 / freedom))
    return 0.5 + float(np.trapezoid(density, grid))
