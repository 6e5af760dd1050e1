"""samples.jsonl: every sample kept, appended as it is made, each exactly once."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kpo_cli.data.problems import Problem
from kpo_cli.errors import RunStopped, UserError
from kpo_cli.rewards import Verdict, grade_batch
from kpo_cli.rewards.normalize import normalize
from kpo_cli.rollout import Response
from kpo_cli.runs import write_text

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

    def table(self, key: Key, problems: Sequence[Problem]) -> list[list[Row]]:
        """Rows by problem and sample; raises RunStopped unless each of the n samples of each problem is there once."""
        table = [sorted(self.rows[key].get(i, []), key=lambda row: row["sample"]) for i in range(len(problems))]
        for place, rows in enumerate(table):
            if [row["sample"] for row in rows] != list(range(self.n)) or rows[0]["id"] != problems[place].id:
                raise RunStopped(
                    f"{self.path}: problem {place} of {key[1]} does not have its {self.n} samples once each"
                )
        return table


def make_rows(
    key: Key, places: Sequence[int], problems: Sequence[Problem], texts: list[list[str]], groups: list[list[Response]]
) -> list[Row]:
    """Graded rows of some problems: `texts[i]` and `groups[i]` are the samples of `problems[i]`."""
    pairs = [(text, problem.answer) for problem, row in zip(problems, texts, strict=True) for text in row]
    verdicts = iter(grade_batch(pairs))
    return [
        {
            "subject": key[0],
            "benchmark": key[1],
            "place": place,
            "id": problem.id,
            "sample": number,
            "answer": problem.answer,
            "response": text,
            "tokens": len(response.token_ids),
            "finish": "stop" if response.finished else "length",
            **_graded(next(verdicts)),
        }
        for place, problem, row, group in zip(places, problems, texts, groups, strict=True)
        for number, (text, response) in enumerate(zip(row, group, strict=True))
    ]


def regraded(rows: list[Row]) -> list[Row]:
    """The same samples with new verdicts."""
    verdicts = grade_batch([(row["response"], row["answer"]) for row in rows])
    return [{**row, **_graded(verdict)} for row, verdict in zip(rows, verdicts, strict=True)]


def read_rows(path: Path) -> list[Row]:
    """Rows of a samples file. A torn last line is left out; damage anywhere else is a UserError."""
    lines = path.read_text(encoding="utf-8").split("\n")
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


def correct_table(table: list[list[Row]]) -> np.ndarray:
    """(Q, n) booleans."""
    return np.array([[row["correct"] for row in rows] for rows in table])


def answer_table(table: list[list[Row]]) -> list[list[str | None]]:
    """Normalised answers, None where there is none."""
    return [[None if row["extracted"] is None else normalize(row["extracted"]) for row in rows] for rows in table]


def _graded(verdict: Verdict) -> Row:
    return {
        "extracted": verdict.extracted,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "grader_failed": verdict.failed,
    }


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=True) + "\n"
