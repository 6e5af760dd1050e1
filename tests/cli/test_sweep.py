"""Sweeps: every job in a process and a directory of its own, and a failing one stops nobody."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


def summaries(folder: Path) -> dict[str, dict]:
    """What the jobs below a directory made of themselves, by the name of their directories."""
    return {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("summary.json")}


@pytest.mark.slow
def test_a_sweep_of_methods_is_the_same_as_one_run_after_the_other(run_kpo, kpo, small: list[str], tmp_path: Path):
    result = run_kpo("train", "-m", *small, "method=kpo,grpo", "seed=1", "run_dir=all", cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert "[2/2] method=grpo -> all/1-method-grpo" in result.out
    done = summaries(tmp_path / "all")
    assert {name: (s["method"], s["seed"]) for name, s in done.items()} == {
        "0-method-kpo": ("kpo", 1),
        "1-method-grpo": ("grpo", 1),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["all"]
    assert kpo("train", *small, "method=grpo", "seed=1", "run_dir=alone").code == 0
    weights = "checkpoints/step-000001/model.safetensors"
    assert (tmp_path / "alone" / weights).read_bytes() == (tmp_path / "all/1-method-grpo" / weights).read_bytes()


@pytest.mark.slow
def test_a_failing_job_does_not_stop_the_others(run_kpo, small: list[str], tmp_path: Path):
    result = run_kpo("train", "-m", *small, "trainer.lr=-1,2e-4", cwd=tmp_path)
    assert result.code == 2
    assert "Traceback" not in result.err
    (sweep,) = tmp_path.glob("outputs/sweeps/*")
    assert set(summaries(sweep)) == {"1-trainer.lr-0.0002"}
    # A failed job leaves nothing behind.
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == {"1-trainer.lr-0.0002"}
    first, second, last = result.err.splitlines()
    assert first == "kpo: trainer.lr=-1.0 must be a finite number above 0"
    assert second.startswith("failed with exit code 2: trainer.lr=-1 ->")
    assert last == "kpo: 1 of 2 jobs failed, 1 finished"


@pytest.mark.slow
def test_where_every_job_fails_no_directory_is_left(run_kpo, tmp_path: Path):
    result = run_kpo("train", "-m", "seed=-1", cwd=tmp_path)
    assert result.code == 2
    assert result.err.splitlines()[0] == "kpo: seed=-1 must be at least 0"
    assert not any(tmp_path.iterdir())


# What the launcher starts, without starting it.


@pytest.fixture
def started(kpo, monkeypatch: pytest.MonkeyPatch):
    """Run a sweep whose jobs end at once; returns the arguments of each, and the result."""
    real = subprocess.Popen

    def sweep(*arguments: str, codes: dict[int, int] | None = None):
        jobs: list[list[str]] = []

        def start(command: list[str], *more: object, **options: object):
            if command[:3] != [sys.executable, "-m", "kpo_cli"]:
                return real(command, *more, **options)
            jobs.append(command[3:])
            return SimpleNamespace(wait=lambda: (codes or {}).get(len(jobs) - 1, 0))

        monkeypatch.setattr(subprocess, "Popen", start)
        return kpo("train", "-m", *arguments), jobs

    return sweep


def values(job: list[str]) -> dict[str, object]:
    """The overrides of a job, read as the job will read them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert job[0] == "train"
    parsed = OverridesParser.create().parse_overrides([argument for argument in job[1:] if argument[0] != "-"])
    return {override.key_or_group: override.value() for override in parsed}


def test_methods_and_seeds(started):
    result, jobs = started("method=kpo,grpo", "seed=0,1", "run_dir=all")
    assert (result.code, result.err) == (0, "")
    assert [(values(job)["method"], values(job)["seed"]) for job in jobs] == [
        ("kpo", 0),
        ("kpo", 1),
        ("grpo", 0),
        ("grpo", 1),
    ]
    assert [values(job)["run_dir"] for job in jobs] == [
        "all/0-method-kpo_seed-0",
        "all/1-method-kpo_seed-1",
        "all/2-method-grpo_seed-0",
        "all/3-method-grpo_seed-1",
    ]


def test_jobs_get_everything_but_the_sweep(started):
    result, jobs = started("method=kpo,grpo", "trainer.steps=3", "run_dir=all")
    assert result.code == 0
    assert [values(job) for job in jobs] == [
        {"method": "kpo", "trainer.steps": 3, "run_dir": "all/0-method-kpo"},
        {"method": "grpo", "trainer.steps": 3, "run_dir": "all/1-method-grpo"},
    ]
    assert not any("-m" in job or "--multirun" in job for job in jobs)


def test_values_survive(started):
    written = {
        "'a, b'": "a, b",
        '"it\'s"': "it's",
        "'say \"x\"'": 'say "x"',
        "'two  spaces'": "two  spaces",
        "'a=b'": "a=b",
        "'[x] {y}'": "[x] {y}",
        "'back\\slash'": "back\\slash",
        "'Grüße'": "Grüße",
        "'7'": "7",
    }
    overrides = [f"+k{i}={text}" for i, text in enumerate(written)]
    result, jobs = started("seed=0,1", *overrides, "run_dir=all")
    assert (result.code, result.err) == (0, "")
    expected = {f"k{i}": value for i, value in enumerate(written.values())}
    assert [values(job) for job in jobs] == [
        {"seed": seed, "run_dir": f"all/{seed}-seed-{seed}", **expected} for seed in (0, 1)
    ]


