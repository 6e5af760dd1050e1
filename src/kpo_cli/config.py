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
DUPLICATES = ("exact", "similar")
ENGINES = ("auto", "hf", "vllm")
CORRECTIONS = ("auto", "none", "truncate", "mask")
OLD_LOG_PROBS = ("auto", "trainer")
OFFLOADS = ("auto", "none", "sampling", "always")
ENGINE_OWN = (
    *("model", "tokenizer", "skip_tokenizer_init", "dtype", "quantization", "load_format", "max_model_len", "seed"),
    *("runner", "generation_config", "logprobs_mode", "enable_sleep_mode", "enable_chunked_prefill"),
    *("tensor_parallel_size", "pipeline_parallel_size"),
)
"""Arguments of vllm.LLM that are not the user's: they decide what is sampled, and from which weights."""
MAX_THREADS = 1024
"""More than any machine has cores; torch dies of a very large number."""


@dataclass(frozen=True)
class Architecture:
    """Of a built-in policy with random weights: Qwen3's, over bytes."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    initializer_range: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _above(f"model.architecture.{name}", value, 0)
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise UserError(
                f"model.architecture.num_attention_heads={heads} must be a multiple of "
                f"model.architecture.num_key_value_heads={shared}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.architecture.head_dim={self.head_dim} must be even: positions rotate pairs")


@dataclass(frozen=True)
class LoraConfig:
    rank: int
    """0: none, every weight trains."""
    alpha: float | None
    targets: list[str] | str
    merge_checkpoints: bool

    def __post_init__(self) -> None:
        _at_least("model.lora.rank", self.rank, 0)
        if self.alpha is not None:
            _above("model.lora.alpha", self.alpha, 0)
        if self.targets in ("", []) or (isinstance(self.targets, str) and self.targets != "all-linear"):
            raise UserError(
                f"model.lora.targets={self.targets} must be all-linear or a list of layers, such as [q_proj,v_proj]"
            )

    @property
    def scaled_alpha(self) -> float:
        """What B A is multiplied with, times the rank."""
        return 2 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class ModelConfig:
    name: str
    path: str | None
    architecture: Architecture | None
    chat_template: str
    chat_template_kwargs: dict[str, Any]
    dtype: str
    device: str
    gradient_checkpointing: bool | int | str
    """Whether layers recompute their activations, or how many; auto: as few as memory asks for."""
    lora: LoraConfig

    def __post_init__(self) -> None:
        _label("model.name", self.name)
        if self.path is None and self.name == "hub":
            raise UserError("model=hub needs a model: give model.path=DIRECTORY or model.path=org/name")
        if self.path is not None and self.architecture is not None:
            raise UserError(
                f"model.path={self.path} has weights of its own, but model={self.name} is built with random ones; "
                f"leave model={self.name} out"
            )
        if self.lora.rank and self.architecture is not None:
            raise UserError(
                f"model.lora.rank={self.lora.rank} adapts a trained model, but model={self.name} begins with random "
                f"weights; set model.lora.rank=0"
            )
        _one_of("model.chat_template", self.chat_template, CHAT_TEMPLATES)
        _one_of("model.dtype", self.dtype, DTYPES)
        _one_of("model.device", self.device, DEVICES)
        again = self.gradient_checkpointing
        if again != "auto" and (isinstance(again, str) or again < 0):
            raise UserError(f"model.gradient_checkpointing={again} must be true, false, auto or a number of layers")


@dataclass(frozen=True)
class FieldNames:
    id: str
    problem: str
    answer: str


@dataclass(frozen=True)
class RowsConfig:
    """How the rows of files are read, where `DataConfig` does not say it: those of benchmarks."""

    fields: FieldNames
    problem_pattern: str | None
    answer_style: str

    def check(self, key: str) -> None:
        """Raise UserError, with `key` before the names."""
        _one_of(f"{key}.answer_style", self.answer_style, ANSWER_STYLES)
        _pattern(f"{key}.problem_pattern", self.problem_pattern)


@dataclass(frozen=True)
class DataConfig:
    name: str
    path: str | None
    subset: str | None
    split: str
    operators: int | None
    max_operators: int | None
    limit: int | None
    heldout: int
    seed: int
    fields: FieldNames
    problem_pattern: str | None
    answer_style: str
    duplicates: str
    system_prompt: str | None
    instruction: str | None

    @property
    def rows(self) -> RowsConfig:
        return RowsConfig(self.fields, self.problem_pattern, self.answer_style)

    def __post_init__(self) -> None:
        _label("data.name", self.name)
        if self.path is None and self.name == "file":
            raise UserError("data=file needs a file: give data.path=FILE.jsonl or FILE.parquet")
        self.rows.check("data")
        _one_of("data.duplicates", self.duplicates, DUPLICATES)
        _at_least("data.operators", self.operators, 1)
        if self.max_operators is not None and self.max_operators < (self.operators or 1):
            raise UserError(f"data.max_operators={self.max_operators} must be at least data.operators={self.operators}")
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
    engine: dict[str, Any] | None

    def __post_init__(self) -> None:
        _one_of("rollout.name", self.name, ENGINES)
        check_engine("rollout.engine", self.engine, self.name)
        _one_of("rollout.correction", self.correction, CORRECTIONS)
        _above("rollout.temperature", self.temperature, 0)
        _above("rollout.correction_cap", self.correction_cap, 1)
        for key in ("max_prompt_tokens", "max_response_tokens", "batch_size"):
            _at_least(f"rollout.{key}", getattr(self, key), 1)


@dataclass(frozen=True)
class PeriodicEvalConfig:
    benchmarks: list[str]
    data_dir: str | None
    data: RowsConfig

    def __post_init__(self) -> None:
        self.data.check("trainer.eval.data")
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise UserError(f"trainer.eval.benchmarks={self.benchmarks} names one of them twice")


@dataclass(frozen=True)
class SupervisedConfig:
    steps: int
    batch_tokens: int
    lr: float
    warmup_steps: int
    first_operators: int | None
    step_noise: float
    guess_fraction: float
    checkpoint_every: int

    def __post_init__(self) -> None:
        for key, bound in (("steps", 0), ("batch_tokens", 1), ("warmup_steps", 0), ("checkpoint_every", 0)):
            _at_least(f"trainer.supervised.{key}", getattr(self, key), bound)
        _above("trainer.supervised.lr", self.lr, 0)
        _at_least("trainer.supervised.first_operators", self.first_operators, 1)
        for key in ("step_noise", "guess_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"trainer.supervised.{key}={getattr(self, key)} must be from 0 to 1, a probability")


@dataclass(frozen=True)
class TrainerConfig:
    steps: int
    prompts_per_step: int
    group_size: int
    mini_batches: int
    max_tokens_per_micro_batch: int | None
    old_log_probs: str
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
    keep_optimizer: int
    ratios_every: int
    threads: int | None
    offload_optimizer: str
    stop_after: float | None
    supervised: SupervisedConfig

    def __post_init__(self) -> None:
        for key in ("steps", "prompts_per_step", "mini_batches", "max_tokens_per_micro_batch"):
            _at_least(f"trainer.{key}", getattr(self, key), 1)
        whole = ("warmup_steps", "eval_every", "checkpoint_every", "keep_checkpoints", "keep_optimizer", "ratios_every")
        for key in whole:
            _at_least(f"trainer.{key}", getattr(self, key), 0)
        _at_least("trainer.group_size", self.group_size, 2, "an advantage is relative to the group")
        _at_least("trainer.threads", self.threads, 1)
        if self.stop_after is not None:
            _above("trainer.stop_after", self.stop_after, 0)
        if self.threads is not None and self.threads > MAX_THREADS:
            raise UserError(f"trainer.threads={self.threads} must be at most {MAX_THREADS}")
        for key in ("lr", "max_grad_norm", "advantage_epsilon"):
            _above(f"trainer.{key}", getattr(self, key), 0)
        for key in ("weight_decay", "kl_coefficient", "entropy_bonus", "dynamic_sampling"):
            _at_least(f"trainer.{key}", getattr(self, key), 0)
        _one_of("trainer.offload_optimizer", self.offload_optimizer, OFFLOADS)
        _one_of("trainer.old_log_probs", self.old_log_probs, OLD_LOG_PROBS)
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
        if self.trainer.supervised.steps:
            _check_supervised(self)


def _check_supervised(config: TrainConfig) -> None:
    given = f"trainer.supervised.steps={config.trainer.supervised.steps}"
    if config.data.path is not None:
        raise UserError(
            f"{given} needs worked examples, and data.path={config.data.path} has none; "
            f"take data=arithmetic or data=long_arithmetic, or set trainer.supervised.steps=0"
        )
    if config.trainer.kl_coefficient:
        raise UserError(
            f"{given} and trainer.kl_coefficient={config.trainer.kl_coefficient} exclude each other: the reference "
            f"would be the policy before the supervised phase; start from its checkpoint with model.path=CHECKPOINT"
        )


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
        return value if type(value) in arguments else convert(arguments[0], value, key)
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


def check_engine(key: str, engine: dict[str, Any] | None, name: str) -> None:
    """Further arguments of vllm.LLM: none without vLLM, and none that kpo sets by itself."""
    if engine and name == "hf":
        raise UserError(f"{key}={engine} is for vLLM, and transformers takes none of it; leave it out")
    for argument in ENGINE_OWN:
        if argument in (engine or {}):
            raise UserError(f"{key}.{argument} is set by kpo; leave it out")


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
