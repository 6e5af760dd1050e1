"""The judge of the worker processes: algebra by high-precision values, and math-verify for what remains."""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from typing import Any

import mpmath
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from kpo_cli.rewards.algebra import Node, NotRead, number, operations, read, symbols
from kpo_cli.rewards.evaluate import MAX_EXACT_DIGITS, Undefined, evaluate
from kpo_cli.rewards.numbers import DOUBLE_DIGITS, read_number, same_number
from kpo_cli.rewards.structure import Relation

DIGITS = 60
_TOLERANCE = 45
_WITNESSES = 3
# Only LaTeX, and none of math-verify's own extraction and unit rules: both are done before, by other conventions. The
# expression parser of the library, which goes through Python's eval, is never used.
_LATEX = (
    LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
        ),
    ),
)
_DISCRETE = frozenset({"floor", "ceil", "factorial", "binomial"})
_DOTS = re.compile(r"\\[lcvd]?dots|\.\.\.")
_SIGNS = {"<": -1, "\\le": -1, ">": 1, "\\ge": 1}
_STRICT = frozenset({"<", ">"})


class AlgebraJudge:
    """Compares expressions, equations and inequalities. `unread` is set once a part of an answer made no sense."""

    def __init__(self) -> None:
        self.unread = False

    def same_value(self, gold: str, answer: str) -> bool:
        """True if two expressions are the same number or the same function of their unknowns."""
        plain, other = read_number(gold), read_number(answer)
        if plain is not None and other is not None:
            return same_number(plain, other)
        try:
            scaled = ("\\%" in gold) != ("\\%" in answer)
            one, two = read(gold), read(answer)
        except NotRead:
            return self._ask_library(gold, answer)
        try:
            same = same_expression(one, two)
            if not same and scaled:
                part, whole = (one, two) if "\\%" in gold else (two, one)
                same = same_expression(Node("mul", (number(Fraction(1, 100)), part)), whole)
        except Undefined:
            return self._ask_library(gold, answer)
        return same or _is_full_precision(gold, one, answer, two)

    def same_relation(self, gold: Relation, answer: Relation) -> bool:
        """True if one relation is the other times a constant (positive, for the same direction)."""
        try:
            one, two = (_difference(relation) for relation in (gold, answer))
            unknowns = symbols(one)
            if not unknowns or unknowns != symbols(two):
                return False
            ratio = _constant_ratio(one, two)
        except NotRead:
            return self._ask_library(_latex_of(gold), _latex_of(answer))
        if ratio is None:
            return False
        sign, other = gold.signs[0], answer.signs[0]
        if sign not in _SIGNS or other not in _SIGNS:
            return sign == other
        direction = _SIGNS[sign] * _SIGNS[other]
        return (sign in _STRICT) == (other in _STRICT) and (ratio > 0) == (direction > 0)

    def _ask_library(self, gold: str, answer: str) -> bool:
        self.unread = self.unread or not parsed(answer)
        return library_says_same(gold, answer)


def _latex_of(relation: Relation) -> str:
    return f"{relation.sides[0]} {relation.signs[0]} {relation.sides[1]}"


def _difference(relation: Relation) -> Node:
    """What a relation says is zero, or has a sign."""
    left, right = (read(side) for side in relation.sides)
    return Node("add", (left, Node("mul", (number(-1), right))))


def points(names: frozenset[str], discrete: bool) -> Iterator[dict[str, Fraction]]:
    """Generic points, always the same: small fractions, some of them negative; integers for discrete functions."""
    ordered = sorted(names)
    state = 20_011
    for turn in range(12):
        point = {}
        for place, name in enumerate(ordered):
            state = (state * 48_271) % 2_147_483_647
            if discrete:
                # Powers of two first: floors of logarithms and quotients differ there.
                point[name] = Fraction(2 ** (turn + 1) if turn < 4 and not place else 2 + state % 29)
            else:
                size = Fraction(101 + state % 1_999, 977)
                point[name] = -size if turn % 3 == 2 else size
        yield point


