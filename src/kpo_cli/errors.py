"""The exceptions that a user is meant to see: one line, no stack trace."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong and how to mend it."""

    exit_code = 2


class RunStopped(UserError):
    """A run that began well and had to stop. The message says why and how to go on."""

    exit_code = 1


class RunInterrupted(RunStopped):
    """Stopped from outside (Ctrl-C, SIGTERM) after the state was saved."""

    exit_code = 130


class RunPaused(RunStopped):
    """Stopped because it was told to stop after so long, after the state was saved: no failure."""

    exit_code = 0


class SamplingFailed(RunStopped):
    """The sampling engine failed, or cannot be trusted. The policy is intact: a training run saves it and stops."""


@contextmanager
def in_time(seconds: float, otherwise: str) -> Iterator[None]:
    """For what somebody else wrote and we run. Raises UserError if it takes longer.

    By a signal, so in the main thread only; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(number: int, frame: FrameType | None) -> None:
        raise UserError(f"{otherwise} in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
