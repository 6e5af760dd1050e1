r"""Sets of reals by the places where they begin and end: intervals, inequalities, and what is made of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from kpo_cli.rewards.normalize import COMMA, peel_brackets, split_top
from kpo_cli.rewards.shapes import CUP, FLIPPED, SIGN, Group, expand_signs, is_name, read_shape
from kpo_cli.rewards.words import AND, OR

SET_LIKE = re.compile(r"\\(?:cup|cap|setminus|le|ge|ne|mathbb)(?![A-Za-z])|[<>]")
_AND, _OR = re.compile(AND), re.compile(OR)
_CAP, _MINUS = re.compile(r"\\cap(?![A-Za-z])"), re.compile(r"\\setminus(?![A-Za-z])")
_BUILDER = re.compile(r"\\\{(?P<head>(?:[^|:{}]|\\mathbb\{[A-Z]\})*)(?:\||:)(?P<condition>.*)\\\}", re.DOTALL)
_MODULUS = re.compile(r"\|(?P<name>[^|]+)\|")
_INFINITE = 10**400


@dataclass(frozen=True)
class RealSet:
    """A set by what it holds, and the places where that may change with the texts that they have in the answer.

    Places are even: twice the value in units of 10^-40, so that there is always one between two. `name` is the unknown
    that the set was said of, if it was. Where the ends of an interval have unknowns, its `interval` is all that is
    known: brackets and ends as texts.
    """

    ends: dict[int, str]
    holds: Callable[[int], bool]
    name: str = ""
    interval: tuple[str, ...] = ()

    def changes(self) -> list[tuple[int, list[bool]]]:
        """The places where membership changes, with that below, at and above them."""
        found = [(place, [self.holds(place + step) for step in (-1, 0, 1)]) for place in sorted(self.ends)]
        return [(place, states) for place, states in found if len(set(states)) > 1]


_LINE = RealSet({-_INFINITE: r"-\infty", _INFINITE: r"\infty"}, lambda place: -_INFINITE < place < _INFINITE)


class SetReader:
    """Reads sets; `measure` gives the real value of an expression, or None if it has unknowns or no value."""

    def __init__(self, measure: Callable[[str], Any | None]) -> None:
        self._measure = measure

    def read(self, text: str, depth: int = 0) -> RealSet | None:
        """The set that a text describes, or None if it describes none or its ends are no numbers."""
        text = peel_brackets(text.strip())
        if not text or depth > 20:
            return None
        builder = _BUILDER.fullmatch(text)
        if builder:
            return self._builder(builder["head"], builder["condition"], depth)
        for separator, combine in ((_OR, _union), (_AND, _intersection), (COMMA, _either)):
            parts, found = split_top(text, separator)
            if found:
                return self._conditions([part for part in parts if part], combine, depth)
        for separator, combine in ((CUP, _union), (_CAP, _intersection), (_MINUS, _difference)):
            parts, found = split_top(text, separator)
            if found:
                return self._fold(parts, combine, depth)
        return self._simple(text, depth)

    def _builder(self, head: str, condition: str, depth: int) -> RealSet | None:
        sides, signs = split_top(head, SIGN)
        if not is_name(sides[0]) or (signs and (signs != ["\\in"] or sides[1] != r"\mathbb{R}")):
            return None
        found = self.read(condition, depth + 1)
        return replace(found, name="") if found and found.name in ("", sides[0].strip()) else None

    def _conditions(self, parts: list[str], combine: Any, depth: int) -> RealSet | None:
        """Conditions on one unknown; a list of numbers or points is no such thing."""
        if not all(SIGN.search(part) for part in parts):
            return None
        return self._fold(parts, combine, depth)

    def _fold(self, parts: list[str], combine: Any, depth: int) -> RealSet | None:
        sets = [self._points(part) or self.read(part, depth + 1) for part in parts]
        known = [found for found in sets if found and not found.interval]
        if len(known) < len(sets) or len({found.name for found in known if found.name}) > 1:
            return None
        return reduce(combine, known)

    def _points(self, text: str) -> RealSet | None:
        r"""The finite set `\{1,2\}`, or the one point of `x=1`."""
        text, name = peel_brackets(text.strip()), ""
        sides, signs = split_top(text, SIGN)
        if signs in (["="], ["\\ne"]) and is_name(sides[0]):
            name, text = sides[0], rf"\{{{sides[1]}\}}"
        if not (text.startswith("\\{") and text.endswith("\\}")) or SIGN.search(text):
            return None
        items = [item for part in split_top(text[2:-2], COMMA)[0] for item in expand_signs(part)]
        keys = [self._key(item) for item in items]
        if None in keys:
            return None
        ends = {key: item for key, item in zip(keys, items, strict=True) if key is not None}
        points = RealSet(ends, lambda place: place in ends, name)
        return points if signs != ["\\ne"] else _difference(_LINE, points)

    def _simple(self, text: str, depth: int) -> RealSet | None:
        if text == r"\mathbb{R}":
            return _LINE
        if text == r"\emptyset":
            return RealSet({}, lambda place: False)
        sides, signs = split_top(text, SIGN)
        if signs:
            return self._relation(sides, signs, depth)
        shape = read_shape(text)
        if isinstance(shape, Group) and shape.ordered and len(shape.items) == 2:
            low, high = shape.items
            return self._interval(low, shape.opened == "[", high, shape.closed == "]", "")
        return None

    def _relation(self, sides: list[str], signs: list[str], depth: int) -> RealSet | None:
        r"""`a < x \le b`, and what is said of |x|."""
        if signs == ["\\in"] and is_name(sides[0]):
            found = self.read(sides[1], depth + 1)
            return replace(found, name=sides[0]) if found else None
        if not set(signs) <= {"<", ">", "\\le", "\\ge", "\\ne"}:
            return None
        if len(sides) == 2 and not _named(sides[0]):
            sides, signs = sides[::-1], [FLIPPED[signs[0]]]
        if len(sides) == 3 and signs[0] in (">", "\\ge"):
            sides, signs = sides[::-1], [FLIPPED[sign] for sign in signs[::-1]]
        if len(sides) == 3 and is_name(sides[1]) and set(signs) <= {"<", "\\le"}:
            return self._interval(sides[0], signs[0] == "\\le", sides[2], signs[1] == "\\le", sides[1])
        if len(sides) != 2 or not _named(sides[0]):
            return None
        modulus = _MODULUS.fullmatch(sides[0])
        name, bound, sign = modulus["name"] if modulus else sides[0], sides[1], signs[0]
        if modulus:
            inside = self._interval(f"-({bound})", sign in ("\\le", ">"), bound, sign in ("\\le", ">"), name)
            if inside is None or sign == "\\ne" or not inside.changes():
                return None
            return inside if sign in ("<", "\\le") else _difference(_LINE, inside)
        if sign == "\\ne":
            return self._points(f"{name}\\ne {bound}")
        if sign in ("<", "\\le"):
            return self._interval(r"-\infty", False, bound, sign == "\\le", name)
        return self._interval(bound, sign == "\\ge", r"\infty", False, name)

    def _interval(self, low: str, closed_low: bool, high: str, closed_high: bool, name: str) -> RealSet | None:
        start, end = self._key(low), self._key(high)
        if start is None or end is None:
            brackets = "[" if closed_low else "(", "]" if closed_high else ")"
            return RealSet({}, lambda place: False, name, (*brackets, low, high))
        first, last = start + (not closed_low), end - (not closed_high)
        return RealSet({start: low, end: high}, lambda place: first <= place <= last, name) if start <= end else None

    def _key(self, text: str) -> int | None:
        value = self._measure(text)
        if value is None or abs(value) > 10**300:
            return None if value is None or abs(value) != float("inf") else (_INFINITE if value > 0 else -_INFINITE)
        return 2 * int(value * 10**40 + (0.5 if value >= 0 else -0.5))


def _named(side: str) -> bool:
    return is_name(side) or bool((m := _MODULUS.fullmatch(side)) and is_name(m["name"]))


def _combine(one: RealSet, two: RealSet, member: Callable[[bool, bool], bool]) -> RealSet:
    def holds(place: int) -> bool:
        return member(one.holds(place), two.holds(place))

    return RealSet({**two.ends, **one.ends}, holds, one.name or two.name)


def _union(one: RealSet, two: RealSet) -> RealSet:
    return _combine(one, two, lambda a, b: a or b)


def _intersection(one: RealSet, two: RealSet) -> RealSet:
    return _combine(one, two, lambda a, b: a and b)


def _difference(one: RealSet, two: RealSet) -> RealSet:
    return _combine(one, two, lambda a, b: a and not b)


def _either(one: RealSet, two: RealSet) -> RealSet:
    """What a comma between conditions means: both, and where they exclude each other, either."""
    both = _intersection(one, two)
    return both if both.changes() else _union(one, two)


def same_set(gold: RealSet, answer: RealSet, same_value: Callable[[str, str], bool]) -> bool:
    """True if two sets change at the same places, which are compared as values are."""
    if gold.name and answer.name and gold.name != answer.name:
        return False
    if gold.interval or answer.interval:
        return gold.interval[:2] == answer.interval[:2] and all(map(same_value, gold.interval[2:], answer.interval[2:]))
    golds, answers = gold.changes(), answer.changes()
    return len(golds) == len(answers) and all(
        states == others and (place == other or same_value(gold.ends[place], answer.ends[other]))
        for (place, states), (other, others) in zip(golds, answers, strict=True)
    )
