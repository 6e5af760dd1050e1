"""What may not happen: a verdict that depends on company, load or luck; a failure taken for a zero; code that runs."""

import math
import random
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import mpmath
import pytest

from kpo_cli.rewards import Verdict, grade_batch, grader
from kpo_cli.rewards.work import LimitReached, TimeReached, Work

ENDLESS = "\\sum_{k=1}^{999999999} \\sin(k^{2}+%d)"
ORDINARY = [
    ("\\boxed{x+1}", "1+x"), ("\\boxed{\\frac{2}{4}}", "0.5"), ("\\boxed{\\sqrt{8}}", "2\\sqrt2"),
    ("\\boxed{(1,2)}", "(2,1)"), ("\\boxed{x>2}", "(2,\\infty)"), ("\\boxed{\\sin\\pi}", "0"),
    ("\\boxed{\\int_0^1 x^2 dx}", "\\frac13"), ("\\boxed{2^{5000}}", "4^{2500}"),
    ("\\boxed{\\frac{1}{2005!}}", "\\frac{1}{2004!}"), ("\\boxed{\\text{East}}", "east"), ("none", "7"),
    ("\\boxed{3}", "4"),
]  # fmt: skip
HOSTILE = [
    "9^{9^{9^{9}}}", "((9!)!)!", "(x+y+z)^{50000}", "\\frac{1}{" * 400 + "7" + "}" * 400,
    "(" * 1400 + "7" + ")" * 1400, "x^" * 900 + "2", "\\sqrt" * 500 + "2", "-" * 2900 + "7",
    "\\text{" * 400 + "7" + "}" * 400, "1," * 1400 + "1", "\\int_0^1 x^{x^{x^{x}}} dx", ENDLESS % 1,
    "\\sum_{k=1}^{9^9} 2^{k!}", "\\cup" * 700, "|" * 2900, "a" * 2900, "\\text{a} " * 300, "x=1 " * 700,
    "\\Gamma" * 400, "1" * 2999, " 1" * 1400, "\\lim_{x\\to\\infty} \\zeta(3)^{x}", "10^{10^{10}}+1",
    "\\frac{\\sin(10^{5000})}{7}", "\\tan(10^{10^{9}})", "0.1" * 900, "{" * 1400 + "}" * 1400,
    "\\binom{10^9}{5\\cdot 10^8}", "(10^{9}+0.5)!", "\\begin{pmatrix}" + "1&" * 1200 + "1\\end{pmatrix}",
    "e^{" * 300 + "1" + "}" * 300, "[" * 2900, "\\text{at" * 300, "3 \\text{ million}" * 150, "\\{x | " * 400,
    "x<" * 1400 + "1", "\\dot1" * 580, "1 000 " * 480, ".\\dot" * 500, "\\prod_{k=1}^{\\infty} k",
]  # fmt: skip
INJECTIONS = [
    "__import__('os').system('touch kpo_pwned_1')", "open('kpo_pwned_2','w')",
    "\\operatorname{open}('kpo_pwned_3','w')", "x+open(kpo_{pwned},w)", "\\text{exec}(open('kpo_pwned_4','w'))",
    "[open('kpo_pwned_5','w'),2]", "\\int_0^1 open('kpo_pwned_6','w') dx", "{0.__class__}", "lambda: print",
    "\\sum_{k=1}^{2} eval(\"open('kpo_pwned_7','w')\")", "\\input{/etc/passwd}", "\\write18{touch kpo_pwned_8}",
    "f'{open(\"kpo_pwned_9\",\"w\")}'",
]  # fmt: skip


def boxed(texts: list[str], gold: str = "7") -> list[tuple[str, str]]:
    return [(f"\\boxed{{{text}}}", gold) for text in texts]


