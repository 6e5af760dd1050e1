"""What the user should know of a run before it begins, and what its manifest says."""

from typing import Any

import torch

from kpo_cli.config import TrainConfig, data_label, model_label, resolve_filter
from kpo_cli.core.methods import METHODS
from kpo_cli.data.load import ProblemSets
from kpo_cli.runs.directory import make_manifest
from kpo_cli.training.display import describe_filter
from kpo_cli.training.loop import Training


def notes_of(job: Training, problems: ProblemSets, dropped: int) -> list[str]:
    """`dropped` prompts were too long."""
    config = job.config
    notes = [
        f"method: {config.method.name} = {config.filter['name']} filter, {_stage(config.method.surrogate)} surrogate, "
        f"{_stage(config.method.aggregation)}",
        *describe_filter(config.filter, config.rollout.max_response_tokens),
        *_own_noise(config),
        f"model: {model_label(config.model)}, {job.policy.parameters:,} parameters, {job.policy.dtype} on "
        f"{job.policy.model.device}, {config.trainer.threads} CPU thread{'s' * (config.trainer.threads != 1)}, "
        f"{'its chat template' if job.templated else 'plain text'}",
        f"data: {data_label(config.data)}, {len(job.train)} problems to train on, {len(job.heldout)} held out",
    ]
    supervised = config.trainer.supervised
    if supervised.steps:
        notes.append(
            f"supervised: {supervised.steps} steps of {supervised.batch_tokens:,} tokens of worked examples before RL, "
            f"in which {supervised.step_noise:.2%} of the results are wrong"
        )
    elif config.model.architecture is not None:
        notes.append("warning: random weights earn no reward to learn from; set trainer.supervised.steps")
    if lora := config.model.lora.rank:
        trained = sum(p.numel() for p in job.policy.model.parameters() if p.requires_grad)
        scale = config.model.lora.scaled_alpha / lora
        notes.insert(-1, f"lora: rank {lora}, scale {scale:g}, {trained:,} trained parameters beside frozen weights")
    if problems.overlap:
        found = ", ".join(f"{count} in {name}" for name, count in problems.overlap.items())
        notes.append(f"warning: training problems that stand in benchmarks: {found}")
    if problems.duplicates or problems.limited or dropped:
        notes.append(
            f"left out of {problems.rows} rows: {problems.duplicates} duplicate problems, {dropped} prompts of more "
            f"than {config.rollout.max_prompt_tokens} tokens, {problems.limited} behind data.limit"
        )
    notes += problems.notes
    notes.append(f"first prompt: {job.train[0].text!r}")
    if config.trainer.mini_batches == 1:
        notes.append(
            "note: with one optimizer step a rollout batch every ratio is exactly 1, so all methods coincide; "
            "a comparison made here says nothing"
        )
    return notes


def _own_noise(config: TrainConfig) -> list[str]:
    """A line where a data preset or an experiment, and not the command line, gave the filter another noise."""
    own, given = METHODS.get(config.method.name), config.method.filter_defaults
    noise = resolve_filter({"name": config.filter["name"], "q": None}, config.method) if "q" in config.filter else {}
    if own is None or "q" not in own.filter_defaults or given.get("time_constant") is None:
        return []
    if noise.get("q") != config.filter["q"]:
        return []
    return [
        f"note: this noise is data={config.data.name}'s or the experiment's (method.filter_defaults), for responses of "
        f"its length; method={config.method.name} alone has filter.q={own.filter_defaults['q']:g}"
    ]


def _stage(stage: dict[str, Any]) -> str:
    parameters = ", ".join(f"{key} {value}" for key, value in stage.items() if key != "name")
    return f"{stage['name']} ({parameters})" if parameters else str(stage["name"])


def manifest_of(job: Training, problems: ProblemSets) -> dict[str, Any]:
    return make_manifest(
        model={**job.policy.identity, "parameters": job.policy.parameters, "stop_ids": list(job.policy.stop_ids)},
        data={
            "path": job.config.data.path,
            "sha256": problems.sha256,
            "train": len(job.train),
            "heldout": len(job.heldout),
            "rows": problems.rows,
            "duplicates": problems.duplicates,
            "benchmark_overlap": problems.overlap,
        },
        first_prompt=job.train[0].text,
        dtype=job.policy.dtype,
        way=job.policy.way.facts(),
        threads=torch.get_num_threads(),
        device=str(job.policy.model.device),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )
