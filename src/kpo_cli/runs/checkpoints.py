"""Checkpoints: a model directory for transformers, with a trainer/ folder that makes the run go on to the same bits.

Written here, found again, and looked at before they are used.

Nothing in a checkpoint is a pickle: tensors are safetensors, the rest JSON. A checkpoint is written under a hidden
name and renamed, so that it is there whole or not at all, and its files' checksums are verified before it is used.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kpo_cli.errors import RunStopped, UserError
from kpo_cli.runs.directory import first_line, read_text, sha256_of, write_text
from kpo_cli.runs.formats import CHECKPOINT, unreadable

STATE, OPTIMIZER = "trainer/state.json", "trainer/optimizer.safetensors"


class Saveable(Protocol):
    """A policy, which lives above this room."""

    def save(self, folder: Path) -> None: ...


@dataclass
class Progress:
    """Where a run stands. Everything random is drawn from (seed, purpose, step), so this is all there is to it."""

    step: int = 0
    data_cursor: int = 0
    """Prompts taken so far, over all epochs."""
    filter_sums: list[float] | None = None
    """What an adaptive filter has seen; None for the others."""
    supervised_step: int | None = None
    """Steps of the supervised phase so far; None: there is none, or it is over."""
    max_tokens: int | None = None
    """Of a micro-batch, where they had to be lowered for want of memory."""
    distrusted: bool = False
    """The sampler's log-probabilities were seen not to be the trainer's: they do not serve as old ones."""
    ways: dict[str, bool] | None = None
    """How the training weights themselves are sampled from (rollout/ways.py); None where an engine samples."""
    way: dict[str, Any] | None = None
    """How log-probabilities are computed (policy/fidelity.py): a run that goes on stays with the last one, which may
    be another than its manifest begins with."""

    @property
    def label(self) -> str:
        """Of the checkpoint that is written here."""
        phase, step = ("step", self.step) if self.supervised_step is None else ("supervised", self.supervised_step)
        return f"{phase}-{step:06d}"


class NotSaved(RunStopped):
    """A checkpoint could not be written. Those that were there are untouched."""


def save_checkpoint(
    run: Path,
    policy: Saveable,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    schedule: dict[str, float],
    keep: int,
    keep_optimizer: int = 0,
) -> Path:
    """Write checkpoints/step-NNNNNN, or supervised-NNNNNN; then remove all but the newest `keep` (0: none).

    Of those, all but the newest `keep_optimizer` (0: none) lose the optimizer's state, without which a run cannot go
    on from them. Raises NotSaved.
    """
    folder = run / "checkpoints"
    final = folder / progress.label
    draft = folder / f".{final.name}.{os.getpid()}"
    _remove_leftovers(folder)
    try:
        (draft / "trainer").mkdir(parents=True)
        _write(draft, policy, optimizer, progress, schedule)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
    except (OSError, SafetensorError) as error:
        raise NotSaved(f"{final} could not be written ({_reason(error)}); make room or mend the place") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    found = checkpoints(run)
    found = found[: found.index(final) + 1]  # later ones are damaged: the run did not go on from them
    for old in found[:-keep] if keep else []:
        shutil.rmtree(old)
    for old in found[-keep:][:-keep_optimizer] if keep_optimizer else []:
        _forget_optimizer(old)
    return final


def _write(
    draft: Path, policy: Saveable, optimizer: torch.optim.Optimizer, progress: Progress, schedule: dict[str, float]
) -> None:
    policy.save(draft)
    tensors, state = _optimizer_state(optimizer)
    save_file(tensors, draft / OPTIMIZER)
    save_file(_random_states(), draft / "trainer" / "random.safetensors")
    state |= {"format": CHECKPOINT, **asdict(progress), "schedule": schedule}
    name, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002 - a model may draw from it
    state |= {
        "python_random": _as_lists(random.getstate()),
        "numpy_random": [name, np.asarray(keys).tolist(), *position],
    }
    write_text(draft / STATE, json.dumps(state) + "\n")
    sums = {str(f.relative_to(draft)): sha256_of(f) for f in sorted(draft.rglob("*")) if f.is_file()}
    write_text(draft / "checksums.json", json.dumps(sums, indent=2) + "\n")
    _sync(draft)


def _remove_leftovers(folder: Path) -> None:
    """Drafts of our own that failed, and of processes that are gone."""
    for draft in folder.glob(".*-*.*"):
        pid = draft.name.rpartition(".")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(draft, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no process id at all: not ours to judge
        return True
    return True


def _forget_optimizer(path: Path) -> None:
    """Take the optimizer's state out of a checkpoint, which is whole all the while."""
    with suppress(ValueError, FileNotFoundError):  # a damaged one is passed over anyway
        sums = _checksums(path)
        if sums.pop(OPTIMIZER, None) is not None:
            write_text(path / "checksums.json", json.dumps(sums, indent=2) + "\n")
        (path / OPTIMIZER).unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """What the operating system said; safetensors has it in a sentence of its own."""
    return getattr(error, "strerror", None) or first_line(error)


