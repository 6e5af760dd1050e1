"""The statistics of a ratio sequence, one token at a time: slow and plain, to test the fast ones against."""

import cmath
import itertools
import math
from collections import Counter


def stretches(values, mask):
    """Blocks of neighbouring valid values of one row."""
    blocks, block = [], []
    for value, valid in zip(values, mask, strict=True):
        if valid:
            block.append(float(value))
        elif block:
            blocks.append(block)
            block = []
    return [*blocks, block] if block else blocks


def sign(value, dead_zone):
    return 1 if value > dead_zone else -1 if value < -dead_zone else 0


def sign_counts(rows, masks, dead_zone=0.0):
    pairs = switches = signed_pairs = signed_switches = 0
    runs = []
    for values, mask in zip(rows, masks, strict=True):
        for block in stretches(values, mask):
            states = [sign(value, dead_zone) for value in block]
            runs.append([states[0], 1])
            for before, after in itertools.pairwise(states):
                pairs += 1
                switches += before != after
                signed_pairs += before != 0 and after != 0
                signed_switches += before * after == -1
                if before == after:
                    runs[-1][1] += 1
                else:
                    runs.append([after, 1])
    return {
        "pairs": pairs,
        "switch_frequency": switches / pairs if pairs else math.nan,
        "switch_frequency_two_state": signed_switches / signed_pairs if signed_pairs else math.nan,
        "runs": Counter(length for _, length in runs),
        "off_policy_runs": Counter(length for state, length in runs if state),
    }


def periodogram_share(values, cutoff):
    """Share below `cutoff` of one response's periodogram, by the defining sums; None where there is none."""
    n = len(values)
    mean = sum(values) / n
    low = total = 0.0
    some = False
    for k in range(1, n):  # two-sided, so that nothing needs a weight
        frequency = min(k, n - k) / n
        power = abs(sum((x - mean) * cmath.exp(-2j * math.pi * k * t / n) for t, x in enumerate(values))) ** 2
        total += power
        if frequency < cutoff:
            low, some = low + power, True
    return low / total if some and total > 1e-24 else None


def autocorrelation(rows, masks, lag):
    blocks = [block for values, mask in zip(rows, masks, strict=True) for block in stretches(values, mask)]
    tokens = [x for block in blocks for x in block]
    mean = sum(tokens) / len(tokens)
    variance = sum((x - mean) ** 2 for x in tokens) / len(tokens)
    products = [(a - mean) * (b - mean) for block in blocks for a, b in zip(block, block[lag:], strict=False)]
    return sum(products) / len(products) / variance
