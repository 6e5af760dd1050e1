"""What is installed: the wheel holds everything that `kpo` needs, and works away from the source."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    here = importlib.util.find_spec("hatchling") is not None
    command = [*PIP, "wheel", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY)]
    done = subprocess.run(
        [*command, "--no-build-isolation"] if here else command, capture_output=True, text=True, check=False
    )
    unreachable = ("No matching distribution found for hatchling", "Could not find a version", "ConnectionError")
    if done.returncode and not here and any(sign in done.stderr for sign in unreachable):
        pytest.skip("building needs hatchling, which is not installed, and the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def below(folder: Path, package: str, pattern: str) -> set[str]:
    files = (path for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts)
    return {f"{package}/{path.relative_to(folder).as_posix()}" for path in files}


def test_the_wheel_holds_the_package_its_configuration_and_the_policy(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    source = REPOSITORY / "src"
    expected = {
        "configuration": below(REPOSITORY / "conf", "kpo_cli/conf", "*.yaml"),
        "policy": below(source / "kpo_cli/builtin/policy", "kpo_cli/builtin/policy", "*"),
        "launcher": below(source / "hydra_plugins", "hydra_plugins", "*.py"),
        "modules": below(source / "kpo_cli", "kpo_cli", "*.py"),
    }
    for what, files in expected.items():
        assert files, what
        assert files <= names, what
    # Hydra's plugins are a namespace: an __init__.py of ours would hide those of others.
    assert "hydra_plugins/__init__.py" not in names
    assert not any(name.startswith(("tests/", "docs/", "conf/")) for name in names)
    assert wheel.stat().st_size < 4_000_000


def test_an_installed_copy_works_from_anywhere(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    work = tmp_path / "work"
    work.mkdir()

    def run(
        *arguments: str, code: str = "from kpo_cli.cli.main import main; main()"
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)

    where = run(code="import kpo_cli, hydra_plugins.kpo_isolated_launcher as l; print(kpo_cli.__file__, l.__file__)")
    assert all(path.startswith(str(site)) for path in where.stdout.split())
    shown = run("train", "--cfg", "job", "--resolve", "method=gspo", "model.path=org/name")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "name: gspo" in shown.stdout
    assert run("--version").stdout.startswith("kpo ")
    refused = run("train", "methd=kpo")
    assert (refused.returncode, refused.stderr) == (2, "kpo: unknown key methd; did you mean method?\n")
    assert not any(work.iterdir())
