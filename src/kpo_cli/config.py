"""From Hydra's composed configuration to frozen, validated dataclasses: once, here, and nowhere else.

conf/ says what each key means and holds the defaults; this file holds the types, the ranges, and the errors. Nothing
below imports torch, so that `kpo train --cfg job` and a mistyped key answer at once.
"""

import dataclasses
import math
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpo_cli.errors import UserError

CHAT_TEMPLATES = ("auto", "required", "none")
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
KL_ESTIMATORS = ("k1", "k2", "k3")
ANSWER_STYLES = ("plain", "hash", "boxed")
CORRECTIONS = ("none", "truncate", "mask")
MAX_THREADS = 1024
"""More than any machine has cores; torch dies of a very large number."""


@dataclass(frozen=True)
class ModelConfig:
    name: str
    path: str | None
    chat_template: str
    chat_template_kwargs: dict[str, Any]
    dtype: str
    device: str
    gradient_checkpointing: bool

    def __post_init__(self) -> None:
        _label("model.name", self.name)
        if self.path is None and self.name == "hub":
            raise UserError("model=hub needs a model: give model.path=DIRECTORY or model.path=org/name")
        _one_of("model.chat_template", self.chat_template, CHAT_TEMPLATES)
        _one_of("model.dtype", self.dtype, DTYPES)
        _one_of("model.device", self.device, DEVICES)


@dataclass(frozen=True)
class FieldNames:
    id: str
    problem: str
    answer: str


@dataclass(frozen=True)
class DataConfig:
    name: str
    path: str | None
    subset: str | None
    split: str
    operators: int | None
    limit: int | None
    heldout: int
    seed: int
    fields: FieldNames
    problem_pattern: str | None
    answer_style: str
    system_prompt: str | None
    instruction: str | None

    def __post_init__(self) -> None:
        _label("data.name", self.name)
        if self.path is None and self.name == "file":
            raise UserError("data=file needs a file: give data.path=FILE.jsonl or FILE.parquet")
        _one_of("data.answer_style", self.answer_style, ANSWER_STYLES)
        _pattern("data.problem_pattern", self.problem_pattern)
        _at_least("data.operators", self.operators, 1)
        _at_least("data.limit", self.limit, 1)
        _at_least("data.heldout", self.heldout, 1)


@dataclass(frozen=True)
class MethodConfig:
    name: str
    surrogate: dict[str, Any]
    aggregation: dict[str, Any]
    filter_defaults: dict[str, Any]

    def __post_init__(self) -> None:
        _label("method.name", self.name)
        for name, value in self.surrogate.items():
            if value is None:  # would fall back on the surrogate's own default, not on the method's
                raise UserError(f"method.surrogate.{name}=null must have a value")


@dataclass(frozen=True)
class RolloutConfig:
    name: str
    temperature: float
    max_prompt_tokens: int
    max_response_tokens: int
    batch_size: int
    correction: str
    correction_cap: float

    def __post_init__(self) -> None:
        _one_of("rollout.name", self.name, ("hf",))
        _one_of("rollout.correction", self.correction, CORRECTIONS)
        _above("rollout.temperature", self.temperature, 0)
        _above("rollout.correction_cap", self.correction_cap, 1)
        for key in ("max_prompt_tokens", "max_response_tokens", "batch_size"):
            _at_least(f"rollout.{key}", getattr(self, key), 1)


