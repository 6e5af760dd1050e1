r"""The shape of an answer: lists, tuples, matrices, relations, single values. Only brackets and signs are read here."""

import re
from dataclasses import dataclass

from kpo_cli.rewards.normalize import COMMA, matching_brackets, peel_brackets, split_top
from kpo_cli.rewards.units import Unit, split_unit
from kpo_cli.rewards.words import AND, OR, is_remark

FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
# Possessive, so that a long run of letters cannot be split in many ways.
_NAME_PIECES = r"(?>\\[A-Za-z]+|[A-Za-z]|_\{[^{}]*\}|\^\{-1\}(?=\()|[{}']|\s|\([^()]*\))++"
_NAME = re.compile(rf"{_NAME_PIECES}(?::{_NAME_PIECES})*+")
_NO_NAME = re.compile(r"\\(?:frac|sqrt|binom|sum|int|prod|lim|infty|emptyset|mathbb|begin|pi|cdot|pm|mp)(?![A-Za-z])")
_TUPLE_OF_NAMES = re.compile(r"\(([^()]*,[^()]*)\)")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_OTHER_COMMA, _INNER_COMMA = re.compile(f"[,;] |[{AND}{OR}]"), re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_TEXT_PREFIX = re.compile(r"\\text\{(?P<words>[^{}]*)\}(?P<gap>\s*):?\s*(?=[\d(\\\-.A-Za-z])")
_CLAUSE_END = re.compile(r"(?:\b(?:is|are|equals)|:)\s*$")
_SIGN_PREFIX = re.compile(r"\\(?:therefore|implies|Rightarrow|approx)(?![A-Za-z])\s*|[:=]\s*")
_REMARK_BEHIND = re.compile(r"(?:\s*[,(]?\s*\\text\{(?P<words>[^{}]*)\}\s*[A-Za-z]?\s*\)?)$")


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of expressions with the relation signs between them."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Items in brackets; `opened` is empty for a bare list."""

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
    unit: Unit | None = None


Shape = Relation | Group | Union | Matrix | Value


def squeeze(text: str) -> str:
    """The text without spaces, except those that keep two words, or a command and a letter, apart."""
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def readings(text: str) -> list[Shape]:
    """The ways to read a text: "100,200" is a number, and a list as well."""
    shape = read_shape(text)
    if isinstance(shape, Value) and _THOUSANDS.fullmatch(shape.text):
        return [shape, Group("", "", tuple(shape.text.split(",")))]
    if isinstance(shape, Group) and _OTHER_COMMA.search(text):
        # A list of numbers with separators: "1,000 and 2,000".
        return [shape, read_shape(_INNER_COMMA.sub("", text))]
    return [shape]


# "x=1 y=2" and "x=1 \text{ so } y=2" are two equations and no chain.
_TWO_EQUATIONS = re.compile(
    r"(?:(?P<value>=\s*[+-]?(?:[\d./]+|\\frac\{\d+\}\{\d+\})) |(?<=[^\s,(])\s*\\text\{[^{}]*\}\s*)"
    r"(?=[A-Za-z](?:_\{\w+\})?\s*=)"
)
_SEMICOLON = re.compile(";")
SIGN = re.compile(r"\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[=<>]")
CUP = re.compile(r"\\cup(?![A-Za-z])")
COLON = re.compile(":")


def read_shape(text: str) -> Shape:
    """The shape of a normalised text."""
    text = peel_brackets(text.strip())
    text = without_prefix(text)
    if "," in text and _THOUSANDS.fullmatch(split_unit(text)[0]):
        return Value(*split_unit(text))
    matrix = _MATRIX.fullmatch(text[1:-1].strip() if text[:1] + text[-1:] in ("[]", "()") else text)
    if matrix and matrix[2].count("\\begin") == 0:
        return _read_matrix(matrix[2])
    if "=" in text:
        text = _TWO_EQUATIONS.sub(r"\g<value>,", text)
    if split_top(text, COMMA)[1]:
        return _read_list(text)
    sides, signs = split_top(text, SIGN)
    if signs:
        match = _REMARK_BEHIND.search(sides[-1])
        if match and match.start() and is_remark(match["words"]):
            sides[-1] = sides[-1][: match.start()]
        return _read_relation(sides, signs)
    parts, cups = split_top(text, CUP)
    if cups:
        return Union(tuple(parts))
    return _read_group(text) or _read_value(text)


