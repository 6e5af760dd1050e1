"""From samples to results: numbers, tables, a figure."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from kpo_cli.evaluation.rows import answer_table, correct_table, failed_table
from kpo_cli.intervals import accuracy as stats
from kpo_cli.runs.samples import Row
from kpo_cli.terminal import text_of

PUBLISHED: dict[str, dict[str, tuple[float, float | None]]] = {
    # 2602.10609, Qwen3-4B: avg@16 and pass@16 in percent, None where the paper's table has none.
    "aime24": {
        "GRPO": (27.29, 53.33),
        "GMPO": (30.83, 50.00),
        "GSPO": (32.70, 60.00),
        "KPO-clipped": (37.91, 63.33),
    },
    "aime25": {"GRPO": (23.12, 43.33), "GSPO": (29.16, 50.00), "KPO-clipped": (36.87, 60.00)},
    "math500": {"GRPO": (85.66, 92.80), "GSPO": (87.41, 94.00), "KPO-clipped": (89.42, 94.80)},
    "minerva": {
        "GRPO": (38.67, None),
        "GMPO": (38.48, None),
        "KPO-clipped": (38.23, None),
        "KPO-unclipped": (39.15, None),
    },
}


def summarise(table: list[list[Row]], seed: int) -> dict[str, Any]:
    """Results of one policy on one benchmark."""
    correct = correct_table(table)
    n = correct.shape[1]
    rows = [row for problem in table for row in problem]
    finished = [row for row in rows if row["finish"] == "stop"]
    lengths = np.array([row["tokens"] for row in rows])
    runs = correct.mean(axis=0)
    return {
        "problems": len(table),
        "samples": n,
        "avg_at_n": vars(stats.avg_at_k(correct, seed)),
        "std_over_runs": float(runs.std(ddof=1)) if n > 1 else None,
        "pass_at_k": {str(k): vars(stats.pass_at_k(correct, k, seed)) for k in _ks(n)},
        "maj_at_n": vars(stats.majority(answer_table(table), correct, seed)),
        "truncated": _share(rows, lambda row: row["finish"] == "length"),
        "no_answer": _share(rows, lambda row: not (row["extracted"] or "").strip()),
        "unparseable": _share(rows, lambda row: row["reason"] == "unparseable"),
        "grader_failed": _share(rows, lambda row: row["grader_failed"]),
        "if_failed_are_right": _if_right(table, seed),
        "accuracy_finished": _share(finished, lambda row: row["correct"]) if finished else None,
        "response_length": {
            "mean": float(lengths.mean()),
            **{f"p{q}": float(np.percentile(lengths, q)) for q in (10, 50, 90, 99)},
            "max": int(lengths.max()),
        },
    }


def _if_right(table: list[list[Row]], seed: int) -> dict[str, float] | None:
    """The upper ends, where the grader failed: what the numbers would be if it had found those samples right."""
    failed = failed_table(table)
    if not failed.any():
        return None
    correct, n = correct_table(table) | failed, failed.shape[1]
    return {
        "avg_at_n": stats.avg_at_k(correct, seed).value,
        "pass_at_n": stats.pass_at_k(correct, n, seed).value,
        "maj_at_n": stats.majority(answer_table(table), correct, seed).value,
    }


def compare(first: list[list[Row]], second: list[list[Row]], seed: int) -> dict[str, Any]:
    """The paired comparison of two policies on one benchmark."""
    ours, theirs = correct_table(first), correct_table(second)
    result = stats.paired(ours.mean(axis=1), theirs.mean(axis=1), ours.shape[1], seed)
    return {"difference": vars(result.difference), "p_value": result.p_value, "detectable": result.detectable}


def _ks(n: int) -> list[int]:
    """1, 2, 4 .. n."""
    powers = [2**i for i in range(n.bit_length()) if 2**i < n]
    return [*powers, n]


def _share(rows: list[Row], predicate: Any) -> float:
    return sum(map(bool, map(predicate, rows))) / len(rows)


Rows = list[list[str]]


def tables(results: dict[str, Any], published: bool) -> list[tuple[str, list[str], Rows]]:
    """Title, columns and rows of every table, for the terminal and for results.md; accuracies in percent."""
    n = results["settings"]["sampling"]["n"]
    head = ["benchmark", "policy", f"avg@{n}", f"pass@{n}", f"maj@{n}"]
    made = [("accuracy in percent, 95% intervals over problems", head, _accuracy_rows(results, n, published))]
    head = [
        "benchmark",
        "policy",
        "problems",
        "truncated",
        "no answer",
        "ungraded",
        "right of finished",
        "tokens p50, p90",
    ]
    made.append((f"how the {n} samples of each problem ended", head, _ending_rows(results)))
    comparison = [
        [
            name,
            _percent(c["difference"], "+"),
            f"{c['p_value']:.4f}",
            "none" if math.isnan(c["detectable"]) else f"{100 * c['detectable']:.2f}",
        ]
        for name, by_role in results["benchmarks"].items()
        if (c := by_role.get("comparison"))
    ]
    if comparison:
        first, second = (results["subjects"][role] for role in ("checkpoint", "vs"))
        title = f"avg@{n}: {first} minus {second}, in points, paired by problem"
        made.append((title, ["benchmark", "difference", "p", "detectable (80% power)"], comparison))
    return made


def _policies(results: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(benchmark, label, numbers) of every policy on every benchmark."""
    return [
        (name, label, by_role[role])
        for name, by_role in results["benchmarks"].items()
        for role, label in results["subjects"].items()
    ]


