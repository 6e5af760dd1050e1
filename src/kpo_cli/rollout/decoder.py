"""One new token a row through a small decoder of Llama's shape, in few operations.

transformers' forward pass of such a model takes milliseconds of Python a token, whatever the number of rows, and Python
runs in one thread at a time. Here a layer is some fifteen operations on tensors. What a model computes is decided by
trying, not by its name; one that is built otherwise in any way stays with transformers' forward pass.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpo_cli.policy.attention import decode_attention
from kpo_cli.policy.fidelity import plain_logits
from kpo_cli.rollout.cache import GrowingLayer, spread

TOLERANCE = 1e-4
"""Between the log-probs of both ways in float32, where they differ by rounding alone."""

Linear = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out,)."""
Norm = tuple[Tensor, float]
"""Weight (size,) and epsilon of an RMSNorm."""


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, where those with the same input are joined."""

    attention_norm: Norm
    qkv: Linear
    qk_norm: Norm | None
    """Of the query and key heads one by one: weight (heads + key-value heads, size)."""
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]
    heads: int
    key_value_heads: int
    size: int
    """Of a head."""
    scaling: float

    @classmethod
    def of(cls, layer: Any) -> "Layer":
        """Of a layer of transformers; raises AttributeError or ValueError if it has another shape."""
        attention, mlp = layer.self_attn, layer.mlp
        size = attention.head_dim
        heads, key_value_heads = (proj.out_features // size for proj in (attention.q_proj, attention.k_proj))
        qk_norm = None
        if hasattr(attention, "q_norm"):
            (query, epsilon), (key, other) = _norm(attention.q_norm), _norm(attention.k_norm)
            if not (query.shape == key.shape == (size,) and epsilon == other):
                raise ValueError("norms of queries and keys are not one a head")
            qk_norm = torch.cat([query.expand(heads, size), key.expand(key_value_heads, size)]), epsilon
        return cls(
            attention_norm=_norm(layer.input_layernorm),
            qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
            qk_norm=qk_norm,
            output=_joined(attention.o_proj),
            mlp_norm=_norm(layer.post_attention_layernorm),
            gate_up=_joined(mlp.gate_proj, mlp.up_proj),
            down=_joined(mlp.down_proj),
            activation=mlp.act_fn,
            heads=heads,
            key_value_heads=key_value_heads,
            size=size,
            scaling=attention.scaling,
        )

    def step(self, hidden: Tensor, cos: Tensor, sin: Tensor, stored: GrowingLayer, mask: Tensor | None) -> Tensor:
        """The hidden states (R, hidden size) behind the layer; its keys and values are appended to those `stored`.

        `cos` and `sin` (1 or R, 1, head size) are the rotary ones, with the sign of the rotation in `sin`.
        """
        qkv = F.linear(_normed(hidden, self.attention_norm), *self.qkv).unflatten(-1, (-1, self.size))
        rotated = qkv[:, : self.heads + self.key_value_heads]
        if self.qk_norm is not None:
            weight, epsilon = self.qk_norm
            rotated = F.rms_norm(rotated, (self.size,), eps=epsilon).mul_(weight)
        rotated = torch.addcmul(rotated * cos, rotated.roll(self.size // 2, -1), sin)
        query, key = rotated[:, : self.heads, None], rotated[:, self.heads :, None]
        keys, values = stored.update(key, qkv[:, self.heads + self.key_value_heads :, None])
        attended = decode_attention(query, keys, values, mask, self.scaling).flatten(1)
        hidden = F.linear(attended, *self.output).add_(hidden)
        gate, up = F.linear(_normed(hidden, self.mlp_norm), *self.gate_up).chunk(2, dim=-1)
        return F.linear(self.activation(gate).mul_(up), *self.down).add_(hidden)


@dataclass(frozen=True)
class Decoder:
    """The weights of a model as they were when it was made. Nothing changes it: threads may share it."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    cos: Tensor
    sin: Tensor
    """(positions, 1, head size) each."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, positions: int) -> "Decoder | None":
        """The present weights of a float32 `model` on the CPU, for that many positions; None if it has another shape.

        Also where hooks, adapters or a wrapped forward pass might have it compute something else.
        """
        try:
            return cls._read(model, positions) if _is_plain(model) else None
        except (AttributeError, ValueError, TypeError):
            return None

    @classmethod
    def _read(cls, model: Any, positions: int) -> "Decoder":
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        embedding = decoder.embed_tokens
        if type(embedding) is not nn.Embedding:
            raise ValueError("embeddings are more than a table")
        cos, sin = decoder.rotary_emb(embedding.weight, torch.arange(positions)[None])
        half = sin.shape[-1] // 2
        return cls(
            embedding=embedding.weight.detach(),
            layers=tuple(Layer.of(layer) for layer in decoder.layers),
            norm=_norm(decoder.norm),
            head=_joined(head),
            cos=cos.transpose(0, 1),
            sin=torch.cat([-sin[..., :half], sin[..., half:]], dim=-1).transpose(0, 1),
        )

    def step(self, token: Tensor, cache: Any, position: Tensor | int, mask: Tensor | None) -> Tensor:
        """The logits (R, V) behind one more token (R,) of each row, which is added to `cache` (of GrowingLayers).

        `position` is that of the token: of all rows, or (R,). `mask` (R, 1, 1, T) bool is false at padding.
        """
        rows = slice(position, position + 1) if isinstance(position, int) else position
        cos, sin = self.cos[rows], self.sin[rows]
        hidden = F.embedding(token, self.embedding)
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            hidden = layer.step(hidden, cos, sin, stored, mask)
        return F.linear(_normed(hidden, self.norm), *self.head)


@torch.no_grad()
def fits(model: Any) -> bool:
    """Whether `Decoder` computes what `model` is (`fidelity.plain_logits`), for any weights: tried with some drawn.

    With those of the model a difference might be too small to see, as long as they are fresh or zero.
    """
    if Decoder.of(model, 1) is None:
        return False
    model = copy.deepcopy(model).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread_out = torch.randn(parameter.shape, generator=draw)
        parameter.copy_(1 + 0.3 * spread_out if parameter.dim() == 1 else 1.5 * spread_out / parameter.shape[-1] ** 0.5)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (3, 9), generator=draw)
    try:
        return all(_gap(model, ids, torch.tensor(padding)) < TOLERANCE for padding in ([0, 0, 0], [0, 3, 1]))
    except Exception:  # a stranger's model code may raise anything
        return False


def _gap(model: Any, ids: Tensor, padding: Tensor) -> float:
    """The largest difference of log-probs to those of the model, with the last tokens of `ids` (B, L) step by step.

    `padding` (B,) of the first tokens of each row are none.
    """
    rows, length = ids.shape
    prompt = length - 4
    mask = torch.arange(length) >= padding[:, None]
    positions = (torch.arange(length) - padding[:, None]).clamp(min=0)
    truth = copy.deepcopy(model)
    alone = [plain_logits(truth, row[start:])[-4:] for row, start in zip(ids, padding.tolist(), strict=True)]
    expected = torch.stack(alone).log_softmax(-1)
    cache = model(
        input_ids=ids[:, :prompt],
        attention_mask=mask[:, :prompt].long(),
        position_ids=positions[:, :prompt],
        use_cache=True,
    ).past_key_values
    spread(cache, torch.arange(rows), length)
    if not all(isinstance(layer, GrowingLayer) and layer.window is None for layer in cache.layers):
        return torch.inf  # a window, of which so few tokens see nothing
    decoder = Decoder.of(model, length)
    assert decoder is not None
    gap = 0.0
    for place in range(prompt, length):
        padded = bool(padding.any())
        logits = decoder.step(
            ids[:, place],
            cache,
            positions[:, place] if padded else place,
            mask[:, None, None, : place + 1] if padded else None,
        )
        difference = torch.log_softmax(logits, -1) - expected[:, place - prompt]
        gap = max(gap, float(difference.abs().nan_to_num(torch.inf).max()))
    return gap


def _is_plain(model: Any) -> bool:
    """Whether `model` is in float32 on the CPU, and its modules do what their classes say and nothing besides."""
    return all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters()) and not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


def _joined(*linears: Any) -> Linear:
    """Several linear layers with the same input as one, their outputs side by side."""
    if any(type(linear) is not nn.Linear for linear in linears):
        raise ValueError("not a plain linear layer")
    if len(linears) == 1:
        return linears[0].weight.detach(), None if linears[0].bias is None else linears[0].bias.detach()
    weight = torch.cat([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    zeros = weight.new_zeros
    return weight, torch.cat([zeros(len(lin.weight)) if lin.bias is None else lin.bias for lin in linears])


def _norm(norm: Any) -> Norm:
    return norm.weight.detach(), norm.variance_epsilon


def _normed(hidden: Tensor, norm: Norm) -> Tensor:
    return F.rms_norm(hidden, norm[0].shape, *norm)
