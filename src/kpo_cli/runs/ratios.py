"""Ratio records: what an update saw of every token, written and read. The format is in docs/run-directory.md.

A record that cannot be used raises `BadRecord`, whose message says what is wrong with it.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.runs.formats import RATIOS, unreadable

TOKEN_TENSORS = ("old_log_probs", "rollout_log_probs", "entropy", "filtered_log_ratio", "response_ids")
ROW_TENSORS = ("advantages", "rewards", "mini_batch_index", "prompt_index", "prompt_lengths")
ROUNDING = ("responses", "tokens", "z", "z_error", "filtered_error", "width", "decided")
"""What is known of 16-bit arithmetic: the fields of `core.rounding.Rounding`."""
PIECE_TOKENS = 2**18
"""Tokens that are worked on at once, padding included: some ten float64 temporaries of 2 MB for each series."""


class BadRecord(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
class Ratios:
    """Responses as rows; token arrays are zero outside the mask. None: not recorded."""

    log_ratio: NDArray[Any]
    """(B, T) float32 or float64, z."""
    mask: NDArray[np.bool_]
    """(B, T)."""
    step: NDArray[Any]
    """(B,) int64."""
    old_log_probs: NDArray[Any] | None = None
    """(B, T)."""
    rollout_log_probs: NDArray[Any] | None = None
    """(B, T)."""
    entropy: NDArray[Any] | None = None
    """(B, T), nats."""
    filtered_log_ratio: NDArray[Any] | None = None
    """(B, T), what the run's own filter made of z."""
    response_ids: NDArray[Any] | None = None
    """(B, T) int."""
    prompt_ids: NDArray[Any] | None = None
    """(B, P) int."""
    prompt_lengths: NDArray[Any] | None = None
    """(B,) int."""
    advantages: NDArray[Any] | None = None
    """(B,)."""
    rewards: NDArray[Any] | None = None
    """(B,)."""
    mini_batch_index: NDArray[Any] | None = None
    """(B,) int; 0 is on-policy."""
    prompt_index: NDArray[Any] | None = None
    """(B,) int; equal numbers of one step are one prompt."""
    texts: NDArray[Any] | None = None
    """(B,) of str, where the file holds texts and not ids."""

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def off_policy(self) -> NDArray[np.bool_]:
        """(B,): true where the mini-batch came after an optimizer step; everywhere, where that is not recorded."""
        if self.mini_batch_index is None:
            return np.ones(len(self), bool)
        off_policy: NDArray[np.bool_] = self.mini_batch_index > 0
        return off_policy

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(B,) valid tokens."""
        return self.mask.sum(1)

    def rows(self, chosen: Any) -> "Ratios":
        """Some of the responses, without the columns that none of them uses."""
        mask = self.mask[chosen]
        width = int(np.flatnonzero(mask.any(0))[-1]) + 1 if mask.any() else 1
        kept: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                value = value[chosen]
                kept[entry.name] = value[:, :width] if entry.name in ("log_ratio", "mask", *TOKEN_TENSORS) else value
        return Ratios(**kept)

    def pieces(self) -> Iterator["Ratios"]:
        """The same responses in parts of bounded size."""
        at_once = max(1, PIECE_TOKENS // self.mask.shape[1])
        for start in range(0, len(self), at_once):
            yield self.rows(slice(start, start + at_once))


def write_ratios(run: Path, step: int, tensors: dict[str, Any], metadata: dict[str, Any]) -> Path:
    """Write ratios/step-NNNNNN.safetensors: (N, T) token tensors, (N,) row tensors, and what made them as metadata."""
    from safetensors.torch import save_file

    folder = run / "ratios"
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{step:06d}.safetensors"
    draft = final.with_name(f".{final.name}.{os.getpid()}")
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    described = {"format": RATIOS, "step": step, **metadata}
    save_file(contiguous, draft, metadata={key: json.dumps(value) for key, value in described.items()})
    draft.rename(final)
    return final


def read_ratios(path: Path) -> Iterator[tuple[Ratios, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    if path.stat().st_size == 0:
        raise BadRecord("the file is empty")
    try:
        with safe_open(path, "pt") as file:
            metadata = _metadata(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys() if name in KNOWN}  # noqa: SIM118
    except SafetensorError as error:
        raise BadRecord(f"truncated or not a safetensors file ({error})") from None
    # numpy has no bfloat16.
    arrays = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}
    yield checked_batch(arrays, int(metadata["step"])), metadata


def _metadata(raw: dict[str, str]) -> dict[str, Any]:
    try:
        metadata = {name: json.loads(value) for name, value in raw.items()}
    except ValueError:
        metadata = {}
    if "format" not in metadata:
        raise BadRecord(f"not a ratio record {RATIOS} (no such format in its metadata)")
    if problem := unreadable(metadata["format"], RATIOS):
        raise BadRecord(problem)
    if not isinstance(metadata.get("step"), int):
        raise BadRecord("its metadata has no step")
    rounding = metadata.get("rounding")
    if rounding is not None and not _is_rounding(rounding):
        raise BadRecord("the rounding in its metadata is not that of a run")
    return metadata


def _is_rounding(found: Any) -> bool:
    """Of one token at least."""
    if not isinstance(found, dict) or found.keys() != {*ROUNDING}:
        return False
    numbers = [value for name, value in found.items() if name != "width" or value is not None]
    known = all(isinstance(value, int | float) and 0 <= value < math.inf for value in numbers)
    return known and found["tokens"] > 0 and found["width"] != 0


KNOWN = {"log_ratio", "response_mask", "prompt_ids", *TOKEN_TENSORS, *ROW_TENSORS}


def checked_batch(arrays: dict[str, Any], step: Any) -> Ratios:
    """A batch of `arrays`, named as in a record, after every check. `step` is a number or (B,). Raises BadRecord."""
    for name in ("log_ratio", "response_mask"):
        if name not in arrays:
            raise BadRecord(f"it has no {name}")
    arrays = dict(arrays)
    mask = arrays.pop("response_mask")
    if mask.ndim != 2 or mask.size == 0:
        raise BadRecord(f"response_mask has shape {mask.shape}; it must be (responses, tokens)")
    if mask.dtype != np.bool_:
        if not np.isin(mask, (0, 1)).all():
            raise BadRecord("response_mask must hold 0 and 1 (or booleans) only")
        mask = mask.astype(bool)
    for name, array in arrays.items():
        expected = mask.shape if name in ("log_ratio", *TOKEN_TENSORS) else mask.shape[:1]
        if array.shape[: len(expected)] != expected or array.ndim != (2 if name == "prompt_ids" else len(expected)):
            raise BadRecord(f"{name} has shape {array.shape}, which does not fit a mask of shape {mask.shape}")
        if name in ("log_ratio", *TOKEN_TENSORS):
            arrays[name] = _token_array(name, array, mask)
        elif array.dtype.kind not in "biuf" and name != "texts":
            raise BadRecord(f"{name} has type {array.dtype}; it must be numbers")
        elif array.dtype.kind == "f":
            # No reward is known where the grader failed.
            known = np.isfinite(array) | (np.isnan(array) if name == "rewards" else False)
            if not known.all():
                raise BadRecord(f"{name} is not a finite number at row {int(np.argmin(known))}")
    return Ratios(mask=mask, step=np.broadcast_to(np.asarray(step, np.int64), mask.shape[:1]), **arrays)


def _token_array(name: str, array: Any, mask: NDArray[np.bool_]) -> Any:
    if (array.dtype.kind == "f") != (name != "response_ids"):
        raise BadRecord(f"{name} has type {array.dtype}")
    clean = np.where(mask, array, array.dtype.type(0))
    if array.dtype.kind == "f" and not np.isfinite(clean).all():
        row, column = np.argwhere(~np.isfinite(clean))[0]
        raise BadRecord(f"{name} is {clean[row, column]} at row {row}, token {column}, a valid token")
    return clean


def joined(batches: list[Ratios]) -> Ratios:
    """One batch of several, padded on the right; what is not recorded in all of them is left out."""
    parts: dict[str, Any] = {}
    for entry in fields(Ratios):
        values = [getattr(batch, entry.name) for batch in batches]
        if any(value is None for value in values):
            continue
        width = max(value.shape[1] if value.ndim == 2 else 0 for value in values)
        parts[entry.name] = np.concatenate(
            [np.pad(v, ((0, 0), (0, width - v.shape[1]))) if v.ndim == 2 else v for v in values]
        )
    return Ratios(**parts)
