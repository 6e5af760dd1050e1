"""From Hydra's composed configuration to frozen, validated dataclasses: once, here, and nowhere else.

conf/ says what each key means and holds the defaults; this file holds the types, the ranges, and the errors. Nothing
below imports torch, so that `kpo train --cfg job` and a mistyped key answer at once.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpo_cli.errors import UserError

CHAT_TEMPLATES = ("auto", "none")


@dataclass(frozen=True)
class ModelConfig:
    name: str
    path: str | None
    chat_template: str
    chat_template_kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        _one_of("model.chat_template", self.chat_template, CHAT_TEMPLATES)


@dataclass(frozen=True)
class FieldNames:
    id: str
    problem: str
    answer: str


@dataclass(frozen=True)
class DataConfig:
    name: str
    path: str | None
    operators: int | None
    limit: int | None
    heldout: int
    seed: int
    fields: FieldNames
    system_prompt: str | None
    instruction: str | None

    def __post_init__(self) -> None:
        _at_least("data.operators", self.operators, 1)
        _at_least("data.limit", self.limit, 1)
        _at_least("data.heldout", self.heldout, 1)


@dataclass(frozen=True)
class MethodConfig:
    name: str
    surrogate: dict[str, Any]
    aggregation: str
    filter_defaults: dict[str, Any]


@dataclass(frozen=True)
class RolloutConfig:
    name: str
    temperature: float
    max_prompt_tokens: int
    max_response_tokens: int
    batch_size: int

    def __post_init__(self) -> None:
        _one_of("rollout.name", self.name, ("hf",))
        _above("rollout.temperature", self.temperature, 0)
        for key in ("max_prompt_tokens", "max_response_tokens", "batch_size"):
            _at_least(f"rollout.{key}", getattr(self, key), 1)


@dataclass(frozen=True)
class TrainerConfig:
    steps: int
    prompts_per_step: int
    group_size: int
    mini_batches: int
    micro_batch: int
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    advantage_epsilon: float
    mask_truncated: bool
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    ratios_every: int
    threads: int | None

    def __post_init__(self) -> None:
        for key in ("steps", "prompts_per_step", "mini_batches", "micro_batch"):
            _at_least(f"trainer.{key}", getattr(self, key), 1)
        for key in ("warmup_steps", "eval_every", "checkpoint_every", "keep_checkpoints", "ratios_every"):
            _at_least(f"trainer.{key}", getattr(self, key), 0)
        _at_least("trainer.group_size", self.group_size, 2, "an advantage is relative to the group")
        _at_least("trainer.threads", self.threads, 1)
        for key in ("lr", "max_grad_norm", "advantage_epsilon"):
            _above(f"trainer.{key}", getattr(self, key), 0)
        _at_least("trainer.weight_decay", self.weight_decay, 0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"trainer.betas={list(self.betas)}: both must be at least 0 and below 1")
        if self.mini_batches > self.prompts_per_step:
            raise UserError(
                f"trainer.mini_batches={self.mini_batches} but only {self.prompts_per_step} prompts a step, and "
                f"mini-batches are cut by prompt; lower it or raise trainer.prompts_per_step"
            )


@dataclass(frozen=True)
class TrainConfig:
    """All of `kpo train`. `filter` is complete: its noise is resolved to numbers."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    filter: dict[str, Any]
    rollout: RolloutConfig
    trainer: TrainerConfig
    seed: int

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        _at_least("data.seed", self.data.seed, 0)


def train_config(raw: dict[str, Any]) -> TrainConfig:
    """Convert and validate the composed configuration (without `run_dir` and `resume`).

    What depends on other keys is resolved here, so that the stored configuration is complete: the filter's noise and
    the warm-up's length. Raises UserError naming the key and the fix.
    """
    raw = dict(raw)
    trainer = dict(raw.get("trainer") or {})
    if trainer.get("warmup_steps", 0) is None and isinstance(trainer.get("steps"), int):
        trainer["warmup_steps"] = round(0.05 * trainer["steps"])
    raw["trainer"] = trainer
    config: TrainConfig = _convert(TrainConfig, raw, "")
    return dataclasses.replace(config, filter=resolve_filter(config.filter, config.method))


def resolve_filter(own: dict[str, Any], method: MethodConfig) -> dict[str, Any]:
    """The filter's parameters: what `filter.*` says, else the method's (or the experiment's) defaults.

    `q` and `time_constant` are two ways to say one thing; either given under `filter` replaces both defaults.
    """
    if "q" not in own:
        return own
    defaults = method.filter_defaults
    for key in ("q", "v", "time_constant", "p0"):
        value = own.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"filter.{key}={value} must be a number")
    if own.get("q") is not None and own.get("time_constant") is not None:
        raise UserError(
            f"filter.q={own['q']} and filter.time_constant={own['time_constant']} both say how slowly the filter "
            f"moves; give one of them"
        )
    chosen = own if own.get("q") is not None or own.get("time_constant") is not None else defaults
    v = own["v"] if own.get("v") is not None else defaults.get("v")
    v = 1.0 if v is None else float(v)
    time_constant = chosen.get("time_constant")
    if time_constant is not None:
        _above("filter.time_constant", float(time_constant), 0)
        q = 4 * math.sinh(1 / (2 * time_constant)) ** 2 * v
    elif chosen.get("q") is not None:
        q = float(chosen["q"])
    else:
        raise UserError(
            f"method={method.name} sets no noise for filter={own.get('name')}; give filter.q or filter.time_constant"
        )
    _above("filter.v", v, 0)
    _above("filter.q", q, 0)
    return {**own, "q": q, "v": v, "time_constant": None}


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain containers, ready for YAML; `train_config` turns them into the same configuration again."""
    plain = dataclasses.asdict(config)
    plain["trainer"]["betas"] = list(config.trainer.betas)
    return plain


def model_label(model: ModelConfig) -> str:
    """A short name for directories: the preset's, or the last part of the path."""
    return Path(model.path).name if model.name == "hub" and model.path else model.name


def data_label(data: DataConfig) -> str:
    return Path(data.path).stem if data.name == "file" and data.path else data.name


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`, which is a dataclass or one of the annotations used above."""
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, key)
    if value == "???":
        raise UserError(f"{key} is required: give {key}=...")
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise UserError(f"{key}={value} must be a list of {len(arguments)} values")
        return tuple(_convert(k, v, f"{key}[{i}]") for i, (k, v) in enumerate(zip(arguments, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key}={value} must be a mapping, such as {{name: value}}")
        return dict(value)
    return _convert_scalar(kind, value, key)


def _convert_dataclass(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{key}={value} must be a group of keys")
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise UserError(f"unknown key {prefix}{name}; {_nearest(str(name), hints)}")
    for name in hints:
        if name not in value:
            raise UserError(f"{prefix}{name} is missing; give {prefix}{name}=...")
    return kind(**{name: _convert(hint, value[name], prefix + name) for name, hint in hints.items()})


def _convert_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a directory named 7 is a name all the same
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        shown = "null" if value is None else value
        raise UserError(f"{key}={shown} must be {names[kind]}")
    return value


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    import difflib

    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value} must be one of: {', '.join(allowed)}")


def _above(key: str, value: float, bound: float) -> None:
    if not (math.isfinite(value) and value > bound):
        raise UserError(f"{key}={value} must be a finite number above {bound}")


def _at_least(key: str, value: float | None, bound: int, why: str = "") -> None:
    if value is not None and not value >= bound:
        raise UserError(f"{key}={value} must be at least {bound}{': ' + why if why else ''}")
