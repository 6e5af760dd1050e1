"""Every command that the README, the docs and the help texts print, in the order of the pages."""

import re
import shlex
from pathlib import Path

import yaml
from conftest import REPOSITORY

from kpo_cli.cli.main import app
from kpo_cli.cli.names import conf_dir

BEGINS = re.compile(r"(?:\$ )?((?:kpo|make|pip|bash|while|python|\S+/python) \S.*)")
"""A line of a block that is a command. `kpo:` begins a line that kpo says."""
INLINE = re.compile(r"`((?:kpo (?:train|eval|analyze)|make|pip install|(?:\S+/)?python)\s[^`]+)`")
"""The same in prose. `kpo train` alone is the name of a command there."""
FENCE = re.compile(r"\s*```(\w*)")
SHELLS = ("", "sh", "bash", "console", "shell")
DIAGRAMS = ("kpo train ...",)


def printed() -> list[tuple[str, str]]:
    """(where it stands, command), each command once."""
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    found = [(page.name, command) for page in pages for command in of_page(page.read_text("utf-8"))]
    found += [(f"kpo {name} --help", command) for name in ("train", "eval", "analyze") for command in _of_help(name)]
    found += [("kpo --help", command) for command in _of_main_help()]
    first = {command: where for where, command in reversed(found) if command not in DIAGRAMS}
    return [(where, command) for where, command in found if first.pop(command, None)]


def of_page(text: str) -> list[str]:
    """Commands of a page in Markdown: in its shell blocks, and inline."""
    blocks, prose = _blocks(text)
    lines = [match[1] for line in blocks if (match := BEGINS.match(line))]
    return [_without_comment(line) for line in lines] + [" ".join(m[1].split()) for m in INLINE.finditer(prose)]


def _blocks(text: str) -> tuple[list[str], str]:
    """The lines of indented and fenced blocks of a shell, where a backslash joins lines; and the prose."""
    lines: list[str] = []
    prose: list[str] = []
    language = None
    for line in text.replace("\\\n", " ").splitlines():
        if fence := FENCE.match(line):
            language = fence[1] if language is None else None
        elif language is None and not line.startswith("    "):
            prose.append(line)
        elif language in (None, *SHELLS):
            lines.append(line.strip())
    return lines, "\n".join(prose)


def _without_comment(line: str) -> str:
    return " ".join(re.sub(r"\s# .*", "", line).split())


def _of_help(name: str) -> list[str]:
    """The examples at the foot of a command's help."""
    footer = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text("utf-8"))["hydra"]["help"]["footer"]
    return of_page("\n".join(f"    {line.strip()}" for line in footer.splitlines()))


def _of_main_help() -> list[str]:
    """What the first lines of the commands' help show, and how completion is set up."""
    docs = [command.callback.__doc__ or "" for command in app.registered_commands if command.callback]
    shown = [
        re.sub(r" \[(?:key=value|RUN) \.\.\.\]|\.$", "", m[1])
        for doc in docs
        for m in re.finditer(r"(kpo .*?)(?:\. |\.$)", doc)
    ]
    return [*shown, *re.findall(r"\$\((kpo [^)]*)\)", str(app.info.epilog))]


def words(command: str) -> list[str]:
    """The arguments as a shell hands them on; three dots mean that there may be more."""
    return [word for word in shlex.split(command) if word != "..."]


def is_test(name: str) -> bool:
    """Whether `pytest -k name` finds something."""
    tests = Path(REPOSITORY / "tests").rglob("test_*.py")
    return any(
        re.search(rf"(?:def test_\w*|/test_\w*){name}", f"/{path.name} {path.read_text('utf-8')}") for path in tests
    )
