"""What can be wrong with a run, found before its directory is made."""

from typing import Any

from omegaconf import OmegaConf

from kpo_cli.config import TrainConfig, train_config
from kpo_cli.errors import UserError
from kpo_cli.policy.load import Policy, choose_device, context_of, loading_errors, transformers_config
from kpo_cli.policy.memory import check_memory, plan_memory

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
    for key in MAY_CHANGE:  # one that the version that wrote it did not have yet
        group, name = key.split(".")
        stored[group].setdefault(name, raw[group][name])
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key == "resume":
            continue
        if key == "run_dir":
            raise UserError("run_dir= and resume= exclude each other; a resumed run stays where it is")
        group, name = [*("rollout.name" if key == "rollout" else key).split("."), ""][:2]
        if f"{group}.{name}" in MAY_CHANGE:
            stored[group][name] = raw[group][name]
            if stored["rollout"]["name"] == "hf":
                stored["rollout"]["engine"] = raw["rollout"]["engine"]  # arguments of vLLM go with it
        elif value_at(raw, key) != value_at(stored, key):
            raise UserError(
                f"{override} differs from the run's own {value_at(stored, key)}; a resumed run may change only "
                f"{', '.join(MAY_CHANGE)}"
            )
    return train_config(stored)


def value_at(config: dict[str, Any], key: str) -> Any:
    value = OmegaConf.select(OmegaConf.create(config), key)
    return value["name"] if OmegaConf.is_dict(value) and "name" in value else value
