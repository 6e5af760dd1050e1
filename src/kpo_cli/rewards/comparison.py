"""Whether an answer says the same as the gold: by its words, its shape, and the values of its parts."""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from kpo_cli.rewards import equality
from kpo_cli.rewards.algebra import Node, NotRead, number, read, symbols
from kpo_cli.rewards.evaluate import Undefined
from kpo_cli.rewards.normalize import matching_brackets, split_top
from kpo_cli.rewards.numbers import read_number, same_number
from kpo_cli.rewards.sets import SET_LIKE, SetReader, same_set
from kpo_cli.rewards.shapes import (
    COLON,
    FLIPPED,
    Group,
    Matrix,
    Relation,
    Shape,
    Union,
    Value,
    is_assignment,
    is_name,
    read_shape,
    readings,
    squeeze,
    text_of,
)
from kpo_cli.rewards.words import AND, OR, is_remark, is_words, words_of
from kpo_cli.rewards.work import Work

MAX_ITEMS = 100
_MAX_DEPTH = 20
_SIGNS = {"<": -1, "\\le": -1, ">": 1, "\\ge": 1}
_STRICT = frozenset({"<", ">"})
_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASED = re.compile(
    rf"\(?(?P<digits>[0-9A-F]*[0-9][0-9A-F]*)\)? ?_\{{ ?(?:(?P<base>\d+)|\\text\{{(?P<word>{'|'.join(_BASES)})\}}) ?\}}"
)
_DECIMAL_COMMA = re.compile(r"[+-]?(?:\d+,(?!\d{3}$)\d+|0,\d+)")
# Names of points, an order of places: no product, whose letters might change theirs.
_POINTS = re.compile(r"[A-Z]{3,}")
_POINT = re.compile(r"[A-Z]'?(?:_\{\w+\})? ?(\([^()]*,[^()]*\))")
_ONLY_TEXT = re.compile(r"(?:\\text\{[^{}]*\}\s*)+")
_LABELLED = re.compile(
    r"(?:\\text\{\s*\(?(?P<text>[A-J])[).:]*\s*\}|\(?(?P<bare>[A-J])(?:\)\s|[.:]))\s*(?P<rest>.+)", re.DOTALL
)
_LETTER = re.compile(r"\\text\{\s*\(?([A-J])[).:]*\s*\}|\(?([A-J])\)?")
_MODULUS = re.compile(r"\s*,?\s*\\pmod\{ ?(\w+) ?\}$")
_FAMILY = re.compile(
    r"\s*[,(:]?\s*(?:\\text\{[^{}]*\}\s*)?(?P<name>[A-Za-z])\s*"
    r"(?:\\in\s*\\mathbb\{Z\}|\\text\{\s*(?:is )?(?:an |any )?integer\s*\})\s*\)?$"
    r"|\s*,?\s*\\text\{\s*(?:for |where )?(?:all |an |any |every |some )?integers?\s*\}\s*(?P<behind>[A-Za-z])$"
)
# What holds for which numbers is a remark, unless it has an equation or another item in it.
_CLAUSE = re.compile(
    rf"(?<=[^\s,(])\s*[,(]?\s*\\text\{{\s*(?:for|where|with)\b(?P<words>[^{{}}=]*)\}}(?!.*\\text\{{\s*for\b)"
    rf"(?!.*[,;{AND}{OR}]\s*[-+\d])[^=]*$"
)
_TIME = re.compile(r"(?P<hour>\d{1,2})(?::(?P<minute>[0-5]\d))?\s*(?:\\text\{(?P<half>[ap])m\})?")
_CALL = re.compile(r"(?P<name>[A-Za-z]) ?\((?P<arguments>[A-Za-z](?:, ?[A-Za-z])*)\)")


