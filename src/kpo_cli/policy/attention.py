"""Attention for packed forward passes and for sampling, and the packing itself.

A micro-batch is one sequence of tokens without padding, and every token stands in it once: the responses to a prompt
share the prompt's. Only attention looks at rows, a prompt and one response each. They are gathered from the packed
tokens, sorted into buckets of like length, and each bucket goes through one causal attention, where padding on the
right needs no mask: no token before it looks at it. On a GPU `policy/varlen.py` may take the buckets' place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "kpo"
"""Of the attention in transformers."""
FILL = 0.75
"""A bucket takes rows down to this share of its longest."""


class Rows(Protocol):
    """The rows of a packed sequence of M tokens, as one kind of attention wants them."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float | None) -> Tensor:
        """Causal attention within the rows: (1, M, heads, size) from `query` (1, heads, M, size).

        With a `window` a token sees itself and the window - 1 tokens before it.
        """
        ...


Layout = Callable[[Sequence[Tensor], int, torch.device], Rows]
"""From rows, each the places (L,) of its tokens in order, which together cover 0 to M - 1; M; and the device."""


@dataclass(frozen=True)
class Packing:
    """Rows in buckets."""

    buckets: tuple[Tensor, ...]
    """(rows, length) int64 each: the places of a row's tokens, from the left; 0 on padding."""
    order: Tensor
    """(M,) int64: for each place, one position among the buckets' tokens laid end to end, padding included."""

    @classmethod
    def of(cls, rows: Sequence[Tensor], tokens: int, device: torch.device) -> "Packing":
        """Pack `rows`, each the places (L,) of its tokens in order; together they cover 0 to `tokens` - 1.

        Tokens that several rows share must have the same tokens before them in each.
        """
        longest_first = sorted(rows, key=len, reverse=True)
        buckets: list[Tensor] = []
        order = torch.empty(tokens, dtype=torch.long)
        start = end = offset = 0
        while start < len(rows):
            length = len(longest_first[start])
            while end < len(rows) and len(longest_first[end]) >= FILL * length:
                end += 1
            places = torch.zeros(end - start, length, dtype=torch.long)
            for i, row in enumerate(longest_first[start:end]):
                places[i, : len(row)] = row
                order[row] = torch.arange(len(row)) + offset + i * length
            buckets.append(places.to(device))
            offset += places.numel()
            start = end
        return cls(tuple(buckets), order.to(device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float | None) -> Tensor:
        """See `Rows`."""
        return packed_attention(query, key, value, self, window, scaling)


class Lacking(NotImplementedError):
    """A model wants what sdpa does not have, and would do without in silence."""


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Rows | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers: its own sdpa, unless there is a `packing` or one new token a row.

    `query` (B, heads, T, size), `key` and `value` (B, key-value heads, T, size); returns (B, T, heads, size). Raises
    Lacking, or NotImplementedError if a packed model wants a position bias.
    """
    for name, called in (("softcap", "soft cap"), ("s_aux", "attention sinks")):
        if others.get(name) is not None:
            raise Lacking(f"sdpa has no {called}")
    plain = others.get("position_bias") is None
    if packing is not None:
        if not plain:
            raise NotImplementedError("packed attention has no position bias")
        return packing.attend(query, key, value, sliding_window, scaling), None
    if plain and query.shape[2] == 1:
        return decode_attention(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, window: int | None, scaling: float | None
) -> Tensor:
    """Causal attention within the rows of `packing`: (1, M, heads, size) from `query` (1, heads, M, size).

    With a `window` a token sees itself and the window - 1 tokens before it.
    """
    heads = [tensor.shape[1] for tensor in (query, key, value)]
    widths = [tensor.shape[1] * tensor.shape[3] for tensor in (query, key, value)]
    # Gathering is F.embedding because its backward is the fast one for places that occur more than once.
    packed = torch.cat([t.transpose(1, 2).flatten(2).squeeze(0) for t in (query, key, value)], dim=-1)
    outputs = []
    for places in packing.buckets:
        rows = F.embedding(places, packed).split(widths, dim=-1)
        q, k, v = (t.unflatten(-1, (count, -1)).transpose(1, 2) for t, count in zip(rows, heads, strict=True))
        mask = None if window is None else _band(places.shape[1], window, places.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads[0] != heads[1]
        )
        outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    attended = F.embedding(packing.order, torch.cat(outputs))
    return attended.unflatten(-1, (heads[0], -1)).unsqueeze(0)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of one new token a row: (B, 1, heads, size) from `query` (B, heads, 1, size).

    `key` and `value` (B, key-value heads, T, size) are read in place. The query heads that share a key head become
    its queries, so that nothing is expanded, with `attention_mask` (B, 1, 1, T; boolean or additive) or without.
    """
    rows, heads, _, size = query.shape
    shared = key.shape[1]
    grouped = query.reshape(rows, shared, heads // shared, size)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[-1])


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) bool: each token sees itself and the `window` - 1 before it."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
