"""The tables, once for the terminal and the report: titles, columns, and cells as text."""

from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from kpo_cli.analysis.statistics.family import LEVEL
from kpo_cli.analysis.statistics.order import ORDER
from kpo_cli.analysis.statistics.sums import STATISTICS
from kpo_cli.terminal import text_of

WITH_NULLS = ("switch_frequency", "mean_off_policy_run_length", "low_frequency_energy", "autocorrelation")
"""Statistics that get a table of their own on the terminal."""
SHARES = {"switch_frequency", "switch_frequency_two_state", "low_frequency_energy", "off_policy_share"}
CORRELATIONS = {"autocorrelation", "sign_autocorrelation", "prediction", "prediction_within_places"}
"""Shown with three places: three digits of what is around 0 are of any length."""


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    """What the reader has to know, below the table."""
    label_columns: int = field(default=1)
    """How many columns are text; the others are numbers."""

    def for_terminal(self) -> RichTable:
        table = RichTable(
            title=text_of(self.title),
            caption=text_of(self.note),
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
            show_edge=False,
        )
        for i, column in enumerate(self.columns):
            side: Any = "left" if i < self.label_columns else "right"
            table.add_column(text_of(column), justify=side, overflow="fold", no_wrap=i == 0)
        for row in self.rows:
            table.add_row(*map(text_of, row))
        return table


def number(value: float | None, share: bool = False, fixed: bool = False, more: int = 0) -> str:
    """Three digits, or three places where `fixed`; shares as percentages; a dash for what does not exist. `more` adds
    digits.
    """
    if value is None or value != value:
        return "-"
    return f"{value:z.{1 + more}%}" if share else f"{value:z.{3 + more}f}" if fixed else f"{value:.{3 + more}g}"


def interval(pair: Any, share: bool = False, fixed: bool = False, more: int = 0) -> str:
    if pair is None or any(value is None or value != value for value in pair):
        return "-"
    return f"{number(pair[0], share, fixed, more).rstrip('%')}..{number(pair[1], share, fixed, more)}"


def compared(nulls: list[dict[str, Any] | None], share: bool = False, fixed: bool = False) -> list[str]:
    """The sample, and the band of each null with a star where the sample lies outside: with digits that show it."""
    known = [null for null in nulls if null is not None]
    more = next((n for n in range(4) if all(_shows(null, share, fixed, n) for null in known)), 4)
    sample = number(known[0]["observed"] if known else None, share, fixed, more)
    return [
        sample,
        *(
            "-" if null is None else f"{interval(null['band'], share, fixed, more)} {'*' if outside(null) else ' '}"
            for null in nulls
        ),
    ]


def _shows(null: dict[str, Any], share: bool, fixed: bool, more: int) -> bool:
    """Whether what is outside the band is so when rounded."""
    ends = (null["band"][0], null["observed"], null["band"][1])
    low, sample, high = (float(number(value, share, fixed, more).rstrip("%")) for value in ends)
    return not (outside(null) and low <= sample <= high)


def statistic_table(found: dict[str, Any], name: str) -> Table:
    """One statistic of every series, beside its nulls."""
    share, fixed, rows = name in SHARES, name in CORRELATIONS, []
    for series, entry in found["filters"].items():
        line = entry[name]
        nulls = [line["null_shuffled"], line["null_sign_flipped"]]
        value, ci = number(line["value"], share, fixed), interval(line["ci"], share, fixed)
        rows.append([series, value, ci, *compared(nulls, share, fixed)])
    columns = ["series", "value", "95%", "sample", "shuffled", "signs flipped"]
    return Table(STATISTICS[name].label.capitalize(), columns, rows)


def outside(null: dict[str, Any]) -> bool:
    """Of its band: significant among all statistics that are compared with this null."""
    return bool(null["p_adjusted"] <= LEVEL)


def order_table(found: dict[str, Any]) -> Table:
    """What the raw log-ratios show of order in time, beyond neighbours."""
    rows = []
    for name, label in ORDER.items():
        nulls = [found["order"][kind]["statistics"][name] for kind in ("null_shuffled", "null_sign_flipped")]
        rows.append([label, *compared(nulls, fixed=name in CORRELATIONS)])
    return Table("Order of raw log-ratios", ["statistic", "sample", "shuffled", "signs flipped"], rows)


def filter_table(found: dict[str, Any]) -> Table:
    """What each filter is and does to sizes."""
    rows = []
    for series, entry in found["filters"].items():
        values = [number(entry[name]["value"]) for name in ("std", "kurtosis", "effective_sample_size")]
        passed, largest = entry["share_passed"], entry["energy_of_largest_percent"]
        rows.append([series, entry["description"], number(passed, True), *values, number(largest, True)])
    columns = ["series", "parameters", "passes", "std", "kurtosis", "ess", "top 1%"]
    note = (
        "passes: share of a constant shift that shows at the last token; ess: effective sample size of the ratios, a "
        "share; top 1%: part of the sum of squares held by the largest 1% of tokens"
    )
    return Table("Filters", columns, rows, note, label_columns=2)


