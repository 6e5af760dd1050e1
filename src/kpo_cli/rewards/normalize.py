r"""Bringing answers and golds to one spelling, as text.

Nothing here knows mathematics: it only rewrites the many spellings of the same thing (`\dfrac12`, `½`, `\tfrac{1}{2}`)
to one. Each step is a linear scan over a text of bounded length, so that it is safe to run on hostile input inside the
calling process.
"""

import re
import unicodedata

from kpo_cli.rewards.units import LETTERS
from kpo_cli.rewards.words import AND, OR, mark_words

# Longer than this, as written, an answer is not looked at; the second limit holds once padding has been removed.
RAW_LIMIT = 200_000
LIMIT = 3_000

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
# Unicode symbols that models write instead of the LaTeX command.
_SYMBOLS = {
    **dict.fromkeys("−–—‒﹣－", "-"),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/",
    "∞": r"\infty ", "√": r"\sqrt ", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ",
    "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ",
    "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "°": r"^{\circ}", "′": "'", "’": "'", "→": r"\to ", "ℏ": r"\hbar ",
    "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "∣": "|", "″": '"', "”": '"', "“": '"', "≡": r"\equiv ",
    "〈": r"\langle ", "〉": r"\rangle ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "，": ",", "；": ";", "∧": f" {AND} ", "∨": f" {OR} ",
}  # fmt: skip
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau",
    "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda",
    "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
GREEK_NAMES = (*_GREEK.values(), "iota", "upsilon", "Upsilon")
_UNICODE = {
    **_SYMBOLS,
    **{letter: f"\\{name} " for letter, name in _GREEK.items()},
    **dict.fromkeys("¥₽₩₪", ""),
}

# Commands that only lay out, and the size commands of delimiters ("\left." has an invisible delimiter).
_LAYOUT = re.compile(
    r"\\(?:left|right)\s*\.|\\(?:left|right|middle|[bB]ig{1,2}[lrm]?|displaystyle|textstyle|scriptstyle|limits"
    r"|nolimits|boldsymbol|bm|ensuremath|mathstrut|strut|hfill|hline|blacksquare|square|tiny|small|large|Large|rm|bf|it)(?![A-Za-z])"
)
_SPACING = re.compile(
    r"\\[,;:!> \n]|\\(?:q?quad|hspace\*?\{[^{}]*\}|thinspace|space)(?![A-Za-z])|\\[hv]?phantom\{[^{}]*\}|~"
)
# A wide space between two equations is a comma.
_WIDE = re.compile(
    r"(?<=[^,;])(?:\s|\\\s|&)*(?:\\q?quad(?![A-Za-z])|\\\\)(?:\s|\\\s|&)*(?=[^=<>]{1,40}(?:[=<>]|\\[lg]eq?))"
)
_THIN_THOUSANDS = re.compile(r"(?<=\d)\s?(?:\{,\}|,\s?\\!|\\!\s?,|\\,)\s?(?:\\!\s?)?(?=\d{3}(?!\d))")
_COLOUR = re.compile(
    r"\\(?:text)?color\s?\{[^{}]*\}|\\colorbox\s?\{[^{}]*\}|\\fcolorbox\s?\{[^{}]*\}\s?\{[^{}]*\}|\\(?:cancel|underline|mathstrut)(?=\s?\{)"
)
_TEXT_COMMANDS = re.compile(
    r"\\(?:text(?:normal|bf|it|rm|sf|tt|up|md|sc|sl)?|mbox|hbox|math(?:rm|bf|it|sf|tt|normal|up))\s?\{"
)
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.]\d| ?\d)")
# A single upright letter is a symbol, except after a number, where most are units.
_LETTER = re.compile(r"(?P<before>(?:\\(?:cdot|frac) ?\{?|\} ?\{|[\d})\s/])?)\\text\{ ?(?P<letter>[A-Za-z]) ?\}")
_UNIT_POWER = re.compile(r"\\text\{([A-Za-z/. ]*[A-Za-z]) ?\^ ?\{?(-?\d)\}? ?\}")
_SCIENTIFIC = re.compile(r"(?<=\d)\s?\\text\{ ?(?:[eE] ?\}\s?\{ ?([+-]?\d+) ?\}|E ?\}\s?([+-]?\d+))")
_BOXES = re.compile(r"\\(?:boxed|fbox)\s?\{")
_FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|ln|log|lg|exp|arcsin|arccos|arctan|sinh|cosh|tanh|coth|arcsinh|arccosh|arctanh|max|min|gcd|lcm"
    "|det|sgn|erf|lim"
)
_OTHER_NAMES = "asin|acos|atan|arsinh|arcosh|artanh|sign|tg|ctg|arctg|mod|sqrt|Re|Im"
_NAMED = re.compile(
    rf"\\(?:operatorname\*?|text(?=\s?\{{[^{{}}]*\}}\s?[(_^]|\s?\{{(?!min|max|mod)[^{{}}]*\}}\s?[\dA-Za-z\\]))"
    rf"\s?\{{ ?({_FUNCTIONS}|{_OTHER_NAMES}) ?\}}"
)


