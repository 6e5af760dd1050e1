"""What can be wrong with a run, found before its directory is made."""

import functools
import operator
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from kpo_cli.config import TrainConfig, train_config
from kpo_cli.data.load import ProblemSets
from kpo_cli.data.prompts import Prompt
from kpo_cli.errors import UserError
from kpo_cli.policy.fidelity import Way
from kpo_cli.policy.load import (
    Policy,
    choose_device,
    context_of,
    loading_errors,
    model_identity,
    model_source,
    transformers_config,
)
from kpo_cli.policy.memory import GIB, MemoryPlan, check_memory, plan_memory
from kpo_cli.runs.directory import first_line

MAY_CHANGE = (
    "trainer.steps",
    "trainer.eval_every",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.keep_optimizer",
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


def check_fit(config: TrainConfig, run_dir: Path | None, way: Way | None = None) -> tuple[TrainConfig, list[str]]:
    """Compare what the run needs with what there is, before the weights are loaded: memory, and disk in `run_dir`.

    Again with the `way` of a loaded policy, if that takes more than one would think. Returns the configuration with
    model.gradient_checkpointing=auto resolved by that, so that the stored one names the number of layers, and lines.
    Raises UserError for what cannot fit. What cannot be estimated stops nothing, and says so.
    """
    device, dtype = choose_device(config.model)
    with loading_errors(config.model):
        model_config = transformers_config(config.model)
    if getattr(model_config.get_text_config(), "num_attention_heads", None) is None:  # Mamba and its kin
        raise UserError(
            f"model.path={config.model.path} cannot be sampled from: it has no attention, and so no cache of keys and "
            f"values; take another architecture"
        )
    try:
        plan = plan_memory(config, model_config, device, dtype != "float32", way)
    except Exception as error:  # loading the model will say it better, if it is more than the plan that fails
        return config, [f"memory: no estimate ({type(error).__name__}: {first_line(error)})"]
    if config.model.gradient_checkpointing == "auto" and not plan.unknown:
        config = replace(config, model=replace(config.model, gradient_checkpointing=plan.recomputed[0]))
    warning = check_memory(plan)
    beside = ""
    if config.rollout.name == "vllm":
        left = max(0, plan.available - plan.sampling) / GIB
        share = f"about {left:.1f} GiB, and gives it back" if device.type == "cuda" else "for its own weights and cache"
        beside = f"; while sampling vLLM takes what that leaves, {share}"
    memory = [plan.describe() + beside, *([f"warning: {warning}"] if warning else [])]
    return config, [*memory, *check_disk(config, plan, run_dir or Path("outputs"))]


def check_disk(config: TrainConfig, plan: MemoryPlan, run_dir: Path) -> list[str]:
    """Compare what checkpoints take with what is free where the run is, or will be.

    One holds float32 weights (or adapters), the tokenizer and two moments a trained weight. At most there are those
    that are kept, of which the newest have the moments, and the one that is being written.
    """
    trainer, lora = config.trainer, config.model.lora
    trained = plan.gradients // 4
    whole = 4 * plan.parameters
    model = (4 * trained + (whole if lora.merge_checkpoints else 0) if lora.rank else whole) + _tokenizer_bytes(config)
    first = model + 8 * trained
    count = _checkpoints(config)
    kept = min(trainer.keep_checkpoints or count, count)
    moments = min(trainer.keep_optimizer or kept, kept)
    peak = kept * model + moments * 8 * trained + (first if count > kept else 0)
    place = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    present = sum(file.stat().st_size for file in (run_dir / "checkpoints").rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free
    sizes = f"a checkpoint takes {first / GIB:.2f} GiB"
    there = f"{free / GIB:.1f} GiB are free in {place}"
    if first > free:
        raise UserError(f"disk: {sizes}, but {there}; make room or take another run_dir=")
    line = f"disk: {sizes}, all of them {peak / GIB:.2f} GiB at most; {there}"
    if peak - present <= free:
        return [line]
    fewer = "trainer.keep_checkpoints, trainer.keep_optimizer or (where all are kept) a larger trainer.checkpoint_every"
    return [line, f"warning: the disk may run full; set a lower {fewer}, or take another run_dir="]


def _checkpoints(config: TrainConfig) -> int:
    """How many a whole run writes."""
    phases = (config.trainer, config.trainer.supervised)
    return sum(-(-p.steps // p.checkpoint_every) if p.checkpoint_every else min(1, p.steps) for p in phases)


def _tokenizer_bytes(config: TrainConfig) -> int:
    """All that is text beside the weights of a local model; of one on the hub, what large vocabularies take."""
    source = Path(model_source(config.model))
    if not source.is_dir():
        return 2**24
    return sum(f.stat().st_size for f in source.iterdir() if f.suffix in (".json", ".txt", ".model", ".jinja"))


def check_context(config: TrainConfig, policy: Policy) -> None:
    context, called = context_of(policy.model)
    prompt, response = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
    if context is not None and prompt + response > context:
        raise UserError(
            f"rollout.max_prompt_tokens={prompt} and rollout.max_response_tokens={response} exceed {called}; "
            f"lower one of them"
        )


def _add_new_keys(stored: dict[str, Any], raw: dict[str, Any]) -> None:
    """Give a configuration that an older kpo stored the keys that there were not, with what held without them."""
    new = {"data.duplicates": "similar", **{key: _node_at(raw, key) for key in (*MAY_CHANGE, "trainer.eval.data")}}
    for key, value in new.items():
        path, _, name = key.rpartition(".")
        group = _node_at(stored, path)
        if isinstance(group, dict):  # else it is no configuration, as is going to be said
            group.setdefault(name, value)


def changed_config(stored: dict[str, Any], raw: dict[str, Any], overrides: list[str]) -> TrainConfig:
    """The stored configuration with the changes that a resumed run may make."""
    _add_new_keys(stored, raw)
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
    """What stands at a dotted key, None if nothing does; of a group, its name."""
    value = _node_at(config, key)
    return value.get("name", value) if isinstance(value, dict) else value


def _node_at(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
