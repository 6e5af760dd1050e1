"""Where in a response, and at which tokens, log-ratios do what: sums of tokens by bins of something else.

Off-policy tokens only. A pair of neighbours counts in the bin of its second token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.statistics.clipping import Widths, beyond
from kpo_cli.analysis.statistics.signs import Floats, neighbours, states
from kpo_cli.runs.ratios import Ratios

EDGES: dict[str, list[float]] = {
    "position": [1, 9, 17, 33, 65, 129, 257, 513, 1025, 2049, 4097, 8193, 16385],
    "entropy": [0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
    "old_probability": [0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999],
    "advantage": [-1, 0, 1],
}
"""The lower edge of each bin: position in the response counted from 1, entropy in nats, probability of the token under
the old policy, sign of the advantage."""
MEASURES = ("tokens", "x", "x2", "positive", "negative", "pairs", "switches", "above", "below", "cut")


def label(kind: str, index: int) -> str:
    """What a bin is called."""
    edges = EDGES[kind]
    if kind == "advantage":
        return ("A < 0", "A = 0", "A > 0")[index]
    if index + 1 == len(edges):
        return f"from {edges[index]:g}"
    return (
        f"{edges[index]:g}-{edges[index + 1] - 1:g}" if kind == "position" else f"{edges[index]:g}-{edges[index + 1]:g}"
    )


def bins_of(kind: str, batch: Ratios) -> NDArray[np.int64] | None:
    """The bin of every token, (B, T); None where the record does not hold what it takes."""
    values: Any
    if kind == "position":
        values = batch.mask.cumsum(1)
    elif kind == "entropy":
        values = batch.entropy
    elif kind == "old_probability":
        values = None if batch.old_log_probs is None else np.exp(batch.old_log_probs)
    else:
        values = None if batch.advantages is None else np.sign(batch.advantages)[:, None].repeat(batch.mask.shape[1], 1)
    if values is None:
        return None
    return np.clip(np.searchsorted(EDGES[kind], values, side="right") - 1, 0, None)


@dataclass(frozen=True)
class TokenMeasures:
    """What is counted of every valid token of a series, (len(MEASURES), tokens)."""

    values: NDArray[np.float64]

    @classmethod
    def of(cls, x: Floats, batch: Ratios, dead_zone: float, widths: Widths | None) -> "TokenMeasures":
        state, mask = states(x, batch.mask, dead_zone), batch.mask
        paired, switch = np.zeros((2, *mask.shape), bool)
        paired[:, 1:] = neighbours(mask)
        switch[:, 1:] = paired[:, 1:] & (state[:, 1:] != state[:, :-1])
        none = np.zeros(mask.shape, bool)
        above, below, cut = (none, none, none) if widths is None else beyond(x, batch.advantages, widths)
        measures = (mask, x, x * x, state > 0, state < 0, paired, switch, above, below, cut)
        return cls(np.stack([measure[mask] for measure in measures]).astype(np.float64))


def binned(measures: TokenMeasures, bins: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """(size, len(MEASURES)): sums by bin; `bins` (tokens,) is that of each valid token."""
    return np.stack([np.bincount(bins, values, size) for values in measures.values], 1)


def rows(kind: str, sums: NDArray[np.float64], clip: bool, cut: bool) -> list[dict[str, Any]]:
    """The filled bins of a breakdown, (bins, len(MEASURES)), as the objects of analysis.json.

    `clip` says whether clip widths were known and `cut` whether advantages were.
    """
    table = []
    for index, line in enumerate(sums):
        m = dict(zip(MEASURES, line.tolist(), strict=True))
        n = m["tokens"]
        if n:
            table.append(
                {
                    "bin": label(kind, index),
                    "tokens": int(n),
                    "mean": m["x"] / n,
                    "std": max(m["x2"] / n - (m["x"] / n) ** 2, 0.0) ** 0.5,
                    "positive": m["positive"] / n,
                    "negative": m["negative"] / n,
                    "switch_frequency": m["switches"] / m["pairs"] if m["pairs"] else None,
                    "above": m["above"] / n if clip else None,
                    "below": m["below"] / n if clip else None,
                    "cut": m["cut"] / n if clip and cut else None,
                }
            )
    return table
