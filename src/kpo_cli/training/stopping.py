"""Ending a run early without losing anything: Ctrl-C, SIGTERM, and `trainer.stop_after`."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from kpo_cli.errors import RunInterrupted, RunPaused


class Stop:
    """True once the run should end: after the first Ctrl-C or SIGTERM, or when its time is up.

    Signals are caught within `with stop:`, so that a step can end well; the second one is final.
    """

    def __init__(self, seconds: float | None) -> None:
        """`seconds` of wall-clock time from now; None: as long as it takes."""
        self.seconds = seconds
        self._ends = math.inf if seconds is None else time.monotonic() + seconds
        self._signalled = False
        self._handlers: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __bool__(self) -> bool:
        return self._signalled or time.monotonic() >= self._ends

    def __enter__(self) -> "Stop":
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def leave(self, where: str, run: Path) -> None:
        """Raise what ends a run whose state is saved: RunInterrupted after a signal, else RunPaused (no failure)."""
        if self._signalled:
            raise RunInterrupted(f"stopped after {where}; go on with: kpo train resume={run}")
        raise RunPaused(
            f"stopped after {where}, trainer.stop_after={self.seconds:g} seconds are over; "
            f"go on with: kpo train resume={run}"
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