def without_prefix(text: str) -> str:
    """The text without a remark or a sign of deduction before it."""
    text = text[m.end() :] if (m := _SIGN_PREFIX.match(text)) else text
    match = _TEXT_PREFIX.match(text)
    if match is None or not is_remark(match["words"]) or match.end() == len(text):
        return text
    if text[match.end()].isalpha() and not _CLAUSE_END.search(match["words"]):
        return text  # "odd n"
    # A word directly before brackets may be a function.
    if text[match.end()] == "(" and not match["gap"] and re.fullmatch(r"[A-Za-z]+", match["words"]):
        return text
    return text[match.end() :]


def _read_value(text: str) -> Shape:
    """A single value, or the two values of a plus-minus."""
    if "\\pm" in text or "\\mp" in text:
        return Group("", "", tuple(expand_signs(text)))
    return Value(*split_unit(text))


def _read_matrix(body: str) -> Matrix:
    """The cells of a matrix; a row break after the last row opens no row."""
    rows = [row for row in body.split("\\cr") if row.strip()]
    return Matrix(tuple(tuple(cell.strip() for cell in row.split("&")) for row in rows))


def _read_list(text: str) -> Shape:
    """A bare list. Semicolons bind less than commas, and "p=5, q=2; p=7, q=2" lists two tuples."""
    outer, semicolons = split_top(text, _SEMICOLON)
    outer = [part for part in outer if part]
    if semicolons and any(split_top(part, COMMA)[1] for part in outer):
        return Group("", "", tuple("(" + ",".join(_values_of(part)) + ")" for part in outer))
    items = [item for part in split_top(text, COMMA)[0] for item in expand_signs(part) if item]
    return Group("", "", tuple(items)) if len(items) > 1 else Value(text)


def _values_of(text: str) -> list[str]:
    """The items of a list with their names dropped."""
    return [_drop_name(item) for item in split_top(text, COMMA)[0] if item]


def _drop_name(text: str) -> str:
    """`x=5` as `5`; anything without a name stays."""
    shape = read_shape(text)
    return shape.sides[-1] if isinstance(shape, Relation) and is_assignment(shape) else text


def expand_signs(text: str) -> list[str]:
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
    if opened == "(" and len(both := expand_signs(text)) > 1:
        return Group("", "", tuple(both))
    items = [item for part in split_top(text[len(opened) : close], COMMA)[0] for item in expand_signs(part) if item]
    if opened == "\\{" and len(items) == 1:
        return Value(items[0]) if not split_top(items[0], SIGN)[1] else None
    if len(items) < 2:
        return None
    return Group(opened, closed, tuple(items))


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


def is_name(text: str) -> bool:
    """True if a side of a relation only names what the other side is: `x`, `f(x)`, `(p,q)`, `AB`, `V_{1}:V_{2}`."""
    names = _TUPLE_OF_NAMES.fullmatch(text)
    if names:
        return all(is_name(name.strip()) for name in names[1].split(","))
    return bool(_NAME.fullmatch(text)) and not _NO_NAME.search(text) and any(map(str.isalpha, text))


def is_assignment(relation: Relation) -> bool:
    """True for a name, an equality sign and whatever it equals."""
    return set(relation.signs) == {"="} and is_name(relation.sides[0])


def text_of(shape: Value | Matrix) -> str:
    """A value or a matrix as LaTeX again."""
    if isinstance(shape, Value):
        return shape.text
    return "\\begin{pmatrix}" + " \\cr ".join(" & ".join(row) for row in shape.rows) + "\\end{pmatrix}"
