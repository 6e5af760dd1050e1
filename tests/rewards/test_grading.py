"""What counts as correct: compact cases of our own, and the labelled cases and golds where they are at hand."""

import json
import os
import re
from pathlib import Path

import pytest

from kpo_cli.rewards import Verdict, grade_batch
from kpo_cli.rewards.extraction import extract
from kpo_cli.rewards.normalize import LIMIT, RAW_LIMIT, normalize
from kpo_cli.rewards.numbers import read_number

DATA = Path(os.environ.get("KPO_SHARED_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of benchmark files (KPO_SHARED_DATA) is absent")

# (gold, content of the box): what must be accepted.
SAME = [
    ("5", "x = 5"), ("5", "5.0"), ("5", "\\approx 5"), ("1000", "1,000"), ("2500", "2,\\!500"), ("2500", "2{,}500"),
    ("0.5", "50\\%"), ("8\\%", "8"), ("\\frac{1}{2}", "1/2"), ("\\frac{1}{2}", "\\dfrac12"), ("\\frac{1}{2}", "½"),
    ("-\\frac{1}{2}", "\\frac{1}{-2}"), ("3\\frac{1}{2}", "\\frac72"), ("0.1\\overline{6}", "\\frac{1}{6}"),
    ("\\sqrt{8}", "2\\sqrt2"), ("(x+1)^2", "x²+2x+1"), ("\\frac{n!}{k!(n-k)!}", "\\binom{n}{k}"), ("8^{2/3}", "4"),
    ("\\sqrt[3]{-8}", "-2"), ("i", "\\sqrt{-1}"), ("|x|", "\\sqrt{x^2}"), ("\\sin 2x", "2\\sin x\\cos x"),
    ("e^{2x}", "\\exp(2x)"), ("\\log_2 8", "3"), ("1.5e3", "1.5 \\times 10^{3} \\text{ J}"), ("1e-5", "10^{-5}"),
    ("(1,2)", "1,2"), ("\\{1,2\\}", "2, 1"), ("1,2,3", "3, 2 \\text{ and } 1"), ("3,-3", "\\pm 3"),
    ("1 or 2", "\\{1,2\\}"),
    ("x>2", "(2,\\infty)"), ("(-1,3)", "3 > x > -1"), ("x\\ne 0", "(-\\infty,0)\\cup(0,\\infty)"),
    ("(-\\infty,0)\\cup(0,\\infty)", "\\mathbb{R}\\setminus\\{0\\}"), ("y=2x+1", "2x - y + 1 = 0"), ("y=2x+1", "2x+1"),
    ("x \\le 1", "-x \\ge -1"), ("x=1, y=2", "(1,2)"), ("x=1,y=2", "y=2, x=1"), ("2:3", "4:6"), ("204_5", "204_{5}"),
    ("\\text{Monday}", "monday"), ("A", "\\text{(A)}"), ("90^\\circ", "90 \\text{ degrees}"), ("12", "\\$12.00"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}2/2\\\\2\\end{bmatrix}"), ("\\emptyset", "\\{\\}"),
    ("\\begin{pmatrix}2\\\\4\\end{pmatrix}", "2\\begin{pmatrix}1\\\\2\\end{pmatrix}"), ("\\sum_{k=1}^{3} k", "6"),
    ("7", "3+4 = 7"), ("\\frac{5}{6}", "5/6 \\approx 0.83"), ("\\frac{1}{3}", "0.3333"),
    ("m\\dot v", "m\\frac{dv}{dt}"),
    ("7", "\\left(\\left(" * 900 + "7" + "\\right)\\right)" * 900), ("7", "  " * 40_000 + "7"),
]  # fmt: skip
# What must be refused.
DIFFERENT = [
    ("5", "6"), ("5", "5x"), ("5", "x^2=25"), ("5", "5 \\text{ or } 6"), ("5", "2x=5"), ("7", "7=8"),
    ("7", "\\{7,8\\}"),
    ("3,5", "35"), ("1,2,2", "1,2"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2]", "(1,2)"), ("x>2", "x\\ge 2"),
    ("x=5", "y=5"), ("x=1,y=2", "x=2,y=1"), ("2x+y=3", "4x+2y=3"), ("0=0", "1=1"), ("a+3z=0", "0"), ("x", "X"),
    ("x", "\\sqrt{x^2}"), ("3c", "3"), ("2m", "2"), ("864 \\text{ inches}^2", "864^2"), ("50\\%", "5000"),
    ("50", "0.5"),
    ("\\sqrt{2}", "1.4142135"), ("\\pi", "3.14"), ("1", "0.999999999"), ("\\frac{1}{3}", "0.33"), ("1", "1+10^{-30}"),
    ("10^{100}+1", "10^{100}"), ("\\frac{100!}{2^{50}}", "\\frac{100!}{2^{49}}"), ("0", "10^{-400}"), ("0", "1/0"),
    ("\\text{listen}", "\\text{silent}"), ("\\text{C}", "\\text{(D)}"), ("1010_2", "1010_3"), ("2:3", "3:2"),
    ("\\lfloor\\log_2 n\\rfloor+1", "\\lceil\\log_2 n\\rceil"), ("\\emptyset", "0"), ("3 \\frac{1}{2}", "\\frac{3}{2}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"), ("7", "7 # 8"),
    ("\\frac{n(n+1)}{2}", "1+2+\\cdots+n"),
]  # fmt: skip


def boxed(pairs: list[tuple[str, str]]) -> list[Verdict]:
    """Verdicts on (gold, content of the box)."""
    return grade_batch([(f"So $\\boxed{{{answer}}}$.", gold) for gold, answer in pairs])


def test_same_answers_are_accepted() -> None:
    verdicts = boxed(SAME)
    assert [pair for pair, verdict in zip(SAME, verdicts, strict=True) if not verdict.correct] == []


def test_different_answers_are_refused() -> None:
    verdicts = boxed(DIFFERENT)
    assert [pair for pair, verdict in zip(DIFFERENT, verdicts, strict=True) if verdict.correct] == []
    assert not any(verdict.failed for verdict in verdicts)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\boxed{7}}", "\\boxed{7}"),
        ("\\fbox{7}", "7"),
        ("\\boxed 7", "7"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{1 or \\boxed{2}", "2"),
        ("\\boxed{7", None),
        ("boxed{7}", None),
        ("no answer", None),
        ("\\boxed{1}</think>\\boxed{2}", "2"),
        ("\\boxed{1}</think> done", None),
        ("<think>\\boxed{1} and on", None),
        ("\\boxed{-2} \\text{ and } $\\boxed{1}$", "-2, 1"),
        ("\\boxed{7}, or \\boxed{7}", "7"),
        ("$x = \\boxed{3}$ or $x = \\boxed{5}$", "3, 5"),
        ("x = \\boxed{3} so x = \\boxed{5}", "5"),
        ("\\boxed{7}, \\boxed{}", ""),
        ("{" * 100_000 + "\\boxed{7}", "7"),
        ("\\boxed{" + "{" * 100_000, None),
        ("\\boxed{7}" + "}" * 100_000, "7"),
    ],
)
def test_extraction_of_boxes(response: str, answer: str | None) -> None:
    assert extract(response, "boxed") == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [("#### 7", "7"), ("#### 1\n#### 2 \nbye", "2"), ("\\boxed{7}", None), ("####", None), ("####\n 8", "8")],
)
def test_extraction_after_hashes(response: str, answer: str | None) -> None:
    assert extract(response, "hash") == answer


