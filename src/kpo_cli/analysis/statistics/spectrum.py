"""Frequencies of a log-ratio along its response.

The periodogram of a response is taken over its longest stretch without a gap, n tokens, with the mean taken off, at
the Fourier frequencies k / n cycles per token, k = 1 .. n // 2. Each is divided by its sum, so that a response counts
by its shape and not by the size of its log-ratios: a few tokens carry nearly all of the energy of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.statistics.signs import Bools, Floats

BINS = 25
"""Of the mean spectrum, from 0 to 0.5 cycles per token."""


@dataclass(frozen=True)
class Spectra:
    """Of B responses."""

    low: NDArray[np.float64]
    """(B,): share of the periodogram below the cutoff. NaN where there is none: a constant response, or one so short
    that no Fourier frequency lies below the cutoff."""
    power: NDArray[np.float64]
    """(B, BINS): share of the periodogram in each bin of frequency, zero for a constant response."""
    white: NDArray[np.float64]
    """(B, BINS): the share that white noise would have there. Sum of power by sum of white is the mean spectrum
    relative to white noise."""


def spectra(values: Floats, valid: Bools, cutoff: float) -> Spectra:
    """Periodograms of `values` (B, T), below `cutoff` cycles per token and in bins."""
    low = np.full(len(values), np.nan)
    power, white = np.zeros((2, len(values), BINS))
    for rows, frequencies, shares in _periodograms(values, valid):
        below = frequencies < cutoff
        if below.any():
            low[rows] = shares[:, below].sum(1)
        known = np.isfinite(shares[:, :1])
        bins, first = np.unique(np.minimum(frequencies * 2 * BINS, BINS - 1).astype(int), return_index=True)
        power[rows[:, None], bins] = np.add.reduceat(np.where(known, shares, 0.0), first, axis=1)
        # White noise has the same power at all Fourier frequencies; n even has its last one once, not twice.
        weights = _weights(frequencies)
        white[rows[:, None], bins] = known * np.add.reduceat(weights / weights.sum(), first)
    return Spectra(low, power, white)


def _periodograms(values: Floats, valid: Bools) -> Iterator[tuple[NDArray[np.int64], Floats, Floats]]:
    """Responses of one length n at a time: their rows, the frequencies, the power (rows, n // 2), sum 1 or NaN."""
    start, length = longest_stretch(valid)
    for n in np.unique(length[length >= 4]):
        rows = np.flatnonzero(length == n)
        if (start[rows] == 0).all():
            stretch = values[rows, :n].astype(np.float64)
        else:
            stretch = np.take_along_axis(values[rows], start[rows, None] + np.arange(n), 1).astype(np.float64)
        scale = np.abs(stretch).max(1, keepdims=True)
        centred = stretch - stretch.mean(1, keepdims=True)
        # What is left of a constant response after its mean is taken off is rounding, not a signal.
        flat = np.abs(centred).max(1, keepdims=True) <= 1e-12 * scale
        frequencies = np.arange(1, n // 2 + 1) / n
        power = np.abs(np.fft.rfft(centred, axis=1)[:, 1:]) ** 2 * _weights(frequencies)
        total = np.where(flat, np.nan, power.sum(1, keepdims=True))
        yield rows, frequencies, power / np.where(total > 0, total, np.nan)


def longest_stretch(valid: Bools) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and length (B,) of the longest block of valid tokens of each row; the first of several."""
    rows, width = valid.shape
    start, length = np.zeros(rows, np.int64), valid.sum(1)
    begins = valid.copy()
    begins[:, 1:] &= ~valid[:, :-1]
    if not begins[:, 1:].any():  # padding on the right alone
        return start, length
    position = np.arange(width)
    last_begin = np.maximum.accumulate(np.where(begins, position, -1), axis=1)
    so_far = np.where(valid, position - last_begin + 1, 0)
    end = so_far.argmax(1)
    length = so_far[np.arange(rows), end]
    return np.maximum(end - length + 1, 0), length


def _weights(frequencies: Floats) -> NDArray[Any]:
    """How often each frequency stands in the two-sided spectrum: twice, but 1/2 once."""
    return np.where(frequencies == 0.5, 1.0, 2.0)


def quotient(part: Any, whole: Any) -> NDArray[np.float64]:
    """part / whole, NaN where there is nothing to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(whole) > 0, part / whole, np.nan)
