"""The problems of a benchmark: from the hub, from a directory of local copies, or from any file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpo_cli.config import ANSWER_STYLES, DataConfig, FieldNames, convert
from kpo_cli.data.arithmetic import arithmetic_problems
from kpo_cli.data.load import read_problems
from kpo_cli.data.problems import Problem
from kpo_cli.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
ARITHMETIC = 200
BUILTIN: dict[str, dict[str, int]] = {"arithmetic": {}, "long_arithmetic": {"operators": 60, "max_operators": 200}}
"""The built-in task's benchmarks, with the lengths of their chains (conf/data)."""


@dataclass(frozen=True)
class BenchmarkSource:
    """Where a benchmark lies on the hub."""

    path: str
    subset: str | None
    split: str
    problem: str
    answer: str
    answer_style: str
    rows: list[int]

    def __post_init__(self) -> None:
        if self.answer_style not in ANSWER_STYLES:
            raise UserError(f"known: answer_style={self.answer_style} must be one of: {', '.join(ANSWER_STYLES)}")


@dataclass(frozen=True)
class Benchmark:
    name: str
    problems: list[Problem]
    total: int
    """Problems before eval.limit."""
    has_instruction: bool
    """False for the built-in task, which needs no request for a box."""


def load_benchmark(name: str, known: dict[str, Any], data_dir: str | None, limit: int | None = None) -> Benchmark:
    """A benchmark by its name in `known` (conf/benchmark), by a file's path, or in `BUILTIN`.

    Raises UserError for a name or file that does not exist, wrong fields, duplicates, or a wrong number of rows."""
    if name in BUILTIN:
        problems = arithmetic_problems("heldout", ARITHMETIC, seed=0, **BUILTIN[name])
        return Benchmark(name, problems[:limit], ARITHMETIC, has_instruction=False)
    if name in known:
        problems = _known(name, known, data_dir)
    elif Path(name).suffix.lower() in SUFFIXES:
        problems = _distinct(read_problems(data_config(name)), name)
    else:
        names = ", ".join([*BUILTIN, *known])
        raise UserError(
            f"benchmarks: {name} does not exist; there are {names}, or give a .jsonl, .json or .parquet file"
        )
    return Benchmark(Path(name).stem, problems[:limit], len(problems), has_instruction=True)


def load_benchmarks(
    names: list[str], known: dict[str, Any], data_dir: str | None, limit: int | None = None
) -> list[Benchmark]:
    """Several benchmarks; two files of one name would be counted as one, so they are refused."""
    loaded = [load_benchmark(name, known, data_dir, limit) for name in names]
    labels = [benchmark.name for benchmark in loaded]
    for name in labels:
        if labels.count(name) > 1:
            raise UserError(f"two benchmarks are called {name}; rename one of the files")
    return loaded


def _known(name: str, known: dict[str, Any], data_dir: str | None) -> list[Problem]:
    source = convert(BenchmarkSource, known[name], f"known.{name}")
    if data_dir is None:
        fields = FieldNames("id", source.problem, source.answer)
        read = read_problems(data_config(source.path, source.subset, source.split, fields, source.answer_style))
    else:
        candidates = [Path(data_dir) / f"{name}{suffix}" for suffix in SUFFIXES]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise UserError(f"data_dir={data_dir} has no {candidates[0].name} (nor .json, .parquet)")
        read = read_problems(data_config(str(path)))
    problems = _distinct(read, name)
    if len(problems) not in source.rows:
        expected = " or ".join(map(str, source.rows))
        raise UserError(
            f"{name} has {len(problems)} problems but should have {expected}; the copy is not the benchmark"
        )
    return problems


def _distinct(read: tuple[list[Problem], int], name: str) -> list[Problem]:
    problems, repeated = read
    if repeated:
        raise UserError(f"benchmark {name} repeats {repeated} problems; each must stand in it once")
    return problems


def data_config(
    path: str,
    subset: str | None = None,
    split: str = "train",
    fields: FieldNames | None = None,
    answer_style: str = "plain",
) -> DataConfig:
    return DataConfig(
        name="file",
        path=path,
        subset=subset,
        split=split,
        operators=None,
        max_operators=None,
        limit=None,
        heldout=1,
        seed=0,
        fields=fields or FieldNames("id", "problem", "answer"),
        problem_pattern=None,
        answer_style=answer_style,
        system_prompt=None,
        instruction=None,
    )
