"""The rows that one rollout gives to training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpo_cli.policy.response import Response


@dataclass(frozen=True)
class Batch:
    """N responses; T is the longest response, P the longest prompt. Padding stands on the right and is 0."""

    prompt_ids: Tensor  # (N, P) int64
    prompt_lengths: Tensor  # (N,) int64
    response_ids: Tensor  # (N, T) int64
    response_mask: Tensor  # (N, T) bool: the response's tokens, its stop token included
    rollout_log_probs: Tensor  # (N, T) float32
    truncated: Tensor  # (N,) bool: no stop token
    prompt_index: Tensor  # (N,) int64: place of the prompt in this step
    rewards: Tensor  # (N,) float32
    advantages: Tensor  # (N,) float32

    def rows(self, index: Tensor) -> "Batch":
        """Some of the rows, cut to their own longest response and prompt."""
        picked = {name: value[index] for name, value in vars(self).items()}
        longest = int(picked["response_mask"].sum(-1).max())
        for name in ("response_ids", "response_mask", "rollout_log_probs"):
            picked[name] = picked[name][:, :longest]
        picked["prompt_ids"] = picked["prompt_ids"][:, : int(picked["prompt_lengths"].max())]
        return Batch(**picked)

    def __len__(self) -> int:
        return len(self.prompt_lengths)


def make_batch(
    prompts: Sequence[list[int]], groups: Sequence[Sequence[Response]], rewards: Tensor, advantages: Tensor
) -> Batch:
    """Lay out the responses (`groups[i]` are those to `prompts[i]`) as rows, group after group."""
    responses = [response for group in groups for response in group]
    index = [i for i, group in enumerate(groups) for _ in group]
    prompt_ids, prompt_mask = _right_pad([prompts[i] for i in index], torch.long)
    response_ids, response_mask = _right_pad([r.token_ids for r in responses], torch.long)
    log_probs, _ = _right_pad([r.log_probs for r in responses], torch.float32)
    return Batch(
        prompt_ids=prompt_ids,
        prompt_lengths=prompt_mask.sum(-1),
        response_ids=response_ids,
        response_mask=response_mask,
        rollout_log_probs=log_probs,
        truncated=torch.tensor([not r.finished for r in responses]),
        prompt_index=torch.tensor(index),
        rewards=rewards,
        advantages=advantages,
    )


def _right_pad(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    values = torch.zeros(len(rows), length, dtype=dtype)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(row, dtype=dtype)
        mask[i, : len(row)] = True
    return values, mask
