"""Reference answers, looked at before anything is graded by them."""

from collections.abc import Sequence

from kpo_cli.data.problems import Problem
from kpo_cli.rewards import grade_batch
from kpo_cli.rewards.normalize import normalize

EXAMPLES = 3
WORDS = 25
"""More than any answer of the benchmarks has; what is longer is a solution, and only the same words would equal it."""


def answer_notes(problems: Sequence[Problem], reduced: int) -> list[str]:
    """What the user should know of the reference answers; `reduced` of the rows' were worked solutions."""
    notes = []
    if reduced:
        notes.append(
            f"warning: {reduced} reference answers are worked solutions; what counts is what follows their last ####, "
            f"or stands in their last \\boxed{{}}"
        )
    unread = unreadable(problems)
    if unread:
        notes.append(f"warning: the grader cannot read {_named(unread)}; no response to them can be right")
    long = [problem for problem in problems if problem not in unread and _is_prose(problem.answer)]
    if long:
        notes.append(f"warning: {_named(long)} are whole texts, and only the same words will be right; give the answer")
    return notes


def unreadable(problems: Sequence[Problem]) -> list[Problem]:
    """The problems whose reference answer, in a box, is not graded as right."""
    verdicts = grade_batch([(f"\\boxed{{{problem.answer}}}", problem.answer) for problem in problems])
    return [
        problem
        for problem, verdict in zip(problems, verdicts, strict=True)
        if not verdict.correct or not normalize(problem.answer)
    ]


def differing(pairs: Sequence[tuple[Problem, Problem]]) -> list[tuple[Problem, Problem]]:
    """Those pairs whose answers are not the same to the grader."""
    verdicts = grade_batch([(f"\\boxed{{{second.answer}}}", first.answer) for first, second in pairs])
    return [pair for pair, verdict in zip(pairs, verdicts, strict=True) if not verdict.correct]


def _is_prose(answer: str) -> bool:
    return len([word for word in answer.split() if word.isalpha()]) > WORDS


def _named(problems: Sequence[Problem]) -> str:
    """How many reference answers, and the first of them."""
    shown = ", ".join(f"{problem.id}: {problem.answer[:40]!r}" for problem in problems[:EXAMPLES])
    more = ", ..." if len(problems) > EXAMPLES else ""
    return f"{len(problems)} reference answer{'s' * (len(problems) > 1)} ({shown}{more})"
