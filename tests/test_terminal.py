"""What is printed: text of any origin, to a terminal or pipe of any encoding, width and fate."""

import io
import os
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

from kpo_cli.analysis.report.tables import Table
from kpo_cli.evaluation.results import rich_table
from kpo_cli.terminal import counted, printable, say, show, text_of
from kpo_cli.training.display import Display

NASTY = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\x08e\rf\x7fg\u202eh\u2028i\x00j\u2066k\ud800l"
PROBE = """
import sys
from kpo_cli.terminal import complain, make_console, say, settle_streams, show
settle_streams()
from rich.table import Table
table = Table("one", "two")
table.add_row("Gr\\xf6\\xdfe", "x" * 30)
for _ in range(int(sys.argv[1])):
    say(make_console(), "Gr\\xf6\\xdfe \\x1b[31m " + "word " * 40)
show(make_console(), table)
complain("\\xfc\\x1b")
with open(sys.argv[2], "w") as file:
    file.write("went on")
sys.exit(3)
"""


def obeyed(text: str) -> list[str]:
    """Characters that a terminal acts on, by Unicode's own categories and not by ours."""
    turning = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    acting = [c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") and c not in "\n\t"]
    return acting + [c for c in text if unicodedata.bidirectional(c) in turning]


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_is_printed_is_obeyed(terminal: bool):
    """Neither codes of the terminal nor rich's markup and emoji names; tables as well as lines."""
    text = f"{NASTY} [bold]x[/bold] :smile: [/]"
    for put in (
        lambda console: say(console, text),
        lambda console: say(console, text, wrap=True),
        lambda console: Display(3, console).say(text),
        lambda console: Display(3, console).warn_once(text),
        lambda console: show(console, rich_table(text, [text], [[text]])),
        lambda console: show(console, Table(text, [text], [[text]], text).for_terminal()),
    ):
        console = Console(file=io.StringIO(), width=400, force_terminal=terminal, color_system=None, highlight=False)
        put(console)
        out = console.file.getvalue()  # type: ignore[attr-defined]
        assert obeyed(out) == []
        assert "\\x1b[2Jb" in out
        assert "[bold]x[/bold] :smile: [/]" in out
    assert str(text_of(NASTY)) == printable(NASTY)


def test_counts():
    assert [counted(n, "step") for n in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]


def probe(tmp_path: Path, lines: int = 1, **options: object) -> subprocess.CompletedProcess:
    """The probe went on to its end, with its own exit code and no traceback."""
    out = tmp_path / "out"
    out.unlink(missing_ok=True)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    done = subprocess.run([sys.executable, "-c", PROBE, str(lines), str(out)], check=False, timeout=60, **options)
    assert done.returncode == 3, done
    assert out.read_text() == "went on"
    assert b"Traceback" not in (done.stderr or b"")
    return done


@pytest.mark.parametrize(
    ("changed", "size"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, "Größe".encode("latin-1")),
        ({"PYTHONIOENCODING": "ascii:strict"}, b"Gr\\xf6\\xdfe"),
        ({"PYTHONIOENCODING": "cp437"}, "Größe".encode("cp437")),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"Gr\\xf6\\xdfe"),
        ({"LC_ALL": "POSIX"}, "Größe".encode()),
        ({"COLUMNS": "20"}, "Größe".encode()),
        ({"COLUMNS": "1"}, "Größe".encode()),
        ({"COLUMNS": "0"}, "Größe".encode()),
        ({"COLUMNS": "wide", "TERM": "dumb"}, "Größe".encode()),
    ],
    ids=str,
)
def test_encodings_and_widths(changed: dict[str, str], size: bytes, tmp_path: Path):
    done = probe(tmp_path, env={**os.environ, **changed})
    assert size in done.stdout
    assert b"x" * 30 in done.stdout  # whole, however narrow
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"\\x1b" in done.stderr


def test_a_reader_that_leaves(tmp_path: Path):
    """More than a pipe holds, so that it is written into after the reader has gone."""
    for name in ("stdout", "stderr"):
        read, write = os.pipe()
        os.close(read)
        probe(tmp_path, 500, **{name: write})
        os.close(write)


def test_a_full_disk_and_a_terminal_that_is_gone(tmp_path: Path):
    with open("/dev/full", "wb") as full:
        probe(tmp_path, 500, stdout=full, stderr=full)
    ours, theirs = pty.openpty()
    os.close(ours)  # a closed window: writing fails with EIO
    probe(tmp_path, 3, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)


def test_a_pipe_that_does_not_block(tmp_path: Path):
    """Another program may have set it so on a terminal that is shared; what does not fit waits, and nothing is lost."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", PROBE, "2000", str(out)], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    with open(read, "rb") as file:
        content = file.read()
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert content.count("Größe".encode()) == 2001


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_closed_descriptors(closed: str, tmp_path: Path):
    """Nothing that is printed may end up in the next file that is opened."""
    out = tmp_path / "out"
    shut = " ".join(f"{number}>&-" for number in closed)
    command = f'exec "$0" -c "$1" 3 "$2" {shut}'
    done = subprocess.run(["bash", "-c", command, sys.executable, PROBE, str(out)], check=False, capture_output=True)
    assert done.returncode == 3, done
    assert out.read_text() == "went on"
