"""Activations that are computed again in the backward pass instead of kept, in eval mode.

transformers recomputes in train mode only, and that mode is another model: dropout, jitter and sampled experts begin to
act, Gemma 3n clips its weights in place. A policy is never in train mode.
"""

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


def recompute_layers(module: torch.nn.Module, on: bool = True) -> bool:
    """Let the outermost layers in `module` that transformers could recompute do so; False if it has none."""
    if isinstance(module, GradientCheckpointingLayer):
        kind: Any = type(module)
        own = kind.__bases__[1] if issubclass(kind, _Recomputed) else kind
        module.__class__ = _recomputed(own) if on else own  # not a wrapped method: a copy's would be the first one's
        return True
    found = [recompute_layers(child, on) for child in module.children()]  # all of them
    return any(found)


@cache
def _recomputed(kind: Any) -> type:
    return type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})
