"""The sampler of a training run, and the check that what it serves is the policy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kpo_cli.config import TrainConfig
from kpo_cli.errors import SamplingFailed, UserError
from kpo_cli.policy.batch import make_batch
from kpo_cli.policy.load import Policy
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import HFSampler, Sampler, VLLMSampler
from kpo_cli.rollout.check import RESPONSES, SamplerCheck, Score
from kpo_cli.rollout.engine import VLLMEngine
from kpo_cli.rollout.hf import Report

FIRST_TOKENS = 32
"""Of each response of the check at the start."""


def make_sampler(
    config: TrainConfig,
    policy: Policy,
    scorer: Scorer,
    prompts: Sequence[list[int]],
    workers: Workers,
    progress: Report,
) -> tuple[Sampler, SamplerCheck | None, list[str]]:
    """The configured sampler, its check (None where its numbers are the trainer's but for float32 rounding), and notes.

    An engine is tried on a few of the `prompts` before anything is written. Raises UserError if it does not start, or
    does not give the trainer's log-probabilities.
    """
    rollout, half = config.rollout, policy.dtype == "bfloat16"
    if rollout.name != "vllm":
        sampler = HFSampler(
            policy.model,
            stop_ids=policy.stop_ids,
            temperature=rollout.temperature,
            max_response_tokens=rollout.max_response_tokens,
            batch_size=rollout.batch_size,
            half=half,
            workers=workers,
            progress=progress,
        )
        # In bfloat16 a token by itself is not rounded as it is among others.
        return sampler, SamplerCheck(trainer_score(scorer), half) if half else None, []
    engine = VLLMEngine(
        policy,
        max_length=rollout.max_prompt_tokens + rollout.max_response_tokens,
        options=rollout.engine or {},
        reserved=_reserved(config, policy),
        training=True,
    )

    def limited(tokens: int) -> VLLMSampler:
        return VLLMSampler(
            engine,
            stop_ids=policy.stop_ids,
            temperature=rollout.temperature,
            max_response_tokens=min(tokens, rollout.max_response_tokens),
            progress=progress,
        )

    check = SamplerCheck(trainer_score(scorer), half)
    first = prompts[:RESPONSES]
    try:
        gap = check(first, limited(FIRST_TOKENS).sample(first, 1, (config.seed,)))
    except SamplingFailed as error:
        raise UserError(str(error)) from None
    note = f"vLLM: its log-probabilities differ from the trainer's by {gap['sampler_gap_max']:.1g} at most"
    return limited(rollout.max_response_tokens), check, [*engine.notes, note]


def trainer_score(scorer: Scorer) -> Score:
    """The trainer's own log-probabilities, one response at a time."""

    def score(prompt: list[int], token_ids: list[int]) -> Tensor:
        response = Response(token_ids, [0.0] * len(token_ids), True)
        with torch.no_grad():
            log_probs, _ = scorer(make_batch([prompt], [[response]], torch.zeros(1), torch.zeros(1)))
        return log_probs[0].float().cpu()

    return score


def _reserved(config: TrainConfig, policy: Policy) -> int:
    """Bytes that the optimizer and the gradients will hold on the device while the engine samples."""
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    return trained * (4 if config.trainer.offload_optimizer != "none" else 12)
