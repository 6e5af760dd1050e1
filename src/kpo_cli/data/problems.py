"""A problem with a verifiable answer: the unit that every data source yields."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One question and its reference answer.

    `id` is unique within its source, `problem` is the text shown to the policy (before any template),
    `answer` is the gold that the grader compares with, always a string.
    """

    id: str
    problem: str
    answer: str
    context: tuple[tuple[str, str], ...] = ()
    """What stands before the problem where a row is a chat: (role, text) of system messages and earlier turns."""
