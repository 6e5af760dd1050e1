"""Checkpoints: a model directory for transformers, with a trainer/ folder that makes the run go on to the same bits.

Written here, found again, and looked at before they are used.

Nothing in a checkpoint is a pickle: tensors are safetensors, the rest JSON. A checkpoint is written under a hidden
name and renamed, so that it is there whole or not at all, and its files' checksums are verified before it is used.
"""

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kpo_cli.errors import UserError
from kpo_cli.runs.directory import sha256_of, write_text


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

    @property
    def label(self) -> str:
        """Of the checkpoint that is written here."""
        phase, step = ("step", self.step) if self.supervised_step is None else ("supervised", self.supervised_step)
        return f"{phase}-{step:06d}"


def save_checkpoint(
    run: Path,
    policy: Saveable,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    schedule: dict[str, float],
    keep: int,
) -> Path:
    """Write checkpoints/step-NNNNNN, or supervised-NNNNNN; then remove all but the newest `keep` (0: none)."""
    folder = run / "checkpoints"
    final = folder / progress.label
    draft = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "trainer").mkdir(parents=True)
    policy.save(draft)
    tensors, state = _optimizer_state(optimizer)
    save_file(tensors, draft / "trainer" / "optimizer.safetensors")
    save_file(_random_states(), draft / "trainer" / "random.safetensors")
    state |= {**asdict(progress), "schedule": schedule}
    name, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002 - a model may draw from it
    state |= {
        "python_random": _as_lists(random.getstate()),
        "numpy_random": [name, np.asarray(keys).tolist(), *position],
    }
    write_text(draft / "trainer" / "state.json", json.dumps(state) + "\n")
    sums = {str(f.relative_to(draft)): sha256_of(f) for f in sorted(draft.rglob("*")) if f.is_file()}
    write_text(draft / "checksums.json", json.dumps(sums, indent=2) + "\n")
    _sync(draft)
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    for old in checkpoints(run)[:-keep] if keep else []:
        shutil.rmtree(old)
    return final


def restore(path: Path, optimizer: torch.optim.Optimizer) -> Progress:
    """Load the trainer/ folder of a checkpoint into the optimizer and the random generators."""
    state = json.loads((path / "trainer" / "state.json").read_text())
    tensors = load_file(path / "trainer" / "optimizer.safetensors")
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
    return Progress(**{field.name: state[field.name] for field in fields(Progress) if field.name in state})


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
    """The newest checkpoint whose checksums hold (None if there never was one), and a line for each that fails."""
    found = checkpoints(run)
    problems: list[str] = []
    for path in reversed(found):
        problem = _damage(path)
        if problem is None:
            return path, problems
        problems.append(f"{path} is damaged ({problem})")
    if found:
        raise UserError(f"no checkpoint of {run} is whole: {'; '.join(problems)}; start the run again")
    return None, problems


def _damage(path: Path) -> str | None:
    try:
        sums = json.loads((path / "checksums.json").read_text())
        for name, expected in sums.items():
            if sha256_of(path / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None
