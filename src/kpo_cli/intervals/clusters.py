"""Bootstrap intervals of statistics that are functions of sums over clusters."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cluster_intervals(
    clusters: Array, statistics: Callable[[Array], Mapping[str, Array]], draws: int, seed: int
) -> dict[str, tuple[float, float]] | None:
    """95% intervals of all `statistics`, functions of summed rows of `clusters` (C, columns), drawn with replacement.

    None for fewer than two clusters or no draws.
    """
    if len(clusters) < 2 or not draws:
        return None
    rng = np.random.default_rng([seed, 1])
    totals = np.empty((draws, clusters.shape[1]))
    for draw in range(draws):
        drawn = rng.integers(0, len(clusters), len(clusters))
        totals[draw] = np.einsum("c,ck->k", np.bincount(drawn, minlength=len(clusters)).astype(float), clusters)
    return {name: _interval(values) for name, values in statistics(totals).items()}


def _interval(values: Array) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return float(low), float(high)
