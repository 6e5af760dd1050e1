"""The run directory: who owns it, what it was made from, and its metrics. See docs/run-directory.md."""

import fcntl
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader

from kpo_cli.errors import UserError
from kpo_cli.runs.formats import RUN, unreadable

PACKAGES = ("kpo-cli", "torch", "transformers", "tokenizers", "safetensors", "numpy", "hydra-core", "mpmath")

SUPERVISED = "supervised.jsonl"
"""The metrics of the supervised phase before RL."""


class RunDir:
    """A directory that one process at a time writes to; a context manager that gives up its lock at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    @classmethod
    def create(cls, path: Path, config: dict[str, Any], manifest: dict[str, Any]) -> "RunDir":
        """Make the directory whole: it appears under its name with config and manifest inside, or not at all."""
        check_new(path)
        place = path.resolve()  # a link to an empty directory stays a link
        draft = place.parent / f".{place.name}.{os.getpid()}"
        parents = missing_parents(place)
        try:
            draft.mkdir(parents=True)
            write_text(draft / "config.yaml", _yaml(config))
            write_text(draft / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            draft.rename(place)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            remove_empty(parents)
            if not isinstance(error, OSError):
                raise
            raise UserError(f"cannot make run_dir={path} ({error.strerror}); choose another run_dir=") from None
        run = cls(path)
        run.lock()
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """An existing run, locked for writing."""
        try:
            found = (path / "config.yaml").is_file()
        except OSError as error:
            raise UserError(f"resume={path} cannot be read ({error.strerror})") from None
        if not found:
            raise UserError(f"resume={path}: not a run directory (it has no config.yaml)")
        run = cls(path)
        run.lock()
        return run

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def lock(self) -> None:
        try:
            self._lock = (self.path / ".lock").open("wb")
        except OSError as error:
            raise UserError(f"cannot write in {self.path} ({error.strerror}); mend its permissions") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path} is in use by another process; wait for it or choose another run") from None

    def discard(self) -> None:
        """Remove the directory with all that is in it."""
        shutil.rmtree(self.path)

    def check_format(self) -> None:
        """Raise UserError if a newer kpo wrote it. Without a manifest, or a format in it, an older one did."""
        written = self.manifest() if (self.path / "manifest.json").exists() else {}
        if problem := unreadable(written.get("format", RUN), RUN):
            raise UserError(f"{self.path} cannot be opened: {problem}")

    def config(self) -> dict[str, Any]:
        """The stored configuration. Raises UserError if it cannot be read, or a newer kpo wrote it."""
        self.check_format()
        try:
            plain: Any = yaml.load(read_text(self.path / "config.yaml"), get_yaml_loader())
        except Exception as error:
            raise UserError(f"{self.path}/config.yaml cannot be read: {first_line(error)}") from None
        if not isinstance(plain, dict):
            raise UserError(f"{self.path}/config.yaml is not a configuration; put back what was there")
        return plain

    def manifest(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(read_text(self.path / "manifest.json"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}/manifest.json cannot be read: {first_line(error)}") from None
        return content

    def write_config(self, config: dict[str, Any]) -> None:
        write_text(self.path / "config.yaml", _yaml(config))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_text(self.path / name, json.dumps(finite(content), indent=2) + "\n")

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_text(path, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))

    def append_metrics(self, metrics: dict[str, Any], name: str = "metrics.jsonl") -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics)) + "\n")

    def replace_last_metrics(self, metrics: dict[str, Any]) -> None:
        """Write the last row of metrics.jsonl anew."""
        rows = [*self.metrics()[:-1], finite(metrics)]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def metrics(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The metrics written so far; a last line that was cut off by a kill is left out."""
        rows = []
        for line in read_lines(self.path / name) if (self.path / name).exists() else []:
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What `write_rows` wrote."""
        return [json.loads(line) for line in read_lines(self.path / name)]

    def cut_after(self, step: int, supervised_step: int | None) -> None:
        """Forget what was written past `step` (-1: everything), as a resumed run is going to write it again.

        The same for `supervised_step` of the supervised phase; None: that is over, and stays.
        """
        self._cut_rows("metrics.jsonl", step)
        if supervised_step is not None:
            self._cut_rows(SUPERVISED, supervised_step)
        for folder, suffix in (("ratios", ".safetensors"), ("evals", ".jsonl")):
            for path in (self.path / folder).glob(f"*step-*{suffix}"):
                if int(path.stem.rpartition("step-")[2]) > step:
                    path.unlink()
        (self.path / "summary.json").unlink(missing_ok=True)

    def _cut_rows(self, name: str, step: int) -> None:
        kept = [row for row in self.metrics(name) if row["step"] <= step]
        write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))


def check_new(path: Path) -> None:
    """Raise UserError if a new run cannot be made at `path`."""
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        place = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot make run_dir={path} ({reason}); choose another run_dir=") from None
    if taken:
        raise UserError(f"run_dir={path} exists already; go on with resume={path} or choose another run_dir=")
    if place == Path.cwd():
        raise UserError("run_dir= is the directory you are in; choose another, such as run_dir=runs/a")
    parent = next(p for p in place.parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"run_dir={path}: {parent} is a file; choose another run_dir=")
    if not os.access(parent, os.W_OK):
        raise UserError(f"run_dir={path}: no permission to write in {parent}; choose another run_dir=")


def missing_parents(path: Path) -> list[Path]:
    """The directories above `path` that do not exist yet, the deepest first."""
    return [parent for parent in path.absolute().parents if not parent.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove those directories that are empty, in order; for what was made on the way to something that failed."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def run_of(path: Path) -> Path:
    """The run that `path` stands for: `path`, or the run above it if it is a run's checkpoints/ directory."""
    absolute = path.absolute()
    inside = absolute.name == "checkpoints" and (absolute.parent / "config.yaml").is_file()
    return path.parent if inside and path.name else path


