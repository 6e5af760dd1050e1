"""What a forward and backward pass holds beside weights, gradients and optimizer, and a sampling batch beside weights.

Estimates for decoders of attention and MLPs, tensor by tensor; `benchmarks/memory.py` counts them with fake tensors.
"""

from dataclasses import dataclass
from typing import Any

from kpo_cli.core.log_probs import chunk_of
from kpo_cli.policy.lora import linear_layers

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
"""What configurations call them."""


class NoEstimate(Exception):
    """Why activations and cache of a model are not estimated. Weights, gradients and optimizer are counted anyway."""


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder of attention and MLPs, as far as memory depends on them."""

    layers: int
    hidden: int
    queries: int
    """Heads times head size."""
    heads: int
    """Of queries."""
    keys: int
    """Key-value heads times head size; as many of values."""
    intermediate: int
    vocabulary: int
    norms: int
    """Of the hidden states, in a layer."""
    head_norms: bool
    """Queries and keys are normalised."""
    gated: bool
    """The MLP has a gate."""
    matrices: int
    """Weights of all layers' products."""
    tied: bool
    """The head is the embedding."""
    capped: tuple[bool, bool]
    """Soft caps on the scores of attention, and on the logits: each keeps its tanh."""

    @classmethod
    def of(cls, config: Any, model: Any) -> "Decoder":
        """From a text model's transformers config and the model (on meta). Raises NoEstimate if it is another kind."""

        def size(name: str, default: int | None = None) -> int:
            value = getattr(config, name, None)
            value = default if value is None else value
            if not isinstance(value, int) or value < 1:
                raise NoEstimate(f"{name} of this model is {str(value)[:40]}")
            return value

        hidden, layers, heads = size("hidden_size"), size("num_hidden_layers"), size("num_attention_heads")
        head = size("head_dim", hidden // heads)
        queries, keys = heads * head, size("num_key_value_heads", heads) * head
        intermediate = size("intermediate_size", 4 * hidden)
        linear = sum(layer.weight.numel() for layer in linear_layers(model).values())
        attention = 2 * hidden * (queries + keys)
        kinds = {layers * (attention + matrices * hidden * intermediate): matrices == 3 for matrices in (2, 3)}
        if linear not in kinds:
            raise NoEstimate("its layers are not attention and an MLP of the sizes in its config")
        modules = dict(model.named_modules())
        wide = [m for m in modules.values() if type(m).__name__.endswith("Norm") and m.weight.numel() == hidden]
        head_norms = any(name.endswith("q_norm") for name in modules)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        vocabulary, norms = size("vocab_size"), max(0, len(wide) - 1) // layers
        return cls(
            *(layers, hidden, queries, heads, keys, intermediate, vocabulary, norms, head_norms, kinds[linear]),
            *(linear, tied, (bool(getattr(config, CAPS[0], None)), bool(getattr(config, CAPS[1], None)))),
        )


@dataclass(frozen=True)
class Pass:
    """A micro-batch, forward and backward, in 16 bits (`half`) or in float32."""

    tokens: int
    gathered: int
    """Tokens of its rows as attention sees them, each with its own prompt."""
    predicted: int
    """Response tokens."""
    half: bool
    recomputed: int
    """Layers, the first ones, that keep their input alone (gradient checkpointing)."""
    adapters: float
    """Ranks of all adapters of a layer together; 0: every weight trains."""
    on_gpu: bool
    rows: int = 0
    """All of one length, where they are padded; 0: packed."""
    eager: bool = False
    """Attention holds its scores."""

    @property
    def scores(self) -> int:
        """Of one head in one layer, of all rows: a number for any two tokens of a row."""
        return self.tokens * self.tokens // self.rows if self.eager else 0


def activation_bytes(model: Decoder, batch: Pass) -> int:
    """The peak of a pass beside weights, gradients and the optimizer's state.

    It is reached in the forward pass of the head, in its backward pass, in the backward pass of the last layer, or in
    that of the embedding, by then with no activations. Recomputed layers keep their input alone, but for the one that
    is computed again. Of weights that train 16 bits are there (policy/sharding.py) of a layer while it is at work, and
    of embedding and head from the beginning to the end.
    """
    trained, square, width = batch.adapters == 0, model.vocabulary * model.hidden, 2 if batch.half else 4
    tables = square * (1 if model.tied else 2)
    hidden = width * batch.tokens * model.hidden
    layer = _layer_bytes(model, batch)
    whole = model.layers - batch.recomputed
    kept = batch.recomputed * hidden + whole * layer + (4 + width * trained) * batch.tokens * model.hidden  # last norm
    states = width * batch.predicted * model.hidden  # those that predict a token
    forward, backward = _head_bytes(model, batch)
    # In an MLP's backward pass three gradients of its width are there and one activation has gone; in that of eager
    # attention there are those of the scores, before and behind their softmax.
    working = hidden + 2 * width * batch.tokens * model.intermediate
    working = max(working, (6 if batch.half else 8) * model.heads * batch.scores) + (0 if whole else layer)
    # The gradient of the head's weight waits for that of the embedding, which comes last, if they are one.
    waiting = width * square if trained and (model.tied or batch.half) else 0
    around = 0
    if not trained:
        last = 0
        if batch.half:  # the merged weight, its update and their sum in 16 bits (policy/lora.py)
            working += 10 * model.hidden * model.intermediate
    elif batch.half:
        around = 2 * tables
        working += 6 * model.matrices // model.layers  # a layer's, and in float32 the gradients of the one above
        last = 10 * tables  # gradients in 16 bits, and twice in float32 as they are reduced
    else:
        last = waiting + 4 * square * (2 if model.tied else 1)  # and their sum
    moments = (
        kept + states + hidden + forward + around,
        kept + states + backward + around,
        kept + waiting + working + around,
        last + hidden,
    )
    return max(moments)


def _layer_bytes(model: Decoder, batch: Pass) -> int:
    """What a decoder layer keeps for its backward pass, of all tokens.

    Products that read the same tensor share it. A norm keeps its input, in float32 in any case, and, for the gradient
    of its weight, what it makes of it. Attention keeps queries, keys, values and its output; if eager, the scores
    behind their softmax, in 16 bits in float32 as well. In padded rows keys and values are repeated for each head of
    queries.
    """
    hidden, queries, keys, intermediate = model.hidden, model.queries, model.keys, model.intermediate
    trained = batch.adapters == 0
    width = 2 if batch.half else 4
    kept = model.norms * (4 + width * trained) * hidden
    kept += 2 * width * hidden  # read by q, k, v and by the MLP
    if model.head_norms:
        kept += (4 + width * trained) * (queries + keys)
    kept += width * queries  # read by the output projection
    kept += (4 if model.gated else 2) * width * intermediate  # gate, its activation, the other half, their product
    attention = width * (2 * queries + 2 * (queries if batch.rows else keys))
    if not batch.half:  # in 16 bits there is no product with A to keep
        kept += int(width * batch.adapters)
    score = (6 if batch.half else 4) + width * model.capped[0]
    return batch.tokens * kept + batch.gathered * attention + score * model.heads * batch.scores


def _head_bytes(model: Decoder, batch: Pass) -> tuple[int, int]:
    """Forward and backward, beside what is kept: logits as they are worked on, and whole matrices.

    Where rows are packed that is a chunk of the logits, else all of them: as they come, chosen, their logarithms of
    probabilities, and three more for the entropy.
    """
    square = model.vocabulary * model.hidden
    block = min(batch.predicted, chunk_of(model.vocabulary, batch.on_gpu)) * model.vocabulary
    if batch.rows:
        block = batch.predicted * model.vocabulary
        capped = (2 if batch.half else 4) * model.capped[1]
        forward, backward = (20 + capped, 14 + capped) if batch.half else (24 + capped, 16 + capped)
    elif batch.half:  # a CPU rounds the logits and then widens them, and widens their gradient again
        forward, backward = (8, 6) if batch.on_gpu else (10, 10)
    else:
        forward, backward = 8, 4
    peak, gradients = backward * block, (2 if batch.half else 4) * batch.predicted * model.hidden
    if not batch.adapters:
        peak += 4 * square
        if batch.half:  # rounded when all chunks are summed
            peak = max(peak, 6 * block + 6 * square)
    return forward * block, peak + gradients


def cache_bytes(model: Decoder, rows: int, length: int, half: bool) -> int:
    """Keys and values of so many rows of `length` tokens, one layer's twice (it grows by copying), and their logits."""
    width = 2 if half else 4
    logits = rows * model.vocabulary * (width + 4 + 4)  # as they come, scaled in float32, and their probabilities
    return (model.layers + 1) * rows * length * 2 * model.keys * width + logits