class Comparison:
    """Compares one answer with its gold. `unread` is set once a part of the answer made no sense."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._sets = SetReader(self._measure)
        self._depth = 0
        self.unread = False

    def same_answer(self, gold: str, answer: str) -> bool:
        """True if a normalised answer says the same as the normalised gold."""
        verdict = self._same_family(gold, answer)
        gold, answer = _CLAUSE.sub(_if_changing, gold), _CLAUSE.sub(_if_changing, answer)
        for compare in (self._same_letter, self._same_residue, self._same_time):
            verdict = compare(gold, answer) if verdict is None else verdict
        if verdict is not None:
            return verdict
        twice = split_top(gold, COLON)[0]
        if len(twice) == 2 and all(self._sets.read(part) for part in twice):
            return any(self._same(part, answer) for part in twice)  # the gold says it in two ways
        return self._same(gold, answer)

    # What holds for an answer as a whole.

    def _same_letter(self, gold: str, answer: str) -> bool | None:
        """Choices: the letter decides where the gold is one, and is a remark where the gold is a value."""
        letter, labelled = _LETTER.fullmatch(gold), _LABELLED.fullmatch(answer)
        if letter and labelled:
            return (letter[1] or letter[2]) == (labelled["text"] or labelled["bare"])
        if labelled and not _LABELLED.fullmatch(gold) and not is_words(answer):
            return self.same_answer(gold, labelled["rest"])
        return None

    def _same_residue(self, gold: str, answer: str) -> bool | None:
        """Numbers modulo another: the modulus is a remark, unless both state one."""
        modulus, other = _MODULUS.search(gold), _MODULUS.search(answer)
        if not modulus and not other:
            return None
        gold = (gold[: modulus.start()] if modulus else gold).replace("\\equiv", "=")
        answer = (answer[: other.start()] if other else answer).replace("\\equiv", "=")
        if not modulus or not other:
            return self._same(gold, answer)
        try:
            one, two, by = (read(text.split("=")[-1]) for text in (gold, answer, modulus[1]))
        except NotRead:
            return modulus[1] == other[1] and self._same(gold, answer)
        return modulus[1] == other[1] and equality.congruent(one, two, by, self._work)

    def _same_family(self, gold: str, answer: str) -> bool | None:
        r"""`x=\frac{\pi}{4}+k\pi, k\in\mathbb{Z}`, with any name for the integer and any member to start from."""
        family, other = _FAMILY.search(gold), _FAMILY.search(answer)
        if not family or not other:
            return None
        texts = []
        name, other_name = (match["name"] or match["behind"] for match in (family, other))
        for text in (gold[: family.start()], answer[: other.start()]):
            shape = read_shape(text)
            texts.append(shape.sides[-1] if isinstance(shape, Relation) and is_assignment(shape) else text)
        try:
            one, two = map(read, texts)
            return equality.same_family(one, two, name, other_name, self._work)
        except (NotRead, Undefined):
            return name == other_name and self._same(*texts)

    def _same_time(self, gold: str, answer: str) -> bool | None:
        """Times of day: a half of the day that only one of two states is forgiven."""
        one, two = _TIME.fullmatch(gold), _TIME.fullmatch(answer)
        if not one or not two or not (one["half"] or two["half"]):
            return None
        minutes = [60 * int(t["hour"]) + int(t["minute"] or 0) for t in (one, two)]
        for place, time in enumerate((one, two)):
            if time["half"]:
                minutes[place] += 720 * ((time["half"] == "p") - (time["hour"] == "12"))
        if one["half"] and two["half"]:
            return minutes[0] == minutes[1]
        marked, bare = minutes if one["half"] else minutes[::-1]
        return marked == bare or (bare < 780 and marked % 720 == bare % 720)

    # What holds for parts as well.

    def _same(self, gold: str, answer: str) -> bool:
        """Compare two texts: as they stand, as words, as sets of reals, by their shapes."""
        self._work.charge(1)
        if squeeze(gold) == squeeze(answer):
            return True
        if not answer or not gold or self._depth > _MAX_DEPTH:
            return False
        self._depth += 1
        same = self._same_parts(gold, answer)
        self._depth -= 1
        return same

    def _same_parts(self, gold: str, answer: str) -> bool:
        """Compare two texts that are not the same as they stand."""
        words = self._same_words(gold, answer)
        if words is not None:
            return words
        if SET_LIKE.search(gold) or SET_LIKE.search(answer):
            one, two = self._sets.read(gold), self._sets.read(answer)
            if one is not None and two is not None:
                return same_set(one, two, self._same_value_text)
        return any(self._same_shape(one, other) for one in readings(gold) for other in _answer_readings(answer, gold))

    def _same_words(self, gold: str, answer: str) -> bool | None:
        """Words without case; None if they are no words, or words that may say a value."""
        texts = [bool(_ONLY_TEXT.fullmatch(text)) or is_words(text) for text in (gold, answer)]
        if not any(texts) and "\\text" not in gold + answer:
            return None
        words = words_of(gold)
        if words and words == words_of(answer):
            return True
        return False if any(texts) else None

    def _same_shape(self, gold: Shape, answer: Shape) -> bool:
        """Compare two answers by their shapes."""
        answer = self._without_name(gold, answer)
        if isinstance(gold, Relation) and not isinstance(answer, Relation) and is_assignment(gold):
            gold = read_shape(gold.sides[-1])
        match gold, answer:
            case Relation(), Relation():
                return self._same_relation(gold, answer)
            case Matrix(), Matrix():
                return self._same_matrix(gold, answer)
            case Group(), Group():
                return self._same_group(gold, answer)
            case (Group(opened="(", items=items), Matrix(rows=rows)) | (
                Matrix(rows=rows),
                Group(opened="(", items=items),
            ):
                # A vector, as a column or in a row.
                cells = [cell for row in rows for cell in row]
                return len(rows) in (1, len(cells)) and self._same_collection(items, cells, ordered=True)
            case Union(), Union():
                return self._same_collection(gold.parts, answer.parts, ordered=False)
            case Value(), Value():
                return self._same_value(gold, answer)
            case (Matrix() | Value() as one, Matrix() | Value() as two):
                return self._same_value_text(text_of(one), text_of(two))
        return False

    def _without_name(self, gold: Shape, answer: Shape) -> Shape:
        """An answer that names its value, or derives it in a chain of equalities, for a gold that does not."""
        if isinstance(gold, Group) and isinstance(answer, Value) and (point := _POINT.fullmatch(answer.text)):
            return read_shape(point[1])
        if isinstance(gold, Relation) or not isinstance(answer, Relation) or set(answer.signs) != {"="}:
            return answer
        first, *middle, last = answer.sides
        named = is_name(first) or all(map(is_name, first.split("+"))) or self._same(first, last)
        if named and all(self._derives(side, last) for side in middle):
            return read_shape(last)
        return answer

    def _derives(self, side: str, last: str) -> bool:
        """True if a middle of a chain may equal its end: a formula in unknowns that it has not, or the same value."""
        if is_name(side) and not read_number(side):
            return True
        try:
            if symbols(read(side)) and not symbols(read(last)):
                return True
        except NotRead:
            pass
        return self._same(side, last)

    def _same_relation(self, gold: Relation, answer: Relation) -> bool:
        """Relations side by side, from either end, and then as whole statements."""
        if is_assignment(gold) and is_assignment(answer):
            gold, answer = _same_arguments(gold, answer)
            if squeeze(gold.sides[0]) == squeeze(answer.sides[0]):
                named = self._without_name(Value(""), answer)
                return not isinstance(named, Relation) and self._same(gold.sides[-1], answer.sides[-1])
        if len(gold.sides) == 2 and len(answer.sides) == 2:
            return self._same_statement(gold, answer)
        return any(
            o.signs == gold.signs and all(map(self._same_value_text, gold.sides, o.sides))
            for o in (answer, _flip(answer))
            if o
        )

    def _same_statement(self, gold: Relation, answer: Relation) -> bool:
        """True if one relation is the other times a constant (positive, for the same direction)."""
        try:
            one, two = (_difference(relation) for relation in (gold, answer))
        except NotRead:
            self.unread = True
            return False
        unknowns = symbols(one)
        if not unknowns or unknowns != symbols(two):
            return False
        ratio = equality.constant_ratio(one, two, self._work)
        if ratio is None:
            return False
        sign, other = gold.signs[0], answer.signs[0]
        if sign not in _SIGNS or other not in _SIGNS:
            return sign == other
        direction = _SIGNS[sign] * _SIGNS[other]
        return (sign in _STRICT) == (other in _STRICT) and (ratio > 0) == (direction > 0)

    def _same_matrix(self, gold: Matrix, answer: Matrix) -> bool:
        """Matrices have the same shape and the same cells."""
        if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
            return False
        cells = [[cell for row in matrix.rows for cell in row] for matrix in (gold, answer)]
        return all(self._same(one, two) for one, two in zip(*cells, strict=True))

    def _same_group(self, gold: Group, answer: Group) -> bool:
        """Tuples are ordered and keep their brackets; bare lists and sets are unordered."""
        if gold.opened and answer.opened and (gold.opened, gold.closed) != (answer.opened, answer.closed):
            return False
        if gold.ordered != answer.ordered and "[" in (gold.opened + gold.closed + answer.opened + answer.closed):
            return False
        # A tuple given as a bare list has to keep the order; a list given as a tuple has not.
        return self._same_collection(gold.items, answer.items, gold.ordered or _distinct_names(gold, answer))

    def _same_collection(self, gold: Iterable[str], answer: Iterable[str], ordered: bool) -> bool:
        """Compare items in order, or find a pairing of them. An answer may repeat an item if the gold repeats none."""
        golds, answers = list(gold), list(answer)
        if len(answers) > len(golds) and not ordered:
            answers = list({squeeze(item): item for item in answers}.values())
        if len(golds) != len(answers) or len(golds) > MAX_ITEMS:
            return False
        if ordered:
            return all(self._same(one, other) for one, other in zip(golds, answers, strict=True))
        return _pair_off(golds, answers, self._same)

    def _same_value(self, gold: Value, answer: Value) -> bool:
        """Compare two single values: units that both state, numbers with a base, ratios, then mathematics."""
        one, two = gold.text, answer.text
        if gold.unit and answer.unit and gold.unit != answer.unit:
            if gold.unit[0] != answer.unit[0]:
                return False
            return self._same_scaled(one, two, answer.unit[1] / gold.unit[1])
        if squeeze(one) == squeeze(two):
            return True
        if (_POINTS.fullmatch(one) and _POINTS.fullmatch(two)) or _bracketed(one) != _bracketed(two):
            return False
        if _BASED.fullmatch(one) or _BASED.fullmatch(two):
            return _same_digits(one, two)
        ratio, ratio_answer = split_top(one, COLON)[0], split_top(two, COLON)[0]
        if len(ratio) > 1 or len(ratio_answer) > 1:
            return self._same_ratio(ratio, ratio_answer)
        return self._same_value_text(one, two)

    def _same_scaled(self, gold: str, answer: str, factor: Fraction) -> bool:
        """Values in different units of one kind."""
        try:
            return equality.same_expression(read(gold), equality.scaled(read(answer), factor), self._work)
        except (NotRead, Undefined):
            return False

    def _same_ratio(self, gold: list[str], answer: list[str]) -> bool:
        """Ratios by the quotients of their terms and the first: `2:3` is `4:6`, and also two thirds."""
        one, two = ([f"({terms[0]})/({term})" for term in terms[1:]] or terms for terms in (gold, answer))
        return len(one) == len(two) and all(map(self._same_value_text, one, two))

    def _same_value_text(self, gold: str, answer: str) -> bool:
        """True if two expressions are the same number or the same function of their unknowns."""
        plain, other = read_number(gold), read_number(answer)
        if plain is not None and other is not None:
            return same_number(plain, other)
        try:
            one, two = read(gold), read(answer)
        except NotRead:
            self.unread = True
            return False
        try:
            same = equality.same_expression(one, two, self._work)
            if not same and ("\\%" in gold) != ("\\%" in answer):
                part, whole = (one, two) if "\\%" in gold else (two, one)
                same = equality.same_expression(equality.scaled(part, Fraction(1, 100)), whole, self._work)
            return same or equality.is_full_precision(gold, one, answer, two, self._work)
        except Undefined:
            self.unread = True
            return False

    def _measure(self, text: str) -> Any | None:
        try:
            return equality.real_value(read(text), self._work)
        except NotRead:
            return None


def _answer_readings(answer: str, gold: str) -> list[Shape]:
    """Those of an answer: with a decimal comma as well, where the gold is a single value."""
    if _DECIMAL_COMMA.fullmatch(answer) and isinstance(read_shape(gold), Value):
        return [*readings(answer), Value(answer.replace(",", "."))]
    return readings(answer)


def _if_changing(clause: re.Match[str]) -> str:
    """A clause that may change what it is said of, or nothing."""
    return "" if is_remark(clause["words"]) else clause[0]


def _bracketed(text: str) -> bool:
    """True for one value in square brackets, which may be the integer part: of an integer it is the integer."""
    whole = text.startswith("[") and matching_brackets(text).get(0) == len(text) - 1
    return whole and not re.fullmatch(r"[+-]?\d+", text[1:-1].strip())


def _difference(relation: Relation) -> Node:
    """What a relation says is zero, or has a sign."""
    left, right = (read(side) for side in relation.sides)
    return Node("add", (left, Node("mul", (number(-1), right))))


def _same_arguments(gold: Relation, answer: Relation) -> tuple[Relation, Relation]:
    """Definitions of one function, with the same names for its arguments: `f(n)=n` as `f(x)=x`."""
    one, two = _CALL.fullmatch(gold.sides[0].strip()), _CALL.fullmatch(answer.sides[0].strip())
    if not one or not two or one["name"] != two["name"] or one["arguments"] == two["arguments"]:
        return gold, answer
    return _renamed(gold, one), _renamed(answer, two)


def _renamed(relation: Relation, call: re.Match[str]) -> Relation:
    """The definition with arguments that no answer has as unknowns."""
    fresh = {name.strip(): f"y_{{{place}\\prime}}" for place, name in enumerate(call["arguments"].split(","))}
    letters = re.compile(r"\\[A-Za-z]+|" + "|".join(fresh))
    sides = [letters.sub(lambda m: fresh.get(m[0], m[0]), side) for side in relation.sides[1:]]
    return Relation((f"{call['name']}({len(fresh)})", *sides), relation.signs)


def _same_digits(gold: str, answer: str) -> bool:
    """Numbers in a base: the same digits and base. A gold without one is decimal; an answer without has the gold's."""
    found = []
    for text in (gold, answer):
        match = _BASED.fullmatch(text)
        base = int(match["base"] or 2 + _BASES.index(match["word"])) if match else None
        digits = match["digits"] if match else text
        if base is not None and not (2 <= base <= 36 and all(int(digit, 36) < base for digit in digits)):
            return False
        found.append((digits.lstrip("0"), base))
    (digits, base), (other, other_base) = found
    same = other_base in (None, base) or (base is None and (other_base == 10 or len(other) < 2))
    return digits == other and same


def _distinct_names(gold: Group, answer: Group) -> bool:
    """True if only one of two lists names its values, and by different names: then the order tells which is which."""
    named = []
    for group in (gold, answer):
        shapes = [read_shape(item) for item in group.items]
        names = {re.sub(r"_\{.*?\}", "", s.sides[0]) for s in shapes if isinstance(s, Relation) and is_assignment(s)}
        named.append(len(names))
    return (named[0] > 1) != (named[1] > 1) and 0 in named


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


def _flip(relation: Relation) -> Relation | None:
    """The relation read from right to left."""
    if not set(relation.signs) <= set(FLIPPED):
        return None
    return Relation(relation.sides[::-1], tuple(FLIPPED[sign] for sign in relation.signs[::-1]))