def progress_of(path: Path) -> Progress:
    """Where the run stood that wrote a checkpoint."""
    state = json.loads(read_text(path / STATE))
    return Progress(**{field.name: state[field.name] for field in fields(Progress) if field.name in state})


def restore(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the trainer/ folder of a checkpoint into the optimizer and the random generators."""
    state = json.loads(read_text(path / STATE))
    tensors = load_file(path / OPTIMIZER)
    per_parameter: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        per_parameter.setdefault(int(index), {})[key] = tensor
    groups = [
        {**group, "betas": tuple(group["betas"])} if "betas" in group else group for group in state["param_groups"]
    ]
    optimizer.load_state_dict({"state": per_parameter, "param_groups": groups})
    randoms = load_file(path / "trainer" / "random.safetensors")
    torch.set_rng_state(randoms["torch"])
    if "cuda" in randoms and torch.cuda.is_available():
        torch.cuda.set_rng_state(randoms["cuda"])
    name, keys, *position = state["numpy_random"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *position))  # noqa: NPY002
    version, internal, gauss = state["python_random"]
    random.setstate((version, tuple(internal), gauss))


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": value.contiguous()
        for index, values in state["state"].items()
        for key, value in values.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def _random_states() -> dict[str, torch.Tensor]:
    states = {"torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _as_lists(state: Any) -> Any:
    return [_as_lists(item) for item in state] if isinstance(state, tuple) else state


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint directories, oldest first: those within the supervised phase come before all steps."""
    found = [path for kind in ("supervised", "step") for path in sorted((run / "checkpoints").glob(f"{kind}-*"))]
    return [path for path in found if path.is_dir()]


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold (None if there never was one), and a line for each that fails.

    Raises UserError if a newer version of kpo wrote it.
    """
    return _newest(run, is_damaged)


def resumable_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can go on from (None: from its start), and a line for each that it cannot.

    Raises UserError if a newer version of kpo wrote it.
    """
    return _newest(run, lambda path: is_damaged(path) or _unresumable(path))


def check_format(path: Path) -> None:
    """Raise UserError if a newer version of kpo wrote the checkpoint. Of other folders there is nothing to say here."""
    try:
        written = json.loads(read_text(path / STATE)).get("format", CHECKPOINT)
    except (OSError, ValueError, AttributeError):  # no checkpoint of ours, or a damaged one
        return
    if problem := unreadable(written, CHECKPOINT):
        raise UserError(f"{path} cannot be opened: {problem}")


def is_damaged(path: Path) -> str | None:
    """Why a checkpoint, which may not be there at all, cannot be used; None if it can."""
    try:
        for name, expected in _checksums(path).items():
            if sha256_of(path / name) != expected:
                return f"is damaged ({name} has changed)"
    except (OSError, ValueError) as error:
        return f"is damaged ({error})"
    return None


def _newest(run: Path, fault: Callable[[Path], str | None]) -> tuple[Path | None, list[str]]:
    found = checkpoints(run)
    problems: list[str] = []
    for path in reversed(found):
        check_format(path)  # first: what else there is to say of it depends on the format
        problem = fault(path)
        if problem is None:
            return path, problems
        problems.append(f"{path} {problem}")
    if not found:
        return None, problems
    whole = [path for path in found if is_damaged(path) is None]
    way_out = f"start a new run from its weights, model.path={whole[-1]}" if whole else "start the run again"
    raise UserError(f"no checkpoint of {run} will do: {'; '.join(problems)}; {way_out}")


def _unresumable(path: Path) -> str | None:
    if OPTIMIZER in _checksums(path):
        return None
    return "has given up its optimizer's state (trainer.keep_optimizer)"


def _checksums(path: Path) -> dict[str, str]:
    sums: dict[str, str] = json.loads(read_text(path / "checksums.json"))
    return sums
