"""Answers that were labelled before the grader saw them, and what a policy might box to be right without knowing."""

from pathlib import Path

import pytest

from kpo_cli.rewards import grade_batch

# No two of them are the same, so that an answer is right for one of them at most.
GOLDS = [
    "37", "\\sqrt{2}", "x^2+1", "(3,4)", "\\frac{1}{3}", "0", "-1", "x>2", "\\text{yes}", "2,5", "y=2x+1", "\\infty",
    "\\emptyset", "B", "\\pi", "1+i", "12\\text{ cm}", "f(x)=x", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "10^{50}",
    "[0,1]", "n", "\\frac{n(n+1)}{2}", "3:4", "1011_2", "2n\\pi, n\\in\\mathbb{Z}", "\\text{Monday}",
]  # fmt: skip
# Zeros that lose every digit, and what is made of them: the precision says nothing about such values.
ZEROS = [
    "1-1", "2-2+0", "\\sin\\pi", "2\\sin\\pi", "\\cos\\frac{\\pi}{2}", "e^{i\\pi}+1", "\\sqrt8-2\\sqrt2", "x-x+1-1",
    "\\sum_{k=1}^{3}(k-2)", "(1-1,2-2)", "\\frac{1}{\\sin\\pi}", "\\frac{1}{1-1}", "(1-1)^{0}", "0\\sin\\pi",
    "x\\sin\\pi", "\\sum_{k=1}^{200}\\sin k", "10^{50}(1-1)", "\\frac{1-1}{1-1}", "\\tan\\frac{\\pi}{2}", "7+1-1",
    "\\prod_{k=1}^{3}(k-2)", "\\ln(1-1)", "(1-1)!", "\\lim_{x\\to 0} (1-1)", "\\int_0^1 (1-1) dx", "n-n+2-2",
]  # fmt: skip


@pytest.mark.parametrize("answer", ZEROS)
def test_no_answer_is_right_for_two_golds(answer: str) -> None:
    verdicts = grade_batch([(f"\\boxed{{{answer}}}", gold) for gold in GOLDS])
    assert len([gold for gold, verdict in zip(GOLDS, verdicts, strict=True) if verdict.correct]) <= 1


def test_answers_labelled_in_advance() -> None:
    """A line of the file is `= gold || answer` for what says the same, and `! gold || answer` for what does not."""
    lines = (Path(__file__).parent / "answers.txt").read_text(encoding="utf-8").splitlines()
    labelled = [(line[0], *line[2:].split(" || ")) for line in lines if line[0] != "#"]
    verdicts = grade_batch([(f"So $\\boxed{{{answer}}}$.", gold) for _, gold, answer in labelled])
    wrong = [
        (label, gold, answer, verdict.reason)
        for (label, gold, answer), verdict in zip(labelled, verdicts, strict=True)
        if verdict.correct != (label == "=") or verdict.failed
    ]
    assert wrong == []
    assert len(labelled) > 900
