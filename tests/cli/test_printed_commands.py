"""Every command that a page or a help text prints does what it says, as printed (tests/cli/printed.py finds them).

What would take minutes gets settings behind it that shorten it, what needs a GPU or the hub is composed (`--cfg job`),
and the arguments of long scripts are read by their own parsers. A command that is new on a page is a new case here.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hub_twin
import pytest
from conftest import REPOSITORY, Result
from printed import is_test, of_page, printed, words

THERE = {
    **dict.fromkeys(("RUN", "RUN_A", "run", "DIR", "runs/a", "runs/grpo-1", "runs/kpo0", "runs/long", "plain"), "run"),
    "RUN_B": "other run",
    **dict.fromkeys(("MODEL", "DIRECTORY_OR_HUB_NAME", "twins/qwen3"), "twin"),
    **dict.fromkeys(("FILE.jsonl", "gsm8k_train.jsonl"), "problems.jsonl"),
    "ratios.parquet": "ratios.parquet",
    "outputs/eval/DIR": "evaluation",
}
"""What lies where a command says so: the names that the pages use, and what the fixture `made` makes for them."""

HUB_OR_GPU = re.compile(
    r"=qwen|=dapo|=paper|aime24|rollout=vllm|experiment=long_arithmetic(?!_cpu)|eval checkpoint=RUN$"
)
"""Also an evaluation of the default benchmarks."""
SMALL = [
    *("trainer.prompts_per_step=2", "trainer.group_size=2", "trainer.mini_batches=2", "rollout.max_response_tokens=8"),
    *("data.limit=16", "data.heldout=4", "trainer.eval_every=0", "trainer.checkpoint_every=0"),
]
SHORTER = {
    "train": ["trainer.steps=2", *SMALL],
    "eval": ["eval.n=1", "eval.limit=4", "eval.max_tokens=8"],
    "analyze": ["nulls.draws=20", "nulls.tokens=2000", "report=false"],
}
STEPS = 10
"""Of the runs that are there."""
GOES_ON = [f"trainer.steps={STEPS + 1}"]

COMMANDS = printed()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The things of THERE, each made by the command that a user would make it with."""
    from small_runs import train

    folder = tmp_path_factory.mktemp("made")
    for name, seed in (("run", 0), ("other run", 1)):
        train(folder / name, *SMALL, f"trainer.steps={STEPS}", f"seed={seed}", "trainer.ratios_every=10")
    (folder / "twin").symlink_to(hub_twin.shared_model("qwen3"))
    rows = [{"problem": problem, "answer": answer} for problem, answer in hub_twin.make_problems(80)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def there(made: Path, kpo: Callable[..., Result], tmp_path: Path) -> Callable[[list[str]], None]:
    """Put into the working directory what the arguments of a command name, but for what it makes itself."""

    def put(arguments: list[str]) -> None:
        text = " ".join(a for a in arguments if not a.startswith("run_dir="))
        for name, what in THERE.items():
            if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w.-])", text):
                _make_the_rest(made, what, kpo)
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (made / what).is_dir() else shutil.copy
                copy(made / what, tmp_path / name)

    return put


def _make_the_rest(made: Path, what: str, kpo: Callable[..., Result]) -> None:
    """What commands of ours make of the run."""
    if (made / what).exists():
        return
    if what == "evaluation":
        given = [f"checkpoint='{made / 'run'}'", "benchmarks=[arithmetic]", f"run_dir='{made / what}'"]
        assert kpo("eval", *given, *SHORTER["eval"]).code == 0
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"log_probs": [-1.0, -0.5 - i / 100, -2.0], "old_log_probs": [-1.1, -0.6, -1.9]} for i in range(8)]
        pq.write_table(pa.Table.from_pylist(rows), made / what)


def test_the_pages_are_read():
    """Blocks with and without a fence, with a prompt, with a backslash, and prose; but not what a command says."""
    page = "Say `kpo train a=1` or `kpo train`.\n\n    $ kpo eval x=[1] \\\n        y=2   # why\n    kpo: said\n\n"
    page += "```sh\nmake test\n```\n\n```python\nmake = 1\n```\n\n    make gpu ONLY=a && python b.py '#'\n"
    expected = ["kpo eval x=[1] y=2", "make test", "make gpu ONLY=a && python b.py '#'", "kpo train a=1"]
    assert of_page(page) == expected
    commands = [command for _, command in COMMANDS]
    assert len(commands) > 80
    assert {"kpo train method=kpo", "kpo eval regrade=outputs/eval/DIR", "make train", "kpo analyze RUN"} <= {*commands}


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[f"{where}: {command}" for where, command in COMMANDS])
def test_it_works_as_printed(where: str, command: str, request: pytest.FixtureRequest):
    if command.startswith("while"):
        request.getfixturevalue("looped")(command)
        return
    for part in command.split(" && "):
        program, *arguments = words(part)
        kind = "python" if program.endswith("python") else program
        request.getfixturevalue({"kpo": "commanded", "python": "parsed"}.get(kind, f"{kind}_knows"))(arguments)


