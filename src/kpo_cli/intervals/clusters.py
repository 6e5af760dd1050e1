"""Intervals of statistics that are functions of sums over clusters, which may be few."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, stdtrit

Array = NDArray[np.float64]


def cluster_intervals(
    clusters: Array,
    statistics: Callable[[Array], Mapping[str, Array]],
    limits: Mapping[str, tuple[float, float]],
) -> dict[str, tuple[float, float]] | None:
    """95% intervals of the `statistics` that have `limits`, functions of summed rows of `clusters` (C, columns).

    The jackknife over clusters (Tukey 1958) with Student's t, on a scale without limits: logarithms above a limit,
    log-odds between two. The degrees of freedom are the effective number of clusters that the variance comes from
    (Kish): a few say little of how large it is. Drawing clusters with replacement is too narrow where they are few.
    None for fewer than two clusters; NaN where a statistic does not exist without one of them.
    """
    if len(clusters) < 2:
        return None
    total = clusters.sum(0)
    whole, without = statistics(total), statistics(total - clusters)
    return {name: _interval(float(whole[name]), without[name], *ends) for name, ends in limits.items()}


def _interval(value: float, without: Array, low: float, high: float) -> tuple[float, float]:
    """From a statistic and its values without each cluster."""
    if (without == value).all():
        return value, value
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = _without_limits(np.append(without, value), low, high)
    if not np.isfinite(scaled).all():  # on a limit: cut there
        ends = _jackknife(value, without)
        return float(np.maximum(low, ends[0])), float(np.minimum(high, ends[1]))
    ends = _jackknife(scaled[-1], scaled[:-1])
    if np.isinf(high):
        return (ends[0], ends[1]) if np.isinf(low) else (low + float(np.exp(ends[0])), low + float(np.exp(ends[1])))
    return low + (high - low) * float(expit(ends[0])), low + (high - low) * float(expit(ends[1]))


def _without_limits(values: Array, low: float, high: float) -> Array:
    if np.isinf(high):
        return values if np.isinf(low) else np.log(values - low)
    return logit((values - low) / (high - low))


def _jackknife(value: float, without: Array) -> tuple[float, float]:
    squares = (without - without.mean()) ** 2
    count, total = len(without), squares.sum()
    if not total:  # nothing differs: no spread, and no degrees of freedom to count
        return value, value
    freedom = min(count - 1.0, max(2.0, total**2 / (squares**2).sum()))
    half = float(stdtrit(freedom, 0.975) * np.sqrt(total * (count - 1) / count))
    return value - half, value + half
