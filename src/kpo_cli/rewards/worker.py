"""A grading worker: a supervisor process that grades in a child it can kill.

The supervisor imports math-verify once and never looks into an answer itself. Answers are graded by a forked child
under an address-space limit; one that passes its deadline is killed and the next one forked, which costs
milliseconds where a fresh interpreter would cost a second. Messages are JSON with a four-byte length before it, on the
standard streams towards the caller and on a socket towards the child.
"""

import ctypes
import json
import logging
import os
import resource
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

from kpo_cli.rewards.verdict import FAILURES

_PR_SET_PDEATHSIG = 1
_RECURSION_LIMIT = 20_000
# Answers are data: whatever a parser may be talked into, a grading child opens nothing for writing and starts nothing.
_DENIED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "subprocess.",
    "socket.",
    "shutil.",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def write_message(descriptor: int, message: Any) -> None:
    """Send one message."""
    data = json.dumps(message).encode()
    view = memoryview(struct.pack("!I", len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def read_message(descriptor: int) -> Any:
    """Receive one message; raises `EOFError` if the other side is gone."""
    (length,) = struct.unpack("!I", _read_exactly(descriptor, 4))
    return json.loads(_read_exactly(descriptor, length))


def _read_exactly(descriptor: int, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = os.read(descriptor, length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


class Child:
    """A forked process that grades one pair at a time."""

    def __init__(self, memory_limit: int) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _serve_child(theirs.fileno(), memory_limit)
        theirs.close()
        self._socket = ours

    def grade(self, pair: list[str], limit: float, caller: int) -> tuple[bool, str]:
        """The verdict on a pair; after a failure the child is of no more use."""
        try:
            write_message(self._socket.fileno(), pair)
            ready, _, _ = select.select([self._socket.fileno(), caller], [], [], limit)
            if caller in ready:
                # The caller never speaks while it waits, so this is the end of its stream.
                self.kill()
                os._exit(0)
            if self._socket.fileno() not in ready:
                return False, "timeout"
            correct, reason = read_message(self._socket.fileno())
            return bool(correct), str(reason)
        except (EOFError, OSError):
            return False, "crashed"

    def kill(self) -> None:
        """Stop and bury the child."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._socket.close()


def _serve_child(descriptor: int, memory_limit: int) -> NoReturn:
    """Grade pairs until the socket closes. Never returns."""
    try:
        alarm = _peak_memory() + memory_limit // 4
        _confine(memory_limit)
        from kpo_cli.rewards.judging import grade_pair

        while True:
            gold, answer = read_message(descriptor)
            correct, reason = grade_pair(gold, answer)
            if not correct and _peak_memory() > alarm:
                # The libraries swallow the error of a failed allocation, so "different" means nothing here.
                reason = "memory"
            write_message(descriptor, [correct, reason])
    except BaseException:
        os._exit(1)


def _confine(memory_limit: int) -> None:
    """Limit what the child can take, and deny what no grading needs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_limit, used + memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(_RECURSION_LIMIT)
    sys.dont_write_bytecode = True
    sys.addaudithook(_deny)


def _peak_memory() -> int:
    """The largest address space this process has had, in bytes; zero where the system does not say."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text("utf-8", "replace").split("\n")
    line = next(line for line in lines if line.startswith("VmPeak"))
    return int(line.split()[1]) * 1024


def _deny(event: str, args: tuple[Any, ...]) -> None:
    if event.startswith(_DENIED) or (event == "open" and isinstance(args[2], int) and args[2] & _WRITING):
        raise PermissionError(f"an answer may not cause {event}")


def serve(requests: int, replies: int) -> None:
    """Answer requests until the caller is gone."""
    child: Child | None = None
    while True:
        request = read_message(requests)
        verdicts = []
        for pair in request["pairs"]:
            child = child or Child(request["memory"])
            verdict = child.grade(pair, request["limit"], requests)
            if verdict[1] in FAILURES:
                child.kill()
                child = None
            verdicts.append(verdict)
        write_message(replies, verdicts)


def main() -> None:
    """Start up, announce it, and serve on what were the standard streams."""
    replies = os.dup(1)
    # Nothing a library prints may get between the messages.
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    from kpo_cli.rewards.judging import warm_up

    warm_up()
    try:
        write_message(replies, "ready")
        serve(0, replies)
    except (EOFError, OSError):
        pass


if __name__ == "__main__":
    main()
