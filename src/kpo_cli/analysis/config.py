"""Configuration of `kpo analyze`: conf/analyze.yaml holds the defaults and says what each key means."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kpo_cli.config import _at_least, convert
from kpo_cli.errors import UserError


@dataclass(frozen=True)
class NullConfig:
    draws: int
    tokens: int

    def __post_init__(self) -> None:
        _at_least("nulls.draws", self.draws, 0)
        if 0 < self.draws < 20:
            raise UserError(f"nulls.draws={self.draws} must be 0 (no nulls) or at least 20, for an interval")
        _at_least("nulls.tokens", self.tokens, 1)


@dataclass(frozen=True)
class AnalyzeConfig:
    """All of `kpo analyze`. `filters` holds {"name": ..., parameter: value}."""

    runs: list[str]
    run_dir: str | None
    filters: list[dict[str, Any]]
    time_constants: list[float]
    q_over_v: list[float]
    dead_zone: float
    cutoff: float
    clip_widths: list[tuple[float, float]]
    nulls: NullConfig
    likelihood_tokens: int
    lags: int
    responses: int
    report: bool
    watch: bool
    refresh: float
    seed: int

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("give what to analyse: kpo analyze RUN [RUN ...]")
        if self.watch and len(self.runs) > 1:
            raise UserError("--watch shows one run; give one")
        _at_least("dead_zone", self.dead_zone, 0)
        if not 0 < self.cutoff <= 0.5:
            raise UserError(f"cutoff={self.cutoff} must be above 0 and at most 0.5 cycles per token")
        for name in ("time_constants", "q_over_v"):
            for value in getattr(self, name):
                if not 0 < value < math.inf:
                    raise UserError(f"{name}={value} must be a finite number above 0")
        for low, high in self.clip_widths:
            if not (0 < low <= 1 and 0 < high < math.inf):
                raise UserError(
                    f"clip_widths=[[{low},{high}]] must be [eps_low, eps_high], 0 < eps_low <= 1, eps_high > 0"
                )
        for name in ("likelihood_tokens", "responses", "seed"):
            _at_least(name, getattr(self, name), 0)
        _at_least("lags", self.lags, 1)
        if not 0.1 <= self.refresh < math.inf:
            raise UserError(f"refresh={self.refresh} must be at least 0.1 seconds")

    @property
    def paths(self) -> list[Path]:
        return [Path(run) for run in self.runs]


def analyze_config(raw: dict[str, Any]) -> AnalyzeConfig:
    """Convert and validate the composed configuration. Raises UserError naming the key and the fix."""
    raw = dict(raw)
    filters = raw.get("filters")
    if not isinstance(filters, list):
        raise UserError(f"filters={filters} must be a list, such as filters=[kalman,sequence_mean]")
    config: AnalyzeConfig = convert(AnalyzeConfig, {**raw, "filters": []})
    return replace(config, filters=[_filter(entry) for entry in filters])


def _filter(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"name": entry}
    if isinstance(entry, dict) and isinstance(entry.get("name"), str):
        return dict(entry)
    raise UserError(f"filters: {entry} must be a filter's name, or a mapping such as {{name:kalman,time_constant:30}}")
