r"""The shape of an answer: lists, tuples, intervals, matrices, relations, words; and how two shapes are compared.

The comparison of what is left, single values and relations between expressions, is asked of a `Judge`. The one in the
calling process only knows plain numbers and gives up (`Undecided`) on the rest; the one in the worker processes knows
algebra. Both run this same code, so that the shape rules exist once.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from kpo_cli.rewards.normalize import has_top_level_comma, matching_brackets, peel_brackets
from kpo_cli.rewards.numbers import read_number, same_number

MAX_ITEMS = 100
_RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\approx")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
# Code, quotes and comment signs are no mathematics: an answer with them is not parsed.
_FORBIDDEN = re.compile(
    r"[\"`@#?]|__|(?:^|[(,\[{=+*/ ])\s*'|\\x|[A-Za-z]\.[A-Za-z_]|\b(?:import|lambda|exec|eval|if|else|for)\b"
)
# Possessive, so that a long run of letters cannot be split in many ways.
_NAME_PIECES = r"(?>\\[A-Za-z]+|[A-Za-z]|_\{[^{}]*\}|[{}']|\s|\([^()]*\))++"
_NAME = re.compile(rf"{_NAME_PIECES}(?::{_NAME_PIECES})*+")
_NO_NAME = re.compile(r"\\(?:frac|sqrt|binom|sum|int|prod|lim|infty|emptyset|mathbb|begin|pi|cdot|pm|mp)(?![A-Za-z])")
_TUPLE_OF_NAMES = re.compile(r"\(([^()]*,[^()]*)\)")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_BASED = re.compile(r"([0-9A-Fa-f]+) ?_\{ ?(\d+) ?\}")
_UNIT_WORDS = (
    r"(?:square |cubic |sq\.? |cu\.? )?(?:cm|mm|km|kg|mg|ml|mL|m/s|km/h|mph|kmph|met(?:er|re)s?|cent?imet(?:er|re)s?"
    r"|kilomet(?:er|re)s?|feet|foot|ft|inch(?:es)?|yards?|miles?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?"
    r"|months?|years?|dollars?|cents?|euros?|rupees|degrees?|deg|radians?|rad|units?|lit(?:er|re)s?|gallons?|grams?"
    r"|kilograms?|pounds?|lbs?|people|students?|points?|ways|eV|keV|MeV|Hz|GHz|MHz|Pa|kPa|mol|ergs?)"
)
_SUFFIXES = (
    # A remark or unit in text mode, with the exponent of the unit: "15 \text{ cm}^{2}", "10 \text{m/s}".
    re.compile(r"(?:\\cdot )?\s*(?:\(\s*)?\\text\{[^{}]*\}\s*(?:\)\s*)?(?:\^\{-?\d\})?\s*\)?$"),
    re.compile(r"(?:\\cdot )?\s*\\frac\{\s*\\text\{[^{}]*\}(?:\^\{\d\})?\s*\}\{\s*\\text\{[^{}]*\}(?:\^\{\d\})?\s*\}$"),
    # A unit in plain letters, only after a number: single letters there are variables.
    re.compile(rf"(?<=[\d}})])\s*{_UNIT_WORDS}(?:\s*(?:/|per)\s*[A-Za-z]+)?(?:\^\{{\d\}})?$"),
    re.compile(r"\s*\^\{\\circ\}(?:\s*[CF])?$"),
)
_PREFIX = re.compile(
    r"\\text\{[^{}]*\}\s*:?\s*(?=[\d(\\\-])|\\(?:therefore|implies|Rightarrow|approx)(?![A-Za-z])\s*|[:=]\s*"
)


class Undecided(Exception):
    """The judge of the calling process cannot tell: the pair has to go to a worker."""


class Judge(Protocol):
    """What compares the leaves of two answers."""

    def same_value(self, gold: str, answer: str) -> bool:
        """True if two expressions have the same value."""

    def same_relation(self, gold: "Relation", answer: "Relation") -> bool:
        """True if two equations or inequalities say the same."""


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of expressions with the relation signs between them."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Items in brackets; `opened` is empty for a bare list and a set is a list."""

    opened: str
    closed: str
    items: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        """True for tuples and intervals."""
        return self.opened in ("(", "[")


