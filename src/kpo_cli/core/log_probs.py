"""Log-probabilities of the sampled tokens, as the sampler saw them: from logits, or from what logits are made of."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEPT_LOGITS = 2**24
"""Probabilities that are kept for the backward pass rather than computed again (64 MiB)."""


def token_log_probs(
    logits: Tensor, token_ids: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at `token_ids`, and the entropy of that distribution in nats.

    `logits` (..., V), `token_ids` (...) give two tensors of shape (...), float32 whatever comes in. The temperature
    is the sampler's: a policy sampled at another one is another policy. The entropy carries a gradient only on request.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
        chosen = log_softmax.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            # An impossible token has p log p = 0, not 0 * -inf.
            finite = log_softmax.masked_fill(log_softmax.isneginf(), 0.0)
            entropy = -(log_softmax.exp() * finite).sum(-1)
    return chosen, entropy


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float,
    *,
    bias: Tensor | None = None,
    entropy_gradient: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_log_probs` of the logits `hidden @ weight.T + bias`, which are never held for more than `chunk` tokens.

    `hidden` (N, D), `weight` (V, D), `bias` (V,) or None and `token_ids` (N,) give two tensors (N,): log-probabilities
    and entropies in nats, float32 (float64 for float64). Logits are computed again in the backward pass, unless all of
    them are few (`KEPT_LOGITS`); the memory it takes is two blocks of `chunk` x V floats, and the gradient of the
    weight, which is summed over chunks in float32, in place. `chunk` is chosen by device and vocabulary if not given.

    The matmul is done in autocast's dtype where autocast is on, as in a model's head, and in the inputs' otherwise.
    On CUDA its result stays float32, so that logits are not rounded to bfloat16 as the head rounds them; on a CPU they
    are, since torch has no such matmul there. Everything after it is float32.

    Raises ValueError if shapes or dtypes do not fit.
    """
    _check(hidden, weight, token_ids, bias)
    chunk = chunk_of(len(weight), hidden.device.type != "cpu") if chunk is None else chunk
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    keep = differentiable and len(hidden) * len(weight) <= KEPT_LOGITS
    settings = (temperature, entropy_gradient, max(1, min(chunk, len(hidden))), keep, _matmul_dtype(hidden, weight))
    chosen, entropy = _LinearLogProbs.apply(hidden, weight, bias, token_ids, *settings)  # type: ignore[no-untyped-call]
    return chosen, entropy


