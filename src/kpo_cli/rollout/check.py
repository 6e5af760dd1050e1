"""What a sampler says against what the trainer says: stale or misread weights show here and nowhere else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpo_cli.errors import SamplingFailed
from kpo_cli.policy.load import Policy
from kpo_cli.policy.response import Response
from kpo_cli.rollout.engine import USE_HF
from kpo_cli.rollout.room import LOGITS_CHECKED

Score = Callable[[list[int], list[int]], Tensor]
"""Log-probabilities (T,) of a response's tokens behind its prompt, from the trainer's weights."""

RESPONSES = 8
"""Whole responses that are scored again, to prompts spread over the batch."""
FIRST_TOKENS = 32
"""Of each response of the check at the start."""


@dataclass(frozen=True)
class Limits:
    """What differences of log-probabilities (nats) may be for rounding; docs/vllm.md has the measurements."""

    mean: float
    """Of the absolute difference."""
    largest: float
    k3: float
    """Of the estimate of KL(engine || trainer)."""


FLOAT32 = Limits(mean=2e-4, largest=1e-2, k3=1e-7)
"""On a CPU: a push that was left out once is seen, rounding is a hundred times below."""
FLOAT32_GPU = Limits(mean=1e-2, largest=0.1, k3=1e-4)
"""Engines were published to differ by 0.002 (root of the mean square) there."""
BFLOAT16 = Limits(mean=0.1, largest=float("inf"), k3=5e-3)
"""Published is 0.031, a k3 of 5e-4. Single tokens may be off by anything."""
OWN_BFLOAT16 = Limits(mean=0.1, largest=float("inf"), k3=float("inf"))
"""Of a sampler that computes with the training weights and was seen to be right in float32. k3 is there for stale
weights, which it cannot have; one token that rounding sends to other experts adds more to it than all others, and has
its importance weight."""


@dataclass(frozen=True)
class Gap:
    """Between a sampler's and the trainer's log-probabilities of the same tokens, absolute, nats."""

    mean: float
    largest: float

    @classmethod
    def of(cls, sampler: Tensor, trainer: Tensor) -> "Gap":
        """Of tensors of one shape."""
        gap = (sampler.double() - trainer.double()).abs().nan_to_num(torch.inf)
        return cls(float(gap.mean()), float(gap.max()))

    def within(self, limits: Limits) -> bool:
        return self.mean <= limits.mean and self.largest <= limits.largest

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats in the mean and {self.largest:.2g} at most"


SERVES = Limits(mean=1e-4, largest=1e-2, k3=float("inf"))
"""Within it the sampler's serve as old log-probabilities: clip widths are 3e-4."""
CLOSE = 0.02
"""Mean up to which importance weights make up for a difference: hybrids decode with a cache a little differently."""
GROSS = 0.1
"""Mean above which nothing makes up for it: another distribution is sampled."""


@dataclass(frozen=True)
class SamplerCheck:
    score: Score
    half: bool
    """The policy computes in 16 bits."""
    gpu: bool = False
    own: bool = False
    """The sampler computes with the training weights themselves, in bfloat16."""

    def __call__(self, prompts: Sequence[list[int]], groups: Sequence[Sequence[Response]]) -> dict[str, float]:
        """`measure`, and SamplingFailed if the differences are not rounding."""
        found = self.measure(prompts, groups)
        mean, largest, k3 = found.values()
        limits = OWN_BFLOAT16 if self.own else BFLOAT16 if self.half else FLOAT32_GPU if self.gpu else FLOAT32
        # NaN compares as not allowed.
        if not (mean <= limits.mean and largest <= limits.largest and k3 <= limits.k3):
            tokens = sum(len(response.token_ids) for _, response in spread(prompts, groups))
            engine, way_out = "sampling engine", f"its weights are stale, or it reads the model differently; {USE_HF}"
            if self.own:
                engine, way_out = "sampler", "rounding is too much for this model; set model.dtype=float32"
            raise SamplingFailed(
                f"the {engine} does not serve the policy: its log-probabilities of {tokens} sampled tokens differ from "
                f"the trainer's by {mean:.2g} in the mean and {largest:.2g} at most, k3 {k3:.2g} (allowed: "
                f"{limits.mean:g}, {limits.largest:g}, {limits.k3:g}); {way_out}"
            )
        return found

    def measure(self, prompts: Sequence[list[int]], groups: Sequence[Sequence[Response]]) -> dict[str, float]:
        """Score a few of the responses (`groups[i]` are those to `prompts[i]`) again and compare.

        Returns the mean and the largest absolute difference, and k3, in nats. k3 is the mean of r - 1 - log r with
        r = pi / mu (http://joschu.net/blog/kl-approx.html): no term is below 0, and of samples of mu its expectation is
        KL(mu || pi).
        """
        log_ratio = torch.cat(
            [
                self.score(prompt, response.token_ids).double() - torch.tensor(response.log_probs, dtype=torch.float64)
                for prompt, response in spread(prompts, groups)
            ]
        )
        return {
            "sampler_gap_mean": float(log_ratio.abs().mean()),
            "sampler_gap_max": float(log_ratio.abs().max()),
            "sampler_gap_k3": float((log_ratio.expm1() - log_ratio).mean()),
        }


def spread(prompts: Sequence[list[int]], groups: Sequence[Sequence[Response]]) -> list[tuple[list[int], Response]]:
    """Some pairs of prompt and response, over the whole batch; later samples of a prompt are those from a cache."""
    count = min(RESPONSES, len(prompts))
    chosen = [i * (len(prompts) - 1) // max(1, count - 1) for i in range(count)]
    return [(prompts[i], groups[i][-1 - n % len(groups[i])]) for n, i in enumerate(chosen)]


def model_score(policy: Policy, temperature: float) -> Score:
    """From the model's own forward pass, one response at a time, beside an engine that has taken all it could.

    So logits are made for `LOGITS_CHECKED` tokens at a time, and a longer response is read again for each such piece:
    `room.check_bytes`.
    """
    model = policy.model

    @torch.no_grad()
    def score(prompt: list[int], token_ids: list[int]) -> Tensor:
        pieces = range(0, len(token_ids), LOGITS_CHECKED)
        return torch.cat([piece(prompt, token_ids[: start + LOGITS_CHECKED], start) for start in pieces])

    def piece(prompt: list[int], token_ids: list[int], start: int) -> Tensor:
        ids = torch.tensor([[*prompt, *token_ids]], device=model.device)
        kept = len(token_ids) - start
        logits = model(input_ids=ids, logits_to_keep=kept + 1, use_cache=False).logits[0, :-1]
        log_softmax = torch.log_softmax(logits.float() / temperature, dim=-1)
        return log_softmax.gather(-1, ids[0, -kept:, None]).squeeze(-1).cpu()

    return score
