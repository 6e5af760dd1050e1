"""The problems of a benchmark: from the hub, from a directory of local copies, or from any file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kpo_cli.config import ANSWER_STYLES, FieldNames, RowsConfig, convert
from kpo_cli.data.arithmetic import arithmetic_problems
from kpo_cli.data.fields import Source
from kpo_cli.data.load import Reading, read_problems
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
    notes: list[str] = field(default_factory=list)
    """What the user should know of its rows."""


@dataclass(frozen=True)
class Files:
    """How benchmarks that are files are read."""

    rows: RowsConfig
    data_dir: str | None
    key: str = ""
    """What stands before the names of the keys: "" or "trainer.eval."."""

    def source(self, path: str | Path, called: str) -> Source:
        return Source(str(path), self.rows, f"{self.key}{called}", f"{self.key}data")


def load_benchmark(name: str, known: dict[str, Any], files: Files, limit: int | None = None) -> Benchmark:
    """A benchmark by its name in `known` (conf/benchmark), by a file's path, or in `BUILTIN`.

    Raises UserError for a name or file that does not exist, wrong fields, duplicates, or a wrong number of rows."""
    if name in BUILTIN:
        problems = arithmetic_problems("heldout", ARITHMETIC, seed=0, **BUILTIN[name])
        return Benchmark(name, problems[:limit], ARITHMETIC, has_instruction=False)
    if name in known:
        reading = _known(name, known, files)
    elif Path(name).suffix.lower() in SUFFIXES:
        reading = _distinct(read_problems(files.source(name, "benchmarks")), name)
    else:
        names = ", ".join([*BUILTIN, *known])
        raise UserError(
            f"{files.key}benchmarks: {name} does not exist; there are {names}, or give a .jsonl, .json or .parquet file"
        )
    label, problems = Path(name).stem, reading.problems
    notes = [note.replace(": ", f": {label}: ", 1) for note in reading.notes]
    return Benchmark(label, problems[:limit], len(problems), has_instruction=True, notes=notes)


def load_benchmarks(names: list[str], known: dict[str, Any], files: Files, limit: int | None = None) -> list[Benchmark]:
    """Several benchmarks; two files of one name would be counted as one, so they are refused."""
    loaded = [load_benchmark(name, known, files, limit) for name in names]
    labels = [benchmark.name for benchmark in loaded]
    for name in labels:
        if labels.count(name) > 1:
            raise UserError(f"two benchmarks are called {name}; rename one of the files")
    return loaded


def _known(name: str, known: dict[str, Any], files: Files) -> Reading:
    stored = convert(BenchmarkSource, known[name], f"known.{name}")
    if files.data_dir is None:
        rows = RowsConfig(FieldNames("id", stored.problem, stored.answer), None, stored.answer_style)
        source = Source(stored.path, rows, f"known.{name}.path", f"known.{name}", stored.subset, stored.split)
    else:
        candidates = [Path(files.data_dir) / f"{name}{suffix}" for suffix in SUFFIXES]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise UserError(f"{files.key}data_dir={files.data_dir} has no {candidates[0].name} (nor .json, .parquet)")
        source = files.source(path, "data_dir")
    reading = _distinct(read_problems(source), name)
    if len(reading.problems) not in stored.rows:
        expected = " or ".join(map(str, stored.rows))
        raise UserError(
            f"{name} has {len(reading.problems)} problems but should have {expected}; the copy is not the benchmark"
        )
    return reading


def _distinct(reading: Reading, name: str) -> Reading:
    if repeated := reading.rows - len(reading.problems):
        raise UserError(f"benchmark {name} repeats {repeated} problems; each must stand in it once")
    return reading
