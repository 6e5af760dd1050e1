"""What the grader says about one answer."""

from dataclasses import dataclass

FAILURES = frozenset({"timeout", "memory", "crashed"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """The grade of one response.

    `extracted` is the answer as the response wrote it (None if it gave none) and `reason` one machine-readable
    word. A grader failure is never `correct`, and `failed` tells it apart from a wrong answer.
    """

    correct: bool
    extracted: str | None
    reason: str

    @property
    def failed(self) -> bool:
        """True if the grader itself failed on this answer, so that nothing is known about it."""
        return self.reason in FAILURES