def _check(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; they must be (N, D) and (V, D)"
        )
    if token_ids.shape != hidden.shape[:1]:
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)} but hidden has {tuple(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)} but weight has {tuple(weight.shape)}")


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """As torch does it: autocast leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden has dtype {hidden.dtype} but weight has {weight.dtype}")
    return hidden.dtype


def chunk_of(vocabulary: int, on_gpu: bool) -> int:
    """Tokens at a time: on a CPU what its cache holds, but no fewer than matmuls need; on a GPU 1 GiB of logits."""
    return max(512, (2**28 if on_gpu else 2**18) // vocabulary)


class _LinearLogProbs(torch.autograd.Function):
    """One walk over the chunks forward and one backward.

    With p = softmax(logits / temperature) and entropy H, the gradient with respect to the logits is
    ((1[chosen] - p) dlog_prob - p (log p + H) dH) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        entropy_gradient: bool,
        chunk: int,
        keep: bool,
        matmul_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(matmul_dtype, torch.float32)
        chosen, entropy, peak, top = hidden.new_empty(4, len(hidden), dtype=dtype)
        logits = hidden.new_empty(chunk, len(weight), dtype=dtype)
        probs = torch.empty_like(logits) if not keep else logits.new_empty(len(hidden), len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, temperature, matmul_dtype)
            for part in _parts(len(hidden), chunk):
                log_p = head.logits(hidden[part], logits)  # up to a constant a row, here and below
                p = torch.softmax(log_p, -1, out=probs[part] if keep else probs[: len(log_p)])
                # log p = logit - max logit + log max p: the normaliser costs no other pass of exponentials.
                torch.amax(log_p, -1, out=peak[part])
                torch.amax(p, -1, out=top[part])
                log_top = top[part].log()
                log_p.sub_(peak[part, None])
                chosen[part] = log_p.gather(-1, token_ids[part, None])[:, 0] + log_top
                if bias is not None:  # an impossible token has p log p = 0, not 0 * -inf
                    log_p.clamp_(min=torch.finfo(dtype).min)
                entropy[part] = -log_p.mul_(p).sum(-1) - log_top
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        kept = (entropy if entropy_gradient else None), (probs if keep else None)
        ctx.save_for_backward(hidden, weight, bias, token_ids, peak, top, *kept)
        ctx.settings = temperature, chunk, matmul_dtype
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, chosen_grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token_ids, peak, top, entropy, probs = ctx.saved_tensors
        temperature, chunk, matmul_dtype = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_grad = hidden.new_empty(hidden.shape) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=peak.dtype) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=peak.dtype) if needs_bias else None
        buffer = peak.new_empty(chunk, len(weight))
        # The products' input is written as they read it, unless more is added to it first.
        wide = entropy is not None or bias_grad is not None
        narrow = buffer if wide or matmul_dtype == peak.dtype else buffer.new_empty(buffer.shape, dtype=matmul_dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(weight, bias, temperature, matmul_dtype)
            for part in _parts(len(hidden), chunk):
                states, g = hidden[part], chosen_grad[part, None] / temperature
                if probs is None:
                    p = head.logits(states, buffer).sub_(peak[part, None]).exp_().mul_(top[part, None])
                else:
                    p = probs[part]
                through_entropy = None
                if entropy is not None:
                    h = entropy_grad[part, None] / temperature
                    through_entropy = torch.special.entr(p).sub_(p * entropy[part, None]).mul_(h)
                ids = token_ids[part, None]
                of_chosen = g - p.gather(-1, ids) * g  # not of a difference that was rounded: p may be close to 1
                grad = torch.mul(p, -g, out=narrow[: len(p)])
                grad.scatter_(-1, ids, of_chosen.to(grad.dtype))
                if through_entropy is not None:
                    grad += through_entropy
                if bias_grad is not None:
                    bias_grad += grad.sum(0)
                grad = grad.to(matmul_dtype)
                if hidden_grad is not None:
                    _matmul(grad, head.weight, hidden_grad[part])
                if weight_grad is not None:
                    _add_product(weight_grad, grad, states.to(matmul_dtype))
        gradients = (hidden_grad, hidden), (weight_grad, weight), (bias_grad, bias)
        return (*(None if g is None else g.to(of.dtype) for g, of in gradients), *[None] * 6)


class _Head:
    """A model's last layer, in the dtype of its matmul."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.temperature = temperature

    def logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """(hidden @ weight.T + bias) / temperature, in the first rows of `buffer`."""
        hidden, out = hidden.to(self.weight.dtype), buffer[: len(hidden)]
        if hidden.dtype == out.dtype:
            scale = 1 / self.temperature
            start, beta = (out, 0.0) if self.bias is None else (self.bias, scale)
            return torch.addmm(start, hidden, self.weight.t(), beta=beta, alpha=scale, out=out)
        _matmul(hidden, self.weight.t(), out)
        if self.bias is not None:
            out += self.bias
        return out if self.temperature == 1 else out.div_(self.temperature)


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b; where `out` is wider, CUDA writes the sums that it has in float32 anyway, a CPU rounds them first."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(a @ b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a.T @ b, in the dtype of `total` and with no other matrix of its size."""
    if a.is_cuda and a.dtype != total.dtype:
        for part in _parts(len(total), 2**14):
            total[part].add_(torch.mm(a[:, part].t(), b, out_dtype=total.dtype))  # += would copy the block onto itself
    else:
        total.addmm_(a.to(total.dtype).t(), b.to(total.dtype))


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
