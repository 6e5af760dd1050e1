"""Ending a run early without losing anything: Ctrl-C, SIGTERM, SIGHUP, and `trainer.stop_after`."""

import math
import shlex
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from kpo_cli.errors import RunInterrupted, RunPaused
from kpo_cli.signals import caught
from kpo_cli.terminal import complain


class Stop:
    """True once the run should end: after the first signal that asks for it, or when its time is up.

    Signals are caught within `with stop:`, so that a step can end well. A second Ctrl-C is final; the other signals may
    come any number of times, as from a launcher that passes on what we have got ourselves.
    """

    def __init__(self, seconds: float | None) -> None:
        """`seconds` of wall-clock time from now; None: as long as it takes."""
        self.seconds = seconds
        self._ends = math.inf if seconds is None else time.monotonic() + seconds
        self._signals: list[int] = []
        self._within = ExitStack()

    def __bool__(self) -> bool:
        return bool(self._signals) or time.monotonic() >= self._ends

    def __enter__(self) -> "Stop":
        self._within.enter_context(caught(self._note))
        return self

    def __exit__(self, *exception: object) -> None:
        self._within.close()

    def leave(self, where: str, run: Path) -> None:
        """Raise what ends a run whose state is saved: RunInterrupted after a signal, else RunPaused (no failure)."""
        if self._signals:
            raise RunInterrupted(f"stopped after {where}; go on with: {resume_command(run)}")
        raise RunPaused(
            f"stopped after {where}, trainer.stop_after={self.seconds:g} seconds are over; "
            f"go on with: {resume_command(run)}"
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if self._signals.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        if len(self._signals) == 1:
            complain("kpo: stopping after this step; a second Ctrl-C ends at once, without saving it")


def resume_command(run: Path, *more: str) -> str:
    """What to type to go on with a run, and `more` settings."""
    return shlex.join(["kpo", "train", f"resume={run}", *more])
