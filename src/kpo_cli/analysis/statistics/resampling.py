"""Nulls.

Nulls answer what the statistic would be if nothing but the values mattered. Shuffled: the tokens of each response are
put into a random order, with their old log-probabilities, and filtered again; order in time is lost, everything else
is kept. Sign-flipped: each log-ratio gets a random sign; the sizes, and where they stand, are kept. For both, the
statistic of the data and of the draws come from the same responses, so that under the null they are exchangeable:
p = (1 + number of draws at least as far out) / (1 + draws), doubled for two sides, is a valid p-value.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.statistics.spectrum import spectra
from kpo_cli.analysis.statistics.sums import Sums, response_sums
from kpo_cli.runs.ratios import Ratios

Apply = Callable[[Any, Any, Any], NDArray[np.float64]]
"""A filter on arrays: log-ratios, mask and old log-probabilities, all (B, T)."""
TOKENS_AT_ONCE = 2**17
"""Of all draws that are worked on together."""


@dataclass(frozen=True)
class Null:
    """What a statistic is under a null, on a subsample of responses."""

    mean: float
    low: float
    high: float
    """2.5% and 97.5% quantiles of the draws."""
    observed: float
    """The statistic of the same subsample as it is: what the interval is to be compared with."""
    p_value: float
    """Two-sided."""

    @classmethod
    def of(cls, draws: NDArray[np.float64], observed: float) -> "Null | None":
        """None where the statistic does not exist."""
        drawn = draws[np.isfinite(draws)]
        if not len(drawn) or not np.isfinite(observed):
            return None
        # A statistic that the null leaves as it is differs from its draws by rounding alone.
        slack = 1e-9 * abs(observed)
        tails = [(1 + np.sum(drawn >= observed - slack)), (1 + np.sum(drawn <= observed + slack))]
        low, high = np.quantile(drawn, (0.025, 0.975))
        p = min(1.0, 2 * float(min(tails)) / (1 + len(drawn)))
        return cls(float(drawn.mean()), float(low), float(high), float(observed), p)


@dataclass(frozen=True)
class Draws:
    """Several copies of a subsample under a null; arrays (copies * B, T)."""

    z: NDArray[Any]
    mask: NDArray[np.bool_]
    old_log_probs: NDArray[Any] | None
    copies: int


def shuffled(batch: Ratios, draws: int, seed: int) -> Iterator[Draws]:
    """`draws` copies in which the valid tokens of each response stand in a random order; gaps stay where they are."""
    rng = np.random.default_rng([seed, 2])
    for copies, mask in _copies(batch, draws):
        # Valid tokens in a random order (keys), put where valid tokens stand (slots).
        keys = np.where(mask, rng.random(mask.shape), 2.0)
        order, slots = keys.argsort(1), (~mask).argsort(1, kind="stable")
        z, old = (_moved(array, order, slots, copies) for array in (batch.log_ratio, batch.old_log_probs))
        yield Draws(z, mask, old, copies)


def sign_flipped(batch: Ratios, draws: int, seed: int) -> Iterator[Draws]:
    """`draws` copies in which every log-ratio has a random sign."""
    rng = np.random.default_rng([seed, 3])
    for copies, mask in _copies(batch, draws):
        signs = rng.integers(0, 2, mask.shape, np.int8) * 2 - 1
        old = None if batch.old_log_probs is None else np.tile(batch.old_log_probs, (copies, 1))
        yield Draws(np.tile(batch.log_ratio, (copies, 1)) * signs, mask, old, copies)


def _copies(batch: Ratios, draws: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    at_once = max(1, TOKENS_AT_ONCE // batch.mask.size)
    for start in range(0, draws, at_once):
        copies = min(at_once, draws - start)
        yield copies, np.tile(batch.mask, (copies, 1))


def _moved(array: Any, order: Any, slots: Any, copies: int) -> Any:
    """Copies of `array` with their entries of `order` put into `slots`."""
    if array is None:
        return None
    tiled = np.tile(array, (copies, 1))
    moved = np.empty_like(tiled)
    np.put_along_axis(moved, slots, np.take_along_axis(tiled, order, 1), 1)
    return moved


def null_totals(draws: Iterator[Draws], filters: list[Apply], dead_zone: float, cutoff: float) -> Sums:
    """(filters, draws, columns): the sums of the whole subsample in each draw, after each filter."""
    totals = []
    for part in draws:
        values = np.concatenate([apply(part.z, part.mask, part.old_log_probs) for apply in filters])
        mask = np.tile(part.mask, (len(filters), 1))
        sums = response_sums(values, mask, dead_zone, spectra(values, mask, cutoff).low)
        totals.append(sums.reshape(len(filters), part.copies, -1, sums.shape[1]).sum(2))
    return np.concatenate(totals, 1)
