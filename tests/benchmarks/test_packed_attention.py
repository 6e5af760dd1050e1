"""benchmarks/packed_attention.py: what it counts is what there is."""

import sys
from functools import partial

import pytest
import torch
from conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))

import packed_attention

from kpo_cli.policy.attention import Packing
from kpo_cli.policy.scorer import pack
from kpo_cli.policy.varlen import Segments, installed_kernels

CPU = torch.device("cpu")
GROUPS = [[7, 0, 300], [12]]


def packed(layout):
    return pack(packed_attention.rows(GROUPS), CPU, layout).packing


def segments():
    if not installed_kernels():
        pytest.skip("this torch has no varlen attention to count")
    return packed(partial(Segments.of, kernel=installed_kernels()[0]))


@pytest.mark.parametrize("window", [None, 1, 200, 1000])
def test_pairs_are_those_that_a_mask_shows(window):
    """By segments: each token once, with every token that it sees."""
    seen = 0
    for group in GROUPS:
        rows = [torch.arange(256 + n) for n in group]
        masks = [(row[:, None] >= row) & (row[:, None] - row < (window or 10**6)) for row in rows]
        seen += sum(int(mask[256:].sum()) for mask in masks) + int(masks[0][:256].sum())
    assert packed_attention.pairs(segments(), window) == seen
    lengths = [bucket.shape for bucket in packed(Packing.of).buckets]
    squares = sum(int(torch.ones(length, length).tril().sum()) * rows for rows, length in lengths)
    if window is None:
        assert packed_attention.pairs(packed(Packing.of)) == squares > seen
    else:
        assert packed_attention.pairs(packed(Packing.of), window) == sum(rows * length**2 for rows, length in lengths)


def test_bytes_are_those_of_what_is_gathered_and_kept():
    tokens, keys = 2 * 256 + 7 + 300 + 12, 263 + 556 + 268  # the response of one token brings nothing
    query, pair = 2 * 16 * 128, 2 * 2 * 8 * 128
    got = packed_attention.count(segments())
    assert got.gathered == keys * pair
    assert got.kept == pytest.approx(
        keys * pair + tokens * query + 4 * 16 * tokens, abs=100
    )  # output and its logarithms
    in_rows = sum(bucket.numel() for bucket in packed(Packing.of).buckets)
    assert packed_attention.count(packed(Packing.of)).gathered == in_rows * (query + pair) + tokens * query