@dataclass(frozen=True, slots=True)
class Union:
    """Sets joined by the union sign."""

    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix by its cells."""

    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Value:
    """Anything else: one expression, or words."""

    text: str


Shape = Relation | Group | Union | Matrix | Value


class PlainJudge:
    """Decides on plain numbers and equal text, and on nothing else."""

    def same_value(self, gold: str, answer: str) -> bool:
        """Exact arithmetic if both are plain numbers."""
        number, other = read_number(gold), read_number(answer)
        if number is None or other is None:
            raise Undecided
        return same_number(number, other)

    def same_relation(self, gold: Relation, answer: Relation) -> bool:
        """Relations between expressions need algebra."""
        raise Undecided


def squeeze(text: str) -> str:
    """The text without spaces, except those that keep two words, or a command and a letter, apart."""
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def is_code(text: str) -> bool:
    """True for a text with quotes, comments or Python in it."""
    return bool(_FORBIDDEN.search(text))


def same_answer(gold: str, answer: str, judge: Judge) -> bool:
    """True if a normalised answer says the same as the normalised gold."""
    if squeeze(gold) == squeeze(answer):
        return True
    if not answer or _FORBIDDEN.search(answer):
        return False
    return any(_same_shape(one, other, judge) for one in _readings(gold) for other in _readings(answer))


def _readings(text: str) -> list[Shape]:
    """The ways to read a text: "100,200" is a number, and a list as well."""
    shape = read_shape(text)
    if isinstance(shape, Value) and _THOUSANDS.fullmatch(shape.text):
        return [shape, Group("", "", tuple(shape.text.split(",")))]
    return [shape]


def split_top(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of a text between separators that stand outside all brackets, and those separators."""
    pairs = matching_brackets(text)
    parts: list[str] = []
    found: list[str] = []
    start = position = 0
    tokens = re.compile(rf"(?P<sep>{separator.pattern})|\\begin.*\\end\{{[a-zA-Z]*\}}|\\.|.", re.DOTALL)
    while position < len(text):
        if position in pairs:
            position = pairs[position] + 1
            continue
        token = tokens.match(text, position)
        assert token is not None
        if token["sep"] is not None:
            parts.append(text[start:position].strip())
            found.append(token["sep"].strip())
            start = token.end()
        position = token.end()
    return [*parts, text[start:].strip()], found


_COMMA, _SEMICOLON = re.compile(r"[,;]"), re.compile(";")
_SIGN = re.compile(r"\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[=<>]")
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_COLON = re.compile(":")


def read_shape(text: str) -> Shape:
    """The shape of a normalised text."""
    text = peel_brackets(text.strip())
    prefix = _PREFIX.match(text)
    if prefix:
        text = text[prefix.end() :]
    if "," in text and _THOUSANDS.fullmatch(strip_units(text)):
        return Value(strip_units(text))
    matrix = _MATRIX.fullmatch(text)
    if matrix and matrix[2].count("\\begin") == 0:
        return _read_matrix(matrix[2])
    if has_top_level_comma(text):
        return _read_list(text)
    sides, signs = split_top(text, _SIGN)
    if signs:
        return _read_relation(sides, signs)
    parts, cups = split_top(text, _CUP)
    if cups:
        return Union(tuple(parts))
    return _read_group(text) or _read_value(text)


def _read_value(text: str) -> Shape:
    """A single value, or the two values of a plus-minus."""
    if "\\pm" in text or "\\mp" in text:
        return Group("", "", tuple(_expand_signs(text)))
    return Value(strip_units(text))


def _read_matrix(body: str) -> Matrix:
    """The cells of a matrix; a row break after the last row opens no row."""
    rows = [row for row in body.split("\\cr") if row.strip()]
    return Matrix(tuple(tuple(cell.strip() for cell in row.split("&")) for row in rows))


def _read_list(text: str) -> Shape:
    """A bare list. Semicolons bind less than commas, and "p=5, q=2; p=7, q=2" lists two tuples."""
    outer, semicolons = split_top(text, _SEMICOLON)
    outer = [part for part in outer if part]
    if semicolons and any(has_top_level_comma(part) for part in outer):
        return Group("", "", tuple("(" + ",".join(_values_of(part)) + ")" for part in outer))
    items = [item for part in split_top(text, _COMMA)[0] for item in _expand_signs(part) if item]
    return Group("", "", tuple(items)) if len(items) > 1 else Value(text)


def _values_of(text: str) -> list[str]:
    """The items of a list with their names dropped."""
    return [_drop_name(item) for item in split_top(text, _COMMA)[0] if item]


def _drop_name(text: str) -> str:
    """`x=5` as `5`; anything without a name stays."""
    shape = read_shape(text)
    return shape.sides[-1] if isinstance(shape, Relation) and _is_assignment(shape) else text


def _expand_signs(text: str) -> list[str]:
    r"""Both values of an expression with `\pm`; the signs of one expression go together."""
    if "\\pm" not in text and "\\mp" not in text:
        return [text]
    upper = text.replace("\\pm", "+").replace("\\mp", "-")
    lower = text.replace("\\pm", "-").replace("\\mp", "+")
    return [upper, lower]


