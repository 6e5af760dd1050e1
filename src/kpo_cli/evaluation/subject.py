"""What is evaluated: a run, a checkpoint, a model directory, a hub name, or the built-in policy."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kpo_cli.checkpoints import newest_checkpoint
from kpo_cli.config import DataConfig, ModelConfig
from kpo_cli.data.prompts import PromptBuilder
from kpo_cli.errors import UserError
from kpo_cli.evaluation.benchmarks import data_config
from kpo_cli.evaluation.config import EvalConfig
from kpo_cli.policy import Policy, load_policy

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Subject:
    """A policy and the prompts that it is asked with."""

    label: str
    path: str | None
    """None: the built-in policy."""
    model: ModelConfig
    system_prompt: str | None
    instruction: str | None

    def load(self) -> Policy:
        return load_policy(self.model)

    def prompts(self, policy: Policy, has_instruction: bool) -> PromptBuilder:
        instruction = self.instruction if has_instruction else None
        data: DataConfig = replace(data_config(""), system_prompt=self.system_prompt, instruction=instruction)
        return PromptBuilder(policy.tokenizer, self.model, data)


def find_subject(name: str, config: EvalConfig) -> Subject:
    """Resolve `checkpoint=` or `vs=`. Raises UserError if there is no such thing."""
    if name == "builtin":
        return _subject("builtin", None, None, config)
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file():  # a run
        checkpoint, _ = newest_checkpoint(path)
        if checkpoint is None:
            raise UserError(f"{name} is a run without a checkpoint; let it train, or evaluate checkpoint=builtin")
        return _subject(_label(path) + f"-{checkpoint.name}", str(checkpoint), path, config)
    run = path.parent.parent
    in_run = path.parent.name == "checkpoints" and (run / "config.yaml").is_file()
    label = _label(run) + f"-{path.name}" if in_run else path.name
    return _subject(label, name, run if in_run else None, config)


def _subject(label: str, path: str | None, run: Path | None, config: EvalConfig) -> Subject:
    """Template, system prompt and instruction are those that the run was trained with, unless given."""
    model = config.model_config(path)
    system_prompt, instruction = config.system_prompt, config.instruction
    if run is not None:
        stored: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        template = stored["model"]
        model = replace(
            model, chat_template=template["chat_template"], chat_template_kwargs=template["chat_template_kwargs"]
        )
        system_prompt = stored["data"]["system_prompt"] if system_prompt is None else system_prompt
        instruction = stored["data"]["instruction"] if instruction == "auto" else instruction
    return Subject(label, path, model, system_prompt, BOXED if instruction == "auto" else instruction)


def _label(run: Path) -> str:
    """The last two parts of a run's path: <method>-<model>-<data>-s<seed> and the time, by default."""
    return "-".join(run.resolve().parts[-2:])
