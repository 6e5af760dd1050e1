"""Problems by configuration: the built-in task, or a JSONL or parquet file."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kpo_cli.config import DataConfig, FieldNames
from kpo_cli.data.arithmetic import arithmetic_problems
from kpo_cli.data.problems import Problem
from kpo_cli.errors import UserError
from kpo_cli.runs import first_line, sha256_of

Row = tuple[str, dict[str, Any]]
"""Where a row stands, for error messages ("FILE:12"), and its content."""


@dataclass(frozen=True)
class ProblemSets:
    """Disjoint problems to train on and to evaluate on."""

    train: list[Problem]
    heldout: list[Problem]
    duplicates: int
    """Rows left out because their problem stands in the file already."""
    sha256: str
    """Of the file, or of the generated problems."""


def load_problems(config: DataConfig) -> ProblemSets:
    """Training and held-out problems. Raises UserError that names the file, the line and the fix."""
    if config.path is None:
        return _builtin(config)
    path = Path(os.path.expanduser(config.path))  # Path.expanduser raises for a user who does not exist
    try:
        problems, duplicates = _read(path, config.fields)
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read ({error.strerror}); give a file that can be") from None
    # At most a fifth: a small file should still be one to train on.
    heldout = min(config.heldout, len(problems) // 5)
    if heldout < 1:
        raise UserError(f"{path} has {len(problems)} problems; at least 5 are needed, one of them to evaluate on")
    order = np.random.default_rng([config.seed, 0]).permutation(len(problems))
    train = [problems[i] for i in sorted(order[heldout:])]
    return ProblemSets(
        train[: config.limit], [problems[i] for i in sorted(order[:heldout])], duplicates, sha256_of(path)
    )


def _builtin(config: DataConfig) -> ProblemSets:
    operators, count = config.operators or 10, config.limit or 8192
    try:
        train = arithmetic_problems("train", count, seed=config.seed, operators=operators)
        heldout = arithmetic_problems("heldout", config.heldout, seed=config.seed, operators=operators)
    except ValueError as error:
        raise UserError(f"{error}; lower data.limit and data.heldout or raise data.operators") from None
    digest = hashlib.sha256("\n".join(p.problem for p in train + heldout).encode())
    return ProblemSets(train, heldout, 0, digest.hexdigest())


def _read(path: Path, fields: FieldNames) -> tuple[list[Problem], int]:
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise UserError(f"data.path={path} {what}; give a .jsonl or .parquet file")
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"data.path={path}: {path.suffix or 'no'} suffix; give a .jsonl or .parquet file")
    problems: dict[str, Problem] = {}
    ids: set[str] = set()
    rows = 0
    for where, row in readers[suffix](path):
        rows += 1
        problem = _problem(where, row, fields, made_up_id=f"{path.stem}-{rows - 1}")
        if problem.problem in problems:
            continue
        if problem.id in ids:
            raise UserError(f"{where}: the id {problem.id!r} is used twice; make ids unique or leave the field out")
        ids.add(problem.id)
        problems[problem.problem] = problem
    if not problems:
        raise UserError(f"data.path={path} holds no problems; give a file with at least 5")
    return list(problems.values()), rows - len(problems)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8 text; convert the file to UTF-8") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); mend the line") from None
            except ValueError as error:  # an integer of thousands of digits
                raise UserError(f"{where}: {first_line(error).split(';')[0]}; mend the line") from None
            except RecursionError:
                raise UserError(f"{where}: nested too deeply; each line must be one flat JSON object") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: {_shown(row)} is not an object; each line must be one JSON object")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path} (row {number})", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.path={path} is not a readable parquet file: {first_line(error)}") from None


def _problem(where: str, row: dict[str, Any], fields: FieldNames, made_up_id: str) -> Problem:
    text = _field(where, row, "problem", fields.problem)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {fields.problem} must be a text that is not empty, found {_shown(text)}")
    answer = _field(where, row, "answer", fields.answer)
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: {fields.answer} must be a text or a number, found {_shown(answer)}")
    own_id = _lookup(row, fields.id)
    problem = Problem(made_up_id if own_id in (None, _MISSING) else str(own_id), text, answer)
    try:
        f"{problem.id}{text}{answer}".encode()
    except UnicodeEncodeError:  # JSON can write half a surrogate pair; no tokenizer takes it
        raise UserError(f"{where}: holds half a character (a lone \\ud800 to \\udfff); mend the line") from None
    return problem


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


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
