"""The configuration of `kpo eval`, converted once from Hydra's."""

from dataclasses import dataclass
from typing import Any

from kpo_cli.config import ENGINES, RowsConfig, check_engine
from kpo_cli.errors import UserError

MAX_TOKENS = 4096
"""Of a response, where eval.max_tokens is null and the context leaves more."""


@dataclass(frozen=True)
class SamplingConfig:
    name: str
    n: int
    temperature: float
    top_p: float
    max_tokens: int | None
    max_prompt_tokens: int | None
    limit: int | None
    batch_size: int
    rollout: str
    engine: dict[str, Any] | None

    @property
    def longest(self) -> int:
        """The most tokens of a response, once it is known what the context leaves (`evaluation.main`)."""
        assert self.max_tokens is not None
        return self.max_tokens

    def __post_init__(self) -> None:
        for key in ("n", "max_tokens", "max_prompt_tokens", "batch_size"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"eval.{key}={value} must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"eval.limit={self.limit} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"eval.temperature={self.temperature} must be a finite number, at least 0")
        if self.rollout not in ENGINES:
            raise UserError(f"eval.rollout={self.rollout} must be one of: {', '.join(ENGINES)}")
        check_engine("eval.engine", self.engine, self.rollout)
        if not 0 < self.top_p <= 1:
            raise UserError(f"eval.top_p={self.top_p} must be above 0 and at most 1")
        if self.temperature == 0 and self.n > 1:
            raise UserError(f"eval.temperature=0 gives the same response {self.n} times; set eval.n=1")


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: str | None
    vs: str | None
    benchmarks: list[str]
    data_dir: str | None
    data: RowsConfig
    regrade: str | None
    chat_template: str
    chat_template_kwargs: dict[str, Any] | str
    system_prompt: str | None
    instruction: str | None
    dtype: str
    device: str
    published: bool
    seed: int
    eval: SamplingConfig
    known: dict[str, Any]

    def __post_init__(self) -> None:
        self.data.check("data")
        if not self.benchmarks:
            raise UserError("benchmarks=[] names nothing to evaluate on; give benchmarks=[aime24,math500], say")
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise UserError(f"benchmarks={self.benchmarks} names one of them twice")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be at least 0")
        if self.checkpoint is None and self.regrade is None:
            raise UserError("give checkpoint=RUN, a checkpoint, a model directory, a hub name, or builtin")
