"""Who may import whom (docs/architecture.md), read off the import statements."""

import ast
import sys
from collections.abc import Iterator
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
    """The files of a package or module of ours; [] where it is not built yet."""
    base = SOURCE / PACKAGE / part
    return (
        sorted(base.rglob("*.py")) if base.is_dir() else [path for path in [base.with_suffix(".py")] if path.is_file()]
    )


def imports(part: str) -> list[Import]:
    return [found for path in files_of(part) for found in imports_of(path)]


def ours(found: Import) -> str | None:
    """The part of our package that is imported: `training`, `config`, ... ("" for the package itself)."""
    first, *rest = found.module.split(".")
    return (rest[0] if rest else "") if first == PACKAGE else None


def top(found: Import) -> str:
    return found.module.split(".")[0]


def forbidden(part: str, others: set[str]) -> list[Import]:
    return [found for found in imports(part) if ours(found) in others]


EVERYTHING = {
    path.stem for path in (SOURCE / PACKAGE).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
}


def test_the_reader_of_imports_sees_them():
    """The tests below pass on whatever is not seen."""
    cli = list(imports_of(SOURCE / PACKAGE / "cli.py"))
    assert ("kpo_cli.errors", False) in {(found.module, found.lazy) for found in cli}
    assert ("kpo_cli.training.main", True) in {(found.module, found.lazy) for found in cli}
    assert {"core", "config", "data", "runs"} <= {ours(found) for found in imports("training")}
    assert {"cli", "config", "core", "training", "rewards"} <= EVERYTHING


def test_core_imports_torch_and_itself():
    """And, inside the functions that have a faster way with them, what may not be installed."""
    allowed = {"torch", PACKAGE, *sys.stdlib_module_names}
    wrong = [
        found
        for found in imports("core")
        if (ours(found) not in (None, "core"))
        or (top(found) not in allowed and not (top(found) in ("numba", "triton", "numpy") and found.lazy))
    ]
    assert wrong == []


def test_the_command_line_imports_nothing_heavy():
    allowed = {"typer", PACKAGE, *sys.stdlib_module_names}
    eager = [found for found in imports("cli") + imports("__main__") + imports("__init__") if not found.lazy]
    assert [found for found in eager if top(found) not in allowed] == []
    assert {ours(found) for found in eager} <= {None, "cli", "errors"}


def test_configuration_is_plain_python():
    found = imports("config")
    assert {top(each) for each in found} <= {PACKAGE, *sys.stdlib_module_names}
    assert {ours(each) for each in found} <= {None, "errors"}


@pytest.mark.parametrize("part", ["config", "hydra_app", "runs", "errors"])
def test_what_reads_the_command_imports_no_torch(part: str):
    """So that a mistyped key is answered before a second is spent on imports."""
    assert files_of(part)
    assert [found for found in imports(part) if top(found) in ("torch", "transformers")] == []
    assert forbidden(part, {"core", "training", "evaluation", "analysis", "rollout", "rewards", "data"}) == []


@pytest.mark.parametrize(
    ("part", "others"),
    [
        ("rewards", EVERYTHING - {"rewards", "errors"}),
        ("rollout", {"training", "evaluation", "analysis", "cli", "hydra_app"}),
        ("data", {"training", "evaluation", "analysis", "rollout", "cli", "hydra_app"}),
        ("evaluation", {"training", "analysis", "cli", "hydra_app"}),
        ("training", {"analysis", "cli", "hydra_app"}),
        ("errors", EVERYTHING - {"errors"}),
    ],
)
def test_direction(part: str, others: set[str]):
    assert files_of(part)
    assert forbidden(part, others) == []


def test_analysis_reads_files_only():
    """It works on run directories, without a model and without the code that made them."""
    assert forbidden("analysis", {"training", "evaluation", "rollout", "cli", "hydra_app"}) == []


def test_no_import_goes_to_a_module_that_is_not_there():
    for path in (SOURCE / PACKAGE).rglob("*.py"):
        for found in imports_of(path):
            if ours(found):
                target = SOURCE.joinpath(*found.module.split("."))
                assert target.with_suffix(".py").is_file() or target.is_dir(), found
