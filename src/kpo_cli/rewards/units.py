r"""Units: what may stand behind a number, and which two units are the same thing in other sizes."""

import re
from fractions import Fraction

from kpo_cli.rewards.words import is_remark

# Size in the base unit of each kind. Names of one letter count in upright type only.
_SIZES: dict[str, dict[str, str]] = {
    "length": {
        "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100", "dm": "1/10", "m meter metre": "1",
        "km kilometer kilometre": "1000", "in inch inches": "127/5000", "ft foot feet": "381/1250",
        "yd yard": "1143/1250",
        "mi mile": "1609344/1000", "nm": "1/1000000000",
    },
    "time": {
        "ms": "1/1000", "s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800",
    },
    "morning": {"am": "1"}, "afternoon": {"pm": "1"}, "months": {"month": "1", "year yr": "12"},
    "mass": {"mg": "1/1000", "g gram": "1", "kg kilogram": "1000", "lb pound": "45359237/100000"},
    "volume": {"ml mL milliliter millilitre": "1/1000", "l L liter litre": "1"},
    "money": {"cent": "1/100", "dollar": "1"},
    "angle": {"degree deg": "1"}, "radian": {"rad radian": "1"}, "kelvin": {"K": "1"}, "celsius": {"C": "1"},
    "energy": {"J joule": "1", "kJ": "1000"}, "ev": {"eV": "1", "keV": "1000", "MeV": "1000000"}, "erg": {"erg": "1"},
    "frequency": {"Hz hertz": "1", "kHz": "1000", "MHz": "1000000", "GHz": "1000000000"},
    "force": {"N newton": "1"}, "pressure": {"Pa": "1", "kPa": "1000"}, "power": {"W watt": "1", "kW": "1000"},
    "voltage": {"V volt": "1"}, "current": {"A ampere amp": "1"}, "amount": {"mol mole": "1"},
    "euro": {"euro": "1"}, "gallon": {"gallon": "1"}, "rupee": {"rupee": "1"},
}  # fmt: skip
_UNITS = {
    form: (kind, Fraction(size))
    for kind, sizes in _SIZES.items()
    for names, size in sizes.items()
    for name in names.split()
    for form in ((name, f"{name}s") if len(name) > 1 else (name,))
}
_SPEEDS = {"mph": "mile / hour", "kmph": "km / hour", "kph": "km / hour"}
_COUNTED = "unit units people students points ways"
LETTERS = frozenset(form for form in _UNITS if len(form) == 1)
# As plain letters only after a number, and only what is no likely product of variables.
_PLAIN = "|".join(
    sorted((*(form for form in _UNITS if len(form) > 1 and form not in ("in", "mi", "ms", "nm", "hrs")), *_SPEEDS,
            *_COUNTED.split()), key=len, reverse=True)
)  # fmt: skip
_POWER = r"(?:\^\{-?\d\})?"
_UPRIGHT = r"\\text\{[^{}]*\}"
_SUFFIXES = (
    # In text mode, with the exponent of the unit: "15 \text{ cm}^{2}", "10 \text{m}/\text{s}".
    re.compile(
        rf"(?:\\cdot )?\s*(?:\(\s*)?(?P<unit>(?:{_UPRIGHT}{_POWER}\s*(?:/|\\cdot )?\s*)*{_UPRIGHT})\s*"
        rf"(?:\)\s*)?(?P<power>{_POWER})\s*\)?$"
    ),
    re.compile(rf"(?:\\cdot )?\s*(?P<unit>\\frac\{{\s*{_UPRIGHT}{_POWER}\s*\}}\{{\s*{_UPRIGHT}{_POWER}\s*\}})$"),
    re.compile(
        rf"(?<=[\d}})])\s*(?P<unit>(?:square |cubic |sq\.? |cu\.? )?(?:{_PLAIN})(?![A-Za-z])"
        rf"(?:\s*(?:/|per)\s*[A-Za-z]+)?)(?P<power>{_POWER})$"
    ),
    re.compile(r"(?P<unit>\s*\^\{\\circ\}(?:\s*(?:\\text\{\s*)?[CF]\s*\}?)?)$"),
    re.compile(r"(?<=\d)\s*(?P<unit>\"|'')$"),
)
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
Unit = tuple[tuple[tuple[str, int], ...], Fraction]


def split_unit(text: str) -> tuple[str, Unit | None]:
    """A value without the units, remarks and degree signs at its end, and the unit if it is a known one."""
    unit: Unit | None = None
    while True:
        for suffix in _SUFFIXES:
            match = suffix.search(text)
            if not match or not match.start() or _TRIGONOMETRY.search(text, 0, match.start()):
                continue
            shorter = text[: match.start()].rstrip(" ~")
            if (
                not shorter
                or shorter[-1] in "+-/^_{("
                or not is_remark(re.sub(r"\\[a-z]+", " ", match["unit"]).replace("square ", ""))
            ):
                continue
            unit = unit or read_unit(match["unit"] + (match.groupdict().get("power") or ""))
            text = shorter
            break
        else:
            return text, unit


def read_unit(text: str) -> Unit | None:
    """Kinds with their exponents, and the size in base units; None if a part of it is no unit."""
    if "\\circ" in text:
        kind = {"C": "celsius", "F": "fahrenheit"}.get(text.strip(" }")[-1], "angle")
        return ((kind, 1),), Fraction(1)
    text = text.replace('"', "in").replace("''", "in")
    text = re.sub(r"\\frac\{(.*?\}(?:\^\{\d\})?)\s*\}\{(.*)\}$", r"\1 / \2", text)
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("\\cdot", " ").replace(" per ", " / ")
    for name, meaning in _SPEEDS.items():
        text = re.sub(rf"\b{name}\b", meaning, text)
    kinds: dict[str, int] = {}
    size, step, sign, power = Fraction(1), Fraction(1), 1, 1
    for token in re.findall(r"[A-Za-z]+\.?|\^ ?\{? ?-?\d|/|\S", text):
        word = token.rstrip(".")
        if word == "/":
            sign = -1
        elif word in ("square", "sq", "cubic", "cu"):
            power = 2 if word[0] == "s" else 3
        elif token[0] == "^" and kinds:
            last = next(reversed(kinds))
            extra = int(re.sub(r"[^\d-]", "", token)) - 1
            kinds[last] += extra * sign
            size *= step ** (extra * sign)
        elif (known := _UNITS.get(word) or _UNITS.get(word.lower() if len(word) > 3 else "")) is not None:
            kind, step = known
            kinds[kind] = kinds.pop(kind, 0) + sign * power
            size *= step ** (sign * power)
            power = 1
        elif token not in "{}().,":
            return None
    return (tuple(sorted((kind, n) for kind, n in kinds.items() if n)), size) if kinds else None
