"""Signs of log-ratios along a response: states, switches, runs.

The state of a token is the sign of its log-ratio outside a dead zone, s_t in {-1, 0, +1}; 0 is on-policy,
|z_t| <= dead_zone. Neighbours are two tokens next to each other in one response: what stands in different rows, or on
different sides of a gap in the mask, is never compared. A run is a maximal block of neighbours of one state. The sign
switch rate is the picture that KPO starts from (He et al., arXiv 2602.10609, section 3).
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SignStatistics:
    """Pooled over all tokens of all rows. A share or a mean of nothing is NaN."""

    tokens: int
    pairs: int
    """Neighbours."""
    switch_frequency: float
    """Share of neighbours of different state (three states)."""
    switch_frequency_two_state: float
    """The same over neighbours that are both non-zero."""
    mean_run_length: float
    """Tokens in a run, runs of all three states."""
    median_run_length: float
    mean_off_policy_run_length: float
    """Tokens in a run of state +1 or -1."""
    run_length_counts: Counter[int]
    """How many runs have each length, all states."""
    off_policy_run_length_counts: Counter[int]


def sign_statistics(log_ratio: Any, mask: Any, dead_zone: float = 0.0) -> SignStatistics:
    """Statistics of the signs of `log_ratio` (B, T) where `mask` (B, T) is true; tensors, arrays, or nested lists.

    Values outside the mask may be anything. Raises ValueError for shapes that do not fit, a negative dead zone, or a
    non-finite log-ratio on a valid token.
    """
    values, valid = checked(log_ratio, mask)
    if not 0 <= dead_zone < np.inf:
        raise ValueError(f"dead_zone={dead_zone} must be a finite number, at least 0")
    state = states(values, valid, dead_zone)
    joined = neighbours(valid)
    switch = joined & (state[:, 1:] != state[:, :-1])
    signed = joined & (state[:, 1:] != 0) & (state[:, :-1] != 0)
    lengths, run_states = runs(state, valid)
    off_policy = lengths[run_states != 0]
    return SignStatistics(
        tokens=int(valid.sum()),
        pairs=int(joined.sum()),
        switch_frequency=_share(switch.sum(), joined.sum()),
        switch_frequency_two_state=_share((switch & signed).sum(), signed.sum()),
        mean_run_length=_share(lengths.sum(), len(lengths)),
        median_run_length=float(np.median(lengths)) if len(lengths) else float("nan"),
        mean_off_policy_run_length=_share(off_policy.sum(), len(off_policy)),
        run_length_counts=Counter(lengths.tolist()),
        off_policy_run_length_counts=Counter(off_policy.tolist()),
    )


def checked(log_ratio: Any, mask: Any) -> tuple[Floats, Bools]:
    """Both as arrays (B, T): log-ratios zero outside the mask, the mask as booleans. Raises ValueError."""
    values, given = _array(log_ratio), _array(mask)
    if values.ndim != 2:
        raise ValueError(f"log_ratio has shape {values.shape}; it must be (B, T), one row a response")
    if given.shape != values.shape:
        raise ValueError(f"mask has shape {given.shape} but log_ratio has {values.shape}")
    valid = given.astype(bool)
    if not (valid == given).all():
        raise ValueError("the mask must hold 0 and 1 (or booleans) only")
    clean = np.where(valid, values, 0.0)
    if not np.isfinite(clean).all():
        row, column = np.argwhere(~np.isfinite(clean))[0]
        raise ValueError(f"log_ratio is {clean[row, column]} at row {row}, token {column}, a valid token")
    return clean, valid


def states(values: Floats, valid: Bools, dead_zone: float) -> NDArray[np.int8]:
    """s (B, T): -1, 0 or +1 on valid tokens, 0 elsewhere."""
    return ((values > dead_zone) & valid).astype(np.int8) - ((values < -dead_zone) & valid).astype(np.int8)


def neighbours(valid: Bools) -> Bools:
    """(B, T - 1): true where the token and the one after it are both valid."""
    return valid[:, 1:] & valid[:, :-1]


def run_starts(state: NDArray[np.int8], valid: Bools) -> Bools:
    """(B, T): true at the first token of each run."""
    start = valid.copy()
    start[:, 1:] &= ~valid[:, :-1] | (state[:, 1:] != state[:, :-1])
    return start


def runs(state: NDArray[np.int8], valid: Bools) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Lengths and states of all runs, row by row. Every row and every gap starts a new one."""
    first = np.flatnonzero(run_starts(state, valid)[valid])
    return np.diff(np.append(first, valid.sum())), state[valid][first]


def _array(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _share(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else float("nan")
