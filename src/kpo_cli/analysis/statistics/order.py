"""Order in time of the raw log-ratios that the statistics of neighbours do not see: periods, places, and drift.

Each is one number of a subsample and of each of its draws under a null, so that they are members of its family
(`kpo_cli.analysis.statistics.family`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kpo_cli.analysis.statistics.resampling import Draws
from kpo_cli.core.noise import Shape, miss_of
from kpo_cli.core.recursion import states_of_gains
from kpo_cli.core.scans import riccati_gains
from kpo_cli.runs.ratios import Ratios

ORDER = {
    "sign_correlogram": "squared autocorrelations of signs",
    "sign_by_place": "signs that places have in common",
    "size_by_place": "sizes that places have in common",
    "prediction": "what the past predicts",
    "prediction_within_places": "what it predicts beyond places",
}
"""By name, what a table calls it."""
ORDER_LIMITS = {name: (-1.0, 1.0) if "prediction" in name else (0.0, math.inf) for name in ORDER}
Q_GRID = 5
"""Trial process noises of `prediction`."""


@dataclass(frozen=True)
class OrderStatistics:
    """The statistics of one subsample: what stays the same in its draws is computed once."""

    lags: int
    dead_zone: float
    place: NDArray[np.int64]
    """(B, T), from 0 at the first valid token."""
    typical: NDArray[np.float64]
    """(B, 1): the median size of each response."""
    shape: Shape
    v: float
    """The noise of a token is v times the shape at its old probability: the fit without drift."""
    profile: NDArray[np.float64]
    """(T,): the mean log-ratio by place, tokens weighted by their precision."""
    trial_q: NDArray[np.float64]

    @classmethod
    def of(cls, sample: Ratios, shape: Shape, v: float, lags: int, dead_zone: float) -> "OrderStatistics":
        z, mask = sample.log_ratio.astype(np.float64), sample.mask
        place = np.maximum(mask.cumsum(1) - 1, 0)
        precision = np.where(mask, 1 / (v * shape(miss_of(_tensor(sample.old_log_probs), mask.shape)).numpy()), 0.0)
        weight = np.bincount(place.ravel(), precision.ravel(), mask.shape[1])
        total = np.bincount(place.ravel(), (precision * z).ravel(), mask.shape[1])
        profile = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
        sizes = np.where(mask, np.abs(z), np.nan)
        typical = np.nanmedian(sizes, axis=1, keepdims=True)
        # From a walk that is the noise only at the end of a long response to one that outruns the noise at once.
        noise, length = mask.sum() / precision.sum(), max(2.0, float(mask.sum(1).mean()))
        return cls(
            lags, dead_zone, place, typical, shape, v, profile, noise * np.geomspace(0.1 / length**2, 10, Q_GRID)
        )

    def of_draws(self, draws: Iterator[Draws], within: Iterator[Draws]) -> dict[str, NDArray[np.float64]]:
        """Each statistic, (draws,); `within` are draws of the log-ratios without their profile (`without_places`)."""
        parts = [self._of(part, other) for part, other in zip(draws, within, strict=True)]
        return {name: np.concatenate([part[name] for part in parts]) for name in ORDER}

    def of_sample(self, sample: Ratios) -> dict[str, float]:
        within = self.without_places(sample)
        own, other = (Draws(r.log_ratio, r.mask, r.old_log_probs, 1) for r in (sample, within))
        return {name: float(values[0]) for name, values in self._of(own, other).items()}

    def without_places(self, sample: Ratios) -> Ratios:
        """The sample without what its places have in common."""
        z = np.where(sample.mask, sample.log_ratio - self.profile[self.place], 0.0)
        return replace(sample, log_ratio=z)

    def _of(self, part: Draws, within: Draws) -> dict[str, NDArray[np.float64]]:
        sign = np.sign(np.where(np.abs(part.z) > self.dead_zone, part.z, 0.0)).astype(np.float32)
        large = np.where(part.mask, np.sign(np.abs(part.z) - np.tile(self.typical, (part.copies, 1))), 0.0)
        prediction, inside = self._predictions(part, within)
        return {
            "sign_correlogram": _correlogram(sign, part, self.lags),
            "sign_by_place": self._in_common(sign, part),
            "size_by_place": self._in_common(large, part),
            "prediction": prediction,
            "prediction_within_places": inside,
        }

    def _in_common(self, values: NDArray[Any], part: Draws) -> NDArray[np.float64]:
        """(copies,): the part of the mean square that is the mean over responses at each place."""
        width, rows = part.mask.shape[1], len(part.mask) // part.copies
        copy = np.repeat(np.arange(part.copies), rows)[:, None]
        place = (copy * width + np.tile(self.place, (part.copies, 1))).ravel()
        size = part.copies * width
        total = np.bincount(place, values.ravel(), size).reshape(part.copies, width)
        number = np.bincount(place, part.mask.ravel(), size).reshape(part.copies, width)
        return (total**2 / np.maximum(number, 1)).sum(1) / number.sum(1)

    def _predictions(self, part: Draws, within: Draws) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The correlation of z_t with the random walk's prediction x_{t-1}, for the best of the trial Q.

        Tokens are weighted by 1 / (P- + V_t). Where signs are independent it is around 0, whatever the sizes; the
        likelihood would also take a size that changes along the response for a drift.
        """
        mask = torch.from_numpy(part.mask)
        variance = self.v * self.shape(miss_of(_tensor(part.old_log_probs), part.mask.shape))
        precision = torch.where(mask, 1 / variance, 0.0)
        begun = (mask.cumsum(1) > 0).double()
        best = np.full((2, part.copies), -np.inf)
        for q in self.trial_q:
            gains = riccati_gains(precision, begun * q, 0.0)
            total = _before(gains * variance) + q + variance
            for i, z in enumerate((part.z, within.z)):
                best[i] = np.fmax(best[i], _correlation(torch.from_numpy(z).double(), gains, total, part.copies))
        return best[0], best[1]


def _correlation(z: torch.Tensor, gains: torch.Tensor, total: torch.Tensor, copies: int) -> NDArray[np.float64]:
    """(copies,): of z and x_{t-1}, weighted by 1 / total; NaN where nothing is predicted."""
    scale = total.rsqrt()
    value, prediction = ((x * scale).view(copies, -1) for x in (z, _before(states_of_gains(z, gains))))
    pairs = ((value, prediction), (value, value), (prediction, prediction))
    products, *squares = ((a * b).sum(1).numpy() for a, b in pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(products / np.sqrt(squares[0] * squares[1]))


def _before(x: torch.Tensor) -> torch.Tensor:
    """What stood one token earlier; 0 before the first."""
    return torch.nn.functional.pad(x[:, :-1], (1, 0))


def _correlogram(sign: NDArray[np.float32], part: Draws, lags: int) -> NDArray[np.float64]:
    """(copies,): the sum over lags of the squared mean product of signs at that distance."""
    found = np.zeros(part.copies)
    by_copy = (part.copies, len(sign) // part.copies, sign.shape[1])
    s, valid = sign.reshape(by_copy), part.mask.reshape(by_copy)[0]
    for lag in range(1, min(lags, sign.shape[1] - 1) + 1):
        pairs = (valid[:, lag:] & valid[:, :-lag]).sum()
        if pairs:
            found += (np.einsum("cbt,cbt->c", s[:, :, lag:], s[:, :, :-lag], dtype=np.float64) / pairs) ** 2
    return found


def _tensor(old_log_probs: Any) -> torch.Tensor | None:
    return None if old_log_probs is None else torch.from_numpy(np.ascontiguousarray(old_log_probs))