def test_quoted_values_can_be_swept(started):
    _, jobs = started("data.instruction='a, b','c d'", "run_dir=all")
    assert [values(job)["data.instruction"] for job in jobs] == ["a, b", "c d"]
    names = [str(values(job)["run_dir"]) for job in jobs]
    assert len(set(names)) == 2
    assert all(name.startswith("all/") and name.count("/") == 1 and " " not in name for name in names)


@pytest.mark.parametrize("name", ["it's a b", "a=b", "Größe\\x", "2026_11_26", "1e3", "'a,b'", "a${"])
def test_odd_names_of_sweep_directories(name: str, started, tmp_path: Path):
    result, jobs = started("seed=0,1", f"run_dir={name}")
    name = name.strip("'")  # Hydra's own, around a comma
    assert (result.code, result.err) == (0, "")
    found = [str(values(job)["run_dir"]).replace("\\${", "${") for job in jobs]
    assert found == [f"{name}/0-seed-0", f"{name}/1-seed-1"]
    assert {path.name for path in tmp_path.iterdir()} <= {name}


def test_run_directories_can_be_swept(started):
    _, jobs = started("run_dir=a,'b c'")
    assert [values(job) for job in jobs] == [{"run_dir": "a"}, {"run_dir": "b c"}]


def test_resumes_can_be_swept(started):
    _, jobs = started("resume=a,'b c'", "trainer.steps=9")
    assert [values(job) for job in jobs] == [{"resume": "a", "trainer.steps": 9}, {"resume": "b c", "trainer.steps": 9}]


def test_a_second_sweep_may_go_where_the_first_one_is(started, tmp_path: Path):
    (tmp_path / "all" / "0-seed-0").mkdir(parents=True)
    result, jobs = started("seed=1,2", "run_dir=all")
    assert result.code == 0
    assert [values(job)["run_dir"] for job in jobs] == ["all/0-seed-1", "all/1-seed-2"]


def test_failures_are_reported_at_the_end(started):
    result, jobs = started("seed=0,1,2", "run_dir=all", codes={0: 1, 2: 2})
    assert len(jobs) == 3
    assert result.code == 2
    assert result.err.splitlines() == [
        "failed with exit code 1: seed=0 -> all/0-seed-0",
        "failed with exit code 2: seed=2 -> all/2-seed-2",
        "kpo: 2 of 3 jobs failed, 1 finished",
    ]


def test_home_is_expanded(started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for written in ("~/all", '"~/all"'):
        _, jobs = started("seed=0,1", f"run_dir={written}")
        assert [values(job)["run_dir"] for job in jobs] == [f"{tmp_path}/home/all/{i}-seed-{i}" for i in (0, 1)]
    assert not (tmp_path / "~").exists()


def test_directories_that_refer_to_what_is_swept_belong_to_the_jobs(started):
    _, jobs = started("seed=0,1", "run_dir=runs/${seed}")
    assert [values(job)["run_dir"] for job in jobs] == ["runs/${seed}"] * 2


def test_globs(started, tmp_path: Path):
    _, jobs = started("method=glob(grpo*)", "run_dir=all")
    assert [values(job)["method"] for job in jobs] == ["grpo", "grpo_tight"]
    _, jobs = started("method=glob(*,exclude=[k*,g*,e*])", "run_dir=all")
    assert "dapo" in {values(job)["method"] for job in jobs}
    assert not {"kpo", "grpo"} & {values(job)["method"] for job in jobs}


@pytest.mark.parametrize("code", [-2, -15, -1, 130])
def test_a_job_that_is_asked_to_end_ends_the_sweep(code: int, started):
    result, jobs = started("seed=0,1,2", "run_dir='a b'", codes={1: code})
    assert len(jobs) == 2
    assert result.code == 130
    *fates, last = result.err.splitlines()
    assert fates == [
        "finished: seed=0 -> a b/0-seed-0",
        "stopped: seed=1 -> a b/1-seed-1",
        "not begun: seed=2 -> a b/2-seed-2",
    ]
    message, _, again = last.partition("; go on with: ")
    assert message == "kpo: sweep stopped: of 3 jobs 1 finished, 1 stopped, 1 not begun"
    assert shlex.split(again) == ["kpo", "train", "-m", "seed=0,1,2", 'run_dir="a b"']


def test_a_job_that_was_killed_has_failed(started):
    """By the system, for want of memory: the others may have enough."""
    result, jobs = started("seed=0,1,2", "run_dir=all", codes={1: -9})
    assert len(jobs) == 3
    assert (result.code, result.err.splitlines()[0]) == (2, "failed with exit code -9: seed=1 -> all/1-seed-1")


def test_the_same_command_goes_on_where_it_was(started, tmp_path: Path):
    """What is finished is not made again, what was begun is resumed; what another command made is in the way."""
    _, jobs = started("seed=0,1,2,3", "run_dir=all")
    for number, (job, finished) in enumerate(zip(jobs[:3], (True, False, True), strict=True)):
        folder = tmp_path / f"all/{number}-seed-{number}"
        folder.mkdir(parents=True)
        command = shlex.join(["kpo", *job]) if number < 2 else "kpo train seed=2 trainer.lr=1"
        (folder / "manifest.json").write_text(json.dumps({"command": command}))
        if finished:
            (folder / "summary.json").write_text("{}")
    result, again = started("seed=0,1,2,3", "run_dir=all")
    assert result.code == 0
    assert again == [["train", 'resume="all/1-seed-1"'], *jobs[2:]]
    assert "[1/4] seed=0 -> all/0-seed-0, finished before" in result.out
    assert "[2/4] seed=1 -> all/1-seed-1, goes on" in result.out


def test_options_reach_the_jobs(started, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    _, jobs = started("--config-dir", "mine", "seed=0,1")
    assert all(job[1:3] == ["--config-dir", "mine"] for job in jobs)
