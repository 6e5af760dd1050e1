"""What is saved, and what a run that has to stop leaves behind: the last whole step.

A step is whole when all its optimizer steps were made and its progress is known. Whatever fails in between, be it the
sampler, the device's memory, the weights or the disk, the run ends with one line: either the last whole step is saved,
or some mini-batches of the failed one have changed the weights already, and the line says which steps are lost.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from kpo_cli.config import TrainerConfig
from kpo_cli.errors import RunStopped
from kpo_cli.policy.load import Policy
from kpo_cli.policy.memory import LESS_MEMORY, lacks_memory
from kpo_cli.policy.sharding import full
from kpo_cli.runs.checkpoints import NotSaved, Progress, checkpoints, is_damaged, save_checkpoint
from kpo_cli.runs.directory import RunDir, first_line
from kpo_cli.training.stopping import resume_command

FAILURES = (RunStopped, RuntimeError, MemoryError, OSError, SafetensorError)
"""What may happen to a run that is right; an OSError is a full disk, in most cases."""


def _reason(error: Exception) -> str | None:
    """Why the run has to stop; None for RuntimeErrors of another kind, which are faults of ours."""
    if isinstance(error, RunStopped):
        return str(error)
    if lacks_memory(error):
        return f"out of memory; {LESS_MEMORY}"
    return None if isinstance(error, RuntimeError) else first_line(error)


class Saver:
    """Writes the checkpoints of a run."""

    def __init__(self, run: RunDir, policy: Policy, optimizer: torch.optim.Optimizer, config: TrainerConfig) -> None:
        self.run, self.policy, self.optimizer, self.config = run, policy, optimizer, config
        self._steps = 0
        optimizer.register_step_pre_hook(self._stepping)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; what fails stops the run as everything else does."""
        with self.keeping(progress, f"saving {progress.label}"):
            self._write(progress)

    @contextmanager
    def keeping(self, whole: Progress, doing: str) -> Iterator[None]:
        """Around anything that may fail: then `whole`, where the run stood before, is saved if it is still there.

        `whole` must not change within the block. Raises RunStopped, which says why, what is lost and how to go on.
        """
        steps, full = self._steps, False
        try:
            yield
            return
        except FAILURES as error:
            reason, full = _reason(error), isinstance(error, NotSaved)
            if reason is None:
                raise
        # Out of the handler, so that what the failed pass held is not kept alive by the error's traceback.
        gc.collect()
        torch.cuda.empty_cache()
        outcome = self._lost() if full or self._steps > steps else self._saved(whole)
        raise RunStopped(f"{doing}: {reason}; {outcome}")

    def _saved(self, whole: Progress) -> str:
        """Save `whole` unless it is the beginning, or there already."""
        begun = whole.step > 0 or whole.supervised_step != (0 if self.config.supervised.steps else None)
        if begun and is_damaged(self.run.path / "checkpoints" / whole.label):
            if not all(full(p.sum()).isfinite() for p in self.policy.model.parameters()):
                return f"its weights are not finite and not saved; {self._lost()}"
            try:
                self._write(whole)
            except FAILURES as error:
                if _reason(error) is None:
                    raise
                return f"saving {whole.label} failed as well ({first_line(error)}); {self._lost()}"
        return f"what there is is saved, go on with: {self._resume}"

    def _lost(self) -> str:
        found = [path.name for path in checkpoints(self.run.path)]
        if not found:
            return f"there is no checkpoint yet, so begin again with: {self._resume}"
        return f"everything after {found[-1]} is lost, go on from there with: {self._resume}"

    def _write(self, progress: Progress) -> None:
        # For readers of the checkpoint alone; a resumed run has the same two numbers in its config.yaml.
        schedule = {"lr": self.config.lr, "warmup_steps": self.config.warmup_steps}
        keep = self.config.keep_checkpoints, self.config.keep_optimizer
        save_checkpoint(self.run.path, self.policy, self.optimizer, progress, schedule, *keep)

    @property
    def _resume(self) -> str:
        return resume_command(self.run.path)

    def _stepping(self, *arguments: Any) -> None:
        """The weights change in an optimizer step and nowhere else."""
        self._steps += 1
