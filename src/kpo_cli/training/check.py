"""What can be wrong with a run, found before its directory is made."""

import functools
import operator
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kpo_cli.config import TrainConfig, train_config
from kpo_cli.data.load import ProblemSets
from kpo_cli.data.prompts import Prompt
from kpo_cli.errors import UserError
from kpo_cli.policy.load import Policy, choose_device, context_of, loading_errors, model_identity, transformers_config
from kpo_cli.policy.memory import check_memory, plan_memory

MAY_CHANGE = (
    "trainer.steps",
    "trainer.eval_every",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.ratios_every",
    "trainer.stop_after",
    "trainer.offload_optimizer",
    "trainer.max_tokens_per_micro_batch",
    "model.gradient_checkpointing",
    "rollout.batch_size",
    "rollout.name",
    "rollout.engine",
)
"""What a resumed run may change, since it does not touch the weights of a step, but for rounding.

A run that is out of memory needs some of it; and an engine that fails, has no room, or is not there any more must not
hold a run captive.
"""

MOVED = ("model.path", "data.path", "trainer.eval.data_dir")
"""Where a resumed run finds what it began with, if that was moved."""


def check_fit(config: TrainConfig) -> list[str]:
    """Compare what the run needs with what there is, before the weights are loaded."""
    device, half = choose_device(config.model)
    with loading_errors(config.model):
        plan = plan_memory(config, transformers_config(config.model), device, half)
    warning = check_memory(plan)
    beside = "; what vLLM takes comes on top" if config.rollout.name == "vllm" else ""
    return [plan.describe() + beside, *([f"warning: {warning}"] if warning else [])]


def check_context(config: TrainConfig, policy: Policy) -> None:
    context, called = context_of(policy.model)
    prompt, response = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
    if context is not None and prompt + response > context:
        raise UserError(
            f"rollout.max_prompt_tokens={prompt} and rollout.max_response_tokens={response} exceed {called}; "
            f"lower one of them"
        )


def changed_config(stored: dict[str, Any], raw: dict[str, Any], overrides: list[str]) -> TrainConfig:
    """The stored configuration with the changes that a resumed run may make."""
    # What runs did before there were keys for it.
    stored["data"].setdefault("duplicates", "similar")
    stored["trainer"]["eval"].setdefault("data", raw["trainer"]["eval"]["data"])
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key == "resume":
            continue
        if key == "run_dir":
            raise UserError("run_dir= and resume= exclude each other; a resumed run stays where it is")
        group, name = [*("rollout.name" if key == "rollout" else key).split("."), ""][:2]
        if key in MOVED:
            *groups, last = key.split(".")
            functools.reduce(operator.getitem, groups, stored)[last] = value_at(raw, key)
        elif f"{group}.{name}" in MAY_CHANGE:
            stored[group][name] = raw[group][name]
            if stored["rollout"]["name"] == "hf":
                stored["rollout"]["engine"] = raw["rollout"]["engine"]  # arguments of vLLM go with it
        elif value_at(raw, key) != value_at(stored, key):
            raise UserError(
                f"{override} differs from the run's own {value_at(stored, key)}; a resumed run may change only "
                f"{', '.join(MAY_CHANGE)}, and {', '.join(MOVED)} where what it began with was moved"
            )
    return train_config(stored)


def check_there(run: Path, config: TrainConfig) -> None:
    """Raise UserError if what a resumed run began with lies somewhere else now."""
    for key, path in (("model.path", config.model.path), ("data.path", config.data.path)):
        if path is not None and os.path.isabs(path) and not os.path.exists(path):
            raise UserError(f"{key}={path} is not there any more; say where it lies now: resume={run} {key}=PATH")


def check_unchanged(run: Path, config: TrainConfig, problems: ProblemSets, manifest: dict[str, Any]) -> None:
    """Raise UserError if a resumed run has not the problems and the weights that it began with, wherever they lie."""
    weights = _without_paths(model_identity(config.model))
    for what, same in (
        (f"data.path={config.data.path}", problems.sha256 == manifest["data"]["sha256"]),
        (f"model.path={config.model.path}", _without_paths(manifest["model"]).items() >= weights.items()),
    ):
        if not same:
            raise UserError(f"{what} has changed since {run} began; put it back or start a new run")


def _without_paths(identity: dict[str, Any]) -> dict[str, Any]:
    """What a model is, wherever it lies; a model of adapters has one below it."""
    kept = {key: value for key, value in identity.items() if key not in ("path", "base")}
    return kept | ({"base": _without_paths(identity["base"])} if "base" in identity else {})


def check_first_prompt(run: Path, first: Prompt, manifest: dict[str, Any]) -> None:
    """Raise UserError if the tokenizer or its template makes another prompt than when a resumed run began."""
    before = manifest["first_prompt"]
    if first.text != before:
        raise UserError(
            f"the first prompt of {run} was {_short(before)} and is {_short(first.text)} now: the chat template has "
            f"changed, or asks for the date; put it back or start a new run"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:80]} ... {text[-80:]}")


def value_at(config: dict[str, Any], key: str) -> Any:
    value = OmegaConf.select(OmegaConf.create(config), key)
    return value["name"] if OmegaConf.is_dict(value) and "name" in value else value
