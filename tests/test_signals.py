"""What asks a process to end: Ctrl-C, SIGTERM, SIGHUP; and what nohup has it ignore."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kpo_cli.errors import RunInterrupted
from kpo_cli.signals import ENDING, caught, interrupting
from kpo_cli.training.stopping import Stop, resume_command


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """Whatever happens, pytest gets its own back."""
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_each_of_them_ends_a_run_after_its_step(number: int, tmp_path: Path, capfd):
    stop = Stop(None)
    with stop:
        assert not stop
        send(number)
        assert stop
        assert capfd.readouterr().err == (
            "kpo: stopping after this step; a second Ctrl-C ends at once, without saving it\n"
        )
        send(signal.SIGTERM, signal.SIGHUP, signal.SIGTERM)  # a launcher's, which passes on what we have got ourselves
        if number != signal.SIGINT:
            send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert capfd.readouterr().err == ""
    with pytest.raises(RunInterrupted, match="stopped after step 3; go on with: kpo train 'resume=a b'"):
        stop.leave("step 3", Path("a b"))


@pytest.mark.parametrize("number", ENDING)
def test_what_was_ignored_stays_ignored(number: int):
    """nohup ignores SIGHUP, and a shell SIGINT for what runs in its background."""
    signal.signal(number, signal.SIG_IGN)
    stop = Stop(None)
    with stop, caught(interrupting()):
        send(number)
    assert not stop
    assert signal.getsignal(number) == signal.SIG_IGN


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in ENDING]
    stop = Stop(None)
    for _ in range(2):  # the supervised phase and RL
        with stop:
            assert [signal.getsignal(number) for number in ENDING] != before
        assert [signal.getsignal(number) for number in ENDING] == before


def test_elsewhere_they_interrupt_once_and_ctrl_c_every_time():
    with caught(interrupting()):
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
        send(signal.SIGTERM, signal.SIGHUP)  # while things are cleaned up
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    for first in (signal.SIGHUP, signal.SIGINT):
        with caught(interrupting()), pytest.raises(KeyboardInterrupt):
            send(first)


def test_a_resume_command_can_be_pasted(tmp_path: Path):
    assert resume_command(Path("runs/a"), "trainer.steps=3") == "kpo train resume=runs/a trainer.steps=3"
    typed = resume_command(Path("it's a=b,c $HOME"))
    shown = subprocess.run(["bash", "-c", f"printf '%s\\n' {typed}"], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[2] == "resume=it's a=b,c $HOME"


CHILD = """
import os, signal, sys, time
from kpo_cli.signals import end_with
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], "w").close(), os._exit(0)))
end_with(int(sys.argv[2]))
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2], sys.argv[3] or str(os.getpid())])
time.sleep(60)
"""


def appears(path: Path, limit_s: float = 60) -> bool:
    ends = time.monotonic() + limit_s
    while not path.exists() and time.monotonic() < ends:
        time.sleep(0.05)
    return path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("already", [False, True], ids=["killed later", "gone before"])
def test_a_job_is_told_when_its_launcher_is_killed(already: bool, tmp_path: Path):
    """SIGKILL lets nobody pass anything on. A launcher that is gone before the job asks is not its parent any more."""
    told = tmp_path / "told"
    other = "1" if already else ""
    command = [sys.executable, "-c", PARENT, CHILD, str(told), other]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    if not already:
        assert parent.stdout.readline() == "ready\n"
        assert not told.exists()
        parent.kill()
    assert appears(told)
    parent.kill()
    parent.communicate(timeout=60)


# --- the launcher, with jobs that are no kpo: they say what they are told, and end when they like

JOB = """#!/bin/bash
# Called as python would be: -m kpo_cli train ... run_dir="DIR"
name=$(basename "${@: -1}" '"'); stop=
for signal in INT TERM HUP; do trap "echo $signal >> $LOG/$name; stop=1" $signal; done
echo $$ > "$LOG/$name.pid"
for i in $(seq 600); do [ -n "$stop" ] && [ -z "$STUBBORN" ] && exit 130; sleep 0.1; done
"""
LAUNCH = """
import sys
from kpo_cli.cli import main as cli
sys.executable = sys.argv[1]
sys.argv = ["kpo", *sys.argv[2:]]
cli.main()
"""


@pytest.fixture
def sweep(tmp_path: Path):
    """Start a sweep of three in a session of its own; returns it when its first job runs, and the job's process id."""
    job = tmp_path / "job.sh"
    job.write_text(JOB)
    job.chmod(0o755)
    started: list[subprocess.Popen] = []

    def start(**environment: str) -> tuple[subprocess.Popen, int]:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(job), "train", "-m", "seed=0,1,2", "run_dir=all"],
            cwd=tmp_path, env={**os.environ, "LOG": str(tmp_path), **environment},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        pid = tmp_path / "0-seed-0.pid"
        assert appears(pid)
        while not pid.read_text().strip():
            time.sleep(0.05)
        return process, int(pid.read_text())

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("to_all", [False, True], ids=["launcher", "group"])
@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_a_sweep_lets_its_job_save_and_stops(name: str, to_all: bool, sweep: Callable, tmp_path: Path):
    process, job = sweep()
    (os.killpg if to_all else os.kill)(process.pid, getattr(signal, f"SIG{name}"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not lives(job)
    heard = (tmp_path / "0-seed-0").read_text()
    assert (name if to_all else "TERM") in heard  # from the terminal, or passed on
    assert not (tmp_path / "1-seed-1.pid").exists()
    lines = err.splitlines()
    assert lines[-4:-1] == [f"{fate}: seed={i} -> all/{i}-seed-{i}" for i, fate in enumerate(FATES)]
    assert lines[-1].endswith("go on with: kpo train -m seed=0,1,2 run_dir=all")


FATES = ("stopped", "not begun", "not begun")


def test_a_second_ctrl_c_kills_a_job_that_goes_on(sweep: Callable, tmp_path: Path):
    process, job = sweep(STUBBORN="1")
    os.kill(process.pid, signal.SIGINT)
    assert appears(tmp_path / "0-seed-0")
    os.kill(process.pid, signal.SIGTERM)  # any number of these
    time.sleep(0.5)
    assert lives(job)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not lives(job)


def test_a_sweep_under_nohup_goes_on(sweep: Callable, tmp_path: Path):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited by what is started
    try:
        process, job = sweep()
    finally:
        signal.signal(signal.SIGHUP, previous)
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    assert lives(job)
    assert not (tmp_path / "0-seed-0").exists()
