r"""Words in answers: what is a remark, what is a word answer, and what changes the value beside it.

After normalisation all text stands in `\text{}`. What is said in words and is mathematics (signs, multipliers, "and",
"or", a number within a sentence) is rewritten as mathematics; what changes a value and cannot be rewritten keeps the
text from being dropped as a remark.
"""

import re

AND, OR = "∧", "∨"
_MULTIPLIERS = {
    "hundred": r"\cdot 100", "thousand": r"\cdot 1000", "million": r"\cdot 10^{6}", "billion": r"\cdot 10^{9}",
    "trillion": r"\cdot 10^{12}", "dozen": r"\cdot 12", "percent": r"\%", "percentage": r"\%", "pct": r"\%",
}  # fmt: skip


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# No remark has these words: "not 5", "at least 5", "5 squared", "half of 5", "5 or more".
_CHANGING = _set(
    "negative minus plus not no non never none nor neither either or and but except excluding without anything "
    "hundred thousand million billion trillion dozen dozens half halves third thirds quarter quarters fourth "
    "fourths fifth fifths sixth eighth tenth tenths hundredth hundredths thousandth thousandths double triple "
    "twice thrice squared cubed power root square cube over divided more less fewer greater least most larger "
    "smaller above below under between up until base mod modulo if unless when inverse reciprocal opposite "
    "complement factorial else than isn't aren't doesn't wasn't cannot impossible undefined choose exceeds "
    "exceeding within imaginary log sine cosine tangent sqrt abs absolute floor ceil ceiling multiple multiples "
    "divisor divisors wrong incorrect false otherwise error probability "
    "january february march april may june july august september october november december"
)
_NEGATIONS = _set("not no non never none nor neither isn't aren't doesn't wasn't cannot except")
_COPULA = re.compile(r"(?:\b(?:is|are|be|equals)|[:=])\s*$")
_FILLERS = _set("is are be the a an")
_KNOWN = _set(
    "yes no true false even odd none all both never always ok one two six ten red sun mon tue wed thu fri sat "
    "north south east west left right"
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_RUN = r"[^\W\d_][^\W\d_.'’-]*(?:[.'’-]+[^\W\d_]+)*\.?"
_RUNS = re.compile(rf"{_RUN}(?:[ ,]+{_RUN})*")
_MARKED = _set(
    "and or for where with negative minus plus not hundred thousand million billion trillion dozen percent percentage "
    "pct least most more less than squared cubed half twice between if else"
)
_TO_MARK = re.compile(rf"\\text\{{[^{{}}]*\}}|(?<![A-Za-z\\{{])(?:{'|'.join(sorted(_MARKED))})(?![A-Za-z])")

# "18 eggs": words alone behind a number.
_COUNTED = re.compile(r"(?<=\d) ([a-z]{3,}(?: [a-z]{2,})*)\.?$")


def mark_words(text: str) -> str:
    r"""Words and mathematics apart: signs and multipliers as mathematics, everything else in `\text{}`."""
    if not re.search(r"[^\W\d_]{2}|\\text", text):
        return text
    text = _COUNTED.sub(lambda m: rf" \text{{{m[1]}}}" if is_words(m[1]) else m[0], text)
    text = _TO_MARK.sub(lambda m: m[0] if m[0][0] == "\\" else rf"\text{{{m[0]}}}", text)
    text = _TEXT.sub(lambda m: _explode(m[1]), text)
    text = re.sub(r"\\text\{[\s,]*(and|or)[\s,]*\}", lambda m: AND if m[1] == "and" else OR, text)
    text = re.sub(r"\\text\{\s*(?:negative|minus)\s*\}\s*(?=[\d.\\(])", "-", text)
    words = "|".join(_MULTIPLIERS)
    return re.sub(
        rf"(?<=\d)\s*\\text\{{\s*({words})\b\s*([^{{}}]*)\}}",
        lambda m: _MULTIPLIERS[m[1]] + (rf"\text{{{m[2]}}}" if m[2] else " "),
        text,
    )


def _explode(content: str) -> str:
    r"""The content of a text that has numbers in it, as words in `\text{}` and mathematics outside."""
    if not re.search(r"[^\W\d_]", content) and re.search(r"[^\s,]", content):
        return content  # a sign
    if not re.search(r"\d|[=<>]", content):
        return rf"\text{{{content}}}"
    return _RUNS.sub(_as_text, content)


def _as_text(match: re.Match[str]) -> str:
    """A run of words as text; a lone letter is a variable, unless a number stands before it."""
    before = match.string[: match.start()].rstrip()
    if len(match[0]) == 1 and not (before and before[-1].isdigit()):
        return match[0]
    return rf"\text{{{match[0]}}}"


def is_remark(content: str) -> bool:
    """True if a text beside a value may be dropped. Behind "the half is" the value is what is meant."""
    bad = _NEGATIONS if _COPULA.search(content.casefold()) else _CHANGING
    return not bad & set(re.findall(r"[a-z]+(?:['’][a-z]+)?", content.casefold()))


def words_of(text: str) -> str:
    """A text answer in one case, without punctuation; what belongs to numbers stays."""
    text = _TEXT.sub(r" \1 ", text).replace(AND, " and ").replace(OR, " or ").casefold()
    text = re.sub(r"(?<!\d)[.,:]|[.,:](?!\d)|(?<=[^\W\d_])-(?=[^\W\d_])|['’\"();!?~]|\\(?=[ ,;])", " ", text)
    tokens = re.findall(r"[^\W\d_]+|\d[\d.,:]*|\S", text)
    if len(kept := [token for token in tokens if token not in _FILLERS]) == 2 and min(map(len, kept)) == 1:
        tokens = sorted(kept)  # "n odd", "odd n", "n is odd"
    return " ".join(tokens)


def is_words(text: str) -> bool:
    """True for plain text that is words and not a product of variables: "Yes", "North East", but not "AB" or "abcd"."""
    words = re.findall(r"[^\W\d_]+", text)
    if not words or not re.fullmatch(r"[^\W\d_ ,.'’-]+(?:[ ,.'’-]+[^\W\d_]+)*\.?", text):
        return False
    return any(map(_is_word, words)) and all(_is_word(word) or len(word) < 4 for word in words)


def _is_word(word: str) -> bool:
    folded = word.casefold()
    if folded in _KNOWN or not word.isascii():
        return True
    if len(word) < 3 or not set(folded) & set("aeiouy") or not (word[1:].islower() or len(word) > 5):
        return False
    # Neighbours in the alphabet are variables.
    return (len(word) > 3 or word[0].isupper()) and max(map(ord, folded)) - min(map(ord, folded)) > len(word)