@dataclass(frozen=True)
class PeriodicEvalConfig:
    benchmarks: list[str]
    data_dir: str | None

    def __post_init__(self) -> None:
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise UserError(f"trainer.eval.benchmarks={self.benchmarks} names one of them twice")


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
    advantage_std: bool
    mask_truncated: bool
    dynamic_sampling: int
    overlong_buffer: float
    kl_coefficient: float
    kl_estimator: str
    entropy_bonus: float
    eval_every: int
    eval: PeriodicEvalConfig
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
        if self.threads is not None and self.threads > MAX_THREADS:
            raise UserError(f"trainer.threads={self.threads} must be at most {MAX_THREADS}")
        for key in ("lr", "max_grad_norm", "advantage_epsilon"):
            _above(f"trainer.{key}", getattr(self, key), 0)
        for key in ("weight_decay", "kl_coefficient", "entropy_bonus", "dynamic_sampling"):
            _at_least(f"trainer.{key}", getattr(self, key), 0)
        _one_of("trainer.kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if not 0 <= self.overlong_buffer < 1:
            raise UserError(f"trainer.overlong_buffer={self.overlong_buffer} must be at least 0 and below 1, a share")
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
    known: dict[str, Any]
    """Where benchmarks lie (conf/benchmark)."""
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
    config: TrainConfig = convert(TrainConfig, raw)
    return dataclasses.replace(config, filter=resolve_filter(config.filter, config.method))


def resolve_filter(own: dict[str, Any], method: MethodConfig) -> dict[str, Any]:
    """The filter's parameters: what `filter.*` says, else the method's (or the experiment's) defaults.

    `q` and `time_constant` are two ways to say one thing; either given under `filter` replaces both defaults.
    """
    if "q" not in own:
        for name, value in own.items():
            if value is None and name != "name":
                raise UserError(f"filter.{name}=null must have a value")
        return own
    defaults = method.filter_defaults
    own_noise = _noise("filter", own)
    default_noise = _noise("method.filter_defaults", defaults)
    time_constant, q = own_noise if own_noise != (None, None) else default_noise
    v = _number("filter.v", own.get("v"))
    v = _number("method.filter_defaults.v", defaults.get("v")) if v is None else v
    v = 1.0 if v is None else v
    _above("filter.v", v, 0)
    if time_constant is not None:
        q = q_of(time_constant, v)
    elif q is None:
        raise UserError(
            f"method={method.name} sets no noise for filter={own['name']}; give filter.q or filter.time_constant"
        )
    _above("filter.q", q, 0)
    if _number("filter.p0", own.get("p0", 0.0)) is None:
        raise UserError("filter.p0=null must be a number")
    return {**own, "q": q, "v": v, "time_constant": None}


def q_of(time_constant: float, v: float) -> float:
    """Q whose steady filter forgets by a factor e in `time_constant` tokens: 4 sinh^2(1 / (2 tau)) V."""
    _above("filter.time_constant", time_constant, 0)
    try:
        q = 4 * math.sinh(1 / (2 * time_constant)) ** 2 * v
    except OverflowError:
        q = math.inf
    if not 0 < q < math.inf:
        raise UserError(f"filter.time_constant={time_constant} tokens cannot be expressed as a noise; give filter.q")
    return q


def _noise(prefix: str, parameters: dict[str, Any]) -> tuple[float | None, float | None]:
    """Time constant and Q as given under `prefix`: at most one of them."""
    time_constant = _number(f"{prefix}.time_constant", parameters.get("time_constant"))
    q = _number(f"{prefix}.q", parameters.get("q"))
    if time_constant is not None and q is not None:
        raise UserError(
            f"{prefix}.q={q} and {prefix}.time_constant={time_constant} both say how slowly the filter moves; "
            f"give one of them"
        )
    return time_constant, q


def _number(key: str, value: Any) -> float | None:
    return None if value is None else _convert_scalar(float, value, key)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain containers, ready for YAML; `train_config` turns them into the same configuration again."""
    plain = dataclasses.asdict(config)
    plain["trainer"]["betas"] = list(config.trainer.betas)
    return plain


def model_label(model: ModelConfig) -> str:
    """A short name for directories: the preset's, or the last part of the path."""
    return Path(os.path.abspath(model.path)).name if model.name == "hub" and model.path else model.name


def data_label(data: DataConfig) -> str:
    return Path(data.path).stem if data.name == "file" and data.path else data.name


def convert(kind: Any, value: Any, key: str = "") -> Any:
    """`value` as `kind`, which is a dataclass or one of the annotations used above. Raises UserError naming the key."""
    if value == "???":
        raise UserError(f"{key} is required: give {key}=...")
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return value if isinstance(value, str) and str in arguments else convert(arguments[0], value, key)
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise UserError(f"{key}={value} must be a list of {len(arguments)} values")
        return tuple(convert(k, v, f"{key}[{i}]") for i, (k, v) in enumerate(zip(arguments, value, strict=True)))
    if origin is list:
        if not isinstance(value, list | tuple):
            raise UserError(f"{key}={value} must be a list, such as [a,b]")
        return [convert(arguments[0], v, f"{key}[{i}]") for i, v in enumerate(value)]
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
    return kind(**{name: convert(hint, value[name], prefix + name) for name, hint in hints.items()})


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
    if value is not None and not bound <= value < math.inf:
        limit = "finite" if value == math.inf else f"at least {bound}"
        raise UserError(f"{key}={value} must be {limit}{': ' + why if why else ''}")


def _pattern(key: str, value: str | None) -> None:
    try:
        compiled = re.compile(value or "(?P<problem>)")
    except re.error as error:
        raise UserError(f"{key}={value} is not a regular expression: {error}") from None
    if "problem" not in compiled.groupindex:
        raise UserError(f"{key}={value} needs a group (?P<problem>...) around what is the problem")


def _label(key: str, value: str) -> None:
    """A name that becomes a part of a directory's name."""
    if not value or "/" in value:
        raise UserError(f"{key}={value} must be a name without a slash")
