"""The keys and values of a batch of responses while they are sampled: grown in place, and shared at the start.

transformers' own layer concatenates: every token copies all that is stored. Ours keeps room behind the last token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

MIN_ROOM = 32
"""Tokens that a layer has room for, beyond those it holds, when it is made or grown; half of what it holds if more."""


class GrowingLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, head size) of one layer of full attention, as a view of larger tensors.

    It replaces a layer that the prompts have been through. From then on rows can be dropped, but not added.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, rows: Tensor, limit: int) -> None:
        """Rows `rows` of `layer`, with repetitions; `limit` is the most tokens there will ever be."""
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.limit = limit
        self._hold(layer.keys.index_select(0, rows), layer.values.index_select(0, rows))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values (rows, heads, new tokens, head size); return all of them."""
        rows, start = key_states.shape[0], self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._key_store.shape[-2]:
            self._hold(self.keys, self.values, end)
        self._key_store[:rows, :, start:end] = key_states
        self._value_store[:rows, :, start:end] = value_states
        self.keys, self.values = self._key_store[:rows, :, :end], self._value_store[:rows, :, :end]
        return self.keys, self.values

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
        self._key_store, self._value_store = _enlarged(keys, capacity), _enlarged(values, capacity)
        self.keys, self.values = self._key_store[:, :, :held], self._value_store[:, :, :held]


def _enlarged(held: Tensor, capacity: int) -> Tensor:
    rows, heads, tokens, size = held.shape
    store = held.new_empty(rows, heads, capacity, size)
    store[:, :, :tokens] = held
    return store


def spread(cache: Any, rows: Any, limit: int) -> None:
    """Make a cache of prompts one of responses: its row `i` becomes that of prompt `rows[i]`, in place.

    Every layer of plain full attention becomes one that grows in place, up to `limit` tokens. Any other (sliding
    window, linear attention, one with more than keys and values) stays transformers' own.
    """
    if isinstance(cache, DynamicCache):
        for place, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
                cache.layers[place] = GrowingLayer(layer, rows, limit)
            else:
                layer.reorder_cache(rows)
    else:
        cache.reorder_cache(rows)
