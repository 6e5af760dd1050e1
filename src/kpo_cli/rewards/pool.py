"""The worker processes, seen from the caller: who has what, until when, and who has to be replaced."""

import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from kpo_cli.rewards.worker import read_message, write_message

Pair = tuple[str, str]
Outcome = tuple[bool, str]

_CHUNK = 16
# Every answer first gets this long. The few that need longer are taken up again when all others are done.
_FIRST_LIMIT_S = 0.5
# Once a batch has lost its whole allowance to slow answers, the others get this long.
_LAST_LIMIT_S = 0.1
# What it takes to kill a grading child and fork another.
_REPLACEMENT_S = 0.05
_START_LIMIT_S = 120.0
# How much later than its own deadline a worker may report before it is taken for dead.
_GRACE_S = 10.0
_MAX_BAD_STARTS = 3
_ROOT = str(Path(__file__).resolve().parents[2])
_COMMAND = f"import sys; sys.path.append({_ROOT!r}); from kpo_cli.rewards.worker import main; main()"


class Worker:
    """One worker process and the chunk it is at."""

    def __init__(self) -> None:
        # A fresh interpreter: nothing of the caller's threads, CUDA contexts or main module comes along. Its own
        # session keeps Ctrl-C away from it, and `-P` keeps files in the current folder from being imported.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.requests = self._process.stdin.fileno()
        self.replies = self._process.stdout.fileno()
        self.pid = self._process.pid
        self.ready = False
        self.chunk: list[int] = []
        self.deadline = time.monotonic() + _START_LIMIT_S

    def send(self, chunk: list[int], pairs: Sequence[Pair], limit: float, memory: int) -> None:
        """Give the worker some of the pairs, by their places."""
        self.chunk = chunk
        self.deadline = time.monotonic() + limit * len(chunk) + _GRACE_S
        message = {"pairs": [pairs[place] for place in chunk], "limit": limit, "memory": memory}
        with contextlib.suppress(OSError):
            write_message(self.requests, message)

    def stop(self) -> None:
        """Kill the worker and whatever it has forked."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self.abandon()

    def abandon(self) -> None:
        """Close our ends of its pipes."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


class Pool:
    """Worker processes that grade pairs; started when first needed and replaced when they die."""

    def __init__(self, workers: int, time_limit_s: float, memory_limit_bytes: int) -> None:
        self._size = workers
        self._time_limit = time_limit_s
        self._memory_limit = memory_limit_bytes
        self._workers: list[Worker] = []
        self._bad_starts = 0
        self._owner = os.getpid()

    @property
    def pids(self) -> list[int]:
        """The process ids of the living workers."""
        return [worker.pid for worker in self._workers]

    def grade(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Outcomes in order. The pairs are tried in the order given, slow ones again at the end.

        All slow answers of a batch together get one time limit more than the others take, so that a batch full of them
        does not stall the caller; an answer that is alone in being slow gets the whole of it.
        """
        if not pairs:
            return []
        if os.getpid() != self._owner:
            # After a fork the workers belong to the parent: leave them to it and start our own.
            for worker in self._workers:
                worker.abandon()
            self._workers, self._owner = [], os.getpid()
        try:
            return self._grade(pairs)
        except BaseException:
            # Interrupted in the middle: the answers still under way must not be taken for those of the next batch.
            self.close()
            raise

    def _grade(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Two rounds, the second for what was slow in the first."""
        outcomes: list[Outcome] = [(False, "timeout")] * len(pairs)
        first = min(_FIRST_LIMIT_S, self._time_limit)
        self._round(pairs, list(range(len(pairs))), first, outcomes)
        slow = [place for place, outcome in enumerate(outcomes) if outcome[1] == "timeout"]
        rest = self._time_limit - (first + _REPLACEMENT_S) * math.ceil(len(slow) / self._size)
        while slow and rest > first:
            turn, slow = slow[: self._size], slow[self._size :]
            started = time.monotonic()
            self._round(pairs, turn, rest, outcomes, chunk=1)
            rest -= time.monotonic() - started
        return outcomes

    def _round(
        self, pairs: Sequence[Pair], places: list[int], limit: float, outcomes: list[Outcome], chunk: int = _CHUNK
    ) -> None:
        """Grade the pairs at these places, each within the limit."""
        waiting = deque(places)
        retried: set[int] = set()
        spent = 0.0
        while waiting or any(worker.chunk for worker in self._workers):
            self._fill(min(self._size, -(-len(waiting) // chunk)))
            for worker in self._workers:
                if worker.ready and not worker.chunk and waiting:
                    # Single answers towards the end, where the slow ones are, keep all workers busy.
                    size = max(1, min(chunk, len(waiting) // (8 * self._size)))
                    current = limit if spent < self._size * self._time_limit else min(limit, _LAST_LIMIT_S)
                    worker.send([waiting.popleft() for _ in range(size)], pairs, current, self._memory_limit)
            for worker, message in self._wait():
                if worker.chunk and message is None:
                    # The supervisor looks into no answer, so that something outside killed it: try once more, alone.
                    for place in worker.chunk:
                        outcomes[place] = (False, "crashed")
                    waiting.extend(place for place in worker.chunk if place not in retried)
                    retried.update(worker.chunk)
                    chunk = 1
                elif worker.chunk and message is not None:
                    for place, (correct, reason) in zip(worker.chunk, message, strict=True):
                        outcomes[place] = (correct, reason)
                        spent += limit if reason == "timeout" else 0.0
                if message is not None:
                    worker.chunk = []

    def _fill(self, wanted: int) -> None:
        """Start workers until there are as many as can be used."""
        if self._bad_starts >= _MAX_BAD_STARTS:
            self._bad_starts = 0
            raise RuntimeError("the grading workers do not start; what they print says why")
        while len(self._workers) < wanted:
            self._workers.append(Worker())

    def _wait(self) -> list[tuple[Worker, list[Outcome] | None]]:
        """What the workers report next; None for one that died or overstayed and has been removed."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            busy = [worker for worker in self._workers if worker.chunk or not worker.ready]
            if not busy:
                return []
            patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            ready = [key.data for key, _ in selector.select(patience)]
        late = [worker for worker in busy if worker not in ready and worker.deadline < time.monotonic()]
        for worker in late:
            self._remove(worker)
        return [(worker, self._receive(worker)) for worker in ready] + [(worker, None) for worker in late]

    def _receive(self, worker: Worker) -> list[Outcome] | None:
        """The message of a worker that has one."""
        try:
            message = read_message(worker.replies)
        except (EOFError, OSError, ValueError):
            self._remove(worker)
            return None
        if not worker.ready:
            worker.ready = True
            self._bad_starts = 0
            return []
        return [(bool(correct), str(reason)) for correct, reason in message]

    def _remove(self, worker: Worker) -> None:
        """Take a worker out."""
        self._bad_starts += not worker.ready
        worker.stop()
        self._workers.remove(worker)

    def close(self) -> None:
        """Stop all workers, unless they are the parent's."""
        for worker in self._workers:
            if os.getpid() == self._owner:
                worker.stop()
            else:
                worker.abandon()
        self._workers = []
