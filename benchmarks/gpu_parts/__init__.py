"""The parts of benchmarks/gpu.py. A part is a function of a `Setting` that yields dicts of numbers as they come.

What a part finds wrong it raises at its end (`require`), behind its numbers. What the device cannot show is
`NOT_MEASURED`, which is neither a number nor a pass.
"""

import math
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Numbers = Iterator[dict[str, float | int | str]]
NOT_MEASURED = "not measured"
PACKAGES = ("torch", "transformers", "triton", "numba", "peft")


@dataclass(frozen=True)
class Setting:
    device: str
    small: bool
    """Shapes for a CPU, seconds a part."""
    seconds: float
    """Until the part is killed."""
    folder: Path
    """Its own, and gone afterwards."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


def device_and_versions(device: str) -> tuple[str, dict[str, str]]:
    """The device's name and what is installed; RuntimeError if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU; without one: --device cpu --small")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    return name, versions


def require(wrong: list[str]) -> None:
    """Raise what was found wrong, if anything."""
    if wrong:
        raise AssertionError("; ".join(wrong))


def largest(values: Iterable[float]) -> float:
    """Of all, or NaN if there is one, which `max` would pass over."""
    return max(values, key=lambda value: (math.isnan(value), value))


def composed(*overrides: str) -> Any:
    """The TrainConfig of `kpo train OVERRIDES`."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from kpo_cli.cli.compose import conf_dir
    from kpo_cli.config import train_config

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw: Any = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    del raw["run_dir"], raw["resume"]
    return train_config(raw)


def saved_model(setting: Setting, **architecture: int) -> Path:
    """A folder with random weights of a built-in architecture, for kpo's own loading (LoRA needs a model to adapt)."""
    from kpo_cli.builtin.warmup import build_model, build_tokenizer
    from kpo_cli.config import Architecture

    folder = setting.folder / "model"
    torch.manual_seed(0)
    build_model(Architecture(max_position_embeddings=4096, initializer_range=0.02, **architecture)).save_pretrained(
        folder
    )
    build_tokenizer().save_pretrained(folder)
    return folder