def test_verdicts_do_not_depend_on_company() -> None:
    pairs = ORDINARY + boxed(HOSTILE[:8])
    alone = [grade_batch([pair])[0] for pair in pairs]
    assert grade_batch(pairs) == alone
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    shuffled = grade_batch([pairs[place] for place in order])
    assert [shuffled[order.index(place)] for place in range(len(pairs))] == alone
    found: list[list[Verdict]] = []
    threads = [threading.Thread(target=lambda: found.append(grade_batch(pairs))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone, alone]


def test_hostile_answers_are_wrong_or_failures_and_cost_little() -> None:
    for text in HOSTILE:
        for gold in ("7", "\\frac{1}{3}", "x>7", "\\text{seven apples}", "(1,2)"):
            start = time.thread_time()
            (verdict,) = grade_batch(boxed([text], gold))
            assert not verdict.correct or (gold == "7" and "7" in text), text[:30]
            assert verdict.reason in {
                "different",
                "unparseable",
                "too_large",
                "limit",
                "equivalent",
                "exact",
                "no_box",
            }, text[:30]
            assert time.thread_time() - start < 10, text[:30]


def test_the_limit_is_counted_and_says_so() -> None:
    for verdict in (*grade_batch(boxed([ENDLESS % 2])), *grade_batch([ORDINARY[0]], units=5)):
        assert verdict.reason == "limit"
        assert verdict.failed
        assert not verdict.correct
        assert verdict.reward == 0  # a policy must not gain by it
    # The count is the same whatever the machine does.
    left = []
    for _ in range(2):
        work = Work()
        assert grader._compare("\\frac{1}{3}", "\\int_{0}^{1} x^{2} dx", work) == (True, "equivalent")
        left.append(work.left)
    assert left[0] == left[1]


def test_processor_time_stands_behind_the_count() -> None:
    assert grade_batch(boxed([ENDLESS % 3]), units=1e12, seconds=0.2)[0] == Verdict(False, ENDLESS % 3, "timeout")
    with pytest.raises(LimitReached):
        Work(units=1).charge(2)
    with pytest.raises(TimeReached):
        Work(seconds=-1).charge(1)


def test_ordinary_answers_are_far_from_the_limits() -> None:
    verdicts = grade_batch(ORDINARY, units=25_000, seconds=5)
    assert verdicts == grade_batch(ORDINARY)
    assert not any(verdict.failed for verdict in verdicts)


def test_a_fault_of_the_grader_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpo_cli.rewards.grader.Comparison.same_answer", lambda *args: 1 / 0)
    (verdict,) = grade_batch([("\\boxed{x+1}", "1+x")])
    assert verdict == Verdict(False, "x+1", "error")
    assert verdict.failed
    assert math.isnan(verdict.reward)


def test_the_precision_of_the_caller_stays() -> None:
    with mpmath.workdps(33):
        grade_batch(ORDINARY)
        assert mpmath.mp.dps == 33
    assert mpmath.mp.dps == 15


def test_nothing_in_an_answer_is_executed(tmp_path: Path) -> None:
    script = f"""
        import sys
        from kpo_cli.rewards import grade_batch
        golds = ("1", "x+1", "\\\\text{{word}}")
        pairs = [(f"\\\\boxed{{{{{{text}}}}}}", gold) for text in {INJECTIONS!r} for gold in golds]
        grade_batch([("\\\\boxed{{x+1}}", "1+x")])
        seen = []
        sys.addaudithook(lambda event, args: seen.append(event))
        verdicts = grade_batch(pairs)
        seen = [e for e in seen if not e.startswith(("object.", "sys.", "cpython."))]
        assert not seen, seen
        assert not any(verdict.correct for verdict in verdicts)
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    result = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_identical_answers_are_graded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = grader._grade
    monkeypatch.setattr(grader, "_grade", lambda *args: calls.append(args) or original(*args))
    verdicts = grade_batch([("\\boxed{x+1}", "1+x"), ("\\boxed{x+2}", "1+x")] * 50)
    assert len(calls) == 2
    assert [verdict.correct for verdict in verdicts] == [True, False] * 50
