"""The series that are compared: raw log-ratios, what the run recorded, and filters applied offline to the tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kpo_cli.analysis.config import AnalyzeConfig
from kpo_cli.core.filters import FILTERS, RatioFilter
from kpo_cli.core.methods import build, with_q
from kpo_cli.errors import UserError
from kpo_cli.runs.ratios import Ratios

RAW, RECORDED = "raw", "recorded"
NEUTRAL_LOG_PROB = float(np.log(0.5))
"""Stands in for old log-probabilities that were not recorded, which only heteroscedastic filters would look at."""


@dataclass(frozen=True)
class Series:
    """A name and what makes the series from a batch."""

    name: str
    description: str
    ratio_filter: RatioFilter | None = None
    """None for `recorded`, which is read from the file."""

    def of(self, batch: Ratios) -> NDArray[np.float64]:
        """(B, T) float64, zero outside the mask."""
        if self.ratio_filter is None:
            assert batch.filtered_log_ratio is not None
            return batch.filtered_log_ratio.astype(np.float64)
        return self.apply(batch.log_ratio, batch.mask, batch.old_log_probs)

    def apply(self, z: Any, mask: Any, old_log_probs: Any) -> NDArray[np.float64]:
        """The filter on arrays (B, T), float64."""
        z64 = np.ascontiguousarray(z, np.float64)
        if self.name == RAW or self.ratio_filter is None:
            return z64
        old = np.full(z64.shape, NEUTRAL_LOG_PROB) if old_log_probs is None else old_log_probs
        tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in (z64, mask, old))
        return self.ratio_filter(*tensors).numpy()


def series_of(config: AnalyzeConfig) -> list[Series]:
    """Raw, the filters asked for, and the grid of Kalman filters. Raises UserError for what cannot be built."""
    made = [Series(RAW, "the recorded log-ratios", _build({"name": "identity"}))]
    for entry in config.filters:
        made.append(_series("_".join(_part(key, value) for key, value in entry.items()), entry))
    for tau in config.time_constants:
        made.append(_series(f"kalman_tau_{tau:g}", {"name": "kalman", "time_constant": tau}))
    for q in config.q_over_v:
        made.append(_series(f"kalman_q_{q:g}", {"name": "kalman", "q": q}))
    unique = {series.name: series for series in made if series.name != "identity"}
    return list(unique.values())


def own_filter(metadata: dict[str, Any]) -> Series | None:
    """The run's own filter, rebuilt from a record's metadata; None where that is not possible."""
    stored = metadata.get("filter")
    if not isinstance(stored, dict):
        return None
    try:
        return Series(RECORDED, "the run's own filter", _build({k: v for k, v in stored.items() if v is not None}))
    except UserError:
        return None


def _series(name: str, entry: dict[str, Any]) -> Series:
    return Series(name, ", ".join(f"{key} {value}" for key, value in entry.items() if key != "name"), _build(entry))


def _build(entry: dict[str, Any]) -> RatioFilter:
    try:
        v = entry.get("v", 1e-4 if entry["name"] == "kalman_robust" else 1.0)
        return build(FILTERS, with_q(entry, float(v)), "filter")
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"filters: {error}") from None


def _part(key: str, value: Any) -> str:
    """A piece of a series' name: `kalman`, `time_constant_30`."""
    if key == "name":
        return str(value)
    return f"{key}_{value:g}" if isinstance(value, float) else f"{key}_{value}"


def describe(series: Series) -> str:
    """The filter's parameters as they were used."""
    if series.ratio_filter is None or series.name == RAW:
        return series.description
    parameters = {k: v for k, v in vars(series.ratio_filter).items() if not isinstance(v, bool) and (k, v) != ("p0", 0)}
    return ", ".join(f"{name} {value:.3g}" for name, value in parameters.items())


def share_passed(series: Series, batch: Ratios, shift: float) -> float:
    """How much of a constant log-ratio `shift` shows at the last token, the mean over the responses of `batch`.

    The filter is given that constant in place of the log-ratios, at the same tokens: this holds for any filter, at
    the lengths at hand. A constant on its own passes whole where the filter is no filter.
    """
    used = batch.rows(batch.lengths > 0)
    shown = series.apply(np.where(used.mask, shift, 0.0), used.mask, used.old_log_probs)
    last = used.mask.shape[1] - 1 - used.mask[:, ::-1].argmax(1)
    return float((shown[np.arange(len(used)), last] / shift).mean())