@pytest.fixture
def commanded(kpo, there, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """`kpo`, in this process. Of a sweep every job is composed, and the first one is run."""

    def run(arguments: list[str]) -> None:
        there(arguments)
        composed = bool(HUB_OR_GPU.search(shlex.join(arguments)))
        if "-m" not in arguments:
            _succeeds(kpo(*arguments, *(["--cfg", "job"] if composed else _shorter(arguments))))
            return
        jobs: list[list[str]] = []

        def start(command: list[str], **options: object) -> SimpleNamespace:
            jobs.append(command[3:])
            return SimpleNamespace(wait=lambda: 0)

        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "Popen", start)
            _succeeds(kpo(*arguments))
        assert len(jobs) > 1
        for job in jobs:
            _succeeds(kpo(*job, "--cfg", "job"))
        if not composed:
            _succeeds(kpo(*jobs[0], *_shorter(jobs[0])))

    return run


def _shorter(arguments: list[str]) -> list[str]:
    """Settings behind those of a command that let it end in a second, and are not what it is about."""
    goes_on = any(a.startswith("resume=") for a in arguments) or arguments[:2] == ["train", "RUN"]
    if goes_on:
        return GOES_ON
    if "experiment=long_arithmetic_cpu" in arguments:
        worked = ["rollout.max_response_tokens=106", "trainer.supervised.steps=1"]  # worked answers are that long
        return [*SHORTER["train"], *worked]
    return [] if arguments[0].startswith("-") or "--help" in arguments else SHORTER[arguments[0]]


def _succeeds(result: Result) -> None:
    assert result.code == 0, result.err
    assert "Traceback" not in result.err


@pytest.fixture
def looped(there, tmp_path: Path) -> Callable[[str], None]:
    """A loop of the shell around a run that has no summary yet: it ends, and then there is one."""

    def run(command: str) -> None:
        there([command])
        (summary,) = tmp_path.rglob("summary.json")
        summary.unlink()
        shim = tmp_path / "bin/kpo"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kpo_cli "$@"\n')
        shim.chmod(0o755)
        environment = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, timeout=120, check=False)
        assert done.returncode == 0
        assert summary.exists()

    return run


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """A script of ours takes these arguments: its own parser reads them, and there it ends."""

    class Parsed(Exception):
        pass

    def run(arguments: list[str]) -> None:
        script = REPOSITORY / arguments[0]
        real = argparse.ArgumentParser.parse_args

        def parse(self: argparse.ArgumentParser, *given: object) -> None:
            real(self, *given)  # type: ignore[call-overload]
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments[1:]])
        monkeypatch.syspath_prepend(script.parent)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")

    return run


@pytest.fixture
def make_knows() -> Callable[[list[str]], None]:
    def run(arguments: list[str]) -> None:
        done = subprocess.run(
            ["make", "--dry-run", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        for name in re.findall(r"-k (\w+)", " ".join(arguments)):
            assert is_test(name)
        for parts in re.findall(r"(?:ONLY=|--only )([\w,]+)", " ".join(arguments)):
            script = REPOSITORY / "benchmarks/gpu.py"
            listed = subprocess.run([sys.executable, script, "--list"], capture_output=True, text=True, check=True)
            assert set(parts.split(",")) <= {line.split()[0] for line in listed.stdout.splitlines()}

    return run


@pytest.fixture
def pip_knows() -> Callable[[list[str]], None]:
    """Extras that are asked for exist."""

    def run(arguments: list[str]) -> None:
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
        assert arguments[0] == "install"
        for extra in re.findall(rf"{project['name']}\[([\w,]+)\]", " ".join(arguments)):
            assert set(extra.split(",")) <= set(project["optional-dependencies"])

    return run


@pytest.fixture
def bash_knows() -> Callable[[list[str]], None]:
    """gpu-bundle/run.sh is benchmarks/run_bundle.sh, put there by benchmarks/gpu_bundle.py."""

    def run(arguments: list[str]) -> None:
        assert arguments == ["gpu-bundle/run.sh"]
        bundle = (REPOSITORY / "benchmarks/gpu_bundle.py").read_text("utf-8")
        assert "run_bundle.sh" in bundle
        assert "run.sh" in bundle
        subprocess.run(["bash", "-n", REPOSITORY / "benchmarks/run_bundle.sh"], check=True)

    return run
