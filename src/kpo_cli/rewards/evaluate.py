"""Values of expressions to any precision, with a bound on every intermediate result and a count of all that is done."""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import accumulate
from typing import Any

import mpmath

from kpo_cli.rewards.algebra import Node
from kpo_cli.rewards.work import Work

# A context of the grader's own: the caller may compute with mpmath at a precision of theirs.
mp: Any = mpmath.MPContext()
DIGITS = 60
# Results beyond 10^(10^12) are not computed: no answer needs them, and exponents of exponents are how bombs are made.
MAX_LOG10 = 10**12
_MAX_EXPONENT = 10**100
MAX_DIGITS = 12_000
_MAX_MATRIX = 20
# Values that are reached by a process (limits, integrals, infinite sums) are computed twice, and have to agree.
_PROCESS_DIGITS = 30
_TERMS = 60
_PROCESS_TOLERANCE = Fraction(1, 10**14)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc, "asin": mp.asin,
    "acos": mp.acos, "atan": mp.atan, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh, "coth": mp.coth,
    "asinh": mp.asinh, "acosh": mp.acosh, "atanh": mp.atanh, "sgn": mp.sign, "abs": abs, "zeta": mp.zeta,
    "gamma": mp.gamma, "erf": mp.erf, "re": mp.re, "im": mp.im,
}  # fmt: skip
# Functions whose argument has to stay small for the library to be quick.
_BOUNDED = {"zeta": 1_000, "gamma": 10**10, "erf": 1_000}
_LIST_FUNCTIONS = frozenset({"min", "max", "gcd", "lcm"})
Point = Mapping[str, Any]
Matrix = list[list[Any]]


class Undefined(Exception):
    """The expression has no value at this point."""


class TooLarge(Exception):
    """An intermediate result is too large to be computed."""


