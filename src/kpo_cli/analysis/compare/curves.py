"""Learning curves of several runs: grouped by what differs in their configurations, mean and interval over seeds."""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from kpo_cli.errors import UserError
from kpo_cli.intervals.means import mean_interval
from kpo_cli.runs.directory import RunDir, first_line

SHARE, POSITIVE = (0.0, 1.0), (0.0, math.inf)
METRICS = {
    "reward_mean": ("reward", SHARE),
    "accuracy_greedy": ("held-out accuracy, greedy", SHARE),
    "accuracy_sampled": ("held-out accuracy, sampled", SHARE),
    "entropy": ("entropy, nats", POSITIVE),
    "clip_fraction_active": ("clip fraction", SHARE),
    "kl_k3": ("KL, k3", POSITIVE),
}
"""Titles, and what the values can be."""
FINAL = ("accuracy_greedy", "accuracy_sampled")
NO_DIFFERENCE = {
    "seed",
    *(f"trainer.{k}" for k in ("threads", "eval_every", "checkpoint_every", "keep_checkpoints", "ratios_every")),
    *("trainer.stop_after", "trainer.keep_optimizer"),
}
"""Keys that do not make two runs different experiments."""
GRID = 60
"""Points of a curve over tokens."""


@dataclass(frozen=True)
class Run:
    """A run's configuration, flat, and its metrics."""

    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    held_out: int | None
    """Problems that the accuracies are shares of; None where the run's manifest does not say."""

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def all_ratios_one(self) -> bool:
        """True if z was exactly 0 in every step: one optimizer step for each batch of rollouts."""
        spreads = [row["log_ratio_std"] for row in self.rows if row.get("log_ratio_std") is not None]
        return bool(spreads) and not any(spreads)

    def curve(self, metric: str) -> tuple[list[int], list[float], list[float]]:
        """Steps, response tokens so far, and values, where the metric was logged."""
        steps, tokens, values, total = [], [], [], 0.0
        for row in self.rows:
            total += row.get("response_tokens") or 0
            if row.get(metric) is not None:
                steps.append(int(row["step"]))
                tokens.append(total)
                values.append(float(row[metric]))
        return steps, tokens, values

    def at(self, metric: str, step: int | None) -> float | None:
        """The value at a step, None where it was not logged."""
        steps, _, values = self.curve(metric)
        return values[steps.index(step)] if step in steps else None


def load_run(name: str, path: Path) -> Run:
    """Raises UserError if there is no run with metrics at `path`."""
    run = RunDir(path)
    config = run.config()
    try:
        rows = [row for row in run.metrics() if isinstance(row, dict) and isinstance(row.get("step"), int)]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/metrics.jsonl cannot be read ({first_line(error)})") from None
    if not rows:
        raise UserError(f"{path} has no metrics yet")
    facts = run.manifest().get("data") if (path / "manifest.json").exists() else None
    return Run(name, flat(config), rows, facts.get("heldout") if isinstance(facts, dict) else None)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """{"trainer.lr": ...}; lists stay as they are."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {key: value for k, child in node.items() for key, value in flat(child, f"{prefix}.{k}".lstrip(".")).items()}


def group(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, by a label that says in what they differ from the others.

    A label holds as few keys as tell the groups apart, the method's and the filter's names first.
    """
    keys = dict.fromkeys(["method.name", "filter.name", *(key for run in runs for key in run.config)])
    values = {key: [repr(run.config.get(key)) for run in runs] for key in keys if key not in NO_DIFFERENCE}
    chosen: list[str] = []
    parts: list[tuple[str, ...]] = [()] * len(runs)
    for key, column in values.items():
        finer = [(*part, value) for part, value in zip(parts, column, strict=True)]
        if len(set(finer)) > len(set(parts)):
            chosen.append(key)
            parts = finer
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[_label(run, chosen)].append(run)
    return dict(groups)


def _label(run: Run, keys: list[str]) -> str:
    if not keys:
        return str(run.config.get("method.name", run.name))
    return ", ".join(str(run.config.get(k)) if k == "method.name" else f"{k}={run.config.get(k)}" for k in keys)


def without_repeats(groups: dict[str, list[Run]]) -> tuple[dict[str, list[Run]], list[str]]:
    """The groups with one run of each seed, the first, and a line on each other: a repeated seed is no second draw."""
    kept, notes = {}, []
    for name, runs in groups.items():
        first = {run.seed: run for run in reversed(runs)}
        kept[name] = [run for run in runs if run is first[run.seed]]
        notes += [
            f"{run.name} has the seed and the settings of {first[run.seed].name}; it is left out of the comparison"
            for run in runs
            if run is not first[run.seed]
        ]
    return kept, notes


