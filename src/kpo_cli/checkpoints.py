"""Finding the checkpoints of a run, and knowing whether they are whole."""

import json
from pathlib import Path

from kpo_cli.errors import UserError
from kpo_cli.runs import sha256_of


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint directories, oldest first: those within the supervised phase come before all steps."""
    found = [path for kind in ("supervised", "step") for path in sorted((run / "checkpoints").glob(f"{kind}-*"))]
    return [path for path in found if path.is_dir()]


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold (None if there never was one), and a line for each that fails."""
    found = checkpoints(run)
    problems: list[str] = []
    for path in reversed(found):
        problem = _damage(path)
        if problem is None:
            return path, problems
        problems.append(f"{path} is damaged ({problem})")
    if found:
        raise UserError(f"no checkpoint of {run} is whole: {'; '.join(problems)}; start the run again")
    return None, problems


def _damage(path: Path) -> str | None:
    try:
        sums = json.loads((path / "checksums.json").read_text())
        for name, expected in sums.items():
            if sha256_of(path / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None