class Evaluator:
    """Evaluates trees at one precision.

    `scale` is the largest |log10| of any value met on the way, and `lost` the digits that may have been lost to
    cancellation, large arguments and large exponents: a value is right to `digits - lost` digits or so.
    """

    def __init__(self, work: Work, digits: int = DIGITS, inside: bool = False) -> None:
        self._work = work
        # Within a process, which is approximate in any case, what is small beyond all bounds is 0.
        self._inside = inside
        self._digits = digits
        self.scale = 0.0
        self.lost = 0.0
        self.approximate = False

    def evaluate(self, node: Node, point: Point) -> Any:
        """The value of a tree where the unknowns have these values: a number of `mp`, or a matrix of them."""
        try:
            with mp.workdps(self._digits):
                return self._value(node, point)
        except (ZeroDivisionError, ValueError, TypeError, mp.NoConvergence) as error:
            raise Undefined from error
        except OverflowError as error:
            raise TooLarge from error

    def _value(self, node: Node, point: Point) -> Any:
        op, args = node.op, node.args
        self._work.charge(1, self._digits)
        if op == "number":
            return self._seen(_rational(node.value))
        if op == "symbol":
            return _rational(point[node.name]) if node.name in point else _undefined()
        if op == "constant":
            return {"\\pi": lambda: +mp.pi, "e": lambda: +mp.e, "i": lambda: mp.mpc(0, 1)}.get(node.name, _undefined)()
        if op == "degree":
            return mp.pi / 180
        if op == "add":
            return self._sum(args, point)
        if op in ("sum", "prod", "integral", "limit"):
            return self._seen(self._process(node, point))
        if op == "matrix":
            width = int(node.value)
            values = [self._value(arg, point) for arg in args]
            return [values[i : i + width] for i in range(0, len(values), width)]
        values = [self._value(arg, point) for arg in args]
        return self._seen(self._apply(op, values))

    def _seen(self, value: Any) -> Any:
        """The value, remembered for its size."""
        if isinstance(value, list):
            return value
        if mp.isnan(value) or mp.isinf(value):
            raise Undefined
        self.scale = max(self.scale, abs(_size(value)))
        return value

    def _sum(self, terms: tuple[Node, ...], point: Point) -> Any:
        """A sum in which equal terms of opposite sign cancel unseen, whatever their size."""
        counts: dict[Node, Fraction] = {}
        for term in terms:
            factor = Fraction(1)
            while term.op == "mul" and term.args[0].op == "number" and len(term.args) == 2:
                factor, term = factor * term.args[0].value, term.args[1]
            if has_infinity(term):
                raise Undefined
            counts[term] = counts.get(term, Fraction(0)) + factor
        values = [self._multiply(_rational(count), self._value(term, point)) for term, count in counts.items() if count]
        if any(isinstance(value, list) for value in values):
            return [[mp.fsum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*values, strict=True)]
        total = mp.fsum(values)
        largest = max(map(_size, values), default=0.0)
        self.lost += max(0.0, largest - _size(total)) if total else self._digits * bool(values)
        return self._seen(total)

    def _apply(self, op: str, values: list[Any]) -> Any:
        """An operation on values."""
        if op == "mul":
            product = values[0]
            for value in values[1:]:
                product = self._multiply(product, value)
            return product
        if op == "det":
            return self._determinant(values[0])
        if op == "transpose":
            return [list(row) for row in zip(*values[0], strict=True)]
        if isinstance(values[0], list):
            return self._matrix_power(values[0], values[1]) if op == "pow" else _undefined()
        if op == "pow":
            return self._power(values[0], values[1])
        if op == "root":
            return self._root(values[0], values[1])
        return self._function(op, values)

    def _multiply(self, one: Any, two: Any) -> Any:
        """A product of numbers, of a number and a matrix, or of matrices."""
        if not isinstance(one, list) and not isinstance(two, list):
            return one * two
        if isinstance(one, list) and isinstance(two, list):
            if len(one[0]) != len(two):
                raise Undefined
            self._work.charge(len(one) * len(two) * len(two[0]), self._digits)
            return [[mp.fdot(zip(row, column, strict=True)) for column in zip(*two, strict=True)] for row in one]
        rows, factor = (one, two) if isinstance(one, list) else (two, one)
        return [[factor * cell for cell in row] for row in rows]

    def _matrix_power(self, base: Matrix, exponent: Any) -> Matrix:
        """A small integer power of a square matrix, and its inverse."""
        if not mp.isint(exponent) or abs(exponent) > 100 or len(base) != len(base[0]) or len(base) > _MAX_MATRIX:
            raise Undefined
        self._work.charge(len(base) ** 3, self._digits)
        factor = base if exponent >= 0 else mp.inverse(mp.matrix(base)).tolist()
        result = mp.eye(len(base)).tolist()
        for _ in range(abs(int(exponent))):
            result = self._multiply(result, factor)
        return result

    def _determinant(self, rows: Any) -> Any:
        if not isinstance(rows, list) or len(rows) != len(rows[0]) or len(rows) > _MAX_MATRIX:
            raise Undefined
        self._work.charge(len(rows) ** 3, self._digits)
        return mp.det(mp.matrix(rows))

    def _power(self, base: Any, exponent: Any) -> Any:
        """A power whose size is known to be bounded before it is computed."""
        if isinstance(exponent, list):
            raise Undefined
        if base == 0:
            if mp.re(exponent) <= 0:
                raise Undefined
            return mp.mpf(0)
        size = mp.re(exponent) * mp.log10(abs(base))
        if self._inside and size < -MAX_LOG10:
            return mp.mpf(0)
        if abs(exponent) > _MAX_EXPONENT or abs(size) > MAX_LOG10:
            raise TooLarge
        self._work.charge(2 if mp.isint(exponent) else 10, self._digits)
        self.lost += max(0.0, _size(exponent), _size(size))
        return mp.power(base, exponent)

    def _root(self, base: Any, index: Any) -> Any:
        """A root; the odd root of a negative number is real, as in school."""
        if isinstance(index, list) or index == 0:
            raise Undefined
        if base == 0:
            return base
        if index == 2:
            self._work.charge(1, self._digits)
            return mp.sqrt(base)
        odd = mp.im(index) == 0 and mp.isint(index) and int(mp.re(index)) % 2 == 1
        if odd and mp.im(base) == 0 and mp.re(base) < 0:
            return -self._power(-base, 1 / index)
        return self._power(base, 1 / index)

    def _function(self, op: str, values: list[Any]) -> Any:
        """Functions of one value or several."""
        if any(isinstance(value, list) for value in values):
            raise Undefined
        first = values[0]
        if op in _LIST_FUNCTIONS:
            return _of_list(op, values)
        self._work.charge(10 if op not in _BOUNDED else 200, self._digits)
        if op in _FUNCTIONS:
            if abs(first) > _BOUNDED.get(op, mp.mpf(10) ** self._digits):
                raise TooLarge
            return self._lossy(_FUNCTIONS[op](first), first)
        if op in ("ln", "lg"):
            return self._lossy(mp.log(first) if op == "ln" else mp.log10(first), mp.mpf(1))
        if op in ("floor", "ceil"):
            nudge = mp.mpf(10) ** (-mp.dps // 2)
            return mp.floor(first + nudge) if op == "floor" else mp.ceil(first - nudge)
        if max(map(abs, values)) > 10**10:
            raise TooLarge
        if not all(map(mp.isint, values)):
            # The gamma function is slow where it is no factorial.
            self._work.charge(200 * (self._digits / DIGITS) ** 2, self._digits)
        if op == "binomial":
            return mp.binomial(first, values[1])
        return mp.factorial(first) if op == "factorial" else mp.fac2(first)

    def _lossy(self, value: Any, argument: Any) -> Any:
        """The value of a function, with the digits that its argument's error may cost it."""
        self.lost += max(0.0, _size(argument)) + abs(_size(value))
        return value

    def _process(self, node: Node, point: Point) -> Any:
        """Sums and products over an index, integrals and limits: the body has a value for each of its variable."""
        body, *bounds = node.args

        def at(value: Any, digits: int) -> Any:
            inner = Evaluator(self._work, digits, inside=True)
            result = inner.evaluate(body, {**point, node.name: value})
            return _undefined() if isinstance(result, list) else mp.mpmathify(result)

        low, high = (infinity_of(bound) or self._value(bound, point) for bound in (bounds * 2)[:2])
        if node.op in ("sum", "prod") and not mp.isinf(low) and not mp.isinf(high):
            return self._finite(node, point, low, high)
        self.approximate = True
        if node.op == "limit":
            return _limit(at, low, node.value)
        if node.op == "integral":
            return _integral(at, low, high)
        if node.op == "prod" or mp.isinf(low) or not mp.isint(low):
            raise Undefined
        return _series(at, int(low))

    def _finite(self, node: Node, point: Point, low: Any, high: Any) -> Any:
        """A sum or product over an integer range; the empty ones are 0 and 1."""
        if not mp.isint(low) or not mp.isint(high):
            raise Undefined
        result = mp.mpf(0 if node.op == "sum" else 1)
        index = int(low)
        while index <= high:
            value = self._value(node.args[0], {**point, node.name: index})
            result = result + value if node.op == "sum" else result * value
            index += 1
        return result


def _undefined() -> Any:
    raise Undefined


def _size(value: Any) -> float:
    """log10 of an absolute value; 0 for 0."""
    return float(mp.mag(value)) * 0.30103 if value else 0.0


def _rational(value: Any) -> Any:
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else mp.mpmathify(value)


def _of_list(op: str, values: list[Any]) -> Any:
    """Minimum, maximum, and what needs integers."""
    if any(mp.im(value) for value in values):
        raise Undefined
    if op in ("min", "max"):
        return (min if op == "min" else max)(values)
    if not all(mp.isint(value) for value in values):
        raise Undefined
    return mp.mpf((math.gcd if op == "gcd" else math.lcm)(*(int(value) for value in values)))


def has_infinity(node: Node) -> bool:
    """True if the infinity sign stands in an expression, bounds of sums and the like excepted."""
    if node.op in ("sum", "prod", "integral", "limit"):
        return has_infinity(node.args[0])
    return (node.op == "constant" and node.name == "\\infty") or any(map(has_infinity, node.args))


def infinity_of(node: Node) -> Any | None:
    """Infinity with its sign if that is all an expression is, else None."""
    if node.op == "constant" and node.name == "\\infty":
        return mp.inf
    if node.op == "mul" and len(node.args) == 2 and node.args[0].op == "number" and node.args[0].value == -1:
        inner = infinity_of(node.args[1])
        return None if inner is None else -inner
    return None


def _series(at: Callable[[Any, int], Any], low: int) -> Any:
    """An infinite sum by Levin's u-transformation of its partial sums; two lengths have to agree."""
    digits = 120
    with mp.workdps(digits):
        # A series whose terms do not vanish has no sum, whatever an extrapolation finds.
        if any(abs(at(mp.mpf(10) ** 6 + shift, digits)) > mp.mpf(10) ** -3 for shift in (0, 1)):
            raise Undefined
        terms = [at(low + k, digits) for k in range(_TERMS)]
        if not all(terms):
            raise Undefined
        sums = list(accumulate(terms))
        values = []
        for length in (_TERMS - 12, _TERMS - 1):
            above = below = mp.mpf(0)
            for j in range(length + 1):
                weight = (-1) ** j * mp.binomial(length, j) * (mp.mpf(j + 1) / (length + 1)) ** (length - 1)
                weight /= (j + 1) * terms[j]
                above, below = above + weight * sums[j], below + weight
            values.append(above / below)
        if not _near(*values):
            raise Undefined
        return values[1]


def _near(one: Any, two: Any) -> bool:
    return bool(abs(one - two) <= _rational(_PROCESS_TOLERANCE) * max(1, abs(one)))


def _integral(at: Callable[[Any, int], Any], low: Any, high: Any) -> Any:
    """A definite integral by tanh-sinh quadrature, which also says how wrong it may be."""
    with mp.workdps(_PROCESS_DIGITS):
        value, error = mp.quad(lambda x: at(x, mp.dps), [low, high], error=True, maxdegree=6)
        if error > mp.mpf(10) ** -15 * max(1, abs(value)):
            raise Undefined
        return value


def _limit(at: Callable[[Any, int], Any], target: Any, side: Fraction) -> Any:
    """A limit by values very near to the target, from both sides (or the one that `side` is the sign of).

    Two distances, and two parities where the target is infinite, tell apart what converges.
    """
    digits = 200
    with mp.workdps(digits):
        if mp.isinf(target):
            sign = 1 if target > 0 else -1
            places = [sign * (mp.mpf(10) ** power + shift) for power in (40, 56) for shift in (0, 1)]
        else:
            sides = [int(side)] if side else [1, -1]
            places = [target + s * mp.mpf(10) ** -power for power in (40, 56) for s in sides]
        values = [at(place, digits) for place in places]
        if not all(_near(values[0], value) for value in values):
            raise Undefined
        return values[-1]
