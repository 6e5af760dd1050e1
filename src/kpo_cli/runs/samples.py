"""samples.jsonl: every sample kept, appended as it is made, each exactly once."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kpo_cli.errors import RunStopped, UserError
from kpo_cli.runs.directory import read_text, write_text

Row = dict[str, Any]
Key = tuple[str, str]
"""Subject ("checkpoint" or "vs") and benchmark."""


class SampleFile:
    """The samples of an evaluation, grouped by subject and benchmark, then by the problem's place."""

    def __init__(self, path: Path, n: int) -> None:
        """Read what is there. A problem that a kill cut short loses its samples: they will be made again."""
        self.path = path
        self.n = n
        self.rows: dict[Key, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in read_rows(path) if path.exists() else []:
            self.rows[row["subject"], row["benchmark"]][row["place"]].append(row)
        for places in self.rows.values():
            for place in [place for place, rows in places.items() if len(rows) != n]:
                del places[place]
        if path.exists():
            kept = [row for places in self.rows.values() for rows in places.values() for row in rows]
            write_text(path, "".join(map(_line, kept)))

    def missing(self, key: Key, problems: int) -> list[int]:
        return [place for place in range(problems) if place not in self.rows[key]]

    def append(self, key: Key, rows: list[Row]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            self.rows[key][row["place"]].append(row)

    def table(self, key: Key, ids: Sequence[str]) -> list[list[Row]]:
        """Rows by problem (named by `ids`) and sample; raises RunStopped unless each of its n samples is there once."""
        table = [sorted(self.rows[key].get(i, []), key=lambda row: row["sample"]) for i in range(len(ids))]
        for place, rows in enumerate(table):
            if [row["sample"] for row in rows] != list(range(self.n)) or rows[0]["id"] != ids[place]:
                raise RunStopped(
                    f"{self.path}: problem {place} of {key[1]} does not have its {self.n} samples once each"
                )
        return table


def read_rows(path: Path) -> list[Row]:
    """Rows of a samples file. A torn last line is left out; damage anywhere else is a UserError."""
    lines = read_text(path).split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number} is damaged; remove the line and run the same command again") from None
        if row is not None:
            rows.append(row)
    return rows


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=True) + "\n"
