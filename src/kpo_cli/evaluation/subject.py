"""What is evaluated: a run, a checkpoint, a model directory, a hub name, or the built-in policy."""

import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kpo_cli.config import ModelConfig, convert
from kpo_cli.data.prompts import PromptBuilder
from kpo_cli.errors import UserError
from kpo_cli.evaluation.config import EvalConfig
from kpo_cli.policy.load import Policy, load_policy
from kpo_cli.policy.lora import MERGED
from kpo_cli.runs.checkpoints import newest_checkpoint
from kpo_cli.runs.directory import RunDir, run_of

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

    def load(self, role: str) -> Policy:
        """The policy; what `kpo train` calls model.path was given as `role` here."""
        try:
            return load_policy(self.model)
        except UserError as error:
            line = str(error).replace("model.path=", f"{role}=")
            raise UserError(re.sub(r"\bmodel\.(?=\w+=)", "", line)) from None

    def prompts(self, policy: Policy, has_instruction: bool) -> PromptBuilder:
        asking = self if has_instruction else replace(self, instruction=None)
        return PromptBuilder(policy.tokenizer, self.model, asking, prefixes=("", ""))


@dataclass(frozen=True)
class Prompting:
    """How problems are put to a policy."""

    chat_template: str = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    instruction: str | None = BOXED


def find_subjects(config: EvalConfig) -> dict[str, Subject]:
    """Resolve `checkpoint=` and `vs=`, asked in the same way. Raises UserError if there is no such thing."""
    assert config.checkpoint is not None
    label, path, run = _locate(config.checkpoint)
    prompting = _prompting(run, config)
    subjects = {"checkpoint": _subject(label, path, prompting, config)}
    if config.vs is not None:
        other, other_path, _ = _locate(config.vs)
        label, other = _told_apart((label, path), (other, other_path))
        subjects["checkpoint"] = _subject(label, path, prompting, config)
        subjects["vs"] = _subject(other, other_path, prompting, config)
    return subjects


def run_behind(name: str) -> RunDir | None:
    """The run that what is evaluated comes from, if any."""
    _, _, run = _locate(name)
    return None if run is None else RunDir(run)


def _told_apart(first: tuple[str, str | None], second: tuple[str, str | None]) -> tuple[str, str]:
    """Two labels that differ: where the names are alike, with as much of the paths before them as it takes."""
    (label, path), (other, other_path) = first, second
    if label != other:
        return label, other
    if path is not None and other_path is not None:
        parts, other_parts = (Path(os.path.abspath(os.path.expanduser(p))).parts for p in (path, other_path))
        for count in range(2, max(len(parts), len(other_parts)) + 1):
            if parts[-count:] != other_parts[-count:]:
                return _joined(parts[-count:]), _joined(other_parts[-count:])
    return label, f"{label} (vs)"


def _locate(name: str) -> tuple[str, str | None, Path | None]:
    """Label, path of the weights (None: the built-in policy), and the run that they belong to, if any."""
    if name == "builtin":
        return "builtin", None, None
    path = run_of(Path(os.path.expanduser(name)))
    if (path / "config.yaml").is_file():  # a run
        checkpoint, _ = newest_checkpoint(path)
        if checkpoint is None:
            raise UserError(f"{name} is a run without a checkpoint; let it train, or evaluate checkpoint=builtin")
        return f"{_label(path)}-{checkpoint.name}", str(checkpoint), path
    if path.name == MERGED:  # beside the adapters of a checkpoint
        label, _, run_of_both = _locate(str(path.parent))
        return f"{label}-{MERGED}", str(path), run_of_both
    run = path.parent.parent
    if path.parent.name == "checkpoints" and (run / "config.yaml").is_file():
        return f"{_label(run)}-{path.name}", str(path), run
    return path.name, name, None


def _joined(parts: tuple[str, ...]) -> str:
    return "-".join(part.strip("/") for part in parts)


def _prompting(run: Path | None, config: EvalConfig) -> Prompting:
    """What the configuration says; what it inherits comes from the run, or from `Prompting` where there is none."""
    inherited = Prompting()
    if run is not None:
        stored = RunDir(run).config()
        model, data = stored["model"], stored["data"]
        inherited = Prompting(
            model["chat_template"], model["chat_template_kwargs"], data["system_prompt"], data["instruction"]
        )
    given = {f.name: getattr(config, f.name) for f in fields(Prompting)}
    return replace(inherited, **{name: value for name, value in given.items() if value != "inherit"})


def _subject(label: str, path: str | None, prompting: Prompting, config: EvalConfig) -> Subject:
    raw = {
        "name": "tiny" if path is None else "hub",
        "path": path,
        "architecture": None,
        "chat_template": prompting.chat_template,
        "chat_template_kwargs": prompting.chat_template_kwargs,
        "dtype": config.dtype,
        "device": config.device,
        "gradient_checkpointing": False,
        "lora": {"rank": 0, "alpha": None, "targets": "all-linear", "merge_checkpoints": False},
    }
    return Subject(label, path, convert(ModelConfig, raw), prompting.system_prompt, prompting.instruction)


def _label(run: Path) -> str:
    """The last two parts of a run's path: <method>-<model>-<data>-s<seed> and the time, by default."""
    return "-".join(run.resolve().parts[-2:])
