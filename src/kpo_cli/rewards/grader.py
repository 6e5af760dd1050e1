"""Grading batches of responses."""

import re
import threading
from collections.abc import Sequence
from functools import lru_cache

from kpo_cli.rewards.comparison import Comparison
from kpo_cli.rewards.evaluate import TooLarge
from kpo_cli.rewards.extraction import AnswerStyle, extract
from kpo_cli.rewards.normalize import LIMIT, normalize
from kpo_cli.rewards.shapes import squeeze
from kpo_cli.rewards.verdict import Verdict
from kpo_cli.rewards.work import SECONDS, UNITS, LimitReached, TimeReached, Work

_INTEGER = re.compile(r"-?[0-9]{1,18}")
# The precision of the arithmetic is a state of the module that computes.
_LOCK = threading.Lock()


def grade_batch(
    pairs: Sequence[tuple[str, str]],
    answer_style: AnswerStyle = "boxed",
    units: float = UNITS,
    seconds: float = SECONDS,
) -> list[Verdict]:
    """Verdicts of (response, gold) pairs, in order.

    A verdict depends on its pair alone: each answer has `units` of counted work of its own, and `seconds` of processor
    time behind them. Batches of several threads are graded one after the other.
    """
    if answer_style not in ("boxed", "hash"):
        raise ValueError(f"answer_style must be 'boxed' or 'hash', not {answer_style!r}")
    known: dict[tuple[str, str], tuple[bool, str]] = {}
    verdicts = []
    with _LOCK:
        for response, gold in pairs:
            answer = extract(response, answer_style)
            if answer is None:
                verdicts.append(Verdict(False, None, "no_box" if answer_style == "boxed" else "no_answer"))
                continue
            key = (answer.strip(), gold.strip())
            if key not in known:
                known[key] = _grade(*key, Work(units, seconds))
            verdicts.append(Verdict(known[key][0], answer, known[key][1]))
    return verdicts


def _grade(text: str, target: str, work: Work) -> tuple[bool, str]:
    """Whether an answer is right, and why."""
    if not text:
        return False, "empty"
    if text == target:
        return True, "exact"
    if _INTEGER.fullmatch(text) and _INTEGER.fullmatch(target):
        same = int(text) == int(target)
        return same, "equivalent" if same else "different"
    answer, gold = normalize(text), _normalize_gold(target)
    if not answer or not gold:
        return False, "unparseable"
    if squeeze(gold) == squeeze(answer):
        return True, "exact"
    return _compare(gold, answer, work)


def _compare(gold: str, answer: str, work: Work) -> tuple[bool, str]:
    """The verdict on two normalised texts."""
    comparison = Comparison(work)
    try:
        if comparison.same_answer(gold, answer):
            return True, "equivalent"
        return False, "unparseable" if comparison.unread else "different"
    except TooLarge:
        return False, "too_large"
    except (LimitReached, RecursionError):
        return False, "limit"
    except TimeReached:
        return False, "timeout"
    except Exception:
        # A fault of the grader's own, and not to be paid for by the policy.
        return False, "error"


@lru_cache(maxsize=4096)
def _normalize_gold(gold: str) -> str | None:
    """Golds come again and again. An absurdly long one is not worth keeping."""
    return normalize(gold) if len(gold) <= 8 * LIMIT else None
