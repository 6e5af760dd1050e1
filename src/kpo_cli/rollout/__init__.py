"""Sampling responses. One interface; every engine samples from exactly softmax(logits / temperature)."""

from collections.abc import Sequence
from typing import Protocol

from kpo_cli.policy.response import Response
from kpo_cli.rollout.hf import HFSampler
from kpo_cli.rollout.vllm import VLLMSampler

__all__ = ["HFSampler", "Sampler", "VLLMSampler"]


class Sampler(Protocol):
    def sample(
        self,
        prompts: Sequence[list[int]],
        samples: int,
        seed: Sequence[int],
        *,
        greedy: bool = False,
        places: Sequence[int] | None = None,
    ) -> list[list[Response]]:
        """`samples` responses to each prompt (token ids).

        The random numbers of a response depend on `seed`, the prompt's place (`places`, or its index) and the
        sample's number alone, not on what is sampled beside it. `greedy` takes the most likely token each time.
        """

    def refresh(self) -> None:
        """Take over the model's present weights: to be called before sampling whenever they may have changed."""

    def release(self) -> None:
        """Give the device what memory can be given until the next `refresh`, for an update of the weights."""
