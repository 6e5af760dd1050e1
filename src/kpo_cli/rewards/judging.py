"""Grading one pair of normalised texts, in the calling process as far as it goes and in a worker for the rest."""

from kpo_cli.rewards.structure import PlainJudge, Undecided, is_code, same_answer, squeeze

_PLAIN = PlainJudge()
# Read once before the first fork, so that every child starts with math-verify's parser warm.
_WARM_UP = (r"\sum_{k=0}^{n} x_{k}^{2} + \int_{0}^{1} \frac{\sin x}{x} dx", r"(0,1) \cup (2,3] \setminus \{5\}")


def grade_plainly(gold: str, answer: str) -> tuple[bool, str] | None:
    """The verdict if text and exact arithmetic on plain numbers suffice for one, else None."""
    if squeeze(gold) == squeeze(answer):
        return True, "exact"
    if is_code(answer):
        return False, "unparseable"
    try:
        return (True, "equivalent") if same_answer(gold, answer, _PLAIN) else (False, "different")
    except Undecided:
        return None
    except RecursionError:
        return False, "unparseable"


def grade_pair(gold: str, answer: str) -> tuple[bool, str]:
    """The verdict with all of algebra; for worker processes only, since it may take any time and memory."""
    from kpo_cli.rewards.engine import AlgebraJudge
    from kpo_cli.rewards.evaluate import TooLarge

    judge = AlgebraJudge()
    try:
        if same_answer(gold, answer, judge):
            return True, "equivalent"
        return False, "unparseable" if judge.unread else "different"
    except TooLarge:
        return False, "too_large"
    except MemoryError:
        return False, "memory"
    except Exception:
        # Whatever a parser or a simplifier trips over in an answer is a property of the answer.
        return False, "unparseable"


def warm_up() -> None:
    """Import and exercise the libraries."""
    from kpo_cli.rewards.engine import library_says_same

    for text in _WARM_UP:
        library_says_same(text, text)
