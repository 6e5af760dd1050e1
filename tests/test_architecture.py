"""Who may import whom (docs/architecture.md), read off the import statements."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import REPOSITORY

SOURCE = REPOSITORY / "src"
PACKAGE = "kpo_cli"


class Import(NamedTuple):
    file: str
    line: int
    module: str
    lazy: bool
    """Inside a function, or for the type checker only: it costs nothing at import."""


def imports_of(path: Path) -> Iterator[Import]:
    """The modules that a file imports; `from a import b` counts as `a.b` where that is a module of ours."""
    name = path.relative_to(SOURCE).as_posix()
    package = list(path.relative_to(SOURCE).with_suffix("").parts[:-1])

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(name, child.lineno, alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield Import(
                        name, child.lineno, f"{module}.{alias.name}" if is_module(module, alias.name) else module, lazy
                    )
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, lazy or inside or types_only)

    yield from walk(ast.parse(path.read_text("utf-8")), False)


def is_module(package: str, name: str) -> bool:
    folder = SOURCE.joinpath(*package.split("."))
    return package.split(".")[0] == PACKAGE and ((folder / f"{name}.py").is_file() or (folder / name).is_dir())


def files_of(part: str) -> list[Path]:
    """The files of a room or module of ours, named from the package's top: `policy`, `runs/directory`."""
    base = SOURCE / PACKAGE / part
    found = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    assert found
    assert all(path.is_file() for path in found), part
    return found


def imports(part: str) -> list[Import]:
    return [found for path in files_of(part) for found in imports_of(path)]


def ours(found: Import) -> str | None:
    """The room of ours that is imported: `training`, `config`, ... ("" for the package itself)."""
    first, *rest = found.module.split(".")
    return (rest[0] if rest else "") if first == PACKAGE else None


def top(found: Import) -> str:
    return found.module.split(".")[0]


ROOMS = {
    path.stem for path in (SOURCE / PACKAGE).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
} - {"__init__", "__main__"}
FLOORS = (
    {"cli"},
    {"training", "analysis"},
    {"evaluation"},
    {"rollout"},
    {"policy"},
    {"builtin"},
    {"data"},
    {"rewards", "runs", "intervals"},
    {"config"},
    {"terminal"},
    {"core", "errors", "signals"},
)
"""A room imports from the floors below its own, and from no other room on its own."""
WINGS = ("compare", "report", "statistics")
"""Of `analysis`, the same way."""


def test_the_reader_of_imports_sees_them():
    """The tests below pass on whatever is not seen."""
    cli = list(imports_of(SOURCE / PACKAGE / "cli" / "main.py"))
    assert ("kpo_cli.errors", False) in {(found.module, found.lazy) for found in cli}
    assert ("kpo_cli.training.main", True) in {(found.module, found.lazy) for found in cli}
    assert {"core", "config", "data", "runs"} <= {ours(found) for found in imports("training")}


def test_every_room_has_a_floor():
    assert set().union(*FLOORS) == ROOMS
    assert sum(map(len, FLOORS)) == len(ROOMS)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_from_the_floors_below(room: str):
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    below = set().union(*FLOORS[floor + 1 :])
    assert [found for found in imports(room) if ours(found) not in {None, room, *below}] == []


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_of_analysis_imports_from_those_below(wing: str):
    above = WINGS[: WINGS.index(wing)]
    assert [
        f for f in imports(f"analysis/{wing}") if f.module.startswith(tuple(f"kpo_cli.analysis.{w}" for w in above))
    ] == []


def test_no_modules_import_each_other_in_a_circle():
    """Late imports count: what needs one to escape a circle is in the wrong room."""
    graph: dict[str, set[str]] = {}
    for path in (SOURCE / PACKAGE).rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        graph[name] = {found.module for found in imports_of(path) if ours(found) is not None} - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_core_imports_torch_and_itself():
    """And, inside the functions that have a faster way with them, what may not be installed."""
    allowed = {"torch", PACKAGE, *sys.stdlib_module_names}
    wrong = [
        found
        for found in imports("core")
        if top(found) not in allowed and not (top(found) in ("numba", "triton", "numpy") and found.lazy)
    ]
    assert wrong == []


def test_the_command_line_imports_nothing_heavy():
    allowed = {"typer", PACKAGE, *sys.stdlib_module_names}
    eager = [found for found in imports("cli/main") + imports("__main__") + imports("__init__") if not found.lazy]
    assert [found for found in eager if top(found) not in allowed] == []
    assert {ours(found) for found in eager} <= {None, "cli", "errors", "signals", "terminal"}


def test_configuration_is_plain_python():
    found = imports("config")
    assert {top(each) for each in found} <= {PACKAGE, *sys.stdlib_module_names}
    assert {ours(each) for each in found} <= {None, "errors"}


