"""The keys and values of a batch of responses while they are sampled: grown in place, and shared at the start.

transformers' own layers concatenate: every token copies all that is stored. Ours keep room behind the last token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

MIN_ROOM = 32
"""Tokens that a layer has room for, beyond those it holds, when it is made or grown; half of what it holds if more."""
GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of transformers that `GrowingLayer` takes the place of."""


class GrowingLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, head size) of one layer of attention, as a view of larger tensors.

    It replaces a layer that the prompts have been through. From then on rows can be dropped, but not added.

    With a `window` it holds the window - 1 tokens that the next one sees. With a `block` attention is given a multiple
    of so many tokens, or the whole window: a shape that changed with every token would have a GPU choose its kernels
    anew each time. What is not filled yet is zero, and for the mask to leave out.
    """

    keys: Tensor
    values: Tensor
    _key_store: Tensor
    _value_store: Tensor
    _start: int

    def __init__(self, layer: DynamicLayer, rows: Tensor, limit: int, block: int | None = None) -> None:
        """Rows `rows` of `layer`, with repetitions; `limit` is the most tokens there will ever be."""
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        self.is_sliding = self.window is not None
        self.is_compileable = block is not None  # then transformers makes a mask without looking whether it has to
        self.limit, self.block, self.seen = limit, block, layer.get_seq_length()
        self._hold(layer.keys.index_select(0, rows), layer.values.index_select(0, rows))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values (rows, heads, new tokens, head size); return all that may be looked at."""
        rows, new = key_states.shape[0], key_states.shape[-2]
        given, _ = self.get_mask_sizes(new)
        if self._start + given > self._key_store.shape[-2]:
            self._hold(self.keys, self.values, given)
        start = self._start
        end = start + self.keys.shape[-2] + new
        self._key_store[:rows, :, end - new : end] = key_states
        self._value_store[:rows, :, end - new : end] = value_states
        self.seen += new
        if self.window is not None:
            self._start = max(start, end - self.window + 1)
        self.keys, self.values = (store[:rows, :, self._start : end] for store in (self._key_store, self._value_store))
        if start == self._start and start + given == end:
            return self.keys, self.values
        return self._key_store[:rows, :, start : start + given], self._value_store[:rows, :, start : start + given]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens `update` will return, and the place of the first of them."""
        held = self.keys.shape[-2]
        given = held + query_length
        if self.block is not None:
            given = rounded_up(given, self.block)
            if self.window is not None:
                given = min(given, self.window - 1 + query_length)
        return given, self.seen - held

    def get_seq_length(self) -> int:
        """Tokens so far, those that a window has left behind included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, no more than there are. Only those that change their place are copied."""
        rows = len(beam_idx)
        moved = (beam_idx != torch.arange(rows, device=self.device)).nonzero().squeeze(-1)
        origin = beam_idx[moved]
        for held in (self.keys, self.values):
            held.index_copy_(0, moved, held.index_select(0, origin))
        self.keys, self.values = self.keys[:rows], self.values[:rows]

    def _hold(self, keys: Tensor, values: Tensor, tokens: int = 0) -> None:
        """Copy what there is to where it has room for at least `tokens` tokens."""
        held = keys.shape[-2]
        capacity = max(held, tokens, min(self.limit, held + max(MIN_ROOM, held // 2)))
        if self.block is not None:
            capacity = rounded_up(capacity, self.block)
        self._start = 0
        self._key_store, self._value_store = (_enlarged(x, capacity, self.block is not None) for x in (keys, values))
        self.keys, self.values = self._key_store[:, :, :held], self._value_store[:, :, :held]


def rounded_up(tokens: int, block: int) -> int:
    """The next multiple of `block`."""
    return -(-tokens // block) * block


def _enlarged(held: Tensor, capacity: int, zeros: bool) -> Tensor:
    rows, heads, tokens, size = held.shape
    # A weight of 0 does not hide what is not a number.
    store = (held.new_zeros if zeros else held.new_empty)(rows, heads, capacity, size)
    store[:, :, :tokens] = held
    return store


def spread(cache: Any, rows: Any, limit: int, *, block: int | None = None) -> None:
    """Make a cache of prompts one of responses: its row `i` becomes that of prompt `rows[i]`, in place.

    Every layer of plain attention, full or in a window, becomes one that grows in place, up to `limit` tokens; `block`
    is that of `GrowingLayer`. Any other (linear attention, one with more than keys and values) stays transformers' own.
    """
    if isinstance(cache, DynamicCache):
        for place, layer in enumerate(cache.layers):
            # Not isinstance alone: what derives from them may hold more.
            if isinstance(layer, DynamicLayer) and type(layer) in GROWING and layer.get_seq_length() > 0:
                cache.layers[place] = GrowingLayer(layer, rows, limit, block)
            else:
                layer.reorder_cache(rows)
    else:
        cache.reorder_cache(rows)
