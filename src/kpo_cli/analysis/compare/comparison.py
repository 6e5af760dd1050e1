"""`kpo analyze RUN RUN ...`: each run's ratios, and the runs side by side."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from kpo_cli.analysis.compare.curves import (
    FINAL,
    METRICS,
    Run,
    curves,
    differences,
    finals,
    group,
    load_run,
    without_repeats,
)
from kpo_cli.analysis.config import AnalyzeConfig
from kpo_cli.analysis.report import figures
from kpo_cli.analysis.report.page import render, write_analysis
from kpo_cli.analysis.report.tables import Table, compared, interval, number
from kpo_cli.analysis.report.terminal import ReadingBar
from kpo_cli.analysis.report.words import summary
from kpo_cli.analysis.source import Source
from kpo_cli.analysis.statistics.analyse import analyse
from kpo_cli.errors import UserError
from kpo_cli.runs.directory import finite, write_text
from kpo_cli.terminal import complain, counted, say, show

SCHEMA = "kpo-comparison-1"
CAPTIONS = {
    "learning_curves": "By step: mean over seeds (thin: each seed); bands from three seeds on: 95%, Student's t.",
    "learning_curves_by_tokens": "The same by response tokens that were sampled until then.",
}


def compare(sources: list[Source], folder: Path, config: AnalyzeConfig, console: Console) -> None:
    """Analyse each source into a folder of its own, then compare the runs. Raises UserError if nothing can be read."""
    labels = _labels(sources)
    found: dict[str, Any] = {"schema": SCHEMA, "runs": {}, "notes": []}
    runs = []
    for label, source in zip(labels, sources, strict=True):
        try:
            found["runs"][label] = _ratios(label, source, folder / label, config, console)
        except UserError as error:
            found["notes"].append(str(error))
        try:
            runs.append(load_run(label, source.run) if source.run else _refuse(source))
        except UserError as error:
            found["notes"].append(str(error))
        found["notes"] += source.problems
    if not runs and not found["runs"]:
        raise UserError(f"nothing to analyse: {found['notes'][0]}")
    groups, repeats = without_repeats(group(runs) if runs else {})
    found["notes"] += repeats
    found |= comparison(groups)
    found["summary"] = in_words(found, groups)
    for note in found["notes"]:
        complain(f"kpo: {note}")
    _write(found, folder, config)
    _print(found, folder, console)


def _labels(sources: list[Source]) -> list[str]:
    """A name for each that is a directory's name, with a number where it occurs twice."""
    names = [source.name for source in sources]
    return [name if names.count(name) == 1 else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _refuse(source: Source) -> Run:
    raise UserError(f"{source.name} is a file and no run: it has no learning curves")


def _ratios(label: str, source: Source, folder: Path, config: AnalyzeConfig, console: Console) -> dict[str, Any]:
    """The full analysis of one source, written to `folder`; what the comparison keeps of it."""
    with ReadingBar(label, len(source.files), console) as bar:
        analysis = analyse(source, config, bar.file, bar.stage)
        analysis.found["summary"] = summary(analysis.found)
        write_analysis(analysis, folder, config, bar.stage)
    kept = ("switch_frequency", "low_frequency_energy", "std", "kl_k3")
    return {name: {stat: entry[stat] for stat in kept} for name, entry in analysis.found["filters"].items()}


def comparison(groups: dict[str, list[Run]]) -> dict[str, Any]:
    """Groups, curves, final accuracies and paired differences, as in comparison.json."""
    return {
        "groups": {
            name: {
                "runs": [run.name for run in runs],
                "seeds": [run.seed for run in runs],
                "last_steps": [int(run.rows[-1]["step"]) for run in runs],
                "ratios_identically_one": all(run.all_ratios_one for run in runs),
                "final": finals(runs),
                "curves": {metric: curves(runs, metric) for metric in METRICS},
            }
            for name, runs in groups.items()
        },
        "differences": differences(groups),
    }


def in_words(found: dict[str, Any], groups: dict[str, list[Run]]) -> str:
    """One paragraph: what is compared, what is refused, and which differences are beyond chance."""
    seeds = max((len(runs) for runs in groups.values()), default=0)
    count = sum(len(runs) for runs in groups.values())
    sentences = [f"{counted(count, 'run')} in {counted(len(groups), 'group')}, up to {counted(seeds, 'seed')} each."]
    if not groups:
        sentences = [f"{counted(len(found['runs']), 'source')} without metrics of training: only ratios are compared."]
    if seeds == 1 and count > 1:
        sentences.append("With one seed a difference cannot be told from chance.")
    ends = {name: entry["last_steps"] for name, entry in found["groups"].items()}
    if len({step for steps in ends.values() for step in steps}) > 1:
        each = "; ".join(f"{name} {', '.join(map(str, steps))}" for name, steps in ends.items())
        sentences.append(f"Runs ended at different steps ({each}): compared is the last evaluation that both share.")
    for entry in found["differences"]:
        if entry["refused"]:
            sentences.append(f"{entry['refused']}.")
            continue
        line = entry["accuracy_sampled"]
        if line.get("ci") and not line["ci"][0] <= 0 <= line["ci"][1]:
            pair = f"{entry['group']} ends {abs(line['mean']):.3f} {'above' if line['mean'] > 0 else 'below'}"
            how = f"95%: {interval(line['ci'])}, {line['n']} seeds, paired, at step {line['step']}"
            sentences.append(f"{pair} {entry['other']} in sampled accuracy ({how}).")
    tested = sum(bool(entry.get("accuracy_sampled", {}).get("ci")) for entry in found["differences"])
    if tested and not any(" in sampled accuracy (" in sentence for sentence in sentences):
        sentences.append("No difference of final sampled accuracy is beyond what seeds do.")
    elif tested > 1:
        sentences.append(f"Of {tested} pairs looked at, one in twenty would differ so by chance.")
    return " ".join(sentences)


def tables(found: dict[str, Any]) -> list[Table]:
    """Final accuracies, paired differences, ratios."""
    rows = []
    for name, entry in found["groups"].items():
        finals = [entry["final"][metric] for metric in FINAL]
        accuracies = [*map(_with_interval, finals), str(finals[-1]["step"])]
        rows.append([name, str(len(entry["runs"])), *accuracies, "yes" if entry["ratios_identically_one"] else "no"])
    columns = ["group", "runs", "greedy", "sampled", "step", "ratios all 1"]
    note = "mean over seeds at the last evaluation that all of a group have; interval: Student's t, 95%"
    found_tables = [Table("Final held-out accuracy", columns, rows, note)] if rows else []
    pairs = []
    for entry in found["differences"]:
        lines = [entry.get(metric, {"n": 0}) for metric in FINAL]
        said = (
            [str(lines[0]["n"]), *map(_with_interval, lines)] if not entry["refused"] else ["0", "refused", "refused"]
        )
        pairs.append([f"{entry['group']} - {entry['other']}", *said])
    columns = ["difference", "pairs", "greedy", "sampled"]
    found_tables += [Table("Differences, paired by seed", columns, pairs)] if pairs else []
    ratios = []
    for name, run in found["runs"].items():
        for series in list(run)[:2]:
            switch = run[series]["switch_frequency"]
            shown = [number(switch["value"], True), *compared([switch["null_shuffled"]], True)]
            shown += [number(run[series][size]["value"]) for size in ("std", "kl_k3")]
            ratios.append([name, series, *shown])
    columns = ["run", "series", "switches", "sample", "shuffled", "std", "KL k3"]
    note = (
        "switches: share of neighbours with different signs; shuffled: the band of a sample with the tokens of each "
        "response shuffled, 95% for all statistics together; *: the sample lies outside"
    )
    return [*found_tables, *([Table("Ratios", columns, ratios, note, label_columns=2)] if ratios else [])]


def _with_interval(line: dict[str, Any]) -> str:
    return f"{number(line.get('mean'))} ({interval(line['ci'])})" if line.get("ci") else number(line.get("mean"))


def draw(found: dict[str, Any], by: str) -> Figure:
    """Learning curves of all groups, one panel a metric; `by` is "by_step" or "by_tokens"."""
    figure = Figure(figsize=(8, 7), dpi=150)
    axes = figure.subplots(3, 2).ravel()
    x_name = by.removeprefix("by_")
    for axis, (metric, (title, limits)) in zip(axes, METRICS.items(), strict=True):
        for i, (name, entry) in enumerate(found["groups"].items()):
            colour = figures.COLOURS[1:][i % (len(figures.COLOURS) - 1)]
            points = entry["curves"][metric][by]
            x = [point[x_name] / (1 if by == "by_step" else 1000) for point in points]
            marker = "." if len(points) < 12 else ""
            axis.plot(x, [point["mean"] for point in points], color=colour, label=name, marker=marker)
            if len(entry["runs"]) > 1:
                axis.plot(x, [point["values"] for point in points], color=colour, alpha=0.4, linewidth=0.5)
            bands = [point["ci"] if point["ci"] and point["n"] > 2 else 2 * [point["mean"]] for point in points]
            axis.fill_between(x, *(np.array(bands).reshape(-1, 2).T), color=colour, alpha=0.2, linewidth=0)
        axis.set_ylim(max(limits[0], axis.get_ylim()[0]), min(limits[1], axis.get_ylim()[1]))
        axis.set_title(title, loc="left")
        axis.set_xlabel("step" if by == "by_step" else "response tokens, thousands")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return figure


def _write(found: dict[str, Any], folder: Path, config: AnalyzeConfig) -> None:
    settings = {**dataclasses.asdict(config), "runs": list(found["runs"])}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.json", json.dumps(finite({**found, "settings": settings}), indent=1) + "\n")
        if not config.report:
            return
        drawn = {}
        if found["groups"]:
            with figures.styled():
                drawn = {name: draw(found, by) for name, by in zip(CAPTIONS, ("by_step", "by_tokens"), strict=True)}
        page = render(
            title="Runs compared",
            summary=found["summary"],
            drawn=figures.save(drawn, folder / "figures"),
            captions=CAPTIONS,
            tables=tables(found),
            browser=None,
            notes=found["notes"],
            table_note="",
        )
        write_text(folder / "report.html", page)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another run_dir=") from None


def _print(found: dict[str, Any], folder: Path, console: Console) -> None:
    say(console, found["summary"], wrap=True)
    for table in tables(found):
        say(console)
        show(console, table.for_terminal())
    say(console, f"\nthe comparison, and each run's own analysis below it, are in {folder}")
