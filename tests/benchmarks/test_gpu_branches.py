"""docs/performance.md lists every function with a branch that only a GPU takes.

`python tests/benchmarks/test_gpu_branches.py` prints the rows that are missing, to be finished by hand.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "src/kpo_cli"
PAGE = REPOSITORY / "docs/performance.md"
HEADING = "## Branches that only a GPU takes"
NAMES = {"cuda", "is_cuda", "pin_memory", "non_blocking", "OutOfMemoryError", "triton", "mem_get_info"}
"""Of variables, attributes, arguments and imported modules."""
DEVICES = {"cuda", "cpu"}
"""Compared with a device's type, or asked for by name."""


def mentions(node: ast.AST) -> bool:
    """Whether one node, its children aside, speaks of a device."""
    if isinstance(node, ast.Name):
        return node.id in NAMES
    if isinstance(node, ast.Attribute):
        return node.attr in NAMES
    if isinstance(node, ast.keyword):
        return node.arg in NAMES
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in NAMES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in NAMES
    return isinstance(node, ast.Constant) and node.value in DEVICES


def functions_of(source: str, module: str, wanted: Callable[[ast.AST], bool] = mentions) -> Iterator[str]:
    """`module:Class.function` of every function of a file with a `wanted` node; nested ones count as theirs."""

    def walk(node: ast.AST, path: tuple[str, ...], inside: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if function and not inside:
                if any(map(wanted, ast.walk(child))):
                    yield f"{module}:{'.'.join([*path, child.name])}"
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, (*path, child.name), inside)

    yield from walk(ast.parse(source), (), False)


def branches(wanted: Callable[[ast.AST], bool] = mentions) -> set[str]:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found |= set(functions_of(path.read_text("utf-8"), module, wanted))
    return found


def listed() -> dict[str, str]:
    """The table's rows: function, and what was measured of it."""
    section = PAGE.read_text("utf-8").split(HEADING)[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([\w.]+:[\w.]+)` \|.*\| ([^|]+) \|$", section, re.MULTILINE))


def test_every_branch_is_listed_and_every_row_is_a_function():
    """A row may also be a function that only such a branch leads to."""
    assert branches() - set(listed()) == set()
    assert set(listed()) - branches(lambda node: True) == set()


def test_what_is_measured_names_a_committed_result():
    for function, measured in listed().items():
        if measured != "not measured":
            named = re.search(r"docs/[\w/.-]+", measured)
            assert named, f"{function}: {measured}"
            assert (REPOSITORY / named.group()).is_file(), f"{function}: {measured}"


def test_the_reader_sees_the_ways_to_speak_of_a_device():
    """The first test passes on whatever is not seen."""
    ways = ("x.is_cuda", "torch.cuda.synchronize()", "d.type == 'cpu'", "t.to(d, non_blocking=True)", "import triton")
    for way in ways:
        assert list(functions_of(f"def f(x):\n    {way}", "m")) == ["m:f"], way
    nested = "class A:\n    class B:\n        def f(x):\n            def g(): x.cuda\n"
    assert list(functions_of(nested, "m")) == ["m:A.B.f"]
    quiet = "def f(x):\n    'on cuda'\n    return x.device.type, 'a cpu'\nDEVICES = ('cpu', 'cuda')"
    assert list(functions_of(quiet, "m")) == []
    assert {"core.robust:saturated_scan", "training.step:Updater._map", "policy.load:choose_device"} <= branches()


if __name__ == "__main__":
    missing, gone = branches() - set(listed()), set(listed()) - branches(lambda node: True)
    print("\n".join(f"| `{name}` | ... | not measured |" for name in sorted(missing)) or "nothing is missing")
    sys.exit("\n".join(["no longer there:", *sorted(gone)]) if gone else 0)
