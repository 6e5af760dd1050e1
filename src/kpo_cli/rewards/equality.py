"""Whether two expressions are the same, by their values at generic points."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

from kpo_cli.rewards.algebra import Node, number, operations, symbols
from kpo_cli.rewards.evaluate import (
    DIGITS,
    MAX_DIGITS,
    Evaluator,
    Point,
    TooLarge,
    Undefined,
    has_infinity,
    infinity_of,
    mp,
)
from kpo_cli.rewards.numbers import DOUBLE_DIGITS, read_number
from kpo_cli.rewards.work import Work

_TOLERANCE = 45
_APPROXIMATE_TOLERANCE = 12
_GUARD = 15
_SMALL_SCALE = 8
_WITNESSES = 3
# Unknowns of these functions are integers; beside a floor or ceiling those are that are called like integers.
_DISCRETE = frozenset({"factorial", "double_factorial", "binomial", "sum", "prod", "gcd", "lcm"})
_ROUNDING = frozenset({"floor", "ceil"})
_INTEGERS = frozenset("nkmijpqNMK")


class _Precision(NamedTuple):
    """Of a pair of values: digits computed with, |log10| of the largest or smallest number met, digits lost."""

    digits: int
    scale: float
    lost: float
    approximate: bool

    @property
    def trusted(self) -> int:
        """Digits that both values are right in; none or fewer where cancellation has left nothing."""
        return int(self.digits - self.lost - _GUARD)


def points(names: frozenset[str], integers: frozenset[str]) -> Iterator[dict[str, Fraction]]:
    """Generic points, always the same: small fractions, some of them negative, and integers for some of the names."""
    ordered = sorted(names)
    state = 20_011
    for turn in range(12):
        point = {}
        for place, name in enumerate(ordered):
            state = (state * 48_271) % 2_147_483_647
            if name in integers:
                # Powers of two first: floors of logarithms and quotients differ there.
                point[name] = Fraction(2 ** (turn + 1) if turn < 4 and not place else 2 + state % 29)
            else:
                size = Fraction(101 + state % 1_999, 977)
                point[name] = -size if turn % 3 == 2 else size
        yield point


def same_expression(gold: Node, answer: Node, work: Work) -> bool:
    """Compare two trees by their values at generic points; raises `Undefined` if they have none."""
    if has_infinity(gold) or has_infinity(answer):
        one, two = infinity_of(gold), infinity_of(answer)
        if (one is None and has_infinity(gold)) or (two is None and has_infinity(answer)):
            raise Undefined
        return one is not None and one == two
    names = symbols(gold) | symbols(answer)
    kinds = operations(gold) | operations(answer)
    integers = names if kinds & _DISCRETE else names & _INTEGERS if kinds & _ROUNDING else frozenset()
    needed = 1 if not names else _WITNESSES + (3 if kinds & (_DISCRETE | _ROUNDING) else 0)
    seen = 0
    for point in points(names, integers):
        try:
            same = _same_at(gold, answer, point, work, bool(names) and "i" not in kinds)
        except Undefined:
            continue
        if not same:
            return False
        seen += 1
        if seen == needed:
            return True
    if seen >= 2:
        return True
    raise Undefined


def _same_at(gold: Node, answer: Node, point: Point, work: Work, real: bool) -> bool:
    """Compare values at one point; raises `Undefined` where they have none, or where they should be real and are not.

    What agrees at first is looked at again with as many digits more as the largest and smallest numbers on the way
    have, so that 1 + 10^-300 is not 1. A zero in disguise, as sin(pi), shrinks with the precision; a tiny number does
    not.
    """
    one, two, first = _values(gold, answer, point, work, DIGITS)
    if isinstance(one, list) or isinstance(two, list):
        return _same_matrices(one, two)
    # Away from its domain an expression has a complex value, which tells nothing: branches are conventions.
    if real and (mp.im(one) or mp.im(two)):
        raise Undefined
    if first.approximate:
        return bool(abs(one - two) <= mp.mpf(10) ** -_APPROXIMATE_TOLERANCE * max(1, abs(one), abs(two)))
    if first.trusted > 0 and not _agree(one, two, first):
        return False
    if max(first.scale, first.lost) <= _SMALL_SCALE:
        return True
    digits = DIGITS + int(first.scale) + int(min(first.lost, first.scale + DIGITS))
    if digits > MAX_DIGITS:
        raise TooLarge
    one, two, second = _values(gold, answer, point, work, digits)
    # A zero has lost all its digits, so that nothing would differ from it in those that are left.
    agree = second.trusted > _GUARD and _agree(one, two, second)
    return agree or bool(abs(one - two) <= mp.mpf(10) ** -(_TOLERANCE + int(first.scale)))


def _agree(one: Any, two: Any, numbers: _Precision) -> bool:
    """True if two values do not differ in the digits that they can be trusted in."""
    with mp.workdps(numbers.digits):
        return bool(abs(one - two) <= mp.mpf(10) ** -numbers.trusted * max(abs(one), abs(two)))


def _values(gold: Node, answer: Node, point: Point, work: Work, digits: int) -> tuple[Any, Any, _Precision]:
    """Both values, and how far they can be trusted."""
    first, second = Evaluator(work, digits), Evaluator(work, digits)
    one, two = first.evaluate(gold, point), second.evaluate(answer, point)
    scale, lost = max(first.scale, second.scale), max(first.lost, second.lost)
    return one, two, _Precision(digits, scale, lost, first.approximate or second.approximate)


def _same_matrices(one: Any, two: Any) -> bool:
    if not isinstance(one, list) or not isinstance(two, list) or len(one) != len(two) or len(one[0]) != len(two[0]):
        return False
    with mp.workdps(DIGITS):
        return all(
            abs(cell - other) <= mp.mpf(10) ** -_TOLERANCE * max(1, abs(cell))
            for row, other_row in zip(one, two, strict=True)
            for cell, other in zip(row, other_row, strict=True)
        )


def constant_ratio(gold: Node, answer: Node, work: Work) -> Any | None:
    """The constant that one expression is times the other, or None."""
    ratios = []
    for point in islice(points(symbols(gold), frozenset()), 8):
        with mp.workdps(DIGITS):
            try:
                one, two, _ = _values(gold, answer, point, work, DIGITS)
            except Undefined:
                continue
            if isinstance(one, list) or isinstance(two, list) or mp.im(one) or mp.im(two) or not one or not two:
                continue
            ratios.append(two / one)
    with mp.workdps(DIGITS):
        same = all(abs(ratios[0] - r) <= mp.mpf(10) ** -_TOLERANCE * abs(ratios[0]) for r in ratios)
    return ratios[0] if len(ratios) >= _WITNESSES and same else None


def is_full_precision(gold: str, one: Node, answer: str, two: Node, work: Work) -> bool:
    """True if one side is a decimal with all the digits of a double, and the other its exact value."""
    for text, exact in ((gold, two), (answer, one)):
        decimal = read_number(text)
        if decimal is None or decimal.digits < DOUBLE_DIGITS or decimal.places is None or symbols(exact):
            continue
        # Exact integers and short decimals have no business being approximated.
        if not operations(exact) & {"root", "constant"}:
            continue
        value = Evaluator(work).evaluate(exact, {})
        with mp.workdps(DIGITS):
            shown = mp.mpf(decimal.value.numerator) / decimal.value.denominator
            return bool(abs(value - shown) <= abs(value) * mp.mpf(10) ** (1 - min(decimal.digits, 40)))
    return False


def real_value(node: Node, work: Work) -> Any | None:
    """The value of an expression without unknowns, infinity included, if it is real; else None."""
    infinite = infinity_of(node)
    if infinite is not None:
        return infinite
    if symbols(node):
        return None
    try:
        value = Evaluator(work).evaluate(node, {})
    except Undefined:
        return None
    return None if isinstance(value, list) or mp.im(value) else mp.re(value)


def same_family(gold: Node, answer: Node, name: str, other: str, work: Work) -> bool:
    """True if two expressions that are linear in an integer take the same values over all integers."""
    steps = []
    for node, unknown in ((gold, name), (answer, other)):
        if symbols(node) != {unknown}:
            return False
        values = [Evaluator(work).evaluate(node, {unknown: Fraction(k)}) for k in (0, 1, 2)]
        with mp.workdps(DIGITS):
            steps.append((values[0], values[1] - values[0], values[2] - values[1]))
    with mp.workdps(DIGITS):
        (start, step, again), (other_start, other_step, other_again) = steps
        tiny = mp.mpf(10) ** -_TOLERANCE
        if not step or abs(step - again) > tiny or abs(other_step - other_again) > tiny:
            return False
        shift = (other_start - start) / step
        return bool(abs(abs(step) - abs(other_step)) <= tiny and abs(shift - mp.nint(mp.re(shift))) <= tiny)


def congruent(gold: Node, answer: Node, modulus: Node, work: Work) -> bool:
    """True if two numbers leave the same remainder."""
    values = [real_value(node, work) for node in (gold, answer, modulus)]
    if any(value is None or not mp.isint(value) for value in values):
        return False
    one, two, by = (int(value) for value in values if value is not None)
    return by != 0 and (one - two) % by == 0


def scaled(node: Node, factor: Fraction) -> Node:
    """An expression times a number."""
    return node if factor == 1 else Node("mul", (number(factor), node))
