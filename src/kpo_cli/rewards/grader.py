"""Grading batches of responses."""

import threading
from collections.abc import Sequence
from types import TracebackType

from kpo_cli.rewards.extraction import AnswerStyle, extract
from kpo_cli.rewards.verdict import Verdict


class Grader:
    """Grades answers."""

    def __init__(
        self,
        workers: int | None = None,
        time_limit_s: float = 5.0,
        memory_limit_bytes: int = 1 << 30,
        answer_style: AnswerStyle = "boxed",
    ) -> None:
        self._style: AnswerStyle = answer_style

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (response, gold) pairs, in order."""
        return [self._grade(response, gold) for response, gold in pairs]

    def _grade(self, response: str, gold: str) -> Verdict:
        found = extract(response, self._style)
        if not found:
            return Verdict(False, None, "no_box")
        answer = found[-1]
        if answer.strip() == gold.strip():
            return Verdict(True, answer, "exact")
        return Verdict(False, answer, "different")

    def close(self) -> None:
        """Stop the workers."""

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


_default: Grader | None = None
_lock = threading.Lock()


def grade_batch(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Verdicts of (response, gold) pairs, in order, by a shared default grader."""
    global _default
    with _lock:
        if _default is None:
            _default = Grader()
        grader = _default
    return grader.grade_batch(pairs)
