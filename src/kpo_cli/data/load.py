"""Problems by configuration: the built-in task, a local file, or a data set on the hub."""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kpo_cli.config import DataConfig
from kpo_cli.data.arithmetic import DEFAULT_OPERATORS, arithmetic_problems
from kpo_cli.data.overlap import benchmark_overlap
from kpo_cli.data.problems import Problem
from kpo_cli.data.rows import Row, hub_rows, local_rows, shown
from kpo_cli.errors import UserError
from kpo_cli.rewards.extraction import extract


@dataclass(frozen=True)
class ProblemSets:
    """Disjoint problems to train on and to evaluate on."""

    train: list[Problem]
    heldout: list[Problem]
    duplicates: int
    """Rows left out because their problem stands in the source already."""
    overlap: dict[str, int]
    """Benchmarks that hold training problems, and how many."""
    sha256: str
    """Of all problems and answers, in order."""


def load_problems(config: DataConfig) -> ProblemSets:
    """Training and held-out problems. Raises UserError that names the file, the line and the fix."""
    if config.path is None:
        return _builtin(config)
    problems, duplicates = read_problems(config)
    # At most a fifth: a small file should still be one to train on.
    heldout = min(config.heldout, len(problems) // 5)
    if heldout < 1:
        raise UserError(
            f"data.path={config.path} has {len(problems)} problems; at least 5 are needed, one of them to evaluate on"
        )
    order = np.random.default_rng([config.seed, 0]).permutation(len(problems))
    train = [problems[i] for i in sorted(order[heldout:])][: config.limit]
    overlap = benchmark_overlap(problem.problem for problem in train)
    return ProblemSets(train, [problems[i] for i in sorted(order[:heldout])], duplicates, overlap, _hash(problems))


def _builtin(config: DataConfig) -> ProblemSets:
    operators, count = config.operators or DEFAULT_OPERATORS, config.limit or 8192
    try:
        draw = partial(arithmetic_problems, seed=config.seed, operators=operators, max_operators=config.max_operators)
        train, heldout = draw("train", count), draw("heldout", config.heldout)
    except ValueError as error:
        raise UserError(f"{error}; lower data.limit and data.heldout or raise data.operators") from None
    return ProblemSets(train, heldout, 0, {}, _hash(train + heldout))


def read_problems(config: DataConfig) -> tuple[list[Problem], int]:
    """All distinct problems of a file or a hub data set, and how many rows repeat one. Raises UserError."""
    return _distinct(_rows(config), config)


def _rows(config: DataConfig) -> Iterator[Row]:
    assert config.path is not None
    local = Path(os.path.expanduser(config.path))  # Path.expanduser raises for a user who does not exist
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", config.path) and not local.suffix and not os.path.exists(local)
    return hub_rows(config.path, config.subset, config.split) if is_hub_name else local_rows(local)


def _distinct(rows: Iterator[Row], config: DataConfig) -> tuple[list[Problem], int]:
    """The first of each problem, and how many rows repeat one."""
    problems: dict[str, Problem] = {}
    ids: set[str] = set()
    count = 0
    stem = Path(config.path or "").stem
    for where, row in rows:
        count += 1
        problem = _problem(where, row, config, made_up_id=f"{stem}-{count - 1}")
        # Spacing and case do not make another problem: it could stand in training and in the held-out part.
        key = " ".join(problem.problem.split()).casefold()
        if key in problems:
            continue
        if problem.id in ids:
            raise UserError(f"{where}: the id {problem.id!r} is used twice; make ids unique or leave the field out")
        ids.add(problem.id)
        problems[key] = problem
    if not problems:
        raise UserError(f"data.path={config.path} holds no problems; give a file with at least 5")
    return list(problems.values()), count - len(problems)


def _problem(where: str, row: dict[str, Any], config: DataConfig, made_up_id: str) -> Problem:
    fields = config.fields
    text = _field(where, row, "problem", fields.problem)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {fields.problem} must be a text that is not empty, found {shown(text)}")
    if config.problem_pattern is not None:
        text = _matched(where, text, config.problem_pattern)
    answer = _field(where, row, "answer", fields.answer)
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: {fields.answer} must be a text or a number, found {shown(answer)}")
    if config.answer_style != "plain":
        answer = _final_answer(where, answer, config.answer_style)
    own_id = _lookup(row, fields.id)
    problem = Problem(made_up_id if own_id in (None, _MISSING) else str(own_id), text, answer)
    try:
        f"{problem.id}{text}{answer}".encode()
    except UnicodeEncodeError:  # JSON can write half a surrogate pair; no tokenizer takes it
        raise UserError(f"{where}: holds half a character (a lone \\ud800 to \\udfff); mend the line") from None
    return problem


def _matched(where: str, text: str, pattern: str) -> str:
    match = re.search(pattern, text)
    if match is None or not match["problem"].strip():
        raise UserError(f"{where}: data.problem_pattern finds no problem in {shown(text)}; mend it or set it to null")
    return match["problem"]


def _final_answer(where: str, text: str, style: str) -> str:
    """The answer at the end of a worked solution."""
    found = extract(text, "hash" if style == "hash" else "boxed")
    if found is None:
        mark = "####" if style == "hash" else "\\boxed{}"
        raise UserError(f"{where}: no {mark} in {shown(text[-40:])}; set data.answer_style or mend the line")
    return found


_MISSING = object()


def _field(where: str, row: dict[str, Any], key: str, name: str) -> Any:
    value = _lookup(row, name)
    if value is _MISSING:
        has = ", ".join(row) or "no fields"
        raise UserError(f"{where}: no field {name!r}; it has {has}; set data.fields.{key}=NAME")
    return value


def _lookup(row: dict[str, Any], name: str) -> Any:
    """The value of a field, or _MISSING; dots lead into nested fields and lists (`prompt.0.content`)."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
    return value


def _hash(problems: list[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem.problem}\0{problem.answer}\0".encode())
    return digest.hexdigest()
