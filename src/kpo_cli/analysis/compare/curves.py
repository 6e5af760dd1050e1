"""Learning curves of several runs: grouped by what differs in their configurations, mean and interval over seeds."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from kpo_cli.errors import UserError
from kpo_cli.intervals.means import mean_interval
from kpo_cli.runs.directory import RunDir, first_line

METRICS = {
    "reward_mean": "reward",
    "accuracy_greedy": "held-out accuracy, greedy",
    "accuracy_sampled": "held-out accuracy, sampled",
    "entropy": "entropy, nats",
    "clip_fraction_active": "clip fraction",
    "kl_k3": "KL, k3",
}
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


def load_run(name: str, path: Path) -> Run:
    """Raises UserError if there is no run with metrics at `path`."""
    config = RunDir(path).config()
    try:
        rows = [row for row in RunDir(path).metrics() if isinstance(row, dict) and isinstance(row.get("step"), int)]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/metrics.jsonl cannot be read ({first_line(error)})") from None
    if not rows:
        raise UserError(f"{path} has no metrics yet")
    return Run(name, flat(config), rows)


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
    return {
        "by_step": [{"step": step, **mean_interval([each[step] for each in by_step])} for step in common],
        "by_tokens": [{"tokens": float(t), **mean_interval(lines[:, i])} for i, t in enumerate(grid)],
    }


def finals(runs: list[Run]) -> dict[str, Any]:
    """The last value of each accuracy, by seed, with mean and interval."""
    found = {}
    for metric in FINAL:
        last = {str(run.seed): values[-1] for run in runs if (values := run.curve(metric)[2])}
        found[metric] = {"by_seed": last, **(mean_interval(list(last.values())) if last else {"n": 0})}
    return found


def differences(groups: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Of the final accuracies, each pair of groups, paired by seed; refused where it would say nothing."""
    found = []
    for (name, runs), (other, others) in combinations(groups.items(), 2):
        entry: dict[str, Any] = {"group": name, "other": other, "refused": refusal(name, runs, other, others)}
        if entry["refused"] is None:
            for metric in FINAL:
                ours, theirs = (finals(each)[metric]["by_seed"] for each in (runs, others))
                seeds = sorted(set(ours) & set(theirs))
                entry[metric] = mean_interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else {"n": 0}
        found.append(entry)
    return found


def refusal(name: str, runs: list[Run], other: str, others: list[Run]) -> str | None:
    """Why two groups cannot be compared: with ratios of exactly 1 all methods are one."""
    if all(run.all_ratios_one for run in [*runs, *others]):
        return (
            f"{name} and {other} are not compared: their ratios were exactly 1 in every step, so both are the same "
            f"plain policy gradient, and what differs is chance or other settings; train with trainer.mini_batches=4"
        )
    return None
