"""Versions of the formats in this room: what an older kpo wrote opens, a newer one is refused by name."""

from typing import Any

RUN = "kpo-run-1"
"""A run's or an evaluation's directory, in manifest.json. Without one it was written before formats had versions."""
CHECKPOINT = "kpo-checkpoint-2"
"""A checkpoint, in trainer/state.json. The first had none; since 2 kalman_adaptive's sums are those of its noise."""
RATIOS = "kpo-ratios-1"
"""A ratio record, in the file's metadata."""


def unreadable(found: Any, own: str) -> str | None:
    """Why what has the format `found` cannot be read by who knows `own` and older ones; None if it can."""
    kind, _, version = own.rpartition("-")
    name, _, number = str(found).rpartition("-")
    if name != kind or not number.isdecimal():
        return f"its format is {found!r}, not {own}"
    if int(number) > int(version):
        return f"its format is {found}, and this kpo reads {own} and older: update kpo"
    return None
