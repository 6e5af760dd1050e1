"""Grading batches of responses."""

import atexit
import os
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from types import TracebackType

from kpo_cli.rewards.extraction import AnswerStyle, extract
from kpo_cli.rewards.judging import grade_plainly
from kpo_cli.rewards.normalize import LIMIT, normalize
from kpo_cli.rewards.pool import Pool
from kpo_cli.rewards.verdict import Verdict

_INTEGER = re.compile(r"-?[0-9]{1,18}")
# What can keep algebra busy: those answers are tried after the others.
_HEAVY = re.compile(r"\\(?:int|oint|iint|sum|prod|lim|operatorname|det)(?![A-Za-z])|!|\^\{[^{}]*\^|[0-9]{7}")


class Grader:
    """Grades responses against reference answers, with worker processes for what needs algebra.

    Workers start when the first answer needs one. `time_limit_s` is wall-clock time for one answer and
    `memory_limit_bytes` what one answer may take beyond the worker's own; both are enforced by the operating system.
    Batches of several threads are graded one after the other.
    """

    def __init__(
        self,
        workers: int | None = None,
        time_limit_s: float = 5.0,
        memory_limit_bytes: int = 1 << 30,
        answer_style: AnswerStyle = "boxed",
    ) -> None:
        if answer_style not in ("boxed", "hash"):
            raise ValueError(f"answer_style must be 'boxed' or 'hash', not {answer_style!r}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        if time_limit_s <= 0 or memory_limit_bytes <= 0:
            raise ValueError("time_limit_s and memory_limit_bytes must be positive")
        self._style: AnswerStyle = answer_style
        self._pool = Pool(workers or min(4, os.cpu_count() or 1), time_limit_s, memory_limit_bytes)
        self._lock = threading.Lock()

    @property
    def worker_pids(self) -> list[int]:
        """The process ids of the workers running now."""
        return self._pool.pids

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (response, gold) pairs, in order. Identical answers to the same gold are graded once."""
        verdicts: list[Verdict | None] = [None] * len(pairs)
        hard: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for place, (response, gold) in enumerate(pairs):
            answer = extract(response, self._style)
            outcome = self._grade_here(answer, gold)
            if isinstance(outcome, Verdict):
                verdicts[place] = outcome
            else:
                assert answer is not None
                hard.setdefault(outcome, []).append((place, answer))
        order = sorted(hard, key=lambda pair: bool(_HEAVY.search(pair[1])))
        with self._lock:
            outcomes = self._pool.grade(order)
        for pair, (correct, reason) in zip(order, outcomes, strict=True):
            for place, answer in hard[pair]:
                verdicts[place] = Verdict(correct, answer, reason)
        return [verdict for verdict in verdicts if verdict is not None]

    def _grade_here(self, answer: str | None, gold: str) -> Verdict | tuple[str, str]:
        """The verdict if none of it needs a worker, else the normalised (gold, answer) to send to one."""
        if answer is None:
            return Verdict(False, None, "no_box" if self._style == "boxed" else "no_answer")
        text, target = answer.strip(), gold.strip()
        if not text:
            return Verdict(False, answer, "empty")
        if text == target:
            return Verdict(True, answer, "exact")
        if _INTEGER.fullmatch(text) and _INTEGER.fullmatch(target):
            same = int(text) == int(target)
            return Verdict(same, answer, "equivalent" if same else "different")
        normal, normal_gold = normalize(text), _normalize_gold(target)
        if not normal or not normal_gold:
            return Verdict(False, answer, "unparseable")
        outcome = grade_plainly(normal_gold, normal)
        return Verdict(outcome[0], answer, outcome[1]) if outcome else (normal_gold, normal)

    def close(self) -> None:
        """Stop the workers."""
        with self._lock:
            self._pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@lru_cache(maxsize=4096)
def _normalize_gold(gold: str) -> str | None:
    """Golds come again and again. An absurdly long one is not worth keeping."""
    return normalize(gold) if len(gold) <= 8 * LIMIT else None


_default: Grader | None = None
_default_lock = threading.Lock()


def grade_batch(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Verdicts of (response, gold) pairs, in order, by a default grader that keeps its workers between calls."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Grader()
            atexit.register(_default.close)
        grader = _default
    return grader.grade_batch(pairs)