def _read_group(text: str) -> Group | Value | None:
    """A bracketed text as a whole: tuple, interval or set; a set of one number is that number."""
    opened = text[:2] if text.startswith("\\{") else text[:1]
    if opened not in ("(", "[", "\\{"):
        return None
    close = matching_brackets(text).get(0)
    closed = "\\}" if opened == "\\{" else text[-1:]
    if close is None or close + len(closed) != len(text):
        return None
    items = [item for part in split_top(text[len(opened) : close], _COMMA)[0] for item in _expand_signs(part) if item]
    if opened == "\\{" and len(items) == 1:
        return Value(items[0]) if not split_top(items[0], _SIGN)[1] else None
    if len(items) < 2:
        return None
    return Group("", "", tuple(items)) if opened == "\\{" else Group(opened, closed, tuple(items))


def _read_relation(sides: list[str], signs: list[str]) -> Shape:
    """A relation; approximations and memberships are reduced to what they say."""
    if "\\approx" in signs:
        # A name that is approximately a value is that value; a value keeps its exact form.
        cut = signs.index("\\approx")
        if cut == 0 and is_name(sides[0]):
            return read_shape(sides[1]) if len(sides) == 2 else _read_relation(sides[1:], signs[1:])
        sides, signs = sides[: cut + 1], signs[:cut]
    if signs == ["\\in"] and is_name(sides[0]):
        return read_shape(sides[1])
    if not signs:
        return read_shape(sides[0])
    return Relation(tuple(sides), tuple(signs))


def strip_units(text: str) -> str:
    """The text without the units, remarks and degree signs at its end, if something is left."""
    while True:
        for suffix in _SUFFIXES:
            match = suffix.search(text)
            if match and match.start() and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text[: match.start()]):
                shorter = text[: match.start()].rstrip(" ~")
                if shorter and shorter[-1] not in "+-/^_{(":
                    text = shorter
                    break
        else:
            return text


def is_name(text: str) -> bool:
    """True if a side of a relation only names what the other side is: `x`, `f(x)`, `(p,q)`, `AB`, `V_{1}:V_{2}`."""
    names = _TUPLE_OF_NAMES.fullmatch(text)
    if names:
        return all(is_name(name.strip()) for name in names[1].split(","))
    return (
        text not in ("e", "i")
        and bool(_NAME.fullmatch(text))
        and not _NO_NAME.search(text)
        and any(map(str.isalpha, text))
    )


def _is_assignment(relation: Relation) -> bool:
    """True for a name, an equality sign and whatever it equals."""
    return set(relation.signs) == {"="} and is_name(relation.sides[0])


def _same_shape(gold: Shape, answer: Shape, judge: Judge) -> bool:
    """Compare two answers by their shapes."""
    answer = _without_name(gold, answer, judge)
    gold = _without_gold_name(gold, answer)
    if type(gold) is not type(answer):
        # An interval, an inequality and a union may be the same set; two of a kind are compared as they stand.
        spans, other = _intervals(gold), _intervals(answer)
        if spans and other:
            return _same_collection(spans, other, judge, ordered=False)
    match gold, answer:
        case Relation(), Relation():
            return _same_relation(gold, answer, judge)
        case Matrix(), Matrix():
            return _same_matrix(gold, answer, judge)
        case Group(), Group():
            return _same_group(gold, answer, judge)
        case Union(), Union():
            return _same_collection(gold.parts, answer.parts, judge, ordered=False)
        case Value(), Value():
            return _same_value(gold.text, answer.text, judge)
        case (Union(), Value()) | (Value(), Union()) | (Matrix(), Value()) | (Value(), Matrix()):
            return judge.same_value(_text_of(gold), _text_of(answer))
        case (Group(opened="("), Value()) | (Value(), Group(opened="(")) if _is_algebra(gold, answer):
            return judge.same_value(_text_of(gold), _text_of(answer))
    return False


def _is_algebra(gold: Shape, answer: Shape) -> bool:
    """True if one of the two is a set expression, so that the other may be the set it makes."""
    return any("\\setminus" in _text_of(shape) or "\\cap" in _text_of(shape) for shape in (gold, answer))