def rounding_table(found: dict[str, Any]) -> Table:
    """Log-ratios behind the first optimizer step beside what 16-bit arithmetic is off by."""
    facts = found["rounding"]
    columns = ["series", "rms of z", f"error of {facts['dtype']}", "in clip widths", "clips decided"]
    raw = ["raw", number(facts["z"]), number(facts["z_error"]), "-", "-"]
    own = ["recorded", "-", number(facts["filtered_error"]), number(facts["widths"]), number(facts["decided"], True)]
    note = (
        f"{facts['responses']} responses ({facts['tokens']:,} tokens) of {facts['steps']} recorded steps, scored in "
        f"float32 as well; errors are root mean squares"
    )
    return Table("Rounding", columns, [raw, own], note)


def mini_batch_table(found: dict[str, Any]) -> Table:
    """The on-policy mini-batch apart from each of the others: raw, and through the first two filters."""
    names = list(found["mini_batches"][0]["filters"])[:3]
    columns = ["mini-batch", "tokens", "std of z", "mean run", *(f"switch {name}" for name in names)]
    rows = []
    for entry in found["mini_batches"]:
        raw = entry["filters"]["raw"]
        label = f"{entry['mini_batch']}{', on-policy' if entry['mini_batch'] == 0 else ''}"
        sizes = [number(raw[name]) for name in ("std", "mean_run_length")]
        switches = [number(entry["filters"][name]["switch_frequency"], True) for name in names]
        rows.append([label, f"{entry['tokens']:,}", *sizes, *switches])
    return Table("Mini-batches", columns, rows)


def clip_table(found: dict[str, Any]) -> Table:
    """The what-if: share of off-policy tokens whose gradient would be cut, filter by widths."""
    entries = found["clip_what_if"]
    widths = list(dict.fromkeys((entry["eps_low"], entry["eps_high"]) for entry in entries))
    by_filter: dict[str, list[str]] = {}
    for entry in entries:
        shown = entry["above"] + entry["below"] if entry["cut"] is None else entry["cut"]
        by_filter.setdefault(entry["filter"], []).append(number(shown, True))
    cut = all(entry["cut"] is not None for entry in entries)
    title = "Tokens whose gradient a clip would cut" if cut else "Tokens outside the clip interval"
    columns = ["series", *(f"{low:g} / {high:g}" for low, high in widths)]
    return Table(title, columns, [[name, *cells] for name, cells in by_filter.items()], "shares of off-policy tokens")


def noise_table(found: dict[str, Any]) -> Table | None:
    """Predictive log-likelihood of the noise models."""
    judged = found["noise"] and found["noise"]["held_out"]
    if not judged:
        return None
    models = sorted(judged["models"].items(), key=lambda item: -item[1]["log_likelihood_per_token"])
    rows = [
        [
            name.replace("_", " "),
            model["description"],
            f"{model['log_likelihood_per_token']:.3f}",
            f"{model['gain_over_constant_noise']:+.3f}",
            "-" if model["gain_error"] is None else f"{model['gain_error']:.3f}",
        ]
        for name, model in models
    ]
    if judged["by"] == "steps":
        fitted, between = len(judged["fitted_steps"]), len(judged["judged_steps"])
        cut = f"fitted on {fitted} recorded steps, judged on the {between} between"
    else:
        cut = f"fitted on every second of the {judged['by']}, judged on the others"
    columns = ["noise of raw log-ratios", "fit", "nats per token", "over constant noise", "se"]
    note = f"{cut}; se: standard error over prompts"
    return Table(f"Log-likelihood of {judged['by']} that were not fitted", columns, rows, note, label_columns=2)


def breakdown_table(found: dict[str, Any], kind: str) -> Table:
    """A breakdown for the raw log-ratios and, where there is one, the run's own filter."""
    filters = found["breakdowns"][kind]
    other = next((name for name in ("recorded", *filters) if name in filters and name != "raw"), None)
    columns = [kind.replace("_", " "), "tokens", "std", "switch", "above clip", "below clip", "cut"]
    if other:
        columns += [f"std {other}", f"switch {other}", f"cut {other}"]
    filtered = {row["bin"]: row for row in filters[other]} if other else {}
    rows = []
    for row in filters["raw"]:
        cells = [row["bin"], f"{row['tokens']:,}", number(row["std"]), number(row["switch_frequency"], True)]
        cells += [number(row[name], True) for name in ("above", "below", "cut")]
        if other:
            again = filtered[row["bin"]]
            cells += [
                number(again["std"]),
                number(again["switch_frequency"], True),
                number(again["cut"], True),
            ]
        rows.append(cells)
    return Table(f"By {kind.replace('_', ' ')}", columns, rows, "clip columns: the run's own widths")


def terminal_tables(found: dict[str, Any]) -> list[Table]:
    """What `kpo analyze` prints."""
    if not found["filters"]:
        return [mini_batch_table(found)] if found["mini_batches"] else []
    tables = [statistic_table(found, name) for name in WITH_NULLS]
    tables += [order_table(found)] if found["order"] else []
    tables += [filter_table(found)]
    tables += [rounding_table(found)] if found["rounding"] else []
    tables += [mini_batch_table(found)] if found["mini_batches"] else []
    noise = noise_table(found)
    return [*tables, *([clip_table(found)] if found["clip_what_if"] else []), *([noise] if noise else [])]


def report_tables(found: dict[str, Any]) -> list[Table]:
    """All of them: every statistic, every breakdown."""
    if not found["filters"]:
        return terminal_tables(found)
    rest = [statistic_table(found, name) for name in STATISTICS if name not in WITH_NULLS]
    return [*terminal_tables(found), *(breakdown_table(found, kind) for kind in found["breakdowns"]), *rest]
