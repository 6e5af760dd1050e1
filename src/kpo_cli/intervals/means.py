"""Means of a few independent values, such as one a seed."""

import math
from typing import Any

import numpy as np
from scipy.special import stdtrit


def mean_interval(
    values: Any, limits: tuple[float, float] = (-math.inf, math.inf), step: float = 0.0
) -> dict[str, Any]:
    """Mean and 95% interval (Student's t) of independent values, cut at the `limits` of what can be.

    Values that come in steps, as shares of a few problems do, may agree by chance: rounding to `step` has a variance of
    step^2 / 12, which is added. There is no interval for one value, nor for equal ones whose step is not known.
    """
    array = np.asarray(values, float)
    n, mean = len(array), float(array.mean())
    variance = (float(array.var(ddof=1)) if n > 1 else 0.0) + step**2 / 12
    if n < 2 or not variance:
        return {"n": n, "mean": mean, "ci": None}
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n)
    return {"n": n, "mean": mean, "ci": [max(limits[0], mean - half), min(limits[1], mean + half)]}
