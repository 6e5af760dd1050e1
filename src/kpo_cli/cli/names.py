"""Names: those that a command knows, those that users of other trainers know, and the nearest to a wrong one."""

import difflib
from pathlib import Path
from typing import Any

RENAMED = {
    "trainer.prompts_per_step": "batch_size train_batch_size gen_batch_size per_device_train_batch_size prompts",
    "trainer.mini_batches": "ppo_mini_batch_size mini_batch_size num_mini_batches num_iterations ppo_epochs",
    "trainer.max_tokens_per_micro_batch": "ppo_max_token_len_per_gpu ppo_micro_batch_size_per_gpu micro_batch_size "
    "ppo_micro_batch_size gradient_accumulation_steps use_dynamic_bsz",
    "trainer.group_size": "n num_generations n_samples rollouts_per_prompt samples_per_prompt",
    "trainer.lr": "learning_rate optim.lr",
    "trainer.steps": "max_steps total_training_steps num_steps iterations num_train_epochs total_epochs epochs",
    "trainer.warmup_steps": "lr_warmup_steps num_warmup_steps warmup_ratio lr_warmup_steps_ratio",
    "trainer.max_grad_norm": "grad_clip clip_grad",
    "trainer.checkpoint_every": "save_steps save_freq save_every save_interval",
    "trainer.keep_checkpoints": "save_total_limit max_actor_ckpt_to_keep",
    "trainer.eval_every": "eval_steps test_freq eval_freq",
    "trainer.eval.benchmarks": "val_files eval_dataset",
    "trainer.kl_coefficient": "beta kl_loss_coef kl_coef init_kl_coef use_kl_loss",
    "trainer.kl_estimator": "kl_loss_type kl_penalty",
    "trainer.entropy_bonus": "entropy_coeff entropy_coef",
    "trainer.advantage_std": "scale_rewards norm_adv_by_std_in_grpo",
    "trainer.mask_truncated": "mask_truncated_completions",
    "trainer.offload_optimizer": "optimizer_offload",
    "rollout.max_prompt_tokens": "max_prompt_length",
    "rollout.max_response_tokens": "max_completion_length max_response_length max_new_tokens response_length",
    "rollout.engine": "gpu_memory_utilization vllm_gpu_memory_utilization",
    "rollout": "use_vllm backend",
    "method": "adv_estimator loss_type loss_mode importance_sampling_level algorithm",
    "method.surrogate.eps_low": "epsilon clip_ratio clip_ratio_low cliprange",
    "method.surrogate.eps_high": "epsilon_high clip_ratio_high",
    "model.path": "model_name_or_path pretrained_model_name model_name model_id",
    "model.dtype": "bf16 torch_dtype",
    "model.gradient_checkpointing": "enable_gradient_checkpointing",
    "model.lora.rank": "lora_r lora_rank",
    "model.lora.alpha": "lora_alpha",
    "model.lora.targets": "lora_target_modules target_modules",
    "data.path": "dataset dataset_name train_files train_file dataset_path",
    "data.fields.problem": "prompt_key",
    "data.fields.answer": "answer_key reward_model.ground_truth",
    "resume": "resume_from_checkpoint resume_mode resume_from_path",
    "run_dir": "output_dir default_local_dir save_dir",
    "checkpoint": "ckpt model_path",
    "eval.n": "num_samples n_samples n num_generations",
    "eval.max_tokens": "max_new_tokens max_completion_length max_response_length",
    "benchmarks": "tasks",
}
"""Our keys, and what others call them (TRL, verl and their like): whole keys, or the last parts of longer ones."""


def conf_dir() -> Path:
    """The configuration directory: inside the installed package, or at the top of a source checkout."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here.parent / "conf", here.parents[2] / "conf") if path.is_dir())


def config_keys(command: str) -> list[str]:
    """Every key and group of the default configuration, dotted."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose(command))
    GlobalHydra.instance().clear()

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return [prefix]
        return [key for name, child in node.items() for key in walk(child, f"{prefix}.{name}" if prefix else name)]

    return groups_of(command) + walk(plain, "")


def groups_of(command: str) -> list[str]:
    """The groups of files that a command chooses from."""
    import yaml

    defaults = yaml.safe_load((conf_dir() / f"{command}.yaml").read_text("utf-8"))["defaults"]
    named = [key.removeprefix("optional ") for entry in defaults if isinstance(entry, dict) for key in entry]
    return sorted(name for name in named if not name.startswith("override "))


def renamed(name: str, known: list[str]) -> str | None:
    """Our key for what another trainer calls `name`, whatever groups it has there."""
    for ours, theirs in RENAMED.items():
        if ours in known and any(name == one or name.endswith(f".{one}") for one in theirs.split()):
            return ours
    return None


def closest(name: str, known: list[str]) -> str | None:
    """The key that another trainer calls so; or the nearest: in the group, else by the whole name or its last part.

    `trainer.stepz` and `stepz` both stand for `trainer.steps`; a wrong key of a known group is not that group.
    """
    if ours := renamed(name, known):
        return ours
    group, _, last = name.rpartition(".")
    parts = [key.rpartition(".") for key in known]
    siblings = {own: key for key, (prefix, _, own) in zip(known, parts, strict=True) if prefix == group}
    anywhere = {own: key for key, (_, _, own) in reversed(list(zip(known, parts, strict=True)))}
    whole = {} if group and siblings else {key: key for key in known}
    for wanted, names in ((last, siblings), (name, whole), (last, anywhere)):
        if close := difflib.get_close_matches(wanted, names, n=1):
            return names[close[0]]
    return None


def hint_of(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