def test_errors_import_nothing_of_ours():
    assert {ours(found) for found in imports("errors")} <= {None}


@pytest.mark.parametrize("part", ["config", "cli", "runs/directory", "runs/samples", "errors"])
def test_what_reads_the_command_imports_no_torch(part: str):
    """So that a mistyped key is answered before a second is spent on imports. Tensors of a run's files are read in
    runs/ratios and runs/checkpoints, which no command line needs."""
    assert [found for found in imports(part) if top(found) in ("torch", "transformers")] == []
    eager = {ours(found) for found in imports(part) if not found.lazy}
    assert eager <= {None, "cli", "config", "errors", "runs", "signals", "terminal"}
    assert not {f"kpo_cli.runs.{name}" for name in ("ratios", "checkpoints")} & {f.module for f in imports(part)}


def test_rewards_know_only_errors():
    """Whoever wants the grader alone takes the folder."""
    assert {ours(found) for found in imports("rewards")} <= {None, "rewards", "errors"}


def test_analysis_reads_files_only():
    """It works on run directories, without a model and without the code that made them."""
    assert {ours(found) for found in imports("analysis")} <= {
        None,
        "analysis",
        "runs",
        "intervals",
        "config",
        "core",
        "errors",
        "terminal",
    }


def test_no_import_goes_to_a_module_that_is_not_there():
    for path in (SOURCE / PACKAGE).rglob("*.py"):
        for found in imports_of(path):
            if ours(found):
                target = SOURCE.joinpath(*found.module.split("."))
                assert target.with_suffix(".py").is_file() or target.is_dir(), found


# --- what files and terminals are given


def calls(path: Path) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))


def called(call: ast.Call) -> str:
    """The last name of what is called: `open` for open(...) and for path.open(...)."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def in_the_locales_encoding(call: ast.Call) -> bool:
    """Reads or writes text without naming its encoding; a mode with a b, or a name that is not Python's, is none."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name, method = called(call), isinstance(call.func, ast.Attribute)
    if name in ("read_text", "write_text"):
        # As a method of a path; our own functions of these names know UTF-8 only.
        return method and len(call.args) < (1 if name == "read_text" else 2) and "encoding" not in given
    if name in ("run", "Popen", "check_output"):
        return "text" in given or "universal_newlines" in given
    if name not in ("open", "fdopen") or (method and getattr(call.func, "value", None) is None):
        return False
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if name == "open" and getattr(owner, "id", "") in ("os", "RunDir", "cls"):
        return False
    mode = given.get("mode") or next(iter(call.args[0 if method and name == "open" else 1 :]), None)
    binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
    return not binary and "encoding" not in given


WHOLE_LINES = {"kpo_cli/runs/directory.py": 1}
"""Where splitlines() is right: the first line of an error's text."""


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_the_reader_of_calls_sees_them():
    wrong = ("p.read_text()", "p.write_text(t)", "open(p)", "p.open('w')", "open(p, 'a')", "run(c, text=True)")
    right = ("p.read_text('utf-8')", "p.open('rb')", "open(p, encoding='utf-8')", "os.open(p, f)", "write_text(p, t)")
    for source, expected in [*((s, True) for s in wrong), *((s, False) for s in right)]:
        (call,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        assert in_the_locales_encoding(call) is expected, source


def test_texts_are_utf_8_whatever_the_locale():
    assert [
        (path.relative_to(SOURCE).as_posix(), call.lineno)
        for path in sources()
        for call in calls(path)
        if in_the_locales_encoding(call)
    ] == []


def test_lines_end_at_newlines():
    """str.splitlines() cuts at U+2028, U+0085, \\v, \\f, \\x1c too, which JSON lets stand in a text."""
    found = {path.relative_to(SOURCE).as_posix(): path.read_text("utf-8").count(".splitlines(") for path in sources()}
    assert {name: count for name, count in found.items() if count} == WHOLE_LINES


def test_what_is_printed_goes_through_the_terminal_module():
    """There, what a terminal would obey is made printable, and what cannot be printed ends no run."""
    own = {"kpo_cli/terminal.py", "kpo_cli/builtin/warmup.py"}  # the second makes the shipped policy, from a checkout
    printing = {
        path.relative_to(SOURCE).as_posix() for path in sources() for call in calls(path) if called(call) == "print"
    }
    assert printing <= own
    written = [path for path in sources() if "sys.stdout" in (text := path.read_text("utf-8")) or "sys.stderr" in text]
    assert {path.relative_to(SOURCE).as_posix() for path in written} <= {"kpo_cli/cli/main.py", "kpo_cli/terminal.py"}