_INSIDE = re.compile(r"[^{}\\]*\}")
_CURRENCIES = {r"\$": "dollars", "€": "euros", "£": "pounds", "₹": "rupees"}
# Before a number that is all there is, or behind one, a currency is a unit.
_CURRENCY = re.compile(r"(?P<sign>\\\$|[€£₹]) ?(?P<number>\d[\d.,]*)(?=[ $]*$)|(?<=\d) ?(?P<behind>[€£₹])")


def _currency(match: re.Match[str]) -> str:
    """The unit behind its number, in words."""
    return rf"{match['number'] or ''} \text{{{_CURRENCIES[match['sign'] or match['behind']]}}}"


def _half_day(match: re.Match[str]) -> str:
    """A half of the day as text of its own; one that stands in a text with its time stays there."""
    half = f"{match[1] or match[2] or match[3]}m".lower()
    return f" {half}" if _INSIDE.match(match.string, match.end()) else rf"\text{{{half}}}"


_SPELLINGS = {
    name: spelling
    for spelling, names in {
        r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom", r"\vec": "overrightarrow", "/": "div",
        r"\le ": "le leq leqslant <= =<", r"\ge ": "ge geq geqslant >=", r"\ne ": "ne neq !=", "<": "lt", ">": "gt",
        r"\approx ": "simeq thickapprox approxeq ~=", r"\cdot ": "cdot times ast bullet *", ":": "colon",
        r"\emptyset ": "varnothing O", r"\{": "lbrace", r"\}": "rbrace", "[": "lbrack", "]": "rbrack", "(": "langle",
        ")": "rangle", "|": "lvert rvert vert mid", r"\setminus ": "backslash smallsetminus", AND: "land wedge",
        OR: "lor vee", r"\mathbb{R}": "R reals Reals", r"\epsilon ": "varepsilon", r"\phi ": "varphi",
        r"\to ": "rightarrow longrightarrow", r"\arcsin ": "asin", r"\arccos ": "acos", r"\arctan ": "atan arctg",
        r"\arcsinh ": "arsinh", r"\arccosh ": "arcosh", r"\arctanh ": "artanh", r"\sgn ": "sign", r"\tan ": "tg",
        r"\cot ": "ctg",
    }.items()
    for name in names.split()
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)|<=|=<|>=|!=|~=|\*")
_ALIASES = (
    (re.compile(r"\\not\s?="), r"\\ne "),
    (re.compile(r"\\\{\s?\\\}"), r"\\emptyset "),
    (re.compile(r"\\mathbf\s?\{R\}|\\mathbb\s?R"), r"\\mathbb{R}"),
    (re.compile(r"\\mathbb\s?([ZNQC])"), r"\\mathbb{\1}"),
    (re.compile(r"\{:\}"), ":"),
    (re.compile(r"\^\s?\{?\s?(?:\\circ|\\degree)(?![A-Za-z])\s?\}?|\\degree(?![A-Za-z])"), r"^{\\circ}"),
    (re.compile(r"\^\s?\{\s?(?:\\prime\s?)+\}|\^\s?\\prime(?![A-Za-z])"), lambda m: "'" * m[0].count("prime")),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|infty|inf)(?![A-Za-z])"), r"\\infty "),
    # Within text they are words: "min" is a minute.
    (re.compile(rf"\\text\{{[^{{}}]*\}}|(?<![A-Za-z\\])(sqrt|pi|{_FUNCTIONS})(?![A-Za-z])"),
     lambda m: rf"\{m[1]} " if m[1] else m[0]),
    (re.compile(r"(?<![A-Za-z])np\s?\.\s?"), ""),
    (re.compile(r"\\?%|(?<![A-Za-z])(?:percentage|percent|pct)(?![A-Za-z])"), r"\\% "),
    (re.compile(r"\\sqrt\s?(\[\d\])?\s?\(([^()]*)\)"), r"\\sqrt\1{\2}"),
    (re.compile(r"\\textcircled\s?\{?(\d)\}?"), r"\\text{(\1)}"),
    # Combinations in their many notations.
    (re.compile(r"\{\}\s?[_^]\s?\{?(\w+)\}?\s?C\s?_\s?\{?(\w+)\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<![A-Za-z])C\s?_\s?\{?(\d+)\}?\s?\^\s?\{?(\d+)\}?(?!\d)"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<![A-Za-z])C\s?\^\s?\{?(\d+)\}?\s?_\s?\{?(\d+)\}?(?!\d)"), r"\\binom{\2}{\1}"),
    (re.compile(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\(?\s?\\(?:pmod|bmod|mod|pod)(?![A-Za-z])\s?\{?\s?([0-9A-Za-z]+)\s?\}?(?:\s?\))?"), r"\\pmod{\1}"),
    (re.compile(r"(?:\\text\{\s?)?\(\s?mod\s?(\w+)\s?\)(?:\s?\})?"), r"\\pmod{\1}"),
    (re.compile(r"(?i)\\text\{\s?all reals?(?: numbers?)?\s?\}"), r"\\mathbb{R}"),
    (re.compile(r"(?<=\d)\s?\{,\}\s?(?=\d)"), "."),
    (re.compile(r"\{([^{}]*)\}\s?\^\s?(?:T|\\top|\\text\{T\})(?![A-Za-z])"), r"{\1}^{T}"),
    (re.compile(r"(?<=\d)\s?\^\s?\{\s?(?:\\text\{\s?)?(?:st|nd|rd|th)(?:\s?\})?\s?\}"), ""),
    # Times of day.
    (re.compile(
        r"(?i)(?<=\d)\s?\\text\{\s*([ap])\.?\s?m\.?\s*\}|(?:(?<=\d)\s?([ap])\.\s?m\.?|(?<=:\d\d)\s?([ap])m)(?![A-Za-z])"
    ), _half_day),
)  # fmt: skip
_TOKEN_ARGUMENT = r"([0-9A-Za-z]|\\(?:pi|alpha|beta|gamma|theta|omega|lambda|mu|sigma|tau)(?![A-Za-z]))"
_FRAC_TWO = re.compile(rf"\\(frac|binom)\s?{_TOKEN_ARGUMENT}\s?{_TOKEN_ARGUMENT}")
_FRAC_ONE = re.compile(rf"\\(frac|binom)\s?{_TOKEN_ARGUMENT}\s?(?=\{{)")
_FRAC_OPEN = re.compile(r"\\(?:frac|binom)\s?(?=\{)")
_SQRT = re.compile(rf"\\sqrt\s?(\[[^\[\]]*\])?\s?{_TOKEN_ARGUMENT}")
_SCRIPT = re.compile(r"([\^_])\s?(-?\d+|[A-Za-z])")

_SCRIPTS_SWAPPED = re.compile(r"\^(\{[^{}]*\})\s?_(\{[^{}]*\})")


def _letter(match: re.Match[str]) -> str:
    """A single upright letter: a unit after a number if it can be one, else a symbol."""
    unit = match["before"] and match["letter"] in LETTERS
    return match[0] if unit else match["before"] + match["letter"]


def _cycle(match: re.Match[str]) -> str:
    r"""A repeating decimal with dots over the ends of its cycle, or with an ellipsis after it, in one notation."""
    if match["first"]:
        cycle = match["first"] + (match["between"] or "") + (match["last"] or "")
        return rf"{match['whole']}.{match['head']}\overline{{{cycle}}}"
    digits = match["digits"]
    for length in range(1, len(digits) // 2 + 1):
        for start in range(len(digits) - 2 * length + 1):
            tail = digits[start:]
            cycle = tail[:length]
            if len(tail) >= max(3, 2 * length) and tail == (cycle * len(tail))[: len(tail)]:
                return rf"{match['shown']}.{digits[:start]}\overline{{{cycle}}}"
    return match[0]


_REPEATING = re.compile(
    r"(?<![\d.])(?:(?P<whole>\d*)\.(?P<head>\d{0,20})\\dot\s?\{?\s?(?P<first>\d)\s?\}?(?:(?P<between>\d{0,40})\\dot\s?\{?\s?(?P<last>\d)\s?\}?(?!\d))?"
    r"|(?P<shown>\d{1,20})\.(?P<digits>\d{3,40})\s?(?:\\[lcd]?dots(?![A-Za-z])|\.\.\.)(?![\s]?[\d+]))"
)
_PAREN_CYCLE = re.compile(r"(?<![\d.])(\d+)\.\((\d+)\)")


def fold_unicode(text: str) -> str:
    """Plain ASCII and LaTeX for Unicode digits, signs, fractions, letters and scripts; invisible characters vanish."""
    if text.isascii():
        return text
    out: list[str] = []
    for char in text:
        if char in _UNICODE:
            out.append(_UNICODE[char])
        elif char in _SUPERSCRIPTS:
            out.append("^{" + _SUPERSCRIPTS[char] + "}")
        elif char in _SUBSCRIPTS:
            out.append("_{" + _SUBSCRIPTS[char] + "}")
        elif "①" <= char <= "⑳":
            out.append(rf"\text{{({ord(char) - ord('①') + 1})}}")
        elif char.isascii():
            out.append(char)
        elif unicodedata.category(char) == "Cf":
            continue
        elif char.isdecimal():
            out.append(str(unicodedata.decimal(char)))
        else:
            out.append(_fold_compatible(char))
    # A multi-digit superscript came out as one group a digit.
    return re.sub(r"\}\^\{|\}_\{(?=\d\})", "", "".join(out))


def _fold_compatible(char: str) -> str:
    """One character by its compatibility decomposition: a vulgar fraction becomes `\\frac`."""
    folded = unicodedata.normalize("NFKC", char)
    above, slash, below = folded.partition("⁄")
    return rf"\frac{{{above}}}{{{below}}}" if slash else folded


def matching_braces(text: str) -> dict[int, int]:
    """The position of the closing brace of each opening one; escaped braces are characters like any other."""
    pairs: dict[int, int] = {}
    stack: list[int] = []
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if token.group() == "{":
            stack.append(token.start())
        elif token.group() == "}" and stack:
            pairs[stack.pop()] = token.start()
    return pairs


def _unwrap(text: str, command: re.Pattern[str], replacement: str) -> str:
    r"""Replace `\command{` by `replacement` and drop its closing brace (or keep it if the replacement opens one)."""
    opens = {match.end() - 1: match.start() for match in command.finditer(text)}
    if not opens:
        return text
    pairs = matching_braces(text)
    keeps_brace = replacement.endswith("{")
    cuts: list[tuple[int, int, str]] = []
    for brace, start in opens.items():
        if brace in pairs:
            cuts.append((start, brace + 1, replacement))
            if not keeps_brace:
                cuts.append((pairs[brace], pairs[brace] + 1, ""))
    return _cut(text, cuts)


def _cut(text: str, cuts: list[tuple[int, int, str]]) -> str:
    """The text with each (start, end) span replaced; spans do not overlap."""
    out: list[str] = []
    position = 0
    for start, end, replacement in sorted(cuts):
        out += [text[position:start], replacement]
        position = end
    return "".join([*out, text[position:]])


def _brace_arguments(text: str) -> str:
    r"""Braces around the arguments that TeX allows to stand bare: `\frac12`, `\frac{1}2`, `\sqrt2`, `x^2`."""
    text = _FRAC_TWO.sub(r"\\\1{\2}{\3}", text)
    text = _FRAC_ONE.sub(r"\\\1{\2}", text)
    text = _SQRT.sub(lambda m: rf"\sqrt{m[1] or ''}{{{m[2]}}}", text)
    text = _SCRIPT.sub(r"\1{\2}", text)
    text = _SCRIPTS_SWAPPED.sub(r"_\2^\1", text)
    pairs = matching_braces(text)
    cuts: list[tuple[int, int, str]] = []
    for match in _FRAC_OPEN.finditer(text):
        close = pairs.get(match.end())
        bare = re.compile(rf"\s?{_TOKEN_ARGUMENT}").match(text, close + 1) if close is not None else None
        if bare:
            cuts.append((bare.start(), bare.end(), f"{{{bare[1]}}}"))
    return _cut(text, cuts) if cuts else text


def _peel_text(text: str) -> str:
    r"""The inside of a text that is one command around everything, however deep: `\text{\text{7}}`."""
    while text.startswith("\\text{") and text.endswith("}"):
        depth = len(re.match(r"(?:\\text\{)+", text)[0]) // 6  # type: ignore[index]
        closing = len(text) - len(text.rstrip("}"))
        depth = min(depth, closing)
        pairs = matching_braces(text)
        if pairs.get(6 * depth - 1) != len(text) - depth:
            return text
        inner = text[6 * depth : len(text) - depth]
        if not re.fullmatch(r"\s*\\text\{.*|\s*\(?[A-Za-z0-9.,/+-]+\)?\s*", inner, re.DOTALL):
            return text
        if re.fullmatch(r"\s*\(?[A-Za-z]{2,}\)?\s*", inner):
            return "\\text{" + inner.strip() + "}"
        text = inner.strip()
    return text


def normalize(raw: str) -> str | None:
    """The text in the one spelling that the rest of the grader reads; None if it is absurdly long."""
    if len(raw) > RAW_LIMIT:
        return None
    text = re.sub(r"\s+", " ", fold_unicode(raw)).strip()
    text = _rows(_LAYOUT.sub("", text))
    if len(text) > 3 * LIMIT:
        return None
    text = _THIN_THOUSANDS.sub("", text.replace("\\pounds", "£"))
    text = _CURRENCY.sub(_currency, text)
    text = re.sub(r"\\\$|[€£₹]", "", text).replace("$", " ")
    text = re.sub(r"^(?:\*\*|__)(.*?)(?:\*\*|__)$", r"\1", text).replace("**", "^")
    text = _SPACING.sub(" ", _WIDE.sub(" , ", text))
    text = _SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), text)
    text = _unwrap(text, _BOXES, "")
    text = _COLOUR.sub("", text)
    text = _peel_text(_unwrap(text, _TEXT_COMMANDS, "\\text{"))
    text = _SCIENTIFIC.sub(lambda m: f"e{m[1] or m[2]}", text)
    text = _NAMED.sub(r"\\\1 ", text)
    text = _LETTER.sub(_letter, _UNIT_POWER.sub(r"\\text{\1}^{\2}", text))
    text = _COMMAND.sub(lambda m: _SPELLINGS.get(m[1] or m[0], m[0]), text)
    for pattern, replacement in _ALIASES:
        text = pattern.sub(replacement, text)
    text = _PAREN_CYCLE.sub(r"\1.\\overline{\2}", _REPEATING.sub(_cycle, text))
    text = mark_words(text)
    text = _brace_arguments(text)
    text = re.sub(r"\\text\{\s*,?\s*\}", ",", text)
    text = re.sub(r"\s+", " ", text).strip(f" :&{_SEPARATORS}").rstrip(f" .:&{_SEPARATORS}")
    text = _french(peel_brackets(text))
    return text if len(text) <= LIMIT else None


_FRENCH = re.compile(r"([\[\]])([^\[\]()]*?[,;][^\[\]()]*)([\[\]])")


def _french(text: str) -> str:
    """Intervals with their brackets turned outwards where they are open: `]0,1[`."""
    if not re.match(r"\]|\[[^\[\]]*\[", text):
        return text
    return _FRENCH.sub(lambda m: ("(" if m[1] == "]" else "[") + m[2] + (")" if m[3] == "[" else "]"), text)


def _rows(text: str) -> str:
    r"""Matrix rows end in `\cr`; elsewhere `\\frac` is `\frac` doubled by some escaping, and `\\` a line break."""
    if "\\begin" in text:
        return text.replace("\\\\", " \\cr ")
    return re.sub(r"\\\\(?=[A-Za-z])", r"\\", text).replace("\\\\", " ")


def peel_brackets(text: str) -> str:
    """The text without the parentheses and TeX groups that enclose all of it and hold a single item."""
    pairs = matching_brackets(text)
    start, end = 0, len(text)
    while end - start >= 2 and text[start : start + 1] + text[end - 1] in ("()", "{}") and pairs.get(start) == end - 1:
        start, end = start + 1, end - 1
        while start < end and text[start] == " ":
            start += 1
        while start < end and text[end - 1] == " ":
            end -= 1
    inner = text[start:end]
    # A comma inside means that the last parentheses taken off make a tuple or an interval of it.
    if start and split_top(inner, COMMA)[1] and text.rfind("(", 0, start) >= 0:
        return "(" + inner + ")"
    return inner


_SEPARATORS = f",;{AND}{OR}"
COMMA = re.compile(f"[{_SEPARATORS}]")
_OPENING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_BRACKET = re.compile(r"\\[{}]|\\.|[()\[\]{}]|\\begin|\\end")


def matching_brackets(text: str) -> dict[int, int]:
    """The position of the closing bracket of each opening one; `(` may be closed by `]` and `[` by `)`."""
    pairs: dict[int, int] = {}
    stack: list[tuple[str, int]] = []
    for token in _BRACKET.finditer(text):
        kind = token.group()
        if kind in _OPENING:
            stack.append((kind, token.start()))
        elif kind in (")", "]", "}", "\\}") and stack:
            opened, position = stack[-1]
            if _OPENING[opened] == kind or (opened in "([" and kind in ")]"):
                stack.pop()
                pairs[position] = token.start()
    return pairs


def split_top(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of a text between separators that stand outside all brackets, and those separators."""
    if not separator.search(text):
        return [text.strip()], []
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