def same_expression(gold: Node, answer: Node) -> bool:
    """Compare two trees by their values at generic points; raises `Undefined` if they have none."""
    names = symbols(gold) | symbols(answer)
    kinds = operations(gold) | operations(answer)
    needed = 1 if not names else _WITNESSES + (3 if kinds & _DISCRETE else 0)
    seen = 0
    for point in points(names, bool(kinds & _DISCRETE)):
        try:
            one, two = _values(gold, answer, point)
        except Undefined:
            continue
        # Away from its domain an expression has a complex value, which tells nothing: branches are conventions.
        if names and "i" not in kinds and (mpmath.im(one) or mpmath.im(two)):
            continue
        if not close(one, two):
            return False
        seen += 1
        if seen == needed:
            return True
    if seen >= 2:
        return True
    raise Undefined


def _values(gold: Node, answer: Node, point: dict[str, Fraction]) -> tuple[Any, Any]:
    """Both values, to every digit of their integer parts if those are long."""
    with mpmath.workdps(DIGITS):
        one, two = evaluate(gold, point), evaluate(answer, point)
        if not one or mpmath.isinf(one) or not close(one, two):
            return one, two
        size = int(mpmath.log10(abs(one)))
    if not DIGITS // 2 < size <= MAX_EXACT_DIGITS:
        return one, two
    with mpmath.workdps(size + DIGITS):
        one, two = evaluate(gold, point), evaluate(answer, point)
        # Agreement in the leading digits is not enough: 10^100 is not 10^100 + 1.
        return (one, two) if abs(one - two) <= mpmath.mpf(10) ** -_TOLERANCE else (one, -one)


def close(one: Any, two: Any) -> bool:
    """True if two values agree to within the working precision."""
    if mpmath.isinf(one) or mpmath.isinf(two):
        return bool(one == two)
    with mpmath.workdps(DIGITS):
        return bool(abs(one - two) <= mpmath.mpf(10) ** -_TOLERANCE * max(abs(one), abs(two)))


def _constant_ratio(gold: Node, answer: Node) -> Any | None:
    """The constant that one expression is times the other, or None."""
    ratios = []
    for point in islice(points(symbols(gold), False), 8):
        with mpmath.workdps(DIGITS):
            try:
                one, two = evaluate(gold, point), evaluate(answer, point)
            except Undefined:
                continue
            if mpmath.im(one) or mpmath.im(two) or not one or not two:
                continue
            ratios.append(two / one)
    if len(ratios) < _WITNESSES or not all(close(ratios[0], ratio) for ratio in ratios):
        return None
    return ratios[0]


def _is_full_precision(gold: str, one: Node, answer: str, two: Node) -> bool:
    """True if one side is a decimal with all the digits of a double, and the other its exact value."""
    for text, exact in ((gold, two), (answer, one)):
        decimal = read_number(text)
        if decimal is None or decimal.digits < DOUBLE_DIGITS or decimal.places is None or symbols(exact):
            continue
        with mpmath.workdps(DIGITS):
            value = evaluate(exact, {})
            shown = mpmath.mpf(decimal.value.numerator) / decimal.value.denominator
            # Exact integers and short decimals have no business being approximated.
            if "root" not in operations(exact) and "constant" not in operations(exact):
                continue
            return bool(abs(value - shown) <= abs(value) * mpmath.mpf(10) ** (1 - min(decimal.digits, 40)))
    return False


def library_says_same(gold: str, answer: str) -> bool:
    """What math-verify says of two LaTeX expressions, without its time-outs, which need signals."""
    one, two = parsed(gold), parsed(answer)
    if not one or not two:
        return False
    return verify(
        list(one), list(two), timeout_seconds=None, raise_on_error=True, float_rounding=12, numeric_precision=30
    )


@lru_cache(maxsize=1024)
def parsed(text: str) -> tuple[Any, ...]:
    """math-verify's reading of an expression; empty if it has none."""
    if _DOTS.search(text):
        # The library drops the dots of "1+2+\\cdots+n", which leaves another expression.
        return ()
    latex = re.sub(r"\\cr(?![A-Za-z])", r"\\\\", text)
    return tuple(parse(f"${latex}$", _LATEX, fallback_mode="no_fallback", parsing_timeout=None))
