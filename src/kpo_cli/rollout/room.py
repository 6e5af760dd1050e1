"""A GPU shared by the trainer and the engine: who gets how much. Arithmetic on bytes, nothing else.

While the engine samples, the trainer holds its weights (they are allocated, so what is free is without them) and,
unless they are in host memory meanwhile, AdamW's moments; gradients are gone by then. The engine gets the rest, less a
little to spare, and what its own weights and the peak of its forward pass leave of that is its key-value cache.
"""

from dataclasses import dataclass
from typing import Any

GIB = 2**30
SPARE = 0.05
"""Of the GPU, left to nobody: the CUDA context grows, blocks of memory break, a push holds a layer twice."""
GRAPHS = GIB
"""For what vLLM records and keeps for its kernels; it measures it when it starts."""
MOMENTS = 8
"""Bytes a trained parameter of AdamW's two moments."""
LOGITS_CHECKED = 512
"""Tokens of a checked response whose logits exist at a time."""


@dataclass(frozen=True)
class Needs:
    """What an engine takes, in bytes."""

    weights: int
    peak: int
    """Of its largest forward pass, beside weights and cache."""
    token: int
    """Of the key-value cache, for one token."""


def needs_of(config: Any, parameters: int, sequences: int, batched_tokens: int, width: int) -> Needs:
    """Of an engine that samples `sequences` responses at a time; `config` is the model's text configuration.

    `width`: bytes of a number. The peak is an estimate: a forward pass has a few hidden vectors and those of one MLP,
    and sampling has three float32 tensors of logits.
    """
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = batched_tokens * width * (4 * hidden + 3 * intermediate)
    logits = 3 * 4 * sequences * config.vocab_size
    return Needs(width * parameters, layer + logits + GRAPHS, token_bytes(config, width))


def token_bytes(config: Any, width: int) -> int:
    """Keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * width * config.num_hidden_layers * heads * head_dim(config)


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def engine_share(free: int, total: int, reserved: int) -> float:
    """The share of the whole GPU that the engine may take, where `reserved` bytes of what is free are the trainer's."""
    return (free - reserved) / total - SPARE


def cache_tokens(free: int, total: int, reserved: int, needs: Needs) -> int:
    """Tokens that the engine's key-value cache will hold, about; 0 where there is no room for an engine."""
    cache = engine_share(free, total, reserved) * total - needs.weights - needs.peak
    return max(0, int(cache // needs.token))


def choose_offload(
    free: int, total: int, moments: int, needs: Needs, wanted: int, given: int | None = None
) -> tuple[str, str]:
    """Where AdamW's moments (bytes, not allocated yet) are while the engine samples: "none" or "sampling", and why.

    They stay if the cache then holds `wanted` tokens. `given`: the bytes that the user gave the engine, if any; they
    stay if they fit beside those.
    """
    if given is not None:
        fits = free - given - int(SPARE * total) >= moments
        why = f"the engine is given {given / GIB:.1f} GiB, and AdamW's moments of {moments / GIB:.1f}"
        return ("none", f"{why} fit beside it") if fits else ("sampling", f"{why} do not fit beside it")
    beside, alone = (cache_tokens(free, total, reserved, needs) for reserved in (moments, 0))
    held = f"vLLM's cache holds about {beside:,} tokens beside AdamW's moments ({moments / GIB:.1f} GiB)"
    if beside >= wanted:
        return "none", f"{held}, and {wanted:,} are all responses that it samples at a time at full length"
    return "sampling", f"{held}, about {alone:,} with them in host memory, and {wanted:,} would be used"


def check_bytes(config: Any, tokens: int, eager: bool) -> int:
    """What it takes to score a response of `tokens` with its prompt (rollout/check.py), beside the weights.

    Three float32 tensors of logits at a time, and the hidden vectors of one layer, in float32 if in any type. `eager`
    attention has scores of any two tokens for every head: as they come, masked or scaled, and what their softmax makes
    of them.
    """
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    logits = 3 * 4 * min(tokens, LOGITS_CHECKED) * config.vocab_size
    scores = 3 * 4 * config.num_attention_heads * tokens**2 if eager else 0
    return logits + scores + 4 * tokens * (8 * hidden + 3 * intermediate)
