"""The sampler of a training run, and the check that what it serves is the policy."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from kpo_cli.rollout.check import FIRST_TOKENS, RESPONSES, SamplerCheck, Score
from kpo_cli.rollout.engine import VLLMEngine, free_memory, given_bytes, gpu_needs, sequences
from kpo_cli.rollout.hf import Report
from kpo_cli.rollout.room import MOMENTS, choose_offload
from kpo_cli.rollout.trial import Trial, choose_ways
from kpo_cli.rollout.ways import Ways


@dataclass(frozen=True)
class Made:
    """A run's sampler."""

    sampler: Sampler
    check: SamplerCheck | None
    """Of what it says in every step; None where it computes in float32 with the training weights themselves."""
    serves: bool
    """Its log-probabilities were seen to be the trainer's but for float32 rounding."""
    notes: list[str]


def try_ways(
    config: TrainConfig, policy: Policy, scorer: Scorer, prompts: Sequence[list[int]], before: Ways | None = None
) -> Trial | None:
    """How to sample from the training weights themselves, found out in float32; None where an engine samples.

    To be called before `policy.narrow`. `prompts`: of their tokens are those of the trial. `before` is how a run that
    is resumed sampled. Raises UserError if there is no way.
    """
    if config.rollout.name == "vllm":
        return None
    own = _own_sampler(config, policy, Workers(), None)
    if policy.half:
        own = own.changed(lean=False)  # as it will be
    return choose_ways(own, trainer_score(scorer), prompts, before)


def _own_sampler(config: TrainConfig, policy: Policy, workers: Workers, progress: Report | None) -> HFSampler:
    return HFSampler(
        policy.model,
        stop_ids=policy.stop_ids,
        temperature=config.rollout.temperature,
        max_response_tokens=config.rollout.max_response_tokens,
        batch_size=config.rollout.batch_size,
        workers=workers,
        progress=progress,
    )


def make_sampler(
    config: TrainConfig,
    policy: Policy,
    scorer: Scorer,
    prompts: Sequence[list[int]],
    workers: Workers,
    progress: Report,
    reserved: int,
    trial: Trial | None,
) -> Made:
    """The configured sampler; `trial` is that of `try_ways`. An engine is tried here, on a few of the `prompts`.

    It leaves `reserved` bytes of a GPU to the trainer, beside what that holds already. Raises UserError if it does not
    start, or does not give the trainer's log-probabilities.
    """
    rollout = config.rollout
    if trial is not None:
        own = _own_sampler(config, policy, workers, progress).changed(ways=trial.ways)
        # In 16 bits a token by itself is not rounded as it is among others.
        check = SamplerCheck(trainer_score(scorer), True, own=True) if policy.half else None
        return Made(own, check, trial.serves and not policy.half, trial.notes())
    engine = VLLMEngine(
        policy,
        max_length=rollout.max_prompt_tokens + rollout.max_response_tokens,
        options=rollout.engine or {},
        reserved=reserved,
        training=True,
        float32_logits=scorer.packed and policy.model.device.type == "cuda",  # else rounded: core/log_probs.py
    )

    def limited(tokens: int) -> VLLMSampler:
        return VLLMSampler(
            engine,
            stop_ids=policy.stop_ids,
            temperature=rollout.temperature,
            max_response_tokens=min(tokens, rollout.max_response_tokens),
            progress=progress,
        )

    check = SamplerCheck(trainer_score(scorer), policy.half, policy.model.device.type == "cuda")
    first = prompts[:RESPONSES]
    try:
        short = limited(FIRST_TOKENS)
        groups = short.sample(first, 1, (config.seed,))
        short.release()  # the trainer's forward pass needs memory
        gap = check(first, groups)
    except SamplingFailed as error:
        raise UserError(str(error)) from None
    note = f"vLLM: its log-probabilities differ from the trainer's by {gap['sampler_gap_max']:.1g} at most"
    return Made(limited(rollout.max_response_tokens), check, False, [*engine.notes, note])


def trainer_score(scorer: Scorer) -> Score:
    """The trainer's own log-probabilities, one response at a time."""

    def score(prompt: list[int], token_ids: list[int]) -> Tensor:
        response = Response(token_ids, [0.0] * len(token_ids), True)
        with torch.no_grad():
            log_probs, _ = scorer(make_batch([prompt], [[response]], torch.zeros(1), torch.zeros(1)))
        return log_probs[0].float().cpu()

    return score


def resolve_offload(config: TrainConfig, policy: Policy) -> tuple[TrainConfig, list[str]]:
    """The configuration with `trainer.offload_optimizer=auto` resolved, and a note where there was a choice.

    To be called with the policy on its device, before the optimizer has state.
    """
    if config.trainer.offload_optimizer != "auto":
        return config, []
    choice, notes = "none", []
    if policy.model.device.type == "cuda" and config.rollout.name == "vllm":
        options, (free, total) = config.rollout.engine or {}, free_memory()
        length = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        needs = gpu_needs(policy, length, options)
        responses = min(sequences(options), config.trainer.prompts_per_step * config.trainer.group_size)
        given = given_bytes(options, total, needs)
        choice, why = choose_offload(free, total, moments_of(policy.model), needs, responses * length, given)
        notes = [f"memory: trainer.offload_optimizer={choice}, since {why}"]
    trainer = dataclasses.replace(config.trainer, offload_optimizer=choice)
    return dataclasses.replace(config, trainer=trainer), notes


def moments_of(model: Any) -> int:
    """Bytes of AdamW's moments."""
    return MOMENTS * sum(p.numel() for p in model.parameters() if p.requires_grad)


def reserved_bytes(config: TrainConfig, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """What the trainer will hold on the device while the engine samples and does not hold yet.

    Gradients are gone by then, and what was restored from a checkpoint is there already.
    """
    if config.trainer.offload_optimizer != "none":
        return 0
    there = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    return max(0, moments_of(model) - there)
