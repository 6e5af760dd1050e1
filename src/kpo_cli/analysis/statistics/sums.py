"""Statistics as quotients of sums over tokens, so that they add up over files and can be resampled.

Every statistic of a series of log-ratios is computed from one row of sums, `COLUMNS`. Sums of responses add up to
sums of prompts, of files, of a run; an interval comes from adding up prompts drawn at random, a null from adding up
responses whose tokens were shuffled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.statistics.signs import Bools, Floats, neighbours, run_starts, states

Sums = NDArray[np.float64]

COLUMNS = (
    *("tokens", "pairs", "switches", "signed_pairs", "signed_switches", "runs", "off_policy_tokens", "off_policy_runs"),
    *("x", "x2", "x3", "x4", "k3", "ratio_excess", "ratio2_excess", "low_share", "low_count"),
    *("first", "second", "product", "sign", "sign_first", "sign_second", "sign_product"),
)
AT = {name: index for index, name in enumerate(COLUMNS)}


def response_sums(values: Floats, valid: Bools, dead_zone: float, low_shares: Floats) -> Sums:
    """(B, len(COLUMNS)): the sums of each response.

    `values` (B, T) must be zero outside the mask; `low_shares` (B,) is `spectra(values, ...).low`.
    """
    x = values.astype(np.float64)
    state = states(values, valid, dead_zone)
    joined = neighbours(valid)
    before, after = state[:, :-1], state[:, 1:]
    switch = joined & (before != after)
    signed = joined & (before != 0) & (after != 0)
    starts = run_starts(state, valid)
    squares = x * x
    with np.errstate(over="ignore"):  # the ratio of a long prefix may be infinite
        excess = np.expm1(x)  # r - 1: exact where z is tiny
        excess2 = excess * (2 + excess)  # r^2 - 1
    columns: dict[str, Any] = {
        "tokens": valid.sum(1),
        "pairs": joined.sum(1),
        "switches": switch.sum(1),
        "signed_pairs": signed.sum(1),
        "signed_switches": (switch & signed).sum(1),
        "runs": starts.sum(1),
        "off_policy_tokens": np.count_nonzero(state, axis=1),
        "off_policy_runs": (starts & (state != 0)).sum(1),
        "x": x.sum(1),
        "x2": squares.sum(1),
        "x3": np.einsum("bt,bt->b", squares, x),
        "x4": np.einsum("bt,bt->b", squares, squares),
        "k3": (excess - x).sum(1),
        "ratio_excess": excess.sum(1),
        "ratio2_excess": excess2.sum(1),
        "low_share": np.nan_to_num(low_shares),
        "low_count": np.isfinite(low_shares),
        "sign": state.sum(1),
        **_lagged_sums(x, joined, ""),
        **_lagged_sums(state.astype(np.float64), joined, "sign_"),
    }
    return np.stack([columns[name] for name in COLUMNS], 1).astype(np.float64)


def _lagged_sums(x: Floats, joined: Bools, prefix: str) -> dict[str, Floats]:
    """Sums over neighbours of the first value, the second, and their product."""
    # The mask is 0 and 1 and x is finite, so a product may stand in for `where`, which is slower.
    pairs = joined.astype(np.float64)
    before, after = x[:, :-1], x[:, 1:]
    return {
        f"{prefix}first": np.einsum("bt,bt->b", before, pairs),
        f"{prefix}second": np.einsum("bt,bt->b", after, pairs),
        f"{prefix}product": np.einsum("bt,bt,bt->b", before, after, pairs),
    }


@dataclass(frozen=True)
class Statistic:
    label: str
    formula: Callable[[Callable[[str], Sums]], Sums]
    """Given the sums by name, all of one shape, the statistic in that shape."""
    limits: tuple[float, float] = (0.0, 1.0)
    """What it can be."""
    covered: bool = True
    """Whether an interval over prompts holds the truth as often as it says; docs/claims.md has how often."""


def statistics(sums: Sums) -> dict[str, Sums]:
    """Every statistic of `sums` (..., len(COLUMNS)), each of shape (...). NaN where nothing could be counted."""

    def column(name: str) -> Sums:
        return sums[..., AT[name]]

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return {name: statistic.formula(column) for name, statistic in STATISTICS.items()}


def _central(s: Callable[[str], Sums]) -> tuple[Sums, Sums]:
    """Second and fourth moment about the mean."""
    n = s("tokens")
    mean, m2, m3, m4 = s("x") / n, s("x2") / n, s("x3") / n, s("x4") / n
    # A difference below the rounding of its terms is 0: a constant has no spread.
    second = np.where(m2 - mean**2 <= 1e-14 * m2, 0.0, m2 - mean**2)
    return second, m4 - 4 * mean * m3 + 6 * mean**2 * m2 - 3 * mean**4


def _kurtosis(s: Callable[[str], Sums]) -> Sums:
    second, fourth = _central(s)
    return fourth / second**2


def _autocorrelation(s: Callable[[str], Sums]) -> Sums:
    return correlation(s("tokens"), s("x"), s("x2"), s("pairs"), s("first"), s("second"), s("product"))


def _sign_autocorrelation(s: Callable[[str], Sums]) -> Sums:
    lagged = (s("sign_first"), s("sign_second"), s("sign_product"))
    return correlation(s("tokens"), s("sign"), s("off_policy_tokens"), s("pairs"), *lagged)


def correlation(n: Any, x: Any, x2: Any, pairs: Any, first: Any, second: Any, product: Any) -> Any:
    """Autocorrelation about the pooled mean m: mean of (x_t - m)(x_{t+k} - m) over pairs, by the variance."""
    mean = x / n
    variance = x2 / n - mean**2
    covariance = (product - mean * (first + second)) / pairs + mean**2
    return np.where(variance > 1e-14 * x2 / n, covariance / variance, np.nan)


def _effective_share(s: Callable[[str], Sums]) -> Sums:
    n = s("tokens")
    return (n + s("ratio_excess")) ** 2 / (n * (n + s("ratio2_excess")))


STATISTICS: dict[str, Statistic] = {
    "switch_frequency": Statistic("switch frequency", lambda s: s("switches") / s("pairs")),
    "switch_frequency_two_state": Statistic(
        "switch frequency, two states", lambda s: s("signed_switches") / s("signed_pairs")
    ),
    "mean_run_length": Statistic("mean run, tokens", lambda s: s("tokens") / s("runs"), (1.0, np.inf)),
    "mean_off_policy_run_length": Statistic(
        "mean off-policy run, tokens", lambda s: s("off_policy_tokens") / s("off_policy_runs"), (1.0, np.inf)
    ),
    "low_frequency_energy": Statistic("low-frequency energy", lambda s: s("low_share") / s("low_count")),
    "autocorrelation": Statistic("autocorrelation, lag 1", _autocorrelation, (-1.0, 1.0)),
    "sign_autocorrelation": Statistic("sign autocorrelation, lag 1", _sign_autocorrelation, (-1.0, 1.0)),
    "off_policy_share": Statistic("share of tokens with a sign", lambda s: s("off_policy_tokens") / s("tokens")),
    "mean": Statistic("mean", lambda s: s("x") / s("tokens"), (-np.inf, np.inf)),
    "std": Statistic("standard deviation", lambda s: np.sqrt(_central(s)[0]), (0.0, np.inf)),
    "kurtosis": Statistic("kurtosis", _kurtosis, (1.0, np.inf), covered=False),
    "effective_sample_size": Statistic("effective sample size, share", _effective_share),
    "kl_k3": Statistic("KL, k3", lambda s: s("k3") / s("tokens"), (0.0, np.inf)),
}
"""What analysis.json holds for each series, in the order of the tables."""
LIMITS = {name: statistic.limits for name, statistic in STATISTICS.items()}
COVERED = {name: statistic.limits for name, statistic in STATISTICS.items() if statistic.covered}


LAG_COLUMNS = ("pairs", "first", "second", "product", "sign_first", "sign_second", "sign_product")


def lag_sums(values: Floats, valid: Bools, dead_zone: float, lags: int) -> Sums:
    """(lags, len(LAG_COLUMNS)): sums over all pairs of tokens at distance 1 .. lags with no gap between them."""
    sign = states(values, valid, dead_zone).astype(np.float64)
    prefix = not (valid[:, 1:] & ~valid[:, :-1]).any()
    parts = _lag_sums_of_prefixes if prefix else _lag_sums_with_gaps
    pairs, of_values = parts(values, valid, lags)
    return np.concatenate([pairs, of_values, parts(sign, valid, lags)[1]], 1)


def _lag_sums_of_prefixes(x: Floats, valid: Bools, lags: int) -> tuple[Sums, Sums]:
    """Pairs (lags, 1) and sums (lags, 3) where the valid tokens of each row are its first ones, x zero beyond them.

    The first tokens of the pairs at distance k are all but the last k of the row, the second ones all but its first k:
    both are differences of cumulative sums.
    """
    length, lag = valid.sum(1)[:, None], np.arange(1, lags + 1)
    upto = np.pad(x.cumsum(1), ((0, 0), (1, 0)))  # sum of the first n tokens at n
    inside = np.clip(length - lag, 0, None)
    first = np.take_along_axis(upto, inside, 1).sum(0)
    second = (upto[:, -1:] - np.take_along_axis(upto, np.minimum(lag, length), 1)).sum(0)
    product = np.zeros(lags)
    for k in range(1, min(lags, x.shape[1] - 1) + 1):
        # einsum and not a dot product: BLAS would start threads for what takes microseconds.
        product[k - 1] = np.einsum("bt,bt->", x[:, :-k], x[:, k:])
    return inside.sum(0)[:, None].astype(np.float64), np.stack([first, second, product], 1)


def _lag_sums_with_gaps(x: Floats, valid: Bools, lags: int) -> tuple[Sums, Sums]:
    """The same for any mask, pair by pair."""
    pairs, sums = np.zeros((lags, 1)), np.zeros((lags, 3))
    unbroken = valid
    for lag in range(1, min(lags, valid.shape[1] - 1) + 1):
        unbroken = unbroken[:, 1:] & valid[:, :-lag]  # valid at t, .., t + lag
        weight, before, after = unbroken.astype(np.float64), x[:, :-lag], x[:, lag:]
        pairs[lag - 1] = weight.sum()
        sums[lag - 1] = [np.einsum("bt,bt->", part, weight) for part in (before, after, before * after)]
    return pairs, sums


def autocorrelations(total: Sums, lagged: Sums) -> dict[str, Sums]:
    """`z` and `sign`, each (lags,), from the sums of a series (len(COLUMNS),) and its `lag_sums`."""
    pairs, first, second, product, *signs = lagged.T
    with np.errstate(divide="ignore", invalid="ignore"):
        n, x, x2, sign, sign2 = (total[AT[name]] for name in ("tokens", "x", "x2", "sign", "off_policy_tokens"))
        return {
            "z": correlation(n, x, x2, pairs, first, second, product),
            "sign": correlation(n, sign, sign2, pairs, *signs),
        }
