"""How much may be computed for one answer: counted work, the same on every machine, and processor time behind it."""

import time

# About the multiplications of sixty-digit numbers that fit into half a second. Ordinary answers need a few hundred.
UNITS = 100_000
# Of the thread that grades, and far more than the units ever take: it only catches an operation that is counted wrong.
SECONDS = 30.0
_DIGITS = 60
# The clock is a call of the system, so it is looked at now and then.
_LOOK_EVERY = 200


class LimitReached(Exception):
    """The answer takes more work than one answer may."""


class TimeReached(Exception):
    """The answer takes more processor time than its counted work can explain."""


class Work:
    """What is left for one answer."""

    def __init__(self, units: float = UNITS, seconds: float = SECONDS) -> None:
        self.left = units
        self._end = time.thread_time() + seconds
        self._look = units

    def charge(self, operations: float, digits: int = _DIGITS) -> None:
        """Pay for operations on numbers of so many digits; raises `LimitReached` or `TimeReached`."""
        self.left -= operations if digits <= _DIGITS else operations * (digits / _DIGITS) ** 1.6
        if self.left < 0:
            raise LimitReached
        if self.left < self._look:
            self._look = self.left - _LOOK_EVERY
            if time.thread_time() > self._end:
                raise TimeReached
