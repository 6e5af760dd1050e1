"""What a sampling engine says against what the trainer says: stale or misread weights show here and nowhere else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kpo_cli.errors import SamplingFailed
from kpo_cli.policy.response import Response
from kpo_cli.rollout.engine import USE_HF

Score = Callable[[list[int], list[int]], Tensor]
"""Log-probabilities (T,) of a response's tokens behind its prompt, from the trainer's weights."""

RESPONSES = 8
"""Whole responses that are scored again, to prompts spread over the batch."""
FLOAT32_MAX = 1e-2
"""Allowed for every token in float32, where engines differ by about 1e-5."""
BFLOAT16_MEAN = 0.1
"""Allowed in the mean in bfloat16, where rounding alone stays well below it, but not for single tokens."""


@dataclass(frozen=True)
class SamplerCheck:
    score: Score
    half: bool
    """The forward pass is bfloat16."""

    def __call__(self, prompts: Sequence[list[int]], groups: Sequence[Sequence[Response]]) -> dict[str, float]:
        """Score a few of the responses (`groups[i]` are those to `prompts[i]`) again and compare.

        Returns the mean and the largest absolute difference, nats; raises SamplingFailed if they are not noise.
        """
        gaps = [
            (self.score(prompt, response.token_ids) - torch.tensor(response.log_probs)).abs().double()
            for prompt, response in spread(prompts, groups)
        ]
        gap = torch.cat(gaps)
        mean, largest = float(gap.mean()), float(gap.max())
        # NaN compares as not allowed.
        if not (mean <= BFLOAT16_MEAN if self.half else largest <= FLOAT32_MAX):
            allowed = f"{BFLOAT16_MEAN:g} in the mean" if self.half else f"{FLOAT32_MAX:g}"
            raise SamplingFailed(
                f"the sampling engine does not serve the policy: its log-probabilities of {len(gap)} sampled tokens "
                f"differ from the trainer's by {mean:.2g} in the mean and {largest:.2g} at most (allowed: {allowed}); "
                f"its weights are stale, or it reads the model differently; {USE_HF}"
            )
        return {"sampler_gap_mean": mean, "sampler_gap_max": largest}


def spread(prompts: Sequence[list[int]], groups: Sequence[Sequence[Response]]) -> list[tuple[list[int], Response]]:
    """Some pairs of prompt and response, over the whole batch; later samples of a prompt are those from a cache."""
    count = min(RESPONSES, len(prompts))
    chosen = [i * (len(prompts) - 1) // max(1, count - 1) for i in range(count)]
    return [(prompts[i], groups[i][-1 - n % len(groups[i])]) for n, i in enumerate(chosen)]


def model_score(model: Any, temperature: float) -> Score:
    """From the model's own forward pass, one response at a time."""

    @torch.no_grad()
    def score(prompt: list[int], token_ids: list[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *token_ids]], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=len(token_ids) + 1, use_cache=False).logits[0, :-1]
        log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
        return log_softmax.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).cpu()

    return score
