"""Sampling with vLLM: the same distribution and the same interface as `rollout/hf.py`, from an engine beside the model.

Where it differs from the transformers sampler:

- Each sample is a request of its own, with a seed from (seed, place, sample). `n=` of vLLM would make the same requests
  with consecutive seeds, which two prompts could share; the prompt is computed once either way, by the prefix cache.
  Given the same logits a response does not depend on what is sampled beside it, but the logits do in their last
  bits, so that other neighbours can change a token where two are nearly as likely.
- With `top_p` below 1 the log-probabilities are those of the nucleus, renormalised, and greedy ones are at
  temperature 1. Both are for evaluation, which reads none of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from kpo_cli.errors import RunStopped, SamplingFailed, UserError
from kpo_cli.policy.response import Response
from kpo_cli.rollout.engine import USE_HF, Request, Sampling
from kpo_cli.rollout.hf import Report

Result = TypeVar("Result")

MIN_TEMPERATURE = 0.01
"""vLLM raises lower ones to it."""


class Engine(Protocol):
    """What the sampler needs of `VLLMEngine`."""

    def push(self) -> None: ...
    def sleep(self) -> None: ...
    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Report | None) -> list[Response]: ...


class VLLMSampler:
    def __init__(
        self,
        engine: Engine,
        *,
        stop_ids: Sequence[int],
        temperature: float,
        max_response_tokens: int,
        top_p: float = 1.0,
        progress: Report | None = None,
    ) -> None:
        """Several samplers may share an engine. `stop_ids` end a response; `top_p` below 1 is for evaluation alone."""
        if temperature < MIN_TEMPERATURE:
            raise UserError(
                f"vLLM samples at temperatures of {MIN_TEMPERATURE} and above, not {temperature}; raise it or {USE_HF}"
            )
        self.engine = engine
        self.sampling = Sampling(temperature, top_p, tuple(sorted(stop_ids)), max_response_tokens)
        self.progress = progress

    def refresh(self) -> None:
        """Push the model's present weights; a push that fails is tried once more, then SamplingFailed."""
        _twice("taking over the weights", self.engine.push)

    def release(self) -> None:
        """Let the engine sleep; a failure is tried once more, then SamplingFailed."""
        _twice("giving back the memory", self.engine.sleep)

    def sample(
        self,
        prompts: Sequence[list[int]],
        samples: int,
        seed: Sequence[int],
        *,
        greedy: bool = False,
        places: Sequence[int] | None = None,
    ) -> list[list[Response]]:
        """As in `Sampler`. A batch that fails is tried once more, then SamplingFailed is raised."""
        places = range(len(prompts)) if places is None else places
        requests = [
            Request(prompt, None if greedy else request_seed(seed, place, sample))
            for prompt, place in zip(prompts, places, strict=True)
            for sample in range(samples)
        ]
        responses = _twice("sampling", lambda: self.engine.generate(requests, self.sampling, self.progress))
        if any(math.isnan(value) for response in responses for value in response.log_probs):
            raise RunStopped("the policy's probabilities are NaN: its weights have exploded; lower trainer.lr")
        return [responses[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def request_seed(seed: Sequence[int], place: int, sample: int) -> int:
    """63 bits that depend on all of their parts. vLLM's CPU generators keep the lower 32 of them."""
    return int(np.random.SeedSequence([*seed, place, sample]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _twice(what: str, work: Callable[[], Result]) -> Result:
    try:
        return work()
    except Exception as error:
        first = error  # a lost worker, a full device: whatever it was may be over
    try:
        return work()
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        same = "" if str(error) == str(first) else f" (the first time: {type(first).__name__})"
        raise SamplingFailed(f"{what} with vLLM failed twice: {text[:300]}{same}") from error
