"""Ratios exported by other trainers: parquet or JSONL, one row a response (docs/analysis.md).

log_probs, old_log_probs    lists of numbers, one a token, of one length; z is their difference
response_mask (or mask)     list of 0 and 1; without it every token counts
rollout_log_probs, entropy, response_ids, filtered_log_ratio      lists, optional
advantage, reward, step, prompt_index, mini_batch_index, response numbers and a text, optional
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kpo_cli.runs.directory import first_line
from kpo_cli.runs.ratios import BadRecord, Ratios, checked_batch

CHUNK = 256
"""Responses read at once."""
LISTS = ("log_probs", "old_log_probs", "rollout_log_probs", "entropy", "filtered_log_ratio", "response_ids", "mask")
SCALARS = {
    "advantage": "advantages",
    "reward": "rewards",
    "prompt_index": "prompt_index",
    "mini_batch_index": "mini_batch_index",
}
"""Names of columns, and of what they are in a record."""
INTEGERS = ("step", "prompt_index", "mini_batch_index")
SYNONYMS = {"response_mask": "mask", "advantages": "advantage", "rewards": "reward"}


def read_parquet(path: Path) -> Iterator[tuple[Ratios, dict[str, Any]]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        wanted = [*LISTS, *SCALARS, *SYNONYMS, "step", "response"]
        columns = [name for name in file.schema_arrow.names if name in wanted]
        start = 0
        for chunk in file.iter_batches(CHUNK, columns=columns):
            yield _batch(chunk.to_pylist(), [f"row {start + i}" for i in range(len(chunk))]), {}
            start += len(chunk)
    except arrow.ArrowException as error:
        raise BadRecord(f"truncated or not a parquet file ({first_line(error)})") from None


def read_jsonl(path: Path) -> Iterator[tuple[Ratios, dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_parsed(line, number))
                    places.append(f"line {number}")
                if len(rows) == CHUNK:
                    yield _batch(rows, places), {}
                    rows, places = [], []
    except UnicodeDecodeError:
        raise BadRecord("not a text in UTF-8") from None
    if rows:
        yield _batch(rows, places), {}


def _parsed(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRecord(f"line {number} is not JSON") from None
    if not isinstance(row, dict):
        raise BadRecord(f"line {number} is not an object")
    return row


def _batch(rows: list[dict[str, Any]], places: list[str]) -> Ratios:
    """Rows as a batch. What one row of a chunk has, all must have."""
    rows = [{SYNONYMS.get(name, name): value for name, value in row.items() if value is not None} for row in rows]
    lengths = [_length(row, place) for row, place in zip(rows, places, strict=True)]
    arrays: dict[str, Any] = {}
    for name in LISTS:
        if _everywhere(name, rows, places):
            kind = np.int64 if name == "response_ids" else np.float64
            arrays[name] = np.zeros((len(rows), max(lengths)), kind)
            for i, (row, place) in enumerate(zip(rows, places, strict=True)):
                arrays[name][i, : lengths[i]] = _numbers(name, row[name], lengths[i], kind, place)
    for name in (*SCALARS, "step"):
        if _everywhere(name, rows, places):
            kind = np.int64 if name in INTEGERS else np.float64
            values = [_numbers(name, [row[name]], 1, kind, place)[0] for row, place in zip(rows, places, strict=True)]
            arrays[SCALARS.get(name, name)] = np.array(values, kind)
    if _everywhere("response", rows, places):
        arrays["texts"] = np.array([str(row["response"]) for row in rows], object)
    mask = arrays.pop("mask", None)
    inside = np.arange(max(lengths)) < np.array(lengths)[:, None]
    arrays["response_mask"] = inside if mask is None else mask
    arrays["log_ratio"] = arrays.pop("log_probs") - arrays["old_log_probs"]
    return checked_batch(arrays, arrays.pop("step", 0))


def _length(row: dict[str, Any], place: str) -> int:
    for name in ("log_probs", "old_log_probs"):
        if not isinstance(row.get(name), list) or not row[name]:
            found = "is not a list of numbers" if name in row else "is missing"
            raise BadRecord(f"{place}: {name} {found}; each row needs log_probs and old_log_probs")
    return len(row["log_probs"])


def _everywhere(name: str, rows: list[dict[str, Any]], places: list[str]) -> bool:
    having = [name in row for row in rows]
    if any(having) and not all(having):
        raise BadRecord(f"{places[having.index(False)]} has no {name}, other rows have")
    return all(having)


def _numbers(name: str, values: Any, length: int, kind: Any, place: str) -> Any:
    if not isinstance(values, list) or len(values) != length:
        found = len(values) if isinstance(values, list) else "not a list"
        raise BadRecord(f"{place}: {name} has {found} values, log_probs has {length}")
    try:
        numbers = np.asarray(values)
        if numbers.dtype.kind not in "biuf" or numbers.ndim != 1:
            raise ValueError
        exact = numbers.astype(kind)
    except (ValueError, OverflowError):
        raise BadRecord(f"{place}: {name} must hold numbers") from None
    if kind is np.int64 and not (exact == numbers).all():
        raise BadRecord(f"{place}: {name} must hold whole numbers")
    return exact
