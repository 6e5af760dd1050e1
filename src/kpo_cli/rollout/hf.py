"""Sampling with the training weights themselves, through any transformers causal language model.

The loop is our own, not `generate`: that applies top-k 50 by default, and whatever the model's generation_config
adds (top-p, penalties, another temperature), and each of these makes the ratios of the objective wrong. Here
a token is drawn from softmax(logits / temperature) and nothing else, by inverting its cumulative distribution in
float64 with one uniform number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kpo_cli.errors import RunStopped
from kpo_cli.rollout.response import Response


class HFSampler:
    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        temperature: float,
        max_response_tokens: int,
        batch_size: int,
        top_p: float = 1.0,
    ) -> None:
        """`stop_ids` end a response; `batch_size` responses are sampled at a time.

        `top_p` below 1 samples from the nucleus. It is for evaluation alone: a policy is not trained on it.
        """
        self.model = model
        self.stop_ids = torch.tensor(sorted(stop_ids), device=model.device)
        self.temperature = temperature
        self.top_p = top_p
        self.max_response_tokens = max_response_tokens
        self.batch_size = batch_size

    def sample(
        self,
        prompts: Sequence[list[int]],
        samples: int,
        seed: Sequence[int],
        *,
        greedy: bool = False,
        places: Sequence[int] | None = None,
    ) -> list[list[Response]]:
        places = range(len(prompts)) if places is None else places
        rows = [(i, j) for i in range(len(prompts)) for j in range(samples)]
        responses: list[Response] = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            uniforms = None
            if not greedy:
                draws = [
                    np.random.default_rng([*seed, places[i], j]).random(self.max_response_tokens) for i, j in batch
                ]
                uniforms = torch.from_numpy(np.stack(draws)).to(self.model.device)
            responses += self._sample_batch([prompts[i] for i, _ in batch], uniforms)
        return [responses[i * samples : (i + 1) * samples] for i in range(len(prompts))]

    @torch.no_grad()
    def _sample_batch(self, prompts: list[list[int]], uniforms: Tensor | None) -> list[Response]:
        """`uniforms` (B, max_response_tokens) in [0, 1), float64; None samples greedily."""
        input_ids, attention_mask = left_pad(prompts, self.model.device)
        rows = len(prompts)
        running = torch.ones(rows, dtype=torch.bool, device=self.model.device)
        position = attention_mask.sum(-1) - 1
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
        }
        cache, tokens, log_probs = None, [], []
        for step in range(self.max_response_tokens):
            out = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, log_prob = self._choose(out.logits[:, -1], None if uniforms is None else uniforms[:, step])
            tokens.append(token)
            log_probs.append(log_prob)
            running &= ~torch.isin(token, self.stop_ids)
            if not running.any():
                break
            cache, position = out.past_key_values, position + 1
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(rows, 1)], dim=1)
            inputs = {
                "input_ids": token[:, None],
                "attention_mask": attention_mask,
                "position_ids": position[:, None],
            }
        if any(values.isnan().any() for values in log_probs):
            raise RunStopped("the policy's probabilities are NaN: its weights have exploded; lower trainer.lr")
        return self._cut(torch.stack(tokens, 1), torch.stack(log_probs, 1))

    def _choose(self, logits: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """A token (B,) and its log-probability (B,) from logits (B, V)."""
        log_softmax = torch.log_softmax(logits.float() / self.temperature, dim=-1)
        if uniform is None:
            token = log_softmax.argmax(-1)
        else:
            probabilities = log_softmax.exp() if self.top_p == 1 else nucleus(log_softmax.exp(), self.top_p)
            token = invert_cdf(probabilities, uniform)
        return token, log_softmax.gather(-1, token[:, None]).squeeze(-1)

    def _cut(self, tokens: Tensor, log_probs: Tensor) -> list[Response]:
        """End every row (B, T) behind its first stop token; what the batch made of it after that is dropped."""
        stops = torch.isin(tokens, self.stop_ids)
        finished = stops.any(-1)
        lengths = torch.where(finished, stops.int().argmax(-1) + 1, tokens.shape[1])
        columns = zip(tokens.tolist(), log_probs.tolist(), lengths.tolist(), finished.tolist(), strict=True)
        return [Response(ids[:length], values[:length], done) for ids, values, length, done in columns]


def invert_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which the cumulative distribution of `probabilities` (B, V) passes `uniform` (B,) in [0, 1).

    A token of probability 0 is never returned.
    """
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    # The product may round up to the total, behind the last possible token.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform.double()[:, None] * total, below_total)
    # Only NaN reaches the clamp; it is reported once the batch is done.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """`probabilities` (B, V), zero outside the fewest most likely tokens that together reach `top_p`."""
    ordered, index = probabilities.sort(-1, descending=True)
    before = ordered.double().cumsum(-1) - ordered.double()
    return torch.zeros_like(probabilities).scatter(-1, index, torch.where(before < top_p, ordered, 0.0))


def left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as `input_ids` and `attention_mask` (B, P), aligned at their ends. The padding's id is never read."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
