r"""Expressions as trees: a reader of normalised LaTeX, and their values at points to high precision.

Two expressions that differ at a point are different; two that agree to sixty digits at several generic points are the
same, far more surely than a simplifier can tell in reasonable time. What the reader does not know makes no sense to
the grader. Text is only ever split into tokens here: there is no evaluation of code anywhere.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from kpo_cli.rewards.normalize import GREEK_NAMES
from kpo_cli.rewards.numbers import read_number

# Far from where Python's own limit would decide, which depends on the caller.
MAX_DEPTH = 100


class NotRead(Exception):
    """The text is not an expression of the kinds that this reader knows."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the tree: `op` is number, symbol, constant, add, mul, pow, or the name of a function.

    Sums, products, integrals and limits bind `name`: their arguments are the body and the bounds, and the sign of a
    limit's `value` is its side. A matrix has its cells as arguments and its width as `value`.
    """

    op: str
    args: tuple["Node", ...] = ()
    value: Fraction = Fraction(0)
    name: str = ""


_TOKEN = re.compile(
    r"\s+|(?P<repeating>\d*\.\d*\\(?:overline|bar)\{\d+\})|(?P<number>(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4}(?![\d.]))?)"
    r"|(?P<command>\\[A-Za-z]+|\\.)|(?P<letter>[A-Za-z])|(?P<sign>.)",
    re.DOTALL,
)
_FUNCTIONS = {
    "\\sin": "sin", "\\cos": "cos", "\\tan": "tan", "\\cot": "cot", "\\sec": "sec", "\\csc": "csc",
    "\\arcsin": "asin", "\\arccos": "acos", "\\arctan": "atan", "\\sinh": "sinh", "\\cosh": "cosh", "\\tanh": "tanh",
    "\\coth": "coth", "\\arcsinh": "asinh", "\\arccosh": "acosh", "\\arctanh": "atanh", "\\sgn": "sgn", "\\erf": "erf",
    "\\ln": "ln", "\\log": "ln", "\\lg": "lg", "\\exp": "exp", "\\Re": "re", "\\Im": "im", "\\det": "det",
}  # fmt: skip
_LIST_FUNCTIONS = {"\\min": "min", "\\max": "max", "\\gcd": "gcd", "\\lcm": "lcm"}
_BINDERS = {"\\sum": "sum", "\\prod": "prod"}
_INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan"}
_OTHER_SYMBOLS = (
    "hbar", "ell", "mho", "odot", "partial", "nabla", "aleph", "angle", "triangle", "Xi", "Pi",
)  # fmt: skip
_ACCENTS = {
    "\\bar", "\\overline", "\\hat", "\\widehat", "\\vec", "\\overrightarrow", "\\tilde", "\\mathbf", "\\mathcal",
}  # fmt: skip
_GREEK = {f"\\{name}" for name in (*GREEK_NAMES, *_OTHER_SYMBOLS) if name != "pi"}
# Letters that denote functions: an application of them is one unknown, not a product.
_FUNCTION_LETTERS = set("fghuFGH") | {"\\delta", "\\phi", "\\psi"}
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}
_STARTS = re.compile(r"[0-9A-Za-z.({\[|\\]")
_STOPS = {
    "\\cdot", "\\le", "\\ge", "\\ne", "\\in", "\\rfloor", "\\rceil", "\\}", "\\cr", "\\%", "\\end", "\\cup",
    "\\setminus", "\\to", "\\above", "\\below",
}  # fmt: skip
_SIDE = re.compile(r"\^ ?\{? ?([+-]) ?\}?(?= ?\})")
_DERIVATIVE = re.compile(
    r"\\frac\{ ?d ?(?:\^\{ ?(?P<order>\d) ?\} ?)?(?P<of>\\?[A-Za-z]+(?:_\{[^{}]*\})?) ?\}"
    r"\{ ?d ?\\?[A-Za-z]+ ?(?:\^\{ ?\d ?\})? ?\}"
)


def number(value: int | Fraction) -> Node:
    """A number as a node."""
    return Node("number", value=Fraction(value))


@lru_cache(maxsize=4096)
def read(text: str) -> Node:
    """The tree of a normalised expression; raises `NotRead` if it is not one."""
    return Reader(text).read_all()


class Reader:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        # Leibniz's, Newton's and Lagrange's derivatives are one notation here.
        text = _DERIVATIVE.sub(lambda m: rf"\deriv{{{m['order'] or 1}}}{{{m['of']}}}", text)
        if "\\lim" in text:
            text = _SIDE.sub(lambda m: "\\above" if m[1] == "+" else "\\below", text)
        if any(name in text for name in _LIST_FUNCTIONS):
            text = text.replace(",", ", ")  # those are no thousands
        self._tokens = [m for m in _TOKEN.finditer(text) if not m.group().isspace()]
        self._at = 0
        self._depth = 0
        self._bars = 0
        self._radians = bool(re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text))
        self._index_i = bool(re.search(r"_\{ ?i ?=", text))
        self._has_matrix = "matrix}" in text

    def read_all(self) -> Node:
        """The expression, which must end where the text does."""
        node = self._sum()
        if self._at != len(self._tokens):
            raise NotRead
        return node

    def _peek(self, ahead: int = 0) -> str:
        position = self._at + ahead
        return self._tokens[position].group() if position < len(self._tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    def _take(self, token: str) -> bool:
        if self._peek() == token:
            self._at += 1
            return True
        return False

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise NotRead

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise NotRead

    def _sum(self) -> Node:
        """Terms with signs between them."""
        self._deeper()
        terms = [self._signed(self._product)]
        while self._peek() in ("+", "-"):
            terms.append(self._signed(self._product))
        self._depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _product(self) -> Node:
        """Factors joined by dots, slashes or nothing, from left to right."""
        factors = [self._mixed() or self._power()]
        while True:
            if self._take("\\cdot"):
                factors.append(self._signed(self._power))
            elif self._take("/"):
                factors.append(_inverse(self._signed(self._power)))
            elif self._starts_factor():
                if self._peek()[0] in "0123456789." and self._peek(-1)[-1] in "0123456789.":
                    # Two numbers side by side are no product.
                    raise NotRead
                factors.append(self._power())
            else:
                return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))

    def _signed(self, part: Callable[[], Node]) -> Node:
        """A term, or a factor after an explicit operator, with the signs before it."""
        sign = 1
        while self._peek() in ("+", "-"):
            sign *= -1 if self._next() == "-" else 1
        return _negated(part(), sign)

    def _starts_factor(self) -> bool:
        token = self._peek()
        if token == "|":
            return self._bars == 0
        return bool(token) and token not in _STOPS and bool(_STARTS.match(token))

    def _mixed(self) -> Node | None:
        r"""An integer directly before a fraction of integers is a mixed number: `3\frac{1}{2}`."""
        tokens = [self._peek(i) for i in range(8)]
        shape = [tokens[i] for i in (1, 2, 4, 5, 7)]
        if shape != ["\\frac", "{", "}", "{", "}"] or not all(tokens[i].isdigit() for i in (0, 3, 6)):
            return None
        self._at += 8
        if not int(tokens[6]):
            raise NotRead
        return number(int(tokens[0]) + Fraction(int(tokens[3]), int(tokens[6])))

    def _power(self) -> Node:
        """An atom with what may follow it: powers, factorials, primes, degrees, percent."""
        base = self._atom()
        for _ in range(MAX_DEPTH):
            token = self._peek()
            if token == "^":
                self._at += 1
                if [self._peek(i) for i in range(3)] == ["{", "\\circ", "}"]:
                    self._at += 3
                    base = Node("mul", (base, Node("degree"))) if self._radians else base
                elif self._transposes():
                    base = Node("transpose", (base,))
                else:
                    base = Node("pow", (base, self._argument()))
            elif token == "!":
                self._at += 1
                base = Node("double_factorial" if self._take("!") else "factorial", (base,))
            elif token == "\\%":
                self._at += 1
            else:
                return base
        raise NotRead

    def _transposes(self) -> bool:
        """Take the exponent of a transposed matrix, if that is what follows one."""
        if self._peek(-2) != "}" or not self._has_matrix:
            return False
        for mark in (["{", "T", "}"], ["{", "\\top", "}"], ["\\top"]):
            if [self._peek(i) for i in range(len(mark))] == mark:
                self._at += len(mark)
                return True
        return False

    def _argument(self) -> Node:
        """A TeX argument: a group, or a single token."""
        if self._take("{"):
            node = self._sum()
            self._expect("}")
            return node
        return self._signed(self._atom)

    def _atom(self) -> Node:
        """A number, a symbol, a bracketed expression, or a command with its arguments."""
        self._deeper()
        if self._at >= len(self._tokens):
            raise NotRead
        node = self._opened()
        self._depth -= 1
        return node

    def _opened(self) -> Node:
        """An atom by its first token."""
        match = self._tokens[self._at]
        token = self._next()
        if match["number"] or match["repeating"]:
            plain = read_number(token)
            if plain is None:
                raise NotRead
            return number(plain.value)
        if token in _CLOSING:
            return self._bracketed(token)
        if match["letter"] or token in _GREEK or token in _ACCENTS:
            return self._symbol(token)
        return self._command(token)

    def _bracketed(self, opened: str) -> Node:
        """An expression in brackets, with the meaning of bars, floor and ceiling."""
        if opened == "|":
            self._bars += 1
        node = self._sum()
        self._expect(_CLOSING[opened])
        if opened == "|":
            self._bars -= 1
            return Node("abs", (node,))
        if opened in ("\\lfloor", "\\lceil"):
            return Node("floor" if opened == "\\lfloor" else "ceil", (node,))
        if opened == "\\{":
            raise NotRead
        return node

    def _command(self, token: str) -> Node:
        """A command that is no symbol."""
        if token in _FUNCTIONS:
            return self._function(_FUNCTIONS[token])
        if token in ("\\pi", "\\infty"):
            return Node("constant", name=token)
        if token == "\\frac":
            return Node("mul", (self._argument(), _inverse(self._argument())))
        if token == "\\binom":
            return Node("binomial", (self._argument(), self._argument()))
        if token == "\\sqrt":
            index = number(2)
            if self._take("["):
                index = self._sum()
                self._expect("]")
            return Node("root", (self._argument(), index))
        if token in _LIST_FUNCTIONS:
            return Node(_LIST_FUNCTIONS[token], self._list())
        if token in _BINDERS:
            return self._bound(_BINDERS[token])
        if token == "\\int":
            return self._integral()
        if token == "\\lim":
            return self._limit()
        if token == "\\begin":
            return self._matrix()
        if token == "\\text":
            return Node("symbol", name=f"text:{self._raw_group()}")
        if token == "\\deriv":
            order = int(self._raw_group())
            return Node("symbol", name="D" * order + ":" + self._raw_group())
        if token in ("\\dot", "\\ddot"):
            name = "D" * (1 if token == "\\dot" else 2) + ":" + self._raw_group()
            return self._applied(name + ("_" + self._raw_group() if self._take("_") else ""))
        raise NotRead

    def _list(self) -> tuple[Node, ...]:
        """Arguments with commas between them, in any brackets."""
        closed = {"(": ")", "\\{": "\\}", "[": "]"}.get(self._next(), "")
        items = [self._sum()]
        while self._take(","):
            items.append(self._sum())
        self._expect(closed)
        return tuple(items)

    def _bound(self, op: str) -> Node:
        r"""A sum or product over an index: `\sum_{k=1}^{n} k`."""
        for token in ("_", "{"):
            self._expect(token)
        name = self._next()
        self._expect("=")
        low = self._sum()
        for token in ("}", "^"):
            self._expect(token)
        high = self._argument()
        return Node(op, (self._product(), low, high), name=_unknown(name))

    def _integral(self) -> Node:
        r"""A definite integral up to its differential: `\int_{0}^{1} x dx`."""
        self._expect("_")
        low = self._argument()
        self._expect("^")
        high = self._argument()
        depth, end = 0, self._at
        while end < len(self._tokens):
            token = self._tokens[end].group()
            depth += (
                1 if token in _CLOSING and token != "|" else -1 if token in _CLOSING.values() and token != "|" else 0
            )
            if token == "d" and not depth and end + 1 < len(self._tokens) and self._tokens[end + 1].group().isalpha():
                break
            end += 1
        else:
            raise NotRead
        rest, self._tokens = self._tokens[end:], self._tokens[:end]
        body = number(1) if self._at == end else self._sum()
        if self._at != end:
            raise NotRead
        self._tokens = self._tokens + rest
        self._at = end + 2
        return Node("integral", (body, low, high), name=_unknown(rest[1].group()))

    def _limit(self) -> Node:
        r"""A limit, from one side or both: `\lim_{x \to 0^{+}} x`."""
        for token in ("_", "{"):
            self._expect(token)
        name = self._next()
        self._expect("\\to")
        target = self._sum()
        side = Fraction(1 if self._take("\\above") else -1 if self._take("\\below") else 0)
        self._expect("}")
        return Node("limit", (self._product(), target), value=side, name=_unknown(name))

    def _matrix(self) -> Node:
        """A matrix or determinant, cell by cell."""
        kind = self._raw_group()
        if not kind.endswith("matrix"):
            raise NotRead
        rows: list[list[Node]] = [[]]
        while not self._take("\\end"):
            rows[-1].append(self._sum())
            if self._take("\\cr"):
                rows.append([])
            elif self._peek() != "\\end":
                self._expect("&")
        self._raw_group()
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) != 1:
            raise NotRead
        node = Node("matrix", tuple(cell for row in rows for cell in row), value=Fraction(len(rows[0])))
        return Node("det", (node,)) if kind == "vmatrix" else node

    def _raw_group(self, opened: str = "{") -> str:
        """The text of a group, or a single token, as it stands."""
        if not self._take(opened):
            return self._next()
        depth, start = 1, self._at
        while depth:
            token = self._next()
            depth += {opened: 1, _CLOSING[opened]: -1}.get(token, 0)
            if not token:
                raise NotRead
        return "".join(match.group() for match in self._tokens[start : self._at - 1])

    def _symbol(self, token: str) -> Node:
        """A letter with its accent, subscript and primes; `e` and `i` are constants if bare."""
        name = f"{token}{{{self._raw_group()}}}" if token in _ACCENTS else token
        if self._take("_"):
            name += "_" + self._raw_group()
        elif token in ("e", "i") and self._peek() != "'" and not (token == "i" and self._index_i):
            return Node("constant", name=token)
        primes = 0
        while self._take("'"):
            primes += 1
        return self._applied("D" * primes + ":" + name if primes else name)

    def _applied(self, name: str) -> Node:
        """The symbol, or its application to an argument as one unknown: `f(2)`, `I(0)`."""
        letter = name.rpartition(":")[2].partition("_")[0]
        if name == "\\zeta" and self._peek() == "(" and self._peek(1).isdigit():
            return Node("zeta", (self._bracketed(self._next()),))
        if name == "C" and self._peek() == "(" and self._peek(2) == ",":
            return Node("binomial", self._list())
        if self._peek() == "(":
            inside = self._peek(1)
            if letter in _FUNCTION_LETTERS or (inside.isdigit() and self._peek(2) == ")"):
                return Node("symbol", name=f"{name}({self._raw_group('(')})")
        return Node("symbol", name=name)

    def _function(self, name: str) -> Node:
        """A named function: its power and base come before its argument."""
        power: Node | None = None
        base: Node | None = None
        while self._peek() in ("^", "_"):
            if self._next() == "^":
                power = self._argument()
            else:
                base = self._argument()
        argument = self._function_argument()
        if power == number(-1) and name in _INVERSES:
            name, power = _INVERSES[name], None
        if base is not None:
            if name != "ln":
                raise NotRead
            node = Node("mul", (Node("ln", (argument,)), _inverse(Node("ln", (base,)))))
        elif name == "exp":
            node = Node("pow", (Node("constant", name="e"), argument))
        else:
            node = Node(name, (argument,))
        return node if power is None else Node("pow", (node, power))

    def _function_argument(self) -> Node:
        r"""Brackets if there are any, else the factors up to the next operator or function: `\sin 2 \pi t`."""
        if self._peek() in ("(", "{", "[", "|"):
            node = self._bracketed(self._next())
            # The bracket was only the first factor of an argument that goes on: "\sin (a)^{2}".
            while self._peek() == "^":
                self._at += 1
                node = Node("pow", (node, self._argument()))
            return node
        if self._peek() in _FUNCTIONS:
            return self._power()
        factors = [self._power()]
        while self._starts_factor() and self._peek() not in _FUNCTIONS and self._peek() not in ("(", "["):
            factors.append(self._power())
        if self._take("/") and self._peek()[:1].isdigit():
            factors.append(_inverse(self._power()))
        return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


def _negated(node: Node, sign: int) -> Node:
    """The node, or its negative."""
    if sign > 0:
        return node
    if node.op == "number":
        return number(-node.value)
    return Node("mul", (number(-1), node))


def _inverse(node: Node) -> Node:
    """One over a node."""
    return Node("pow", (node, number(-1)))


def _unknown(token: str) -> str:
    """The name of a variable that something binds."""
    if not re.fullmatch(r"[A-Za-z]|\\[A-Za-z]+", token):
        raise NotRead
    return token


def symbols(node: Node) -> frozenset[str]:
    """The names of the unknowns in an expression, without those that it binds."""
    if node.op == "symbol":
        return frozenset({node.name})
    found = frozenset[str]().union(*map(symbols, node.args))
    if node.op in ("sum", "prod", "integral", "limit"):
        return (symbols(node.args[0]) - {node.name}).union(*map(symbols, node.args[1:]))
    return found


def operations(node: Node) -> frozenset[str]:
    """The kinds of nodes in an expression; the imaginary unit counts as one."""
    found: set[str] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        found.add("i" if current.op == "constant" and current.name == "i" else current.op)
        stack.extend(current.args)
    return frozenset(found)
