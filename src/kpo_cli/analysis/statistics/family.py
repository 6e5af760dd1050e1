"""All statistics that are compared with one null, judged together.

One null is one family. A draw is as far out as its farthest statistic, in standard deviations over the draws and the
data (max-T, Westfall and Young 1993): what is called significant in a family without order is anything at all in at
most 5% of the families, however many statistics there are and however they hang together. With the data among the
draws nothing is approximate, so 20 draws are enough for the level, and more of them are better for the power.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.statistics.resampling import Null

LEVEL = 0.05
"""Of a family, and of every verdict."""
ROUNDING = 1e-9
"""A statistic that the null leaves as it is differs between draws by rounding alone, relative to its size."""


@dataclass(frozen=True)
class Judged(Null):
    """A statistic under a null, on its own (`Null`) and as one of a family."""

    p_adjusted: float
    """The share of families, the data's own included, in which something lies as far out as this."""
    band: tuple[float, float]
    """All statistics of a draw lie in their bands in 95% of the draws; outside it is p_adjusted <= 5%."""


@dataclass(frozen=True)
class Family:
    """Every statistic under one null."""

    judged: dict[Any, Judged | None]
    """By key; None where the statistic does not exist."""
    p_value: float
    """That nothing distinguishes the data from the null: the smallest `p_adjusted`."""
    refutable: bool
    """False: no draw stands out from the others either, so that no data could have been significant."""

    @property
    def size(self) -> int:
        return sum(one is not None for one in self.judged.values())


def judge(
    drawn: Mapping[Any, NDArray[np.float64]],
    observed: Mapping[Any, float],
    limits: Mapping[Any, tuple[float, float]],
) -> Family:
    """The family of `drawn` (draws,) and `observed`, by the same keys; bands end at the `limits` of a statistic."""
    nulls = {key: Null.of(values, float(observed[key])) for key, values in drawn.items()}
    known = {key: null for key, null in nulls.items() if null is not None}
    if not known:
        return Family(dict.fromkeys(drawn), 1.0, False)
    table = np.array([[*drawn[key], observed[key]] for key in known], np.float64)
    centre, spread, distance = _standardised(table)
    largest = distance.max(0)
    data, draws = distance[:, -1], largest[:-1]
    p = (1 + (draws >= data[:, None] * (1 - ROUNDING)).sum(1)) / table.shape[1]
    allowed = int(LEVEL * table.shape[1] + ROUNDING)  # draws, the data among them, that may be as far out
    width = spread * (np.sort(draws)[-allowed] if allowed else np.inf)
    judged: dict[Any, Judged | None] = dict.fromkeys(drawn)
    for i, (key, null) in enumerate(known.items()):
        band = np.clip([centre[i] - width[i], centre[i] + width[i]], *limits[key]).tolist()
        judged[key] = Judged(**vars(null), p_adjusted=float(p[i]), band=(band[0], band[1]))
    ties = (draws >= draws.max() * (1 - ROUNDING)).sum() / table.shape[1]
    return Family(judged, float(p.min()), bool(draws.max() > 0 and ties <= LEVEL))


def _standardised(table: NDArray[np.float64]) -> tuple[Any, Any, Any]:
    """Mean and standard deviation of each row, and how far each entry is out; 0 for what is not finite."""
    finite = np.isfinite(table)
    clean = np.where(finite, table, 0.0)
    number = finite.sum(1)
    centre = clean.sum(1) / number
    away = np.where(finite, clean - centre[:, None], 0.0)
    spread = np.sqrt((away**2).sum(1) / number)
    moved = spread > ROUNDING * np.abs(clean).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return centre, spread, np.where(moved[:, None], np.abs(away) / spread[:, None], 0.0)
