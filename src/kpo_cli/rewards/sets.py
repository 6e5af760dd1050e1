r"""Sets of reals as cuts of the line: intervals, inequalities, their unions, intersections and differences."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kpo_cli.rewards.normalize import peel_brackets
from kpo_cli.rewards.shapes import COMMA, CUP, FLIPPED, SIGN, Group, expand_signs, is_name, read_shape, split_top
from kpo_cli.rewards.words import AND, OR

SET_LIKE = re.compile(r"\\(?:cup|cap|setminus|le|ge|ne|mathbb)(?![A-Za-z])|[<>]")
_AND, _OR = re.compile(AND), re.compile(OR)
_CAP, _MINUS = re.compile(r"\\cap(?![A-Za-z])"), re.compile(r"\\setminus(?![A-Za-z])")
_BUILDER = re.compile(r"\\\{(?P<head>(?:[^|:{}]|\\mathbb\{[A-Z]\})*)(?:\||:)(?P<condition>.*)\\\}", re.DOTALL)
_MODULUS = re.compile(r"\|(?P<name>[^|]+)\|")
_INFINITE = 10**400


@dataclass(frozen=True)
class Cut:
    """A place on the line, below (`after` False) or above the point `key`, a value in units of 10^-40.

    The key is None where the end of an interval has unknowns; such a set is an interval and nothing more.
    """

    key: int | None
    after: bool
    text: str

    @property
    def place(self) -> tuple[int, bool]:
        assert self.key is not None
        return self.key, self.after


@dataclass(frozen=True)
class RealSet:
    """Every second cut opens an interval; `name` is the unknown that the set was said of, if it was."""

    cuts: tuple[Cut, ...]
    name: str = ""


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
        return RealSet(found.cuts) if found and found.name in ("", sides[0].strip()) else None

    def _conditions(self, parts: list[str], combine: Any, depth: int) -> RealSet | None:
        """Conditions on one unknown; a list of numbers or points is no such thing."""
        if not all(SIGN.search(part) for part in parts):
            return None
        return self._fold(parts, combine, depth)

    def _fold(self, parts: list[str], combine: Any, depth: int) -> RealSet | None:
        sets = [self._points(part) or self.read(part, depth + 1) for part in parts]
        if (
            any(found is None or any(cut.key is None for cut in found.cuts) for found in sets)
            or len({found.name for found in sets if found and found.name}) > 1
        ):
            return None
        result = sets[0]
        for other in sets[1:]:
            assert result is not None
            assert other is not None
            result = RealSet(combine(result.cuts, other.cuts), result.name or other.name)
        return result

    def _points(self, text: str) -> RealSet | None:
        r"""The finite set `\{1,2\}`, or the one point of `x=1`."""
        text, name = peel_brackets(text.strip()), ""
        sides, signs = split_top(text, SIGN)
        if signs in (["="], ["\\ne"]) and is_name(sides[0]):
            name, text = sides[0], rf"\{{{sides[1]}\}}"
        if not (text.startswith("\\{") and text.endswith("\\}")) or SIGN.search(text):
            return None
        cuts: tuple[Cut, ...] = ()
        for item in (item for part in split_top(text[2:-2], COMMA)[0] for item in expand_signs(part)):
            key = self._key(item)
            if key is None:
                return None
            cuts = _union(cuts, (Cut(key, False, item), Cut(key, True, item)))
        return RealSet(cuts if signs != ["\\ne"] else _difference(_line(), cuts), name)

    def _simple(self, text: str, depth: int) -> RealSet | None:
        if text == r"\mathbb{R}":
            return RealSet(_line())
        if text == r"\emptyset":
            return RealSet(())
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
            return RealSet(found.cuts, sides[0]) if found else None
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
            if inside is None or sign == "\\ne" or inside.cuts[:1] == () or inside.cuts[0].key is None:
                return None
            return inside if sign in ("<", "\\le") else RealSet(_difference(_line(), inside.cuts), name)
        if sign == "\\ne":
            return self._points(f"{name}\\ne {bound}")
        if sign in ("<", "\\le"):
            return self._interval(r"-\infty", False, bound, sign == "\\le", name)
        return self._interval(bound, sign == "\\ge", r"\infty", False, name)

    def _interval(self, low: str, closed_low: bool, high: str, closed_high: bool, name: str) -> RealSet | None:
        start, end = self._key(low), self._key(high)
        if start is not None and end is not None and start > end:
            return None
        cuts = (Cut(start, not closed_low, low), Cut(end, closed_high, high))
        empty = start is not None and end is not None and cuts[0].place >= cuts[1].place
        return RealSet(() if empty else cuts, name)

    def _key(self, text: str) -> int | None:
        value = self._measure(text)
        if value is None or abs(value) > 10**300:
            return None if value is None or abs(value) != float("inf") else (_INFINITE if value > 0 else -_INFINITE)
        return int(value * 10**40 + (0.5 if value >= 0 else -0.5))


def _named(side: str) -> bool:
    return is_name(side) or bool((m := _MODULUS.fullmatch(side)) and is_name(m["name"]))


def _line() -> tuple[Cut, ...]:
    return Cut(-_INFINITE, True, r"-\infty"), Cut(_INFINITE, False, r"\infty")


def _combine(one: tuple[Cut, ...], two: tuple[Cut, ...], member: Callable[[bool, bool], bool]) -> tuple[Cut, ...]:
    """Sweep over both sets from left to right, and keep the places where membership changes."""
    cuts = {cut.place: cut for cut in (*two, *one)}
    result: list[Cut] = []
    inside = False
    for place in sorted(cuts):
        state = [sum(cut.place <= place for cut in cuts_of) % 2 == 1 for cuts_of in (one, two)]
        if member(*state) != inside:
            inside = not inside
            result.append(cuts[place])
    return tuple(result)


def _union(one: tuple[Cut, ...], two: tuple[Cut, ...]) -> tuple[Cut, ...]:
    return _combine(one, two, lambda a, b: a or b)


def _intersection(one: tuple[Cut, ...], two: tuple[Cut, ...]) -> tuple[Cut, ...]:
    return _combine(one, two, lambda a, b: a and b)


def _difference(one: tuple[Cut, ...], two: tuple[Cut, ...]) -> tuple[Cut, ...]:
    return _combine(one, two, lambda a, b: a and not b)


def _either(one: tuple[Cut, ...], two: tuple[Cut, ...]) -> tuple[Cut, ...]:
    """What a comma between conditions means: both, and where they exclude each other, either."""
    return _intersection(one, two) or _union(one, two)


def same_set(gold: RealSet, answer: RealSet, same_value: Callable[[str, str], bool]) -> bool:
    """True if two sets have the same cuts, ends compared as values are."""
    if len(gold.cuts) != len(answer.cuts) or (gold.name and answer.name and gold.name != answer.name):
        return False
    return all(
        one.after == two.after and ((one.key == two.key and one.key is not None) or same_value(one.text, two.text))
        for one, two in zip(gold.cuts, answer.cuts, strict=True)
    )
