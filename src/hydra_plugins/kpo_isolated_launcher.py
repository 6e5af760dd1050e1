"""The default launcher of `-m`: one process a job, one after the other, failures reported at the end.

Hydra's basic launcher runs all jobs in one process, where one failing job ends the sweep and settings such as the
number of threads leak from job to job. Other launchers (`hydra/launcher=submitit_slurm`, ...) work as ever.

Hydra finds launchers only in a package called `hydra_plugins`, which is why this file stands apart from the rest.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from kpo_cli.errors import UserError


class SweepFailed(UserError):
    """Some jobs of a sweep failed; the others are finished."""


@dataclass
class IsolatedLauncherConfig:
    _target_: str = "hydra_plugins.kpo_isolated_launcher.IsolatedLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="isolated", node=IsolatedLauncherConfig, provider="kpo")


class IsolatedLauncher(Launcher):
    def __init__(self) -> None:
        self.command: list[str] = []
        self.sweep_dir = Path()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from kpo_cli.cli.compose import split_arguments

        # kpo set sys.argv to ["kpo train", options ..., overrides ...]; a job gets the same options but for -m.
        flags, _ = split_arguments(sys.argv[1:])
        self.command = [sys.argv[0].split()[-1], *(flag for flag in flags if flag not in ("-m", "--multirun"))]
        self.sweep_dir = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        jobs = [list(filter_overrides(overrides)) for overrides in job_overrides]
        common = set(jobs[0]).intersection(*jobs)
        failed: list[str] = []
        for number, overrides in enumerate(jobs, initial_job_idx):
            label = " ".join(override for override in overrides if override not in common)
            run_dir = self._run_dir(number, overrides, label)
            print(f"[{number + 1 - initial_job_idx}/{len(jobs)}] {label} -> {run_dir}", flush=True)
            code = self._run(overrides, run_dir)
            if code in (-signal.SIGINT, 128 + signal.SIGINT):
                raise KeyboardInterrupt
            if code:
                failed.append(f"failed with exit code {code}: {label} -> {run_dir}")
        print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
        if failed:
            raise SweepFailed(f"{len(failed)} of {len(jobs)} jobs failed, {len(jobs) - len(failed)} finished")
        return [JobReturn(overrides=job, status=JobStatus.COMPLETED) for job in jobs]

    def _run_dir(self, number: int, overrides: list[str], label: str) -> Path:
        from kpo_cli.cli.compose import value_of

        own = [value_of(override) for override in overrides if override.startswith(("run_dir=", "resume="))]
        if own:
            return Path(own[-1])
        # No "=" and no ",": the directory is going to be an argument of other commands, where they mean something.
        readable = "".join(c if c.isalnum() or c in ".-_" else "_" for c in label.replace("=", "-"))[:100]
        return self.sweep_dir / (f"{number}-{readable}" if readable else str(number))

    def _run(self, overrides: list[str], run_dir: Path) -> int:
        from kpo_cli.cli.compose import SHOW_TRACES, quote_value

        job = [override for override in overrides if not override.startswith("run_dir=")]
        if not any(override.startswith("resume=") for override in overrides):
            job.append(f"run_dir={quote_value(str(run_dir))}")
        environment = {**os.environ, "HYDRA_FULL_ERROR": "1" if SHOW_TRACES else "0"}
        command = [sys.executable, "-m", "kpo_cli", *self.command, *job]
        return subprocess.run(command, check=False, env=environment).returncode
