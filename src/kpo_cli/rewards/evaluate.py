"""Values of expressions to high precision, with a bound on every intermediate result."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath

from kpo_cli.rewards.algebra import Node

# Results beyond 10^(10^12) are not computed: no answer needs them, and exponents of exponents are how bombs are made.
MAX_LOG10 = 10**12
MAX_EXACT_DIGITS = 4_000
_TRIG = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec, "csc": mpmath.csc,
    "asin": mpmath.asin, "acos": mpmath.acos, "atan": mpmath.atan, "sinh": mpmath.sinh, "cosh": mpmath.cosh,
    "tanh": mpmath.tanh,
}  # fmt: skip


class Undefined(Exception):
    """The expression has no value at this point."""


class TooLarge(Exception):
    """An intermediate result is too large to be computed."""


def evaluate(node: Node, point: Mapping[str, Fraction]) -> Any:
    """The value of a tree where the unknowns have these values, as an mpmath number."""
    try:
        return _finite(_value(node, point))
    except (ZeroDivisionError, ValueError) as error:
        raise Undefined from error
    except OverflowError as error:
        raise TooLarge from error


def _finite(value: Any) -> Any:
    if mpmath.isnan(value):
        raise Undefined
    return value


def _value(node: Node, point: Mapping[str, Fraction]) -> Any:
    op, args = node.op, node.args
    if op == "number":
        return _rational(node.value)
    if op == "symbol":
        return _rational(point[node.name])
    if op == "constant":
        return {"\\pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1), "\\infty": mpmath.inf}[node.name]
    if op == "degree":
        return mpmath.pi / 180
    if op == "add":
        return _sum(args, point)
    values = [_value(arg, point) for arg in args]
    if op == "mul":
        return mpmath.fprod(values)
    if op == "pow":
        return _power(values[0], values[1])
    if op == "root":
        return _root(values[0], values[1])
    return _function(op, values)


def _rational(value: Fraction) -> Any:
    return mpmath.mpf(value.numerator) / value.denominator


def _sum(terms: tuple[Node, ...], point: Mapping[str, Fraction]) -> Any:
    """A sum in which equal terms of opposite sign cancel unseen, whatever their size."""
    counts: dict[Node, Fraction] = {}
    for term in terms:
        factor = Fraction(1)
        while term.op == "mul" and term.args[0].op == "number" and len(term.args) == 2:
            factor, term = factor * term.args[0].value, term.args[1]
        counts[term] = counts.get(term, Fraction(0)) + factor
    return mpmath.fsum(_rational(count) * _value(term, point) for term, count in counts.items() if count)


def _power(base: Any, exponent: Any) -> Any:
    """A power whose size is known to be bounded before it is computed."""
    if base == 0:
        if mpmath.re(exponent) <= 0:
            raise Undefined
        return mpmath.mpf(0)
    if mpmath.isinf(base) or mpmath.isinf(exponent):
        raise Undefined
    if abs(exponent) > MAX_LOG10 or abs(exponent * mpmath.log10(abs(base))) > MAX_LOG10:
        raise TooLarge
    return mpmath.power(base, exponent)


def _root(base: Any, index: Any) -> Any:
    """A root; the odd root of a negative number is real, as in school."""
    if index == 0:
        raise Undefined
    odd = mpmath.im(index) == 0 and mpmath.isint(index) and int(mpmath.re(index)) % 2 == 1
    if odd and mpmath.im(base) == 0 and mpmath.re(base) < 0:
        return -_power(-base, 1 / index)
    return _power(base, 1 / index) if base != 0 else base


def _function(op: str, values: list[Any]) -> Any:
    """Functions of one or two values."""
    first = values[0]
    if op in _TRIG:
        return _TRIG[op](first)
    if op in ("ln", "lg"):
        if first == 0:
            raise Undefined
        return mpmath.log(first) if op == "ln" else mpmath.log10(first)
    if op == "abs":
        return abs(first)
    if op in ("floor", "ceil"):
        nudge = mpmath.mpf(10) ** (-mpmath.mp.dps // 2)
        return mpmath.floor(first + nudge) if op == "floor" else mpmath.ceil(first - nudge)
    if op == "factorial":
        if abs(first) > 10**10:
            raise TooLarge
        return mpmath.factorial(first)
    if op == "binomial":
        if max(abs(first), abs(values[1])) > 10**10:
            raise TooLarge
        return mpmath.binomial(first, values[1])
    raise Undefined
