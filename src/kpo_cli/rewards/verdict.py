"""What the grader says about one answer."""

from dataclasses import dataclass

FAILURES = frozenset({"limit", "timeout", "error"})
# How much work an answer takes is its own doing: the same answer meets the limit on every machine.
_ANSWERS_OWN = "limit"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The grade of one response.

    `extracted` is the answer as the response wrote it (None if it gave none) and `reason` one machine-readable
    word. A failure of the grader is never `correct`, and is not a wrong answer either: see `failed`.
    """

    correct: bool
    extracted: str | None
    reason: str

    @property
    def failed(self) -> bool:
        """True if the grader itself failed on this answer, so that nothing is known about it."""
        return self.reason in FAILURES

    @property
    def reward(self) -> float:
        """1 for a right answer, 0 for a wrong one and one past the limit, NaN where the fault is the grader's."""
        return float("nan") if self.failed and self.reason != _ANSWERS_OWN else float(self.correct)