def _text_of(shape: Shape) -> str:
    """A shape as LaTeX again."""
    match shape:
        case Value():
            return shape.text
        case Union():
            return "\\cup ".join(shape.parts)
        case Matrix():
            body = "\\\\".join(" & ".join(row) for row in shape.rows)
            return "\\begin{pmatrix}" + body + "\\end{pmatrix}"
        case Group():
            opened, closed = (shape.opened, shape.closed) if shape.opened else ("\\{", "\\}")
            return opened + ",".join(shape.items) + closed
        case Relation():
            signs = [*shape.signs, ""]
            return " ".join(f"{side} {sign}" for side, sign in zip(shape.sides, signs, strict=True))


def _without_name(gold: Shape, answer: Shape, judge: Judge) -> Shape:
    """An answer that names its value, or derives it in a chain of equalities, for a gold that does not."""
    if isinstance(gold, Relation) or not isinstance(answer, Relation) or set(answer.signs) != {"="}:
        return answer
    if _is_assignment(answer):
        return read_shape(answer.sides[-1])
    last = answer.sides[-1]
    if all(judge.same_value(last, side) for side in answer.sides[:-1]):
        return read_shape(last)
    return answer


def _without_gold_name(gold: Shape, answer: Shape) -> Shape:
    """A gold that names its value, for an answer that does not."""
    if isinstance(gold, Relation) and not isinstance(answer, Relation) and _is_assignment(gold):
        return read_shape(gold.sides[-1])
    return gold


def _same_value(gold: str, answer: str, judge: Judge) -> bool:
    """Compare two single values: words, numbers with a base, ratios, then mathematics."""
    if squeeze(gold) == squeeze(answer):
        return True
    if "\\text" in gold or "\\text" in answer or _is_sentence(gold):
        words = _words(gold)
        if words == _words(answer) and words:
            return True
        if gold.startswith("\\text") or answer.startswith("\\text") or _is_sentence(gold):
            return False
    based, other = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if based or other:
        return _same_digits(gold, answer, judge)
    ratio, ratio_answer = split_top(gold, _COLON)[0], split_top(answer, _COLON)[0]
    if len(ratio) > 1 or len(ratio_answer) > 1:
        return _same_ratio(ratio, ratio_answer, judge)
    return judge.same_value(gold, answer)


def _is_sentence(text: str) -> bool:
    """True for several plain words."""
    return bool(re.fullmatch(r"[A-Za-z]{2,}(?: [A-Za-z]{2,})+", text))


def _words(text: str) -> str:
    """The letters and digits of a text answer, in one case."""
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"\\text\{([^{}]*)\}", r"\1", text).casefold()).strip()


def _same_digits(gold: str, answer: str, judge: Judge) -> bool:
    """Numbers in a base: the same digits, and the same base unless only one of the two states it."""
    (digits, base), (other, other_base) = (
        (m[1], m[2]) if (m := _BASED.fullmatch(text)) else (text, None) for text in (gold, answer)
    )
    return digits.lstrip("0") == other.lstrip("0") and (base is None or other_base is None or base == other_base)


def _same_ratio(gold: list[str], answer: list[str], judge: Judge) -> bool:
    """Ratios by cross-multiplication: `2:3` is `4:6`, and also two thirds."""
    if len(gold) == 2 and len(answer) == 1:
        return judge.same_value(f"({gold[0]})/({gold[1]})", answer[0])
    if len(gold) == 1 and len(answer) == 2:
        return judge.same_value(gold[0], f"({answer[0]})/({answer[1]})")
    if len(gold) != len(answer):
        return False
    return all(
        judge.same_value(f"({gold[0]})/({g})", f"({answer[0]})/({a})")
        for g, a in zip(gold[1:], answer[1:], strict=True)
    )


def _same_matrix(gold: Matrix, answer: Matrix, judge: Judge) -> bool:
    """Matrices have the same shape and the same cells."""
    if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
        return False
    return all(
        same_answer(cell, other, judge)
        for row, other_row in zip(gold.rows, answer.rows, strict=True)
        for cell, other in zip(row, other_row, strict=True)
    )


def _same_group(gold: Group, answer: Group, judge: Judge) -> bool:
    """Tuples are ordered and keep their brackets; bare lists and sets are unordered."""
    if gold.ordered and answer.ordered and (gold.opened, gold.closed) != (answer.opened, answer.closed):
        return False
    if gold.ordered != answer.ordered and "[" in (gold.opened + gold.closed + answer.opened + answer.closed):
        return False
    # A tuple given as a bare list has to keep the order; a list given as a tuple has not.
    ordered = gold.ordered or _distinct_names(gold, answer)
    return _same_collection(gold.items, answer.items, judge, ordered)


def _distinct_names(gold: Group, answer: Group) -> bool:
    """True if only one of two lists names its values, and by different names: then the order tells which is which."""
    named = []
    for group in (gold, answer):
        shapes = [read_shape(item) for item in group.items]
        names = {re.sub(r"_\{.*?\}", "", s.sides[0]) for s in shapes if isinstance(s, Relation) and _is_assignment(s)}
        named.append(len(names))
    return (named[0] > 1) != (named[1] > 1) and 0 in named


