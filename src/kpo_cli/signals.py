"""Signals that ask a process to end: Ctrl-C, SIGTERM, and SIGHUP, which a closed terminal sends."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
LAUNCHER = "KPO_LAUNCHER"
"""The environment's name for the process id of the sweep that a job belongs to."""


@contextmanager
def caught(handler: Handler) -> Iterator[None]:
    """Within the block `handler` gets what asks to end, but for what whoever started us had ignored, as nohup does."""
    before = {number: signal.getsignal(number) for number in ENDING}
    for number in ENDING:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def interrupting() -> Handler:
    """A handler that raises KeyboardInterrupt: each time for Ctrl-C, and once for the others.

    A launcher passes on what the terminal has sent to us as well, which is not to cut short what is being cleaned up.
    """
    seen: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if number == signal.SIGINT or len(seen) == 1:
            raise KeyboardInterrupt

    return end


def end_with(parent: int) -> None:
    """Get a SIGTERM when the process `parent` ends, however it ends. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before we asked
            os.kill(os.getpid(), signal.SIGTERM)
