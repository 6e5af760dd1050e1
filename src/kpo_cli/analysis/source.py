"""What `kpo analyze` reads: a run, its ratios/ directory, or an export of another trainer; one file at a time.

A file that cannot be used is remembered with what is wrong with it, and the next one is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kpo_cli.analysis.exports import read_jsonl, read_parquet
from kpo_cli.errors import UserError
from kpo_cli.runs.directory import RunDir
from kpo_cli.runs.ratios import BadRecord, Ratios, read_ratios


@dataclass
class Source:
    """Something to analyse: a run, or files; and what was found wrong with its files while reading."""

    name: str
    files: list[Path]
    output: Path
    """Where the results go by default."""
    run: Path | None = None
    problems: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    """That of the newest record read: method, filter, clip widths."""
    roundings: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By step: what rounding did to log-ratios, of the records of a run in 16 bits."""

    def batches(self) -> Iterator[tuple[Path, Ratios]]:
        """Batches of all files that can be read, in order; what is wrong with the others goes to `problems`."""
        for path in self.files:
            try:
                for batch, metadata in read_file(path):
                    self.metadata = metadata
                    if metadata.get("rounding") is not None:
                        self.roundings[metadata["step"]] = metadata["rounding"]
                    yield path, batch
            except BadRecord as error:
                self.problem(path, str(error))

    def problem(self, path: Path, what: str) -> None:
        line = f"{path}: {what}; left out"
        if line not in self.problems:
            self.problems.append(line)


def find_source(path: Path) -> Source:
    """A run directory, its ratios/ directory, or one file. Raises UserError."""
    try:
        return _find_source(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def _find_source(path: Path) -> Source:
    absolute = path.absolute()
    if path.is_dir():
        run = absolute.parent if absolute.name == "ratios" else absolute
        folder = run / "ratios"
        if not (folder.is_dir() or (run / "config.yaml").is_file()):
            raise UserError(f"{path}: not a run directory (it has neither config.yaml nor ratios/)")
        RunDir(run).check_format()
        found = sorted(entry for entry in folder.glob("*") if entry.is_file() and not entry.name.startswith("."))
        shown = path.parent if absolute.name == "ratios" else path
        return Source(run.name, [shown / "ratios" / file.name for file in found], shown / "analysis", run=shown)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run directory, or a .safetensors, .parquet or .jsonl file")
    if path.suffix not in READERS:
        raise UserError(f"{path}: unknown kind of file; it must be one of: {', '.join(READERS)}")
    return Source(path.stem, [path], path.with_name(f"{path.stem}-analysis"))


def read_file(path: Path) -> Iterator[tuple[Ratios, dict[str, Any]]]:
    """Batches of one file, each with the file's metadata. Raises BadRecord."""
    if path.suffix not in READERS:
        raise BadRecord("not a ratio record (.safetensors, .parquet or .jsonl)")
    try:
        yield from READERS[path.suffix](path)
    except OSError as error:
        raise BadRecord(f"cannot be read ({error.strerror or error})") from None


READERS = {".safetensors": read_ratios, ".parquet": read_parquet, ".jsonl": read_jsonl}
