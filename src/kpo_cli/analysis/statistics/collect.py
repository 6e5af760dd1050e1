"""One pass over the records: sums that hold for every token, and a random subsample kept as it is.

What is kept grows with the number of prompts, not of tokens: for each prompt of each recorded step one row of sums a
series. The subsample is the responses with the smallest of random keys, as many as hold the wanted number of tokens;
which ones depends on the seed and the order of the files alone.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.config import AnalyzeConfig
from kpo_cli.analysis.statistics.breakdowns import EDGES, MEASURES, TokenMeasures, binned, bins_of
from kpo_cli.analysis.statistics.clipping import Widths, clip_counts
from kpo_cli.analysis.statistics.series import Series
from kpo_cli.analysis.statistics.signs import runs, states
from kpo_cli.analysis.statistics.spectrum import BINS, spectra
from kpo_cli.analysis.statistics.sums import COLUMNS, LAG_COLUMNS, lag_sums, response_sums
from kpo_cli.runs.ratios import Ratios, joined

LONGEST_RUN = 512
"""Runs of this length and more are counted together."""
MAGNITUDE_BINS = 1601
"""Of |x|: 100 a decade from 1e-12 to 1e4, half a bin more than a percent wide; the first one is 0 and less than it."""
TRUNCATION = 2.0
"""C of truncated importance sampling, sg[min(pi_old / mu, C)], whose effect the mismatch table states."""


@dataclass
class Mismatch:
    """Sums over all tokens of m = log pi_old - log mu, the trainer's log-probability less the sampler's."""

    tokens: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    k3: float = 0.0
    largest: float = 0.0
    truncated: float = 0.0

    def add(self, batch: Ratios) -> None:
        if batch.old_log_probs is None or batch.rollout_log_probs is None:
            return
        m = (batch.old_log_probs.astype(np.float64) - batch.rollout_log_probs)[batch.mask]
        self.tokens += len(m)
        self.total += m.sum()
        self.squares += (m**2).sum()
        with np.errstate(over="ignore"):
            self.k3 += (np.expm1(m) - m).sum()
        self.largest = max(self.largest, float(np.abs(m).max(initial=0.0)))
        self.truncated += float((m > np.log(TRUNCATION)).sum())


@dataclass
class Reservoir:
    """A random subsample of responses, in the order of their keys."""

    tokens: int
    rng: np.random.Generator
    keys: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    kept: Ratios | None = None

    def add(self, batch: Ratios) -> None:
        usable = batch.rows(batch.lengths > 0)
        if not len(usable):
            return
        keys = np.append(self.keys, self.rng.random(len(usable)))
        together = usable if self.kept is None else joined([self.kept, usable])
        order = keys.argsort()
        chosen = order[: fitting(together.lengths[order], self.tokens)]
        self.keys, self.kept = keys[chosen], together.rows(chosen)


def fitting(lengths: NDArray[np.int64], tokens: int) -> int:
    """How many of the first responses hold at most `tokens` tokens together; at least one."""
    return max(1, int(np.searchsorted(lengths.cumsum(), tokens, side="right")))


class Collector:
    """Sums of all series. Axes: S series, K columns of sums."""

    def __init__(self, series: list[Series], config: AnalyzeConfig) -> None:
        self.series, self.config = series, config
        self.widths: list[Widths] = config.clip_widths
        self.reservoir = Reservoir(
            max(config.likelihood_tokens, config.nulls.tokens), np.random.default_rng([config.seed, 0])
        )
        self.mismatch = Mismatch()
        self.own_widths: Widths | None = None
        self.has_advantages = True
        self.has_mini_batches = True
        self.responses = self.off_policy_responses = 0
        count = len(series)
        self._keys: list[NDArray[np.int64]] = []
        self._clusters: list[NDArray[np.float64]] = []
        self.lags = np.zeros((count, config.lags, len(LAG_COLUMNS)))
        self.spectrum = np.zeros((count, 2, BINS))
        self.run_lengths = np.zeros((count, 2, LONGEST_RUN + 1))
        self.magnitudes = np.zeros((count, 2, MAGNITUDE_BINS))
        self.clipped = np.zeros((count, len(self.widths), 3))
        self.breakdowns = {kind: np.zeros((count, len(edges), len(MEASURES))) for kind, edges in EDGES.items()}
        self.available: set[str] = set()

    def add(self, batch: Ratios, own_widths: Widths | None) -> None:
        """A batch of responses, with the clip widths of its own run."""
        self.own_widths = own_widths
        self.has_advantages &= batch.advantages is not None
        self.has_mini_batches &= batch.mini_batch_index is not None
        for piece in batch.pieces():
            self._add_piece(piece)

    def _add_piece(self, piece: Ratios) -> None:
        self.responses += len(piece)
        self.off_policy_responses += int(piece.off_policy.sum())
        self.mismatch.add(piece)
        values = np.stack([series.of(piece) for series in self.series])
        self._add_sums(piece, values)
        off_policy = piece.off_policy
        if off_policy.any():
            later = piece if off_policy.all() else piece.rows(off_policy)
            self.reservoir.add(later)
            self._add_tokens(later, values[:, off_policy, : later.mask.shape[1]])

    def _add_sums(self, piece: Ratios, values: NDArray[np.float64]) -> None:
        """Sums by prompt and mini-batch, on-policy ones included."""
        flat, mask = values.reshape(-1, values.shape[2]), np.tile(piece.mask, (len(values), 1))
        found = spectra(flat, mask, self.config.cutoff)
        sums = response_sums(flat, mask, self.config.dead_zone, found.low).reshape(len(values), len(piece), -1)
        off_policy = piece.off_policy
        by_series = (len(values), len(piece), BINS)
        for i, part in enumerate((found.power, found.white)):
            self.spectrum[:, i] += part.reshape(by_series)[:, off_policy].sum(1)
        unknown = -1 - np.arange(self.responses - len(piece), self.responses)  # every response a prompt of its own
        prompts = unknown if piece.prompt_index is None else piece.prompt_index
        batches = np.ones(len(piece), int) if piece.mini_batch_index is None else piece.mini_batch_index
        keys, index = np.unique(np.stack([piece.step, prompts, batches], 1), axis=0, return_inverse=True)
        clusters = np.zeros((len(keys), len(values), len(COLUMNS)))
        np.add.at(clusters, index.ravel(), sums.transpose(1, 0, 2))
        self._keys.append(keys)
        self._clusters.append(clusters)

    def _add_tokens(self, piece: Ratios, values: NDArray[np.float64]) -> None:
        """Distributions over off-policy tokens."""
        dead_zone = self.config.dead_zone
        bins = {kind: found for kind in EDGES if (found := bins_of(kind, piece)) is not None}
        self.available |= bins.keys()
        for i, x in enumerate(values):
            self.lags[i] += lag_sums(x, piece.mask, dead_zone, self.config.lags)
            self.run_lengths[i] += run_counts(x, piece.mask, dead_zone)
            self.magnitudes[i] += magnitude_counts(x[piece.mask])
            self.clipped[i] += clip_counts(x, piece.mask, piece.advantages, self.widths)
            measures = TokenMeasures.of(x, piece, dead_zone, self.own_widths)
            for kind, of_token in bins.items():
                self.breakdowns[kind][i] += binned(measures, of_token[piece.mask], len(EDGES[kind]))

    def clusters(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Keys (C, 3) step, prompt and mini-batch, and sums (C, S, K); one row for each that occurs."""
        keys, sums = np.concatenate(self._keys), np.concatenate(self._clusters)
        unique, index = np.unique(keys, axis=0, return_inverse=True)
        merged = np.zeros((len(unique), *sums.shape[1:]))
        np.add.at(merged, index.ravel(), sums)
        return unique, merged


