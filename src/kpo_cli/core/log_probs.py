"""Log-probabilities of the sampled tokens, as the sampler saw them."""

import torch
from torch import Tensor


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
