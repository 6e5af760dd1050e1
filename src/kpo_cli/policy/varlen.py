"""Packed attention without padding: torch's varlen attention, where a GPU and the installed torch have it.

Queries stay where a packed micro-batch has them, each token once; only keys and values are gathered, row by row. A
segment is what a row brings and no row before it had: a prompt with its first response, then one other response each.
Its queries are the last of the keys that it looks at, which is the alignment of `varlen_attn` (at the bottom right).
What is computed in float32, as all trials before a run are, goes through buckets: the kernel takes 16 bits alone.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kpo_cli.policy.attention import Packing


class Kernel(Protocol):
    """Attention of packed `query` (M, heads, size) to `key` and `value` (K, key-value heads, size), both by segments.

    The ends of segments are int32, from 0 on. `window_size` is how far a query looks to the left (-1: all the way) and
    to the right, where the last query of a segment stands at its last key.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed sequence of M tokens lie, for a `kernel`."""

    places: Tensor
    """(K,) int64: of the keys that each segment looks at, end to end."""
    query_ends: Tensor
    """(segments + 1,) int32, from 0 to M."""
    key_ends: Tensor
    """(segments + 1,) int32, from 0 to K."""
    longest: tuple[int, int]
    """Queries and keys of a segment, at most."""
    kernel: Kernel
    narrow: bool
    """The kernel takes 16 bits alone."""
    rows: Sequence[Tensor]
    """The places (L,) of each row's tokens."""

    @classmethod
    def of(
        cls, rows: Sequence[Tensor], tokens: int, device: torch.device, kernel: Kernel, narrow: bool = True
    ) -> "Segments":
        """Pack `rows`, each the places (L,) of its tokens in order; together they cover 0 to `tokens` - 1.

        What a row brings of its own stands at its end, behind what the rows before it brought. Raises ValueError where
        that is not so.
        """
        keys, query_ends, key_ends = [], [0], [0]
        for row in rows:
            own = int((row >= query_ends[-1]).sum())
            if own:  # a response of one token brings none: what follows the last token is not predicted
                keys.append(row)
                query_ends.append(query_ends[-1] + own)
                key_ends.append(key_ends[-1] + len(row))
                if not torch.equal(row[-own:], torch.arange(query_ends[-2], query_ends[-1])):
                    raise ValueError("a row's own tokens do not stand behind those of the rows before it")
        ends = [torch.tensor(each, dtype=torch.int32) for each in (query_ends, key_ends)]
        longest = int(ends[0].diff().max()), int(ends[1].diff().max())
        places, *ends = (tensor.to(device) for tensor in (torch.cat(keys), *ends))
        return cls(places, ends[0], ends[1], longest, kernel, narrow, rows)

    @cached_property
    def buckets(self) -> Packing:
        """The same rows, for float32."""
        return Packing.of(self.rows, int(self.query_ends[-1]), self.places.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float | None) -> Tensor:
        """See `policy.attention.Rows`."""
        given = (query, key, value)
        dtype = min((tensor.dtype for tensor in given), key=lambda each: each.itemsize)  # norms may leave float32
        if self.narrow and dtype.itemsize > 2:
            return self.buckets.attend(query, key, value, window, scaling)
        query, key, value = (tensor.to(dtype).squeeze(0).transpose(0, 1) for tensor in given)
        # As in buckets: the backward of F.embedding is the fast one for places that occur more than once.
        key, value = (F.embedding(self.places, t.flatten(1)).unflatten(1, t.shape[1:]) for t in (key, value))
        return self.kernel(
            query,
            key,
            value,
            self.query_ends,
            self.key_ends,
            *self.longest,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        ).unsqueeze(0)


@dataclass(frozen=True)
class Installed:
    """torch's `varlen_attn`, called with what its signature has."""

    function: Callable[..., Any]
    flagged: bool
    """Fewer key-value heads are announced by `enable_gqa`; torch 2.11 takes them without."""
    expanded: bool = False
    """Key-value heads are repeated until there are as many as of queries."""
    unsplit: bool = False
    """With `num_splits=1`: what a token attends to is summed in one order, whatever else is in the micro-batch."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *lengths: Any, enable_gqa: bool, **options: Any
    ) -> Tensor:
        """See `Kernel`."""
        if self.expanded:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        elif self.flagged:
            options["enable_gqa"] = enable_gqa
        if self.unsplit:
            options["num_splits"] = 1
        out: Tensor = self.function(query, key, value, *lengths, **options)
        return out


def installed_kernels() -> tuple[Installed, ...]:
    """Ways to call the `varlen_attn` of the installed torch, best first; none where it has none that we can use.

    Asked by signature. Whether a kernel takes what the signature has is for a trial to find out (`policy/kernels.py`).
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    known = inspect.signature(varlen_attn).parameters.keys()
    if not {"scale", "window_size"} <= known:
        return ()
    flagged = "enable_gqa" in known
    return tuple(
        Installed(varlen_attn, flagged, expanded, unsplit)
        for expanded in (False, True)
        for unsplit in ((True, False) if "num_splits" in known else (False,))
    )
