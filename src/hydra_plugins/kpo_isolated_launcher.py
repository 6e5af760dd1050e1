"""The default launcher of `-m`: one process a job, one after the other, failures reported at the end.

Hydra's basic launcher runs all jobs in one process, where one failing job ends the sweep and settings such as the
number of threads leak from job to job. Other launchers (`hydra/launcher=submitit_slurm`, ...) work as ever.

What asks the sweep to end is passed on to its job, which saves and stops; the same command goes on from there.

Hydra finds launchers only in a package called `hydra_plugins`, which is why this file stands apart from the rest.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kpo_cli.errors import RunInterrupted, UserError
from kpo_cli.signals import ENDING, LAUNCHER, caught
from kpo_cli.terminal import complain, make_console, say


class SweepFailed(UserError):
    """Some jobs of a sweep failed; the others are finished."""


@dataclass
class IsolatedLauncherConfig:
    _target_: str = "hydra_plugins.kpo_isolated_launcher.IsolatedLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="isolated", node=IsolatedLauncherConfig, provider="kpo")


@dataclass
class Job:
    """A point of the sweep."""

    label: str
    run_dir: Path
    command: list[str]
    """What to type after `kpo`."""

    @property
    def begun(self) -> bool:
        """There is a run that this very command has made."""
        try:
            manifest = json.loads((self.run_dir / "manifest.json").read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(manifest, dict) and manifest.get("command") == shlex.join(["kpo", *self.command])

    @property
    def finished(self) -> bool:
        return self.begun and (self.run_dir / "summary.json").is_file()


class Process:
    """A job's process, and what happens to it when we are asked to end.

    The first time it is told to save and stop. From a terminal it hears so itself, and it must not mind being told
    twice: so Ctrl-C is passed on as SIGTERM, of which it may get any number. A second Ctrl-C kills it.
    """

    def __init__(self) -> None:
        self.running: subprocess.Popen[bytes] | None = None
        self.signals: list[int] = []

    def run(self, arguments: list[str]) -> int:
        """The exit code of `kpo arguments`."""
        from kpo_cli.cli.compose import SHOW_TRACES

        environment = {**os.environ, "HYDRA_FULL_ERROR": "1" if SHOW_TRACES else "0", LAUNCHER: str(os.getpid())}
        self.running = subprocess.Popen([sys.executable, "-m", "kpo_cli", *arguments], env=environment)
        if self.signals:  # it came while the process was made
            self.running.send_signal(signal.SIGTERM)
        code = self.running.wait()
        self.running = None
        return code

    def end(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        if self.running is not None:
            self.running.send_signal(signal.SIGKILL if self.signals.count(signal.SIGINT) > 1 else signal.SIGTERM)


class IsolatedLauncher(Launcher):
    def __init__(self) -> None:
        self.command: list[str] = []
        self.sweep_dir = Path()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from kpo_cli.cli.grammar import MULTIRUN, split_arguments

        # kpo set sys.argv to ["kpo train", options ..., overrides ...]; a job gets the same options but for -m.
        flags, _ = split_arguments(sys.argv[1:])
        self.command = [sys.argv[0].split()[-1], *(flag for flag in flags if flag not in MULTIRUN)]
        self.sweep_dir = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        overrides = [list(filter_overrides(overrides)) for overrides in job_overrides]
        if not overrides:
            raise UserError("the sweep has no jobs: its glob() matches nothing")
        common = set(overrides[0]).intersection(*overrides)
        jobs = [self._job(number, one, common) for number, one in enumerate(overrides, initial_job_idx)]
        process, console, fates = Process(), make_console(), dict.fromkeys(range(len(jobs)), "not begun")
        with caught(process.end):
            for place, job in enumerate(jobs):
                say(console, f"[{place + 1}/{len(jobs)}] {job.label} -> {job.run_dir}{_again(job)}")
                fates[place] = _fate(job, process)
                if process.signals or fates[place] == "stopped":
                    break
        interrupted = bool(process.signals) or "stopped" in fates.values()
        _report(jobs, list(fates.values()), _same_command(self.sweep_dir) if interrupted else None)
        return [JobReturn(overrides=one, status=JobStatus.COMPLETED) for one in overrides]

    def _job(self, number: int, overrides: list[str], common: set[str]) -> Job:
        from kpo_cli.cli.grammar import value_of
        from kpo_cli.cli.texts import literal

        label = " ".join(override for override in overrides if override not in common)
        own = [override for override in overrides if override.startswith(("run_dir=", "resume="))]
        if own:
            return Job(label, Path(os.path.expanduser(value_of(own[-1]))), [*self.command, *overrides])
        # No "=" and no ",": the directory is going to be an argument of other commands, where they mean something.
        readable = "".join(c if c.isalnum() or c in ".-_" else "_" for c in label.replace("=", "-"))[:100]
        run_dir = self.sweep_dir / (f"{number}-{readable}" if readable else str(number))
        return Job(label, run_dir, [*self.command, *overrides, f"run_dir={literal(str(run_dir))}"])


def _again(job: Job) -> str:
    return ", finished before" if job.finished else ", goes on" if job.begun else ""


def _fate(job: Job, process: Process) -> str:
    """Run a job, or what is left of it, and say how it ended."""
    from kpo_cli.cli.texts import literal

    if job.finished:
        return "finished"
    goes_on = job.command[0] == "train" and job.begun
    code = process.run(["train", f"resume={literal(str(job.run_dir))}"] if goes_on else job.command)
    asked = code == RunInterrupted.exit_code or -code in ENDING
    if asked or (code == -signal.SIGKILL and process.signals):  # else somebody killed it, for want of memory say
        return "stopped"
    return f"failed with exit code {code}" if code else "finished"


def _report(jobs: list[Job], fates: list[str], again: str | None) -> None:
    """Say how the jobs ended; raises SweepFailed, or RunInterrupted with `again`, unless all are finished."""
    finished, interrupted = fates.count("finished"), again is not None
    for job, fate in zip(jobs, fates, strict=True):
        if fate != "finished" or (interrupted and finished < len(jobs)):
            complain(f"{fate}: {job.label} -> {job.run_dir}")
    failed = sum(fate.startswith("failed") for fate in fates)
    if interrupted and finished + failed < len(jobs):
        counts = ", ".join(f"{fates.count(fate)} {fate}" for fate in ("finished", "stopped", "not begun"))
        failures = f", {failed} failed" if failed else ""
        raise RunInterrupted(f"sweep stopped: of {len(jobs)} jobs {counts}{failures}; go on with: {again}")
    if failed:
        raise SweepFailed(f"{failed} of {len(jobs)} jobs failed, {finished} finished")


def _same_command(sweep_dir: Path) -> str:
    """The sweep's own command as it was typed, and where the sweep is: it goes on where it was stopped."""
    from kpo_cli.cli import compose
    from kpo_cli.cli.texts import literal

    arguments = list(compose.typed)
    if not any(argument.startswith("run_dir=") for argument in sys.argv):  # else every job has its own
        arguments = [a for a in arguments if not a.startswith(("run_dir=", "hydra.sweep.dir="))]
        plain = re.fullmatch(r"[\w./-]+", str(sweep_dir))
        arguments.append(f"run_dir={sweep_dir if plain else literal(str(sweep_dir))}")
    return shlex.join(["kpo", *sys.argv[0].split()[1:], *arguments])
