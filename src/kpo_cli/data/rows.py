"""Rows of a data source, each with the place it stands at: local files, or data sets on the hub."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kpo_cli.errors import UserError
from kpo_cli.runs.directory import first_line

Row = tuple[str, dict[str, Any]]
"""Where a row stands, for error messages ("FILE:12"), and its content."""


def local_rows(path: Path, given: str) -> Iterator[Row]:
    """Rows of a .jsonl, .json or .parquet file, called `given` in errors (data.path=FILE).

    Raises UserError that names the file, the line and the fix."""
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        what = (
            "is a directory" if os.path.isdir(path) else "is not a file" if os.path.exists(path) else "does not exist"
        )
        raise UserError(f"{given} {what}; give a .jsonl, .json or .parquet file, or a hub name")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{given}: {path.suffix or 'no'} suffix; give a .jsonl, .json or .parquet file")
    try:
        yield from readers[suffix](path)
    except OSError as error:
        raise UserError(f"{given} cannot be read ({error.strerror}); give a file that can be") from None


def hub_rows(name: str, subset: str | None, split: str, given: str) -> Iterator[Row]:
    """Rows of a data set on the hub (or in its local cache)."""
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # an unreachable hub is one line of ours, not one for each retry
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub, the network, the cache and the set's own files each raise their own
        raise UserError(
            f"{given} cannot be loaded from the hub: {first_line(error)} (check its name, subset, split and the "
            f"network, or give a local file)"
        ) from None
    for number, row in enumerate(data, 1):
        yield f"{name} (row {number})", row


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(_text(line))
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8 text; convert the file to UTF-8") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); mend the line") from None
            except ValueError as error:  # an integer of thousands of digits
                raise UserError(f"{where}: {first_line(error).split(';')[0]}; mend the line") from None
            except RecursionError:
                raise UserError(f"{where}: nested too deeply; each line must be one flat JSON object") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: {shown(row)} is not an object; each line must be one JSON object")
            yield where, row


def _text(content: bytes) -> str:
    """UTF-8, with or without a mark at its head. Of bytes, json.loads would guess the encoding."""
    return content.decode("utf-8-sig")


def _json_rows(path: Path) -> Iterator[Row]:
    """A JSON file that holds one list of objects."""
    try:
        rows = json.loads(_text(path.read_bytes()))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)}); mend it, or use .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: must hold one list of objects; for one object a line use .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path} (row {number})", row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for values in zip(*map(_plain_values, batch.columns), strict=True):
                number += 1
                yield f"{path} (row {number})", dict(zip(batch.schema.names, values, strict=True))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable parquet file: {first_line(error)}") from None


def _plain_values(column: Any) -> list[Any]:
    """The values of a column in Python's types. What has none (nanoseconds, the year 10,000) is read as text."""
    import pyarrow as pa

    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        column = column.cast(pa.string()).cast(pa.float64())  # 0.1, not 0.10000000149
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        try:
            values = column.cast(pa.string()).to_pylist()
        except pa.ArrowException:  # nested, or not UTF-8
            values = [None] * len(column)
    return values


def shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
