"""Activations that are computed again in the backward pass instead of kept, in eval mode.

transformers recomputes in train mode only, and that mode is another model: dropout, jitter and sampled experts begin to
act, Gemma 3n clips its weights in place. A policy is never in train mode.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


class _Recomputed:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own, which keeps its inputs alone where gradients are wanted."""
        own = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        # Nothing is random in eval mode, so there is no state of generators to keep.
        return checkpoint(partial(own, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


def recompute_layers(model: torch.nn.Module, count: int | None = None) -> int:
    """Let the first `count` (None: all) of the outermost layers that transformers could recompute do so, and the others
    not; returns how many it could.

    The first: they are computed again last, when what the others kept has gone.
    """
    layers: list[Any] = list(_outermost(model))
    for place, layer in enumerate(layers):
        kind = type(layer)
        own = kind.__bases__[1] if issubclass(kind, _Recomputed) else kind
        # Not a wrapped method: a copy's would be the first one's.
        layer.__class__ = _recomputed(own) if count is None or place < count else own
    return len(layers)


def _outermost(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    if isinstance(module, GradientCheckpointingLayer):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


@cache
def _recomputed(kind: Any) -> type:
    return type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})
