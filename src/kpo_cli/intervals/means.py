"""Means of a few independent values, such as one a seed."""

import math
from typing import Any

import numpy as np


def mean_interval(values: Any) -> dict[str, Any]:
    """Mean and 95% interval (Student's t) of independent values; no interval for one."""
    array = np.asarray(values, float)
    n, mean = len(array), float(array.mean())
    if n < 2:
        return {"n": n, "mean": mean, "ci": None}
    half = t_quantile(n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return {"n": n, "mean": mean, "ci": [mean - half, mean + half]}


def t_quantile(df: int) -> float:
    """97.5% quantile of Student's t: tabulated where few, else the expansion of Cornish and Fisher."""
    few = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
    if df <= len(few):
        return few[df - 1]
    z = 1.959964
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))