def run_counts(x: NDArray[np.float64], mask: NDArray[np.bool_], dead_zone: float) -> NDArray[np.float64]:
    """(2, LONGEST_RUN + 1): how many runs have each length, of all states and of +1 and -1 alone."""
    lengths, run_states = runs(states(x, mask, dead_zone), mask)
    both = (lengths, lengths[run_states != 0])
    return np.stack([np.bincount(np.minimum(each, LONGEST_RUN), minlength=LONGEST_RUN + 1) for each in both]).astype(
        float
    )


def magnitude_counts(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, MAGNITUDE_BINS): how many values are negative, or at least 0, in each bin of |x|."""
    with np.errstate(divide="ignore"):
        bins = np.clip((np.log10(np.abs(x)) + 12) * 100 + 1, 0, MAGNITUDE_BINS - 1).astype(int)
    return np.stack(
        [np.bincount(bins[x < 0], minlength=MAGNITUDE_BINS), np.bincount(bins[x >= 0], minlength=MAGNITUDE_BINS)]
    )


def magnitudes() -> NDArray[np.float64]:
    """(MAGNITUDE_BINS,): the middle of each bin of |x|."""
    middle = 10 ** ((np.arange(MAGNITUDE_BINS) - 0.5) / 100 - 12)
    middle[0] = 0.0
    return middle


def percentiles(counts: NDArray[np.float64], levels: tuple[float, ...]) -> dict[str, float]:
    """Percentiles from `magnitude_counts`, right to 1.2%."""
    middle = magnitudes()
    values, weights = np.concatenate([-middle[::-1], middle]), np.concatenate([counts[0, ::-1], counts[1]])
    at = np.searchsorted(weights.cumsum(), np.array(levels) / 100 * weights.sum())
    return {f"{level:g}": float(values[min(i, len(values) - 1)]) for level, i in zip(levels, at, strict=True)}


def energy_of_largest(counts: NDArray[np.float64], share: float) -> float:
    """Part of the sum of squares that the largest `share` of the values hold, from `magnitude_counts`."""
    number, squares = counts.sum(0)[::-1], (counts.sum(0) * magnitudes() ** 2)[::-1]
    wanted, total = share * number.sum(), squares.sum()
    if not total:
        return float("nan")
    held = np.interp(wanted, np.concatenate([[0], number.cumsum()]), np.concatenate([[0], squares.cumsum()]))
    return float(held / total)
