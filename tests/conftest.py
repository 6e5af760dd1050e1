"""Helpers for the tests of the whole command: `kpo` in this process, `run_kpo` in one of its own."""

import copy
import functools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# A shell that starts the tests in the background, or nohup, has them ignore signals, and kpo would do so as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def compose(*overrides: str) -> dict[str, Any]:
    """The configuration of `kpo train` as a job gets it, without `run_dir` and `resume`."""
    return copy.deepcopy(_compose(*overrides))


@functools.cache
def _compose(*overrides: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from kpo_cli.cli.compose import conf_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw: Any = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    del raw["run_dir"], raw["resume"]
    return raw


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Several threads fight over the cores that other work uses; and a result is the same at the same number."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def cache_of_engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests of the engine write beside their runs stays out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name == "engine":
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Overrides that make a run last a second."""
    return [
        "trainer.steps=1",
        "trainer.prompts_per_step=2",
        "trainer.group_size=2",
        "trainer.mini_batches=2",
        "rollout.max_response_tokens=8",
        "data.limit=16",
        "data.heldout=4",
    ]


@pytest.fixture(scope="session")
def run_kpo() -> Callable[..., Result]:
    """Run `kpo` as a command: what a user sees, at the price of its imports."""

    def run(*arguments: str, cwd: Path, env: dict[str, str | None] | None = None) -> Result:
        # One thread: several fight over the cores that other tests use.
        changed: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
        environment = {name: value for name, value in changed.items() if value is not None}
        done = subprocess.run(
            [sys.executable, "-m", "kpo_cli", *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def kpo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Result]]:
    """Run `kpo` in this process, in `tmp_path`: the same code without the second that its imports take."""
    import torch
    from hydra.core.global_hydra import GlobalHydra

    from kpo_cli.cli import main as cli

    threads, handlers, level = torch.get_num_threads(), logging.root.handlers[:], logging.root.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # kpo sets it: monkeypatch puts back what was there

    def run(*arguments: str) -> Result:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["kpo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code = stopped.value.code
        assert code is None or isinstance(code, int)
        return Result(code or 0, *capsys.readouterr())

    yield run
    GlobalHydra.instance().clear()
    torch.set_num_threads(threads)
    logging.root.handlers[:] = handlers  # Hydra's would write to this test's stdout for ever
    logging.root.setLevel(level)
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], set[str]]:
    """Every path below a directory, to see what a command left behind."""

    def below(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*")}

    return below


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[Any]], Path]:
    def write(path: Path, rows: list[Any]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def problems() -> list[dict[str, str]]:
    """Rows of a good problem file."""
    return [{"id": f"p{i}", "problem": f"{i}+1?", "answer": str((i + 1) % 10)} for i in range(20)]
