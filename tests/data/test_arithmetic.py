"""The built-in task: right answers, honest noise, and splits that share nothing."""

import random
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from kpo_cli.data.arithmetic import Chain, arithmetic_problems, chains, demonstration, make_chain

STEP = re.compile(r"(\d)([-+*])(\d)=(\d);")
BOXED = re.compile(r"\\boxed\{(\d)\}")


def evaluate(problem: str) -> int:
    """An evaluator that shares nothing with the package: exact integers, reduced once at the end."""
    assert re.fullmatch(r"\d([-+]\d|\*[379])+\?", problem)
    expression = problem[0]
    for move in re.findall(r"[-+*]\d", problem):
        expression = f"({expression}){move}"
    return eval(expression) % 10


def wrong_steps(response: str) -> list[bool]:
    """Whether each written step is false, after checking that the steps follow from one another."""
    steps = STEP.findall(response)
    boxed = BOXED.search(response)
    assert boxed is not None
    assert response == "".join(f"{a}{op}{b}={c};" for a, op, b, c in steps) + boxed.group()
    assert boxed.group(1) == steps[-1][3]
    assert all(before[3] == after[0] for before, after in pairwise(steps))
    return [evaluate(f"{a}{op}{b}?") != int(c) for a, op, b, c in steps]


def within(successes: int, trials: int, rate: float) -> bool:
    """True unless the count is a one-in-10,000 event at that rate."""
    return binomtest(successes, trials, rate).pvalue > 1e-4


def test_worked_example():
    chain = Chain(8, (("-", 6), ("-", 9), ("+", 7), ("*", 3)))
    assert chain.problem == "8-6-9+7*3?"
    assert chain.worked() == r"8-6=2;2-9=3;3+7=0;0*3=0;\boxed{0}"
    assert chain.answer == "0"


@given(seed=st.integers(0, 2**32), operators=st.integers(1, 40))
def test_worked_is_right_and_ends_in_the_answer(seed: int, operators: int):
    chain = make_chain(random.Random(seed), operators)
    worked = chain.worked()
    assert len(wrong_steps(worked)) == operators
    assert not any(wrong_steps(worked))
    assert worked.endswith(rf"\boxed{{{chain.answer}}}")
    assert chain.answer == str(evaluate(chain.problem))
    steps = STEP.findall(worked)
    assert chain.problem == steps[0][0] + "".join(op + digit for _, op, digit, _ in steps) + "?"


def test_a_chain_needs_an_operator():
    with pytest.raises(ValueError, match="at least one operator"):
        make_chain(random.Random(0), 0)


def test_problems_are_distinct_right_and_disjoint_between_splits():
    train = arithmetic_problems("train", 5000, seed=0)
    heldout = arithmetic_problems("heldout", 5000, seed=0)
    texts = {p.problem for p in train}, {p.problem for p in heldout}
    assert len(texts[0]) == len(texts[1]) == 5000
    assert texts[0].isdisjoint(texts[1])
    assert texts[0].isdisjoint(p.problem for p in arithmetic_problems("heldout", 5000, seed=1))
    assert train[17].id == "arithmetic-train-17"
    assert len({p.id for p in train + heldout}) == 10_000
    assert all(p.answer == str(evaluate(p.problem)) for p in train + heldout)
    assert all(len(re.findall(r"[-+*]", p.problem)) == 10 for p in train)


def test_splits_of_short_chains_are_disjoint_and_cover_everything():
    train, heldout = ({c.problem for c in chains(s, seed=3, operators=1)} for s in ("train", "heldout"))
    assert train.isdisjoint(heldout)
    assert len(train | heldout) == 10 * 23  # a start digit, then 10 additions, 10 subtractions, 3 factors


def test_asking_for_more_than_there_is_says_so():
    with pytest.raises(ValueError, match=r"train split has only \d+ chains with 1 operators, not 1000"):
        arithmetic_problems("train", 1000, seed=0, operators=1)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        arithmetic_problems("test", 1, seed=0)  # type: ignore[arg-type]


def test_problems_depend_on_the_seed_alone():
    first = arithmetic_problems("train", 200, seed=5)
    assert arithmetic_problems("train", 300, seed=5)[:200] == first
    assert arithmetic_problems("train", 200, seed=6) != first


def test_another_process_with_another_hash_seed_draws_the_same_problems():
    script = "from kpo_cli.data.arithmetic import *; import sys; " + (
        "print([p.problem for p in arithmetic_problems('heldout', 20, seed=2)], 'torch' in sys.modules)"
    )
    environment = {"PYTHONHASHSEED": "123"}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    expected = [p.problem for p in arithmetic_problems("heldout", 20, seed=2)]
    assert output.stdout.strip() == f"{expected} False"


def test_eight_thousand_problems_are_quick():
    start = time.process_time()
    arithmetic_problems("train", 8000, seed=0)
    assert time.process_time() - start < 2.0  # 0.3 s on an idle core


def test_answers_and_operators_are_uniform():
    drawn = list(islice(chains("heldout", seed=11), 5000))
    assert chisquare(list(Counter(c.answer for c in drawn).values())).pvalue > 1e-4
    operators = Counter(op for c in drawn for op, _ in c.moves)
    assert set(operators) == set("+-*")
    assert chisquare(list(operators.values())).pvalue > 1e-4
    factors = Counter(digit for c in drawn for op, digit in c.moves if op == "*")
    assert set(factors) == {3, 7, 9}


def test_demonstration_rates():
    rng = random.Random(0)
    drawn = list(islice(chains("train", seed=0), 6000))
    responses = [demonstration(rng, chain) for chain in drawn]
    guesses = [(c, r) for c, r in zip(drawn, responses, strict=True) if r.startswith("\\")]
    assert within(len(guesses), len(drawn), 0.7)
    assert all(BOXED.fullmatch(response) for _, response in guesses)
    assert within(sum(BOXED.search(r).group(1) == c.answer for c, r in guesses), len(guesses), 0.1)
    slips = [slip for r in responses if not r.startswith("\\") for slip in wrong_steps(r)]
    assert within(sum(slips), len(slips), 0.02)


def test_demonstration_extremes():
    chain = make_chain(random.Random(0))
    assert demonstration(random.Random(1), chain, guess_fraction=0.0, step_noise=0.0) == chain.worked()
    assert all(wrong_steps(demonstration(random.Random(1), chain, guess_fraction=0.0, step_noise=1.0)))
    assert BOXED.fullmatch(demonstration(random.Random(1), chain, guess_fraction=1.0))