def curves(runs: list[Run], metric: str) -> dict[str, list[dict[str, Any]]]:
    """Mean and interval over the runs of a group, by step (where all have a value) and by response tokens."""
    found = [run.curve(metric) for run in runs]
    if not all(values for _, _, values in found):
        return {"by_step": [], "by_tokens": []}
    by_step = [dict(zip(steps, values, strict=True)) for steps, _, values in found]
    common = sorted(set(by_step[0]).intersection(*by_step))
    start, end = max(tokens[0] for _, tokens, _ in found), min(tokens[-1] for _, tokens, _ in found)
    grid = np.linspace(start, end, GRID) if end > start else np.array([start] if end == start else [])
    lines = np.array([np.interp(grid, tokens, values) for _, tokens, values in found])

    def point(values: list[float]) -> dict[str, Any]:
        return {"values": values, **mean_interval(values, METRICS[metric][1], _step(runs, metric))}

    return {
        "by_step": [{"step": step, **point([each[step] for each in by_step])} for step in common],
        "by_tokens": [{"tokens": float(t), **point(lines[:, i].tolist())} for i, t in enumerate(grid)],
    }


def _step(runs: list[Run], metric: str) -> float:
    """The step in which an accuracy comes, 0 where it is not known."""
    counts = [run.held_out for run in runs if run.held_out]
    return 1 / min(counts) if counts and metric in FINAL else 0.0


def last_common(runs: list[Run], metric: str) -> tuple[int | None, dict[str, float]]:
    """The last step at which all runs that have the metric have it, and its values there by seed."""
    steps = [set(steps) for run in runs if (steps := run.curve(metric)[0])]
    step = max(set.intersection(*steps), default=None) if steps else None
    values = {str(run.seed): run.at(metric, step) for run in runs}
    return step, {seed: value for seed, value in values.items() if value is not None}


def finals(runs: list[Run]) -> dict[str, Any]:
    """Each accuracy at the last evaluation that the runs of a group share, by seed, with mean and interval."""
    found = {}
    for metric in FINAL:
        step, last = last_common(runs, metric)
        line = mean_interval(list(last.values()), SHARE, _step(runs, metric)) if last else {"n": 0}
        found[metric] = {"by_seed": last, "step": step, **line}
    return found


def differences(groups: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Of the accuracies at the last evaluation that both share, each pair of groups, paired by seed; refused where it
    would say nothing."""
    found = []
    for (name, runs), (other, others) in combinations(groups.items(), 2):
        entry: dict[str, Any] = {"group": name, "other": other, "refused": refusal(name, runs, other, others)}
        if entry["refused"] is None:
            for metric in FINAL:
                entry[metric] = _difference(runs, others, metric)
        found.append(entry)
    return found


def _difference(runs: list[Run], others: list[Run], metric: str) -> dict[str, Any]:
    both = _paired_runs(runs, others)
    step, _ = last_common([run for pair in both for run in pair], metric)
    at_step = [[value for run in pair if (value := run.at(metric, step)) is not None] for pair in both]
    values = [pair[0] - pair[1] for pair in at_step if len(pair) == 2]
    if not values:
        return {"n": 0}
    rounding = math.sqrt(2) * _step([*runs, *others], metric)  # of both
    return {"step": step, **mean_interval(values, (-1.0, 1.0), rounding)}


def _paired_runs(runs: list[Run], others: list[Run]) -> list[tuple[Run, Run]]:
    theirs = {str(run.seed): run for run in others}
    return [(run, theirs[str(run.seed)]) for run in runs if str(run.seed) in theirs]


def refusal(name: str, runs: list[Run], other: str, others: list[Run]) -> str | None:
    """Why two groups cannot be compared: ratios of exactly 1, where all methods are one, or nothing in common."""
    if all(run.all_ratios_one for run in [*runs, *others]):
        return (
            f"{name} and {other} are not compared: their ratios were exactly 1 in every step, so both are the same "
            f"plain policy gradient, and what differs is chance or other settings; train with trainer.mini_batches=4"
        )
    both = _paired_runs(runs, others)
    if not both:
        return f"{name} and {other} are not compared: no seed is in both, and differences are paired by seed"
    if not any(last_common([run for pair in both for run in pair], metric)[0] for metric in FINAL):
        return f"{name} and {other} are not compared: they share no evaluation after step 0"
    return None
