"""The nulls of all series on one subsample: numbers for the tables, curves for the figures."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.config import AnalyzeConfig
from kpo_cli.analysis.statistics.collect import LONGEST_RUN, run_counts
from kpo_cli.analysis.statistics.resampling import Null, null_totals, shuffled, sign_flipped
from kpo_cli.analysis.statistics.series import Series
from kpo_cli.analysis.statistics.spectrum import BINS, quotient, spectra
from kpo_cli.analysis.statistics.sums import (
    COLUMNS,
    LAG_COLUMNS,
    STATISTICS,
    Sums,
    autocorrelations,
    lag_sums,
    response_sums,
    statistics,
)
from kpo_cli.runs.ratios import Ratios

NULLS = {"null_shuffled": shuffled, "null_sign_flipped": sign_flipped}
CURVE_DRAWS = 20
"""Draws behind a null's curve in a figure, which has no interval."""


@dataclass(frozen=True)
class NullResult:
    """One series under one null."""

    statistics: dict[str, Null | None]
    autocorrelation: dict[str, NDArray[np.float64]]
    spectrum: NDArray[np.float64]
    """(BINS,), relative to white noise."""
    run_lengths: NDArray[np.float64]
    """(LONGEST_RUN + 1,): share of the runs that have each length."""


SeriesNull = dict[str, NullResult]
"""By name of the null, as in `NULLS`."""


def nulls_of(sample: Ratios, series: list[Series], config: AnalyzeConfig) -> dict[str, SeriesNull]:
    """By name of the series. Those whose filter is not known, and all if no draws are wanted, are left out."""
    known = [each for each in series if each.ratio_filter is not None]
    if not config.nulls.draws:
        return {}
    observed = [_observed(each, sample, config) for each in known]
    found: dict[str, SeriesNull] = {each.name: {} for each in known}
    for kind, draw in NULLS.items():
        draws = draw(sample, config.nulls.draws, config.seed)
        totals = null_totals(draws, [each.apply for each in known], config.dead_zone, config.cutoff)
        for i, each in enumerate(known):
            drawn = statistics(totals[i])
            own = {name: Null.of(drawn[name], float(observed[i][name])) for name in STATISTICS}
            found[each.name][kind] = NullResult(own, *_curves(sample, each, draw, config))
    return found


def _observed(series: Series, sample: Ratios, config: AnalyzeConfig) -> dict[str, Sums]:
    values = series.apply(sample.log_ratio, sample.mask, sample.old_log_probs)
    low = spectra(values, sample.mask, config.cutoff).low
    return statistics(response_sums(values, sample.mask, config.dead_zone, low).sum(0))


def _curves(sample: Ratios, series: Series, draw: Any, config: AnalyzeConfig) -> tuple[Any, Any, Any]:
    """Autocorrelation, spectrum and run lengths, pooled over a few draws."""
    total, lagged = np.zeros(len(COLUMNS)), np.zeros((config.lags, len(LAG_COLUMNS)))
    power, white, lengths = np.zeros(BINS), np.zeros(BINS), np.zeros(LONGEST_RUN + 1)
    for part in draw(sample, min(config.nulls.draws, CURVE_DRAWS), config.seed):
        values = series.apply(part.z, part.mask, part.old_log_probs)
        found = spectra(values, part.mask, config.cutoff)
        total += response_sums(values, part.mask, config.dead_zone, found.low).sum(0)
        lagged += lag_sums(values, part.mask, config.dead_zone, config.lags)
        power += found.power.sum(0)
        white += found.white.sum(0)
        lengths += run_counts(values, part.mask, config.dead_zone)[0]
    return autocorrelations(total, lagged), quotient(power, white), quotient(lengths, lengths.sum())