def _accuracy_rows(results: dict[str, Any], n: int, published: bool) -> Rows:
    rows = [
        [name, label, *(_percent(e) for e in (r["avg_at_n"], r["pass_at_k"][str(n)], r["maj_at_n"]))]
        for name, label, r in _policies(results)
    ]
    for name in results["benchmarks"] if published else ():
        for method, (avg, passed) in PUBLISHED.get(name, {}).items():
            at_16 = "" if passed is None else f"{passed:.2f}"
            rows.append(
                [name, f"{method}, Qwen3-4B: published with n = 16, not measured here", f"{avg:.2f}", at_16, ""]
            )
    return rows


def _ending_rows(results: dict[str, Any]) -> Rows:
    rows = []
    for name, label, r in _policies(results):
        shares = [f"{100 * r[key]:.1f}%" for key in ("truncated", "no_answer", "grader_failed")]
        finished = "" if r["accuracy_finished"] is None else f"{100 * r['accuracy_finished']:.1f}%"
        length = r["response_length"]
        rows.append([name, label, str(r["problems"]), *shares, finished, f"{length['p50']:.0f}, {length['p90']:.0f}"])
    return rows


def _percent(estimate: dict[str, float], sign: str = "") -> str:
    value, low, high = (f"{100 * estimate[key]:{sign}.2f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def rich_table(title: str, head: list[str], rows: Rows) -> Table:
    table = Table(title=text_of(title), title_justify="left")
    for column in head:
        table.add_column(text_of(column))
    for row in rows:
        table.add_row(*map(text_of, row))
    return table


def markdown(results: dict[str, Any], published: bool) -> str:
    """results.md: the tables, and everything that one needs to say how they came about."""
    parts = ["# Evaluation", ""]
    for title, head, rows in tables(results, published):
        lines = [head, ["---"] * len(head), *rows]
        parts += [f"{title[0].upper()}{title[1:]}.", ""]
        parts += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]
    parts += ["## Settings", "", "```json", json.dumps(results["settings"], indent=2), "```"]
    return "\n".join(parts) + "\n"


def pass_at_k_figure(results: dict[str, Any], path: Path) -> None:
    """pass@k over k, a panel for each benchmark, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(results["benchmarks"])
    figure = Figure(figsize=(4 * len(names), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for subject, r in results["benchmarks"][name].items():
            if subject == "comparison":
                continue
            ks = [int(k) for k in r["pass_at_k"]]
            values, low, high = ([100 * e[key] for e in r["pass_at_k"].values()] for key in ("value", "low", "high"))
            axes.plot(ks, values, marker="o", markersize=3, label=results["subjects"][subject])
            axes.fill_between(ks, low, high, alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.set(title=name, xlabel="k", ylabel="pass@k, percent", ylim=(-2, 102))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
