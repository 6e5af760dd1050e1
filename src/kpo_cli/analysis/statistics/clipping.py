"""What clip widths would cut, from the records alone.

PPO's clip cuts the gradient of a token whose ratio lies above 1 + eps_high where the advantage is positive, or below
1 - eps_low where it is negative: `kpo_cli.core.surrogates.Clip`, of which this counts the `active` and the `outside`.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.statistics.signs import Bools, Floats

Widths = tuple[float, float]
"""eps_low, eps_high."""


def beyond(x: Floats, advantages: NDArray[Any] | None, widths: Widths) -> tuple[Bools, Bools, Bools]:
    """Where the log-ratio `x` (B, T) is above the interval, below it, and cut; nothing is cut without advantages."""
    low, high = widths
    above = x > math.log1p(high)
    below = x < math.log1p(-low) if low < 1 else np.zeros(x.shape, bool)
    if advantages is None:
        return above, below, np.zeros(x.shape, bool)
    sign = advantages[:, None]
    return above, below, (above & (sign > 0)) | (below & (sign < 0))


def clip_counts(x: Floats, mask: Bools, advantages: NDArray[Any] | None, widths: list[Widths]) -> NDArray[np.float64]:
    """(len(widths), 3): tokens above, below and cut. `x` is zero outside the mask, which no interval excludes."""
    values = x[mask]
    tokens = None if advantages is None else np.repeat(advantages, mask.sum(1))
    counts = [beyond(values[:, None], tokens, pair) for pair in widths]
    return np.array([[part.sum() for part in parts] for parts in counts], np.float64).reshape(len(widths), 3)
