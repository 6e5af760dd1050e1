"""The nulls of all series on one subsample: numbers for the tables, curves for the figures, and the families."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.config import AnalyzeConfig
from kpo_cli.analysis.statistics.collect import LONGEST_RUN, run_counts
from kpo_cli.analysis.statistics.family import Family, Judged, judge
from kpo_cli.analysis.statistics.likelihood import Likelihood
from kpo_cli.analysis.statistics.order import ORDER, ORDER_LIMITS, OrderStatistics
from kpo_cli.analysis.statistics.resampling import null_totals, shuffled, sign_flipped
from kpo_cli.analysis.statistics.series import Series
from kpo_cli.analysis.statistics.spectrum import BINS, quotient, spectra
from kpo_cli.analysis.statistics.sums import (
    COLUMNS,
    LAG_COLUMNS,
    LIMITS,
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

    statistics: dict[str, Judged | None]
    autocorrelation: dict[str, NDArray[np.float64]]
    spectrum: NDArray[np.float64]
    """(BINS,), relative to white noise."""
    run_lengths: NDArray[np.float64]
    """(LONGEST_RUN + 1,): share of the runs that have each length."""


@dataclass(frozen=True)
class Nulls:
    """Of one subsample; everything by the name of the null, as in `NULLS`."""

    series: dict[str, dict[str, NullResult]]
    """By name of the series, without those whose filter is not known."""
    order: dict[str, dict[str, Judged | None]]
    """The statistics of `ORDER`."""
    families: dict[str, Family]
    """All of these together."""
    prediction_p: dict[str, dict[str, float]]
    """By statistic: the share of draws, the data among them, in which the past predicts at least as well."""


def nulls_of(sample: Ratios, series: list[Series], config: AnalyzeConfig) -> Nulls | None:
    """None if no draws are wanted or all log-ratios are 0."""
    known = [each for each in series if each.ratio_filter is not None]
    noise = Likelihood(sample).still(shaped=True) if config.nulls.draws else None
    if noise is None:
        return None
    order = OrderStatistics.of(sample, noise.shape, noise.v, config.lags, config.dead_zone)
    observed: dict[Any, Any] = dict(order.of_sample(sample))
    for each in known:
        observed |= {(each.name, name): value for name, value in _observed(each, sample, config).items()}
    limits = ORDER_LIMITS | {(each.name, name): pair for each in known for name, pair in LIMITS.items()}
    found = Nulls({each.name: {} for each in known}, {}, {}, {name: {} for name in ORDER if "prediction" in name})
    for kind, draw in NULLS.items():
        few = (config.nulls.draws, config.seed)
        drawn: dict[Any, Any] = dict(order.of_draws(draw(sample, *few), draw(order.without_places(sample), *few)))
        totals = null_totals(draw(sample, *few), [each.apply for each in known], config.dead_zone, config.cutoff)
        for i, each in enumerate(known):
            drawn |= {(each.name, name): values for name, values in statistics(totals[i]).items()}
        family = found.families[kind] = judge(drawn, observed, limits)
        found.order[kind] = {name: family.judged[name] for name in ORDER}
        for name, p_values in found.prediction_p.items():
            p_values[kind] = _one_sided(drawn[name], observed[name])
        for each in known:
            own = {name: family.judged[each.name, name] for name in STATISTICS}
            found.series[each.name][kind] = NullResult(own, *_curves(sample, each, draw, config))
    return found


def _one_sided(drawn: NDArray[np.float64], observed: float) -> float:
    """A prediction that does not exist is none."""
    if not np.isfinite(observed):
        return 1.0
    return float((1 + (np.nan_to_num(drawn) >= observed).sum()) / (1 + len(drawn)))


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
