r"""Plain numbers: what can be read and compared exactly, without any algebra."""

import re
from dataclasses import dataclass
from fractions import Fraction

# Exponents beyond this are left to the engine, so that "1e999999999" costs nothing here.
MAX_EXPONENT = 10_000
# A decimal with this many significant digits identifies an irrational number (the precision of a double).
DOUBLE_DIGITS = 15
_ROUNDED_PLACES = 4

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_DECIMAL = re.compile(rf"(?P<sign>[+-]?) ?(?P<digits>{_UNSIGNED})(?: ?[eE] ?(?P<exponent>[+-]?\d{{1,6}}))?")
_POWER = re.compile(
    rf"(?P<sign>[+-]?) ?(?:(?P<digits>{_UNSIGNED}) ?\\cdot )? ?10 ?\^ ?(?:\{{ ?(?P<exponent>[+-]?\d{{1,6}}) ?\}})"
)
_REPEATING = re.compile(r"(?P<sign>[+-]?) ?(?P<whole>\d*)\.(?P<head>\d*)\\(?:overline|bar|dot)\{(?P<cycle>\d+)\}")
_QUOTIENT = re.compile(r"(?P<sign>[+-]?) ?\(?(?P<above>[+-]?[\d.,]+)\)? ?/ ?\(?(?P<below>[+-]?[\d.,]+)\)?")
_FRACTION = re.compile(r"(?P<sign>[+-]?) ?\\frac\{ ?(?P<above>[+-]?[\d., ]+)\}\{ ?(?P<below>[+-]?[\d., ]+)\}")
_MIXED = re.compile(
    r"(?P<sign>[+-]?) ?(?P<whole>\d+) ?"
    r"(?:\\frac\{ ?(?P<above>\d+) ?\}\{ ?(?P<below>\d+) ?\}| (?P<over>\d+) ?/ ?(?P<under>\d+))"
)


@dataclass(frozen=True, slots=True)
class Number:
    """An exact value and how it was written: with how many decimals (None: not as a decimal), as a percentage."""

    value: Fraction
    places: int | None = None
    digits: int = 0
    percent: bool = False


def read_number(text: str) -> Number | None:
    """The plain number that the normalised text is, or None if it is anything else."""
    percent = text.endswith("\\%")
    if percent:
        text = text[:-2].rstrip()
    number = _read_decimal(text) or _read_quotient(text) or _read_mixed(text)
    if number is None:
        return None
    return Number(number.value, number.places, number.digits, percent)


def _read_decimal(text: str) -> Number | None:
    """An integer, a decimal, scientific notation, or a repeating decimal."""
    match = _DECIMAL.fullmatch(text) or _POWER.fullmatch(text)
    if match is None:
        return _read_repeating(text)
    exponent = int(match["exponent"] or 0)
    digits = (match["digits"] or "1").replace(",", "")
    if abs(exponent) > MAX_EXPONENT or len(digits) > MAX_EXPONENT // 4:
        return None
    whole, _, tail = digits.partition(".")
    value = Fraction(int(whole + tail or "0"), 10 ** len(tail)) * Fraction(10) ** exponent
    places = max(0, len(tail) - exponent)
    return Number(-value if match["sign"] == "-" else value, places, len((whole + tail).lstrip("0")))


def _read_repeating(text: str) -> Number | None:
    """A decimal with a marked cycle, as `0.1\\overline{6}`."""
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    head, cycle = match["whole"] + match["head"], match["cycle"]
    value = int(head or "0") + Fraction(int(cycle), 10 ** len(cycle) - 1)
    value /= 10 ** len(match["head"])
    return Number(-value if match["sign"] == "-" else value)


def _read_quotient(text: str) -> Number | None:
    """A fraction of two decimals, in either notation."""
    match = _FRACTION.fullmatch(text) or _QUOTIENT.fullmatch(text)
    if match is None:
        return None
    above, below = _read_decimal(match["above"].strip()), _read_decimal(match["below"].strip())
    if above is None or below is None or not below.value:
        return None
    value = above.value / below.value
    return Number(-value if match["sign"] == "-" else value)


def _read_mixed(text: str) -> Number | None:
    """A mixed number: `3\\frac{1}{2}` and `3 1/2` are seven halves."""
    match = _MIXED.fullmatch(text)
    if match is None:
        return None
    below = int(match["below"] or match["under"])
    if not below or len(text) > MAX_EXPONENT // 4:
        return None
    value = int(match["whole"]) + Fraction(int(match["above"] or match["over"]), below)
    return Number(-value if match["sign"] == "-" else value)


def same_number(gold: Number, answer: Number) -> bool:
    """True if the two numbers are the same under the grader's conventions.

    The percent sign is ignored, and a percentage may also be given as the fraction that it is.
    """
    if gold.value == answer.value or _rounds_to(gold, answer) or _rounds_to(answer, gold):
        return True
    if gold.percent == answer.percent:
        return False
    scale = Fraction(1, 100)
    return gold.value * (scale if gold.percent else 1) == answer.value * (scale if answer.percent else 1)


def _rounds_to(decimal: Number, exact: Number) -> bool:
    """True if a correctly rounded decimal stands for a fraction that no finite decimal can write.

    Four places at least, and enough of them to single the fraction out: two fractions with denominators up to q are
    at least 1/q² apart, so that n places determine the fraction if 10^n > q².
    """
    if decimal.places is None or decimal.places < _ROUNDED_PLACES or decimal.percent or exact.percent:
        return False
    below = exact.value.denominator
    if exact.places is not None or below.bit_length() > 64 or below * below >= 10**decimal.places:
        return False
    return _never_terminates(below) and abs(decimal.value - exact.value) * 2 * 10**decimal.places <= 1


def _never_terminates(denominator: int) -> bool:
    """True if fractions with this denominator have no finite decimal expansion."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator > 1