def _same_collection(gold: Iterable[str], answer: Iterable[str], judge: Judge, ordered: bool) -> bool:
    """Compare items in order, or find a pairing of them. An answer may repeat an item if the gold repeats none."""
    golds, answers = list(gold), list(answer)
    if len(answers) > len(golds) and not ordered:
        answers = list({squeeze(item): item for item in answers}.values())
    if len(golds) != len(answers) or len(golds) > MAX_ITEMS:
        return False
    if ordered:
        return all(same_answer(one, other, judge) for one, other in zip(golds, answers, strict=True))
    return _pair_off(golds, answers, lambda one, other: same_answer(one, other, judge))


def _pair_off(golds: list[str], answers: list[str], same: Callable[[str, str], bool]) -> bool:
    """Pair each gold with an answer of its own, equal texts first. Equality is transitive, so greedy is exact."""
    rest = list(answers)
    open_golds = []
    for gold in golds:
        twin = next((item for item in rest if squeeze(item) == squeeze(gold)), None)
        if twin is None:
            open_golds.append(gold)
        else:
            rest.remove(twin)
    for gold in open_golds:
        match = next((item for item in rest if same(gold, item)), None)
        if match is None:
            return False
        rest.remove(match)
    return not rest


def _intervals(shape: Shape) -> list[str] | None:
    r"""The intervals that a set of reals is made of, from brackets, inequalities in one unknown or `\mathbb{R}`."""
    match shape:
        case Value(text=r"\mathbb{R}"):
            return [r"(-\infty,\infty)"]
        case Group() if shape.ordered and len(shape.items) == 2:
            return [_text_of(shape)]
        case Group(opened="", items=items):
            found = [_intervals(read_shape(item)) for item in items if _SIGN.search(item)]
            return [span[0] for span in found if span] if found and all(found) and len(found) == len(items) else None
        case Union(parts=parts):
            return [*parts]
        case Relation():
            if shape.signs == ("\\ne",) and is_name(shape.sides[0]):
                return [rf"(-\infty,{shape.sides[1]})", rf"({shape.sides[1]},\infty)"]
            span = _as_interval(shape)
            return [span] if span else None
    return None


def _as_interval(relation: Relation) -> str | None:
    """`a < x \\le b` as `(a,b]`; None unless the relation bounds one name."""
    sides, signs = relation.sides, relation.signs
    if not set(signs) <= {"<", ">", "\\le", "\\ge"}:
        return None
    if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]):
        sides, signs = (sides[1], sides[0]), (_FLIPPED[signs[0]],)
    if len(sides) == 2 and is_name(sides[0]):
        if signs[0] in ("<", "\\le"):
            return f"(-\\infty,{sides[1]}" + (")" if signs[0] == "<" else "]")
        return ("(" if signs[0] == ">" else "[") + f"{sides[1]},\\infty)"
    if len(sides) == 3 and is_name(sides[1]):
        if signs[0] in (">", "\\ge"):
            sides, signs = sides[::-1], (_FLIPPED[signs[1]], _FLIPPED[signs[0]])
        if set(signs) <= {"<", "\\le"}:
            return ("(" if signs[0] == "<" else "[") + f"{sides[0]},{sides[2]}" + (")" if signs[1] == "<" else "]")
    return None


def _same_relation(gold: Relation, answer: Relation, judge: Judge) -> bool:
    """Relations side by side, from either end, and then as whole statements."""
    if any(
        gold.signs == other.signs and [squeeze(s) for s in gold.sides] == [squeeze(s) for s in other.sides]
        for other in (answer, _flip(answer))
        if other
    ):
        return True
    if _is_assignment(gold) and _is_assignment(answer) and squeeze(gold.sides[0]) == squeeze(answer.sides[0]):
        return same_answer(gold.sides[-1], answer.sides[-1], judge)
    if len(gold.sides) == 2 and len(answer.sides) == 2:
        return judge.same_relation(gold, answer)
    for other in (answer, _flip(answer)):
        if other and other.signs == gold.signs:
            return all(judge.same_value(one, two) for one, two in zip(gold.sides, other.sides, strict=True))
    return False


def _flip(relation: Relation) -> Relation | None:
    """The relation read from right to left."""
    if not set(relation.signs) <= set(_FLIPPED):
        return None
    return Relation(relation.sides[::-1], tuple(_FLIPPED[sign] for sign in relation.signs[::-1]))
