"""The table of docs/models.md, from results."""

import re
from typing import Any

BEGIN, END = "<!-- families: written by the command above -->", "<!-- end of families -->"
Line = dict[str, Any]


def written(page: str, lines: list[Line]) -> str:
    """The page with the table of `lines` between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables(lines)}\n\n{END}{after}"


def tables(lines: list[Line]) -> str:
    chosen = {outcome: [line for line in lines if line["outcome"] == outcome] for outcome in HEADS}
    parts = [counts(chosen)]
    for outcome, head in HEADS.items():
        if chosen[outcome]:
            parts.append(f"### {outcome.capitalize()}\n\n" + table(head, [ROWS[outcome](x) for x in chosen[outcome]]))
    return "\n\n".join(parts)


def counts(chosen: dict[str, list[Line]]) -> str:
    number = {outcome: len(lines) for outcome, lines in chosen.items()}
    built = sum(number.values()) - number["not built"]
    return (
        f"Of {built} families **{number['trained']} train** and **{number['refused']} are refused**; "
        f"{number['wrong']} do neither. {number['not built']} more could not be built."
    )


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def scored(line: Line) -> str:
    """How log-probabilities were computed, by the run's own notes."""
    notes = " ".join(line["notes"])
    told = {"micro-batch of its own": "row by row", "padded, not packed": "padded"}
    rows = next((rows for note, rows in told.items() if note in notes), "packed")
    return rows + (", eager" if "attention is eager" in notes else "")


def sampled(line: Line) -> str:
    """How responses were, by the run's own notes, and whether their log-probabilities were the trainer's."""
    way = re.search(r"is sampled ([^,:]+)", " ".join(line["notes"]))
    other = "" if line["used"] else "; not used"
    return (way[1] if way else "with a cache") + other


def trained(line: Line) -> tuple[str, ...]:
    layers = ", ".join(line["layers"]).replace("_attention", "").replace("_", " ") or "full"
    gaps = f"{line['sampler_gap']:.0e}", f"{line['trainer_gap']:.0e}"
    rounding = f"{line['rounding']:.0e}" if line["rounding"] else ""
    return (f"`{line['family']}`", layers, scored(line), sampled(line), *gaps, rounding)


def failed(line: Line) -> tuple[str, ...]:
    return f"`{line['family']}`", line["reason"].replace("<", "&lt;")


HEADS = {
    "trained": ("family", "attention layers", "scored", "sampled", "sampler's gap", "trainer's gap", "its own"),
    "refused": ("family", "what kpo says"),
    "wrong": ("family", "what is wrong"),
    "not built": ("family", "why there is no tiny model of it here"),
}
ROWS = {"trained": trained, "refused": failed, "wrong": failed, "not built": failed}