def path_of(key: str, value: Any) -> Path | None:
    """The path given as `key`, ~ expanded; None for null. Raises UserError for anything but a text."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{key}={value} must be a path")
    return Path(os.path.expanduser(str(value)))


def default_run_dir(label: str) -> Path:
    """outputs/train/<label>/<time>, with a number behind it where two runs start in the same second."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    base = Path("outputs") / "train" / label
    names = [stamp, *(f"{stamp}-{i}" for i in range(2, 1000))]
    return next(base / name for name in names if not (base / name).exists())


def make_manifest(**facts: Any) -> dict[str, Any]:
    """What is needed to run it again: command, versions, source, machine, and the `facts` given."""
    return {
        "format": RUN,
        "command": shlex.join(["kpo", *sys.argv[0].split()[1:], *sys.argv[1:]]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": _git_state(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "processor": _processor()},
        **facts,
    }


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read_text(path: Path) -> str:
    """The text of a file in UTF-8 as it stands, whatever the locale; no other ends of lines become "\\n"."""
    return path.read_bytes().decode("utf-8")


def read_lines(path: Path) -> list[str]:
    """The lines of a file in UTF-8 that are not empty. They end at "\\n" alone: JSON lets U+2028 and its kind pass."""
    return [line for line in read_text(path).split("\n") if line.strip()]


def _yaml(config: dict[str, Any]) -> str:
    """As OmegaConf writes it, without reading ${ in a text as a reference."""
    text: str = yaml.dump(
        config, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=get_omega_conf_dumper()
    )
    return text


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the source that runs, and whether it was changed since; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        tracked = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, cwd=here, check=True, capture_output=True)
        run = {"cwd": here, "check": True, "capture_output": True, "encoding": "utf-8", "errors": "replace"}
        commit: Any = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changes: Any = subprocess.run(["git", "status", "--porcelain"], **run).stdout  # type: ignore[call-overload]
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(changes.strip())}


def _processor() -> str:
    with suppress(OSError):
        for line in read_lines(Path("/proc/cpuinfo")):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
