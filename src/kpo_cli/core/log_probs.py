"""Log-probabilities of the sampled tokens, as the sampler saw them."""

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at `token_ids`, and the entropy of that distribution in nats.

    `logits` (..., V), `token_ids` (...) give two tensors of shape (...), float32 whatever comes in. The temperature
    is the sampler's: a policy sampled at another one is another policy. The entropy carries no gradient.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
        chosen = log_softmax.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            # An impossible token has p log p = 0, not 0 * -inf.
            entropy = -torch.where(log_softmax.isneginf(), 0.0, log_softmax.exp() * log_softmax).sum(-1)
    return chosen, entropy
