"""Problems by configuration: the built-in task, a local file, or a data set on the hub."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kpo_cli.config import DataConfig
from kpo_cli.data.answers import answer_notes, differing
from kpo_cli.data.arithmetic import DEFAULT_OPERATORS, arithmetic_problems
from kpo_cli.data.fields import Source, problem_of
from kpo_cli.data.overlap import benchmark_overlap
from kpo_cli.data.problems import Problem
from kpo_cli.data.rows import Row, hub_rows, local_rows
from kpo_cli.errors import UserError


@dataclass(frozen=True)
class ProblemSets:
    """Disjoint problems to train on and to evaluate on."""

    train: list[Problem]
    heldout: list[Problem]
    rows: int
    """Of the source: each is a problem of these, a duplicate, or behind data.limit."""
    duplicates: int
    """Rows left out because their problem stands in the source already."""
    limited: int
    """Problems left out by data.limit."""
    overlap: dict[str, int]
    """Benchmarks that hold training problems, and how many."""
    sha256: str
    """Of all problems and answers, in order."""
    notes: list[str]
    """What the user should know of the rows."""


@dataclass(frozen=True)
class Reading:
    """What a source holds."""

    problems: list[Problem]
    rows: int
    notes: list[str]


def load_problems(config: DataConfig) -> ProblemSets:
    """Training and held-out problems. Raises UserError that names the file, the line and the fix."""
    if config.path is None:
        return _builtin(config)
    source = Source(config.path, config.rows, subset=config.subset, split=config.split, duplicates=config.duplicates)
    reading = read_problems(source)
    problems = reading.problems
    # At most a fifth: a small file should still be one to train on.
    heldout = min(config.heldout, len(problems) // 5)
    if heldout < 1:
        raise UserError(
            f"data.path={config.path} has {len(problems)} problems; at least 5 are needed, one of them to evaluate on"
        )
    order = np.random.default_rng([config.seed, 0]).permutation(len(problems))
    train = [problems[i] for i in sorted(order[heldout:])][: config.limit]
    return ProblemSets(
        train,
        heldout=[problems[i] for i in sorted(order[:heldout])],
        rows=reading.rows,
        duplicates=reading.rows - len(problems),
        limited=len(problems) - heldout - len(train),
        overlap=benchmark_overlap(problem.problem for problem in train),
        sha256=_hash(problems),
        notes=reading.notes,
    )


def _builtin(config: DataConfig) -> ProblemSets:
    operators, count = config.operators or DEFAULT_OPERATORS, config.limit or 8192
    try:
        draw = partial(arithmetic_problems, seed=config.seed, operators=operators, max_operators=config.max_operators)
        train, heldout = draw("train", count), draw("heldout", config.heldout)
    except ValueError as error:
        raise UserError(f"{error}; lower data.limit and data.heldout or raise data.operators") from None
    return ProblemSets(train, heldout, len(train + heldout), 0, 0, {}, _hash(train + heldout), [])


def read_problems(source: Source) -> Reading:
    """All distinct problems of a file or a hub data set. Raises UserError that names the row and the fix."""
    problems: dict[str, Problem] = {}
    repeated: list[tuple[Problem, Problem]] = []
    ids: set[str] = set()
    rows = reduced = 0
    stem = Path(source.path).stem
    for where, row in _rows(source):
        problem, was_reduced = problem_of(where, row, source, made_up_id=f"{stem}-{rows}")
        rows += 1
        reduced += was_reduced
        text = f"{problem.context}{problem.problem}"
        # Equal characters, however they are composed, are the same text for a reader and for most tokenizers.
        key = unicodedata.normalize("NFC", text) if source.duplicates == "exact" else _similar(text)
        if key in problems:
            if problem.answer != problems[key].answer:
                repeated.append((problems[key], problem))
            continue
        if problem.id in ids:
            raise UserError(f"{where}: the id {problem.id!r} is used twice; make ids unique or leave the field out")
        ids.add(problem.id)
        problems[key] = problem
    if not problems:
        raise UserError(f"{source.called}={source.path} holds no problems")
    distinct = list(problems.values())
    return Reading(distinct, rows, [*answer_notes(distinct, reduced), *_repetitions(distinct, repeated, source)])


def _repetitions(problems: list[Problem], repeated: list[tuple[Problem, Problem]], source: Source) -> list[str]:
    """What is to be said of problems that stand in a source more than once."""
    notes = []
    conflicts = differing(repeated)
    if conflicts:
        first, second = conflicts[0]
        count = len({first.id for first, _ in conflicts})
        notes.append(
            f"warning: {count} problem{'s have' if count > 1 else ' has'} other answers elsewhere in the source; the "
            f"first counts ({first.id}: {first.answer!r}, then {second.answer!r})"
        )
    alike = len(problems) - len({_similar(f"{problem.context}{problem.problem}") for problem in problems})
    if alike:
        asked = "; data.duplicates=similar takes them for one" if source.called == "data.path" else ""
        notes.append(f"note: {alike} problems differ from another in case or spacing only{asked}")
    return notes


def _similar(text: str) -> str:
    return " ".join(text.split()).casefold()


def _rows(source: Source) -> Iterator[Row]:
    path = source.path
    local = Path(os.path.expanduser(path))  # Path.expanduser raises for a user who does not exist
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not local.suffix and not os.path.exists(local)
    given = f"{source.called}={path}"
    return hub_rows(path, source.subset, source.split, given) if is_hub_name else local_rows(local, given)


def _hash(problems: list[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        context = "".join(f"{role}\0{text}\0" for role, text in problem.context)
        digest.update(f"{context}{problem.problem}\0{problem.answer}\0".encode())
    return digest.hexdigest()