def test_reasons() -> None:
    responses = ["7", "\\boxed{}", "\\boxed{7}", "\\boxed{8}", "\\boxed{14/2}", "\\boxed{os._exit(0)}", "\\boxed{@}"]
    verdicts = grade_batch([(response, "7") for response in responses])
    reasons = ["no_box", "empty", "exact", "different", "equivalent", "unparseable", "unparseable"]
    assert [verdict.reason for verdict in verdicts] == reasons
    assert [verdict.extracted for verdict in verdicts[:3]] == [None, "", "7"]
    by_hash = grade_batch([("\\boxed{7}", "7"), ("so\n#### 7", "7")], answer_style="hash")
    assert by_hash == [Verdict(False, None, "no_answer"), Verdict(True, "7", "exact")]


def test_absurd_lengths_are_not_parsed() -> None:
    long = ["x" * (RAW_LIMIT + 1), "1+" * LIMIT + "1", "9" * 20_000]
    assert [verdict.reason for verdict in boxed([("7", answer) for answer in long])] == ["unparseable"] * 3


def test_normal_form_is_stable() -> None:
    for pair in SAME[:40] + DIFFERENT:
        for text in pair:
            once = normalize(text)
            assert once is not None
            assert normalize(once) == once, text


def test_plain_numbers_are_exact() -> None:
    number = read_number("1.325e-27")
    assert number is not None
    assert number.value * 10**30 == 1325
    assert read_number("1e999999999") is None
    assert read_number("1/0") is None


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="answer_style"):
        grade_batch([], answer_style="last")  # type: ignore[arg-type]


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@needs_data
@pytest.mark.parametrize(("name", "least"), [("cases", 0.99), ("round2", 0.95)])
def test_labelled_cases(name: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = read_lines(DATA / "grader" / f"{name}.jsonl")
    verdicts = grade_batch([(case["response"], case["gold"]) for case in cases])
    graded = list(zip(cases, verdicts, strict=True))
    assert [case for case, verdict in graded if verdict.correct and not case["correct"]] == []
    assert [case for case, verdict in graded if verdict.failed] == []
    assert sum(verdict.correct == case["correct"] for case, verdict in graded) >= least * len(cases)
    assert list(tmp_path.iterdir()) == []


@needs_data
@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench", "gsm8k"])
def test_golds_against_themselves(name: str) -> None:
    golds = [line["answer"] for line in read_lines(DATA / "benchmarks" / f"{name}.jsonl")]
    responses = [f"\\boxed{{{gold}}}" for gold in golds] + [f"\\boxed{{ \\displaystyle {gold} . }}" for gold in golds]
    verdicts = grade_batch(list(zip(responses, golds * 2, strict=True)))
    assert [gold for gold, verdict in zip(golds * 2, verdicts, strict=True) if not verdict.correct] == []


@needs_data
def test_scientific_golds_in_latex() -> None:
    golds = [line["answer"] for line in read_lines(DATA / "benchmarks" / "minerva.jsonl")]
    scientific = [gold for gold in golds if re.fullmatch(r"-?[\d.]+e-?\d+", gold)]
    assert len(scientific) == 58
    forms = [(gold, "{} \\times 10^{{{}}}".format(*gold.split("e"))) for gold in scientific]
    assert all(verdict.correct for verdict in boxed(forms))
    shifted = [(gold, "{} \\times 10^{{{}1}}".format(*gold.split("e"))) for gold in scientific]
    assert not any(verdict.correct for verdict in boxed(shifted))
