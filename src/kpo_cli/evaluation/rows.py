"""Rows of samples.jsonl: a response, graded; and tables of them."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from kpo_cli.data.problems import Problem
from kpo_cli.policy.response import Response
from kpo_cli.rewards import Verdict, grade_batch
from kpo_cli.rewards.normalize import normalize
from kpo_cli.runs.samples import Key, Row

RIGHT = " right"
"""The spelling of every answer that is right; with a space in front, which no normalised text has."""


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


def correct_table(table: list[list[Row]]) -> np.ndarray:
    """(Q, n) booleans."""
    return np.array([[row["correct"] for row in rows] for rows in table])


def failed_table(table: list[list[Row]]) -> np.ndarray:
    """(Q, n) booleans: the samples on which the grader failed, which are neither right nor wrong."""
    return np.array([[row["grader_failed"] for row in rows] for rows in table])


def answer_table(table: list[list[Row]]) -> list[list[str | None]]:
    """Each sample's answer, None where there is none, in one spelling for all that are one answer by the grader.

    Answers that are right are one. Of wrong ones `205` and `205\\text{ units}` are one: each is graded against the
    shorter of the others of its problem.
    """
    spelled = [[_spelling(row) for row in rows] for rows in table]
    pairs = [
        (place, answer, shorter)
        for place, row in enumerate(spelled)
        for shorter, answer in combinations(sorted({text for text in row if text} - {RIGHT}, key=len), 2)
    ]
    verdicts = grade_batch([(f"\\boxed{{{answer}}}", shorter) for _, answer, shorter in pairs])
    same: dict[tuple[int, str], str] = {}
    for (place, answer, shorter), verdict in zip(pairs, verdicts, strict=True):
        if verdict.correct:
            same.setdefault((place, answer), same.get((place, shorter), shorter))
    return [[text and same.get((place, text), text) for text in row] for place, row in enumerate(spelled)]


def _spelling(row: Row) -> str | None:
    """An answer normalised; None for an empty box or none."""
    return RIGHT if row["correct"] else normalize(row["extracted"] or "") or None


def _graded(verdict: Verdict) -> Row:
    return {
        "extracted": verdict.extracted,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "grader_failed": verdict.failed,
    }
