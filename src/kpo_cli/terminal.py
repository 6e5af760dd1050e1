"""What is printed, and where it goes: text of any origin, to a terminal or pipe of any encoding, width and fate.

Everything that the commands print goes through here: `say` and `show` to stdout, `complain` to stderr.
"""

import io
import os
import re
import select
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

LEAST_WIDTH = 60
"""Columns of a table; on a narrower terminal its lines run on, which can be read, instead of being cut."""

# Controls but for tab and newline, line and paragraph separators, what turns the direction of writing, half characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with whatever a terminal would obey, or could not show, written as an escape: \\x1b."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def counted(count: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def make_console(width_of_files: int = 80) -> "Console":
    """As wide as the terminal; `width_of_files` columns where there is none."""
    from rich.console import Console

    console = Console(highlight=False)
    width = console.width if console.is_terminal or os.environ.get("COLUMNS") else width_of_files
    return Console(highlight=False, width=max(width, LEAST_WIDTH))


def text_of(text: str) -> "Text":
    """For cells and labels: neither markup nor codes of the terminal are the text's to use."""
    from rich.text import Text

    return Text(printable(text))


def say(console: "Console", text: str = "", *, wrap: bool = False) -> None:
    """A line on stdout; `wrap`: prose, broken to the width."""
    console.print(text_of(text), soft_wrap=not wrap)


def show(console: "Console", table: "RenderableType") -> None:
    """A table whose cells are `text_of` something."""
    console.print(table)


def complain(text: str) -> None:
    """A line on stderr, in one write, so that it may be said from within a signal's handler."""
    line = f"{printable(text)}\n"
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except RuntimeError:  # the signal came while stderr was being written
        os.write(2, line.encode("utf-8", "backslashreplace"))


class _Lasting(io.FileIO):
    """A descriptor for writing. Once its reader has gone, or its disk is full, what is written is dropped."""

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # it does not block, and is full
                select.select([], [self], [])
        except OSError:
            return len(data)
        return count


def settle_streams() -> None:
    """Make stdout and stderr take any text and outlive their readers; open those that are closed.

    A descriptor that is closed would be given to the next file opened, and what is printed would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # else whoever runs us has put something of its own there
            setattr(sys, name, _lasting(descriptor, stream))


def _lasting(descriptor: int, stream: Any) -> io.TextIOWrapper:
    encoding, by_line, through = "utf-8", False, False
    if stream is not None:
        encoding, by_line, through = stream.encoding, stream.line_buffering, stream.write_through
    raw = io.BufferedWriter(_Lasting(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=by_line, write_through=through)
