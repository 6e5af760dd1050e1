"""Which answers of a problem are one answer, and which are none."""

import numpy as np
import pytest

from kpo_cli.evaluation.results import summarise
from kpo_cli.evaluation.rows import answer_table, regraded

GOLD = "204"


def graded(*boxes, gold=GOLD):
    """Rows of one problem, one sample a box; None for a response without one."""
    row = {"answer": gold, "tokens": 1, "finish": "stop"}
    texts = ["no box" if box is None else rf"so \boxed{{{box}}}" for box in boxes]
    return regraded([{**row, "response": text} for text in texts])


def majority(*boxes, gold=GOLD):
    return summarise([graded(*boxes, gold=gold)], 0)["maj_at_n"]["value"]


@pytest.mark.parametrize("nothing", ["", " ", r"\,", "~", r"\text{}", "$$"])
def test_an_empty_box_is_no_vote(nothing):
    assert majority("204", nothing, nothing) == 1


@pytest.mark.parametrize(
    ("one", "two", "gold"),
    [
        ("204", r"204\text{ units}", "204"),
        (r"\frac12", "0.5", r"\frac{1}{2}"),
        ("x+1", "1+x", "x+1"),
        ("(1,2)", r"\left(1, 2\right)", "(1,2)"),
    ],
)
def test_spellings_of_the_right_answer_are_one_vote(one, two, gold):
    """Each alone loses to the two that agree on a wrong one."""
    assert majority("7", "7", one, two, one, gold=gold) == 1
    assert majority("7", "7", one, two, gold=gold) == 0.5


@pytest.mark.parametrize(("one", "two"), [("205", r"205\text{ units}"), (r"\frac15", "0.2"), ("y+1", "1+y")])
def test_spellings_of_a_wrong_answer_are_one_vote_too(one, two):
    """Else what is right would win by its spelling."""
    assert majority("204", "204", one, two, two) == 0
    assert majority("204", "204", one, two) == 0.5


def test_votes_are_counted_within_their_problem():
    table = [graded("205", r"205\text{ units}", None), graded(r"205\text{ units}", "7", "204")]
    first, second = answer_table(table)
    assert first[0] == first[1] != None  # noqa: E711
    assert first[2] is None
    assert len(set(second)) == 3


def test_a_wrong_answer_that_is_a_word():
    """No text that was written is taken for what stands for right answers."""
    assert majority("right", "right", "204") == 0


def test_an_empty_box_counts_as_no_answer():
    found = summarise([graded("204", "", " ", None)], 0)
    assert found["no_answer"] == 0.75
    assert np.isfinite(found["avg_at_n"]["low"])
