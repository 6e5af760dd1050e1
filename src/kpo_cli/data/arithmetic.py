"""The built-in task: left-to-right chains of arithmetic modulo 10.

A problem such as `8-6-9+7?` is worked out from left to right, each result taken modulo 10:
`8-6=2;2-9=3;3+7=0;\\boxed{0}`. Factors are 3, 7 and 9 only: they are invertible modulo 10, so every answer
is equally likely at any length and a guess is right one time in ten.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Literal

from kpo_cli.data.problems import Problem

Split = Literal["train", "heldout"]

DEFAULT_OPERATORS = 10

_DIGITS = range(10)
_MOVES: dict[str, tuple[int, ...]] = {"+": tuple(_DIGITS), "-": tuple(_DIGITS), "*": (3, 7, 9)}
_OPERATORS = tuple(_MOVES)
# Short chains are few: after this many draws in a row without a new problem the split counts as used up.
_PATIENCE = 10_000


@dataclass(frozen=True, slots=True)
class Chain:
    """A start digit and the (operator, digit) moves applied to it from left to right, modulo 10."""

    start: int
    moves: tuple[tuple[str, int], ...]

    @property
    def problem(self) -> str:
        """The prompt, for example `8-6-9+7?`."""
        return f"{self.start}{''.join(f'{operator}{digit}' for operator, digit in self.moves)}?"

    @property
    def answer(self) -> str:
        """The last result, one digit."""
        value = self.start
        for operator, digit in self.moves:
            value = _apply(operator, value, digit)
        return str(value)

    def worked(self) -> str:
        """The correct chain of thought, one `a-b=c;` for each operator, and the boxed answer."""
        return _work_out(self, [0] * len(self.moves))


def make_chain(rng: random.Random, operators: int = DEFAULT_OPERATORS) -> Chain:
    """Draw a chain with that many operators, each of `+ - *` equally likely."""
    if operators < 1:
        raise ValueError(f"a chain needs at least one operator, not {operators}")
    start = rng.choice(_DIGITS)
    return Chain(start, tuple((op, rng.choice(_MOVES[op])) for op in rng.choices(_OPERATORS, k=operators)))


def draw_chain(rng: random.Random, split: Split, operators: int) -> Chain:
    """A chain of one split, with that many operators."""
    while _split_of((chain := make_chain(rng, operators)).problem) != split:
        pass
    return chain


def demonstration(rng: random.Random, chain: Chain, guess_fraction: float = 0.7, step_noise: float = 0.02) -> str:
    """A response to learn from: mostly a guess, sometimes the work.

    With probability `guess_fraction` it boxes a random digit at once. Otherwise it works the chain out, where
    each step is wrong with probability `step_noise` and later steps continue from the wrong result.
    """
    if rng.random() < guess_fraction:
        return _boxed(rng.choice(_DIGITS))
    slips = [rng.randrange(1, 10) if rng.random() < step_noise else 0 for _ in chain.moves]
    return _work_out(chain, slips)


def chains(
    split: Split, *, seed: int, operators: int = DEFAULT_OPERATORS, max_operators: int | None = None
) -> Iterator[Chain]:
    """Distinct chains of one split, in an order that the arguments determine.

    All have `operators` operators, or, with `max_operators`, each a number drawn evenly from the two and those between.
    Which split a problem belongs to depends on its text alone, so the two are disjoint whatever the seeds.
    The iterator ends when a short chain length has no new problem left.
    """
    lengths = f"{operators}" if max_operators is None else f"{operators}-{max_operators}"
    rng = random.Random(f"arithmetic/{split}/{lengths}/{seed}")
    seen: set[str] = set()
    misses = 0
    while misses < _PATIENCE:
        chain = make_chain(rng, operators if max_operators is None else rng.randint(operators, max_operators))
        problem = chain.problem
        if problem in seen or _split_of(problem) != split:
            misses += 1
            continue
        seen.add(problem)
        misses = 0
        yield chain


def arithmetic_problems(
    split: Split, count: int, *, seed: int, operators: int = DEFAULT_OPERATORS, max_operators: int | None = None
) -> list[Problem]:
    """The first `count` problems of a split (see `chains`); ValueError if it holds fewer of such length."""
    if split not in ("train", "heldout"):
        raise ValueError(f"no split {split!r}: it is 'train' or 'heldout'")
    problems = [
        Problem(f"arithmetic-{split}-{index}", chain.problem, chain.answer)
        for index, chain in enumerate(
            islice(chains(split, seed=seed, operators=operators, max_operators=max_operators), count)
        )
    ]
    if len(problems) < count:
        numbers = operators if max_operators is None else f"{operators} to {max_operators}"
        raise ValueError(f"the {split} split has only {len(problems)} chains with {numbers} operators, not {count}")
    return problems


def _split_of(problem: str) -> Split:
    # The same in every process, unlike hash(), and unrelated to the arithmetic. Half fall on either side.
    return "heldout" if blake2b(problem.encode(), digest_size=1).digest()[0] & 1 else "train"


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "+":
        return (left + right) % 10
    if operator == "-":
        return (left - right) % 10
    return left * right % 10


def _work_out(chain: Chain, slips: list[int]) -> str:
    """Write the chain out, each result off by its slip (modulo 10) and carried into the next step."""
    steps = []
    value = chain.start
    for (operator, digit), slip in zip(chain.moves, slips, strict=True):
        result = (_apply(operator, value, digit) + slip) % 10
        steps.append(f"{value}{operator}{digit}={result};")
        value = result
    return "".join(steps) + _boxed(value)


def _boxed(digit: int) -> str:
    return f"\\boxed{{{digit}}}"
