"""Collect what a GPU machine without a network lacks: `make gpu-bundle`, then take the checkout with gpu-bundle/ there.

    bash gpu-bundle/run.sh                             what `make gpu` does, with that machine's own python3
    bash gpu-bundle/run.sh --only step,memory
    PYTHON=python3.12 bash gpu-bundle/run.sh --device cpu --small

The machine is taken to have torch, transformers and what these bring (NEEDED_THERE below); the bundle holds pure-Python
wheels of what kpo needs beside them, of the versions in constraints.txt, and in binary/ a scipy for Linux with that
Python (--python), which run.sh installs where there is none. `datasets` is only for data from the hub and
stays behind. kpo itself is run from src/. run.sh installs into a folder of its own that goes with it.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
WHEELS = ("hydra-core", "omegaconf", "antlr4-python3-runtime")
NEEDED_THERE = (
    *("torch", "transformers", "peft", "numba", "safetensors", "accelerate", "typer", "rich", "matplotlib", "mpmath"),
    *("pyarrow", "pandas", "pytest"),
)
BINARY = ("scipy",)
"""Compiled, for one Python on x86-64 Linux."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")
LIMIT = 64 * 2**20
"""Bytes; what a small courier takes."""
TAG = re.compile(r"-(py2\.)?py3-none-any\.whl$")
"""Of a wheel that any Python 3 on any machine installs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "gpu-bundle")
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU (3.12)")
    parser.add_argument("--needed-there", action="store_true", help="print what the machine must have, and stop")
    options = parser.parse_args()
    if options.needed_there:
        print(" ".join(NEEDED_THERE))
        return 0
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    build(options.out, options.python)
    shutil.copy(Path(__file__).with_name("run_bundle.sh"), options.out / "run.sh")
    if wrong := check(options.out):
        print(f"gpu-bundle: {wrong}", file=sys.stderr)
        return 1
    names = sorted(path.name for path in options.out.iterdir())
    print(f"{options.out}: {', '.join(names)}; {size_of(options.out) / 2**20:.1f} MiB")
    return 0


def build(folder: Path, python: str) -> None:
    """Wheels of the pinned versions. antlr4's runtime has none to download: pip builds it from its source."""
    pip = [sys.executable, "-m", "pip"]
    pinned = ["--quiet", "--disable-pip-version-check", "--no-deps", "-c", str(REPOSITORY / "constraints.txt")]
    subprocess.run([*pip, "wheel", *pinned, "-w", str(folder), *WHEELS], check=True)
    there = ["--only-binary", ":all:", "--python-version", python, *(f"--platform={name}" for name in PLATFORMS)]
    subprocess.run([*pip, "download", *pinned, *there, "-d", str(folder / "binary"), *BINARY], check=True)


def check(folder: Path) -> str | None:
    """What is wrong with a bundle: a wheel that is not for any machine, a missing one, or too many bytes."""
    wheels = [path.name for path in folder.glob("*.whl")]
    if bound := [name for name in wheels if not TAG.search(name)]:
        return f"{', '.join(bound)}: not a pure-Python wheel, so that it may not install there"
    found = {name.split("-")[0].lower() for name in wheels}
    if missing := [name for name in WHEELS if name.replace("-", "_").lower() not in found]:
        return f"no wheel of {', '.join(missing)}"
    return f"{size_of(folder):,} bytes are more than {LIMIT:,}" if size_of(folder) > LIMIT else None


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
