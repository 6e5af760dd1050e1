"""What a run shows: a progress bar on a terminal, plain lines elsewhere."""

import math
import time
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kpo_cli.core import kalman_meaning
from kpo_cli.core.rounding import SHARE, Rounding
from kpo_cli.terminal import counted, make_console, say, show

SILENCE = 60.0
"""Seconds without a line, after which a long sampling phase says where it is."""


class Display:
    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = console or make_console()
        self.steps = steps
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._accuracy = ""
        self._line = ""
        self._phase = "starting"
        self._spoke = time.monotonic()
        self._warned: set[str] = set()

    def say(self, line: str) -> None:
        self._spoke = time.monotonic()
        say(self.console, line)

    def show(self, table: RenderableType) -> None:
        show(self.console, table)

    def warn_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            self.say(f"warning: {line}")

    def start(self, step: int) -> None:
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._task = self._progress.add_task("starting", total=self.steps, completed=step)
        self._progress.start()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def phase(self, name: str) -> None:
        """What is being done right now; shown until the first step has ended."""
        self._phase = name
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=self._line or name)

    def sampled(self, finished: int, tokens: int) -> None:
        """How far the sampler has come with what it was asked for: always on a terminal, once a minute elsewhere."""
        line = f"{finished:,} responses done, {tokens:,} tokens"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"{self._line or self._phase}  {line}")
        elif time.monotonic() - self._spoke > SILENCE:
            self.say(f"{self._phase}: {line}")

    def supervised(self, metrics: dict[str, Any], steps: int) -> None:
        """A step of the supervised phase: all of them on a terminal, one in twenty elsewhere."""
        step = metrics["step"]
        line = (
            f"loss {metrics['loss']:.3f}  length {metrics['response_length_mean']:.0f}  "
            f"{metrics['tokens_per_second']:,.0f} tok/s"
        )
        self.phase(f"supervised {step}/{steps}  {line}")
        if step == 1 or step == steps or step % max(1, steps // 20) == 0:
            self.say(f"supervised {step:>5}  {line}  {metrics['time_step']:.1f} s")

    def evaluated(self, step: int, metrics: dict[str, Any]) -> None:
        self._accuracy = f"accuracy {metrics['accuracy_greedy']:.2f}"
        sampled, length = metrics["accuracy_sampled"], metrics["response_length_greedy"]
        self.say(
            f"step {step:>4}  held-out accuracy: greedy {metrics['accuracy_greedy']:.3f}, sampled {sampled:.3f}; "
            f"greedy responses of {length:.0f} tokens"
        )

    def stepped(self, metrics: dict[str, Any]) -> None:
        line = (
            f"reward {_reward(metrics)}  entropy {metrics['entropy']:.2f}  "
            f"clip {metrics['clip_fraction_active']:.1%}  length {metrics['response_length_mean']:.0f}  "
            f"{metrics['tokens_per_second']:,.0f} tok/s"
        )
        if self._progress is not None and self._task is not None:
            self._line = f"{line}  {self._accuracy}"
            self._progress.update(self._task, completed=metrics["step"], description=self._line)
        else:
            self.say(f"step {metrics['step']:>4}  {line}  {metrics['time_step']:.1f} s")
        if "accuracy_greedy" in metrics:
            self.evaluated(metrics["step"], metrics)


def _reward(metrics: dict[str, Any]) -> str:
    """The mean reward, and how often the grader failed, where it did."""
    mean, failures = metrics["reward_mean"], metrics["grader_failures"]
    shown = "none" if math.isnan(mean) else f"{mean:.2f}"
    return f"{shown} ({counted(failures, 'grader failure')})" if failures else shown


def describe_filter(filter_parameters: dict[str, Any], length: int) -> list[str]:
    """What a Kalman setting means at responses of `length` tokens, and a warning where it means nothing."""
    name, q, v = filter_parameters["name"], filter_parameters.get("q"), filter_parameters.get("v")
    if q is None or v is None:
        return [f"filter: {name}"]
    meaning = kalman_meaning(q, v, length)
    line = (
        f"filter: {name}, Q/V = {meaning.q_over_v:.3g}: time constant {meaning.time_constant:,.0f} tokens, steady gain "
        f"{meaning.steady_gain:.3g}; {meaning.share_passed:.1%} of a constant shift shows after {length} tokens"
    )
    return [line, *_passes_nothing(name, meaning.share_passed, length)]


def measured_filter(filter_parameters: dict[str, Any], length: int, longest: int) -> list[str]:
    """The same at the length that responses turned out to have; `longest` is what `describe_filter` was told."""
    name, q, v = filter_parameters["name"], filter_parameters.get("q"), filter_parameters.get("v")
    if q is None or v is None:
        return []
    share = kalman_meaning(q, v, length).share_passed
    known = _passes_nothing(name, kalman_meaning(q, v, longest).share_passed, longest)
    line = f"filter: {share:.1%} of a constant shift shows after {length} tokens, the mean response of step 1"
    return [line, *([] if known else _passes_nothing(name, share, length))]


def measured_rounding(rounding: Rounding | None, dtype: str) -> list[str]:
    """What 16-bit arithmetic does to log-ratios, and a warning where it takes part in what is clipped."""
    if rounding is None:
        return []
    line = (
        f"rounding: behind the first optimizer step log-ratios in {dtype} are off by {rounding.z_error:.2g}, their own "
        f"size being {rounding.z:.2g} (root mean squares), and filtered ones by {rounding.filtered_error:.2g}"
    )
    if rounding.widths is None:
        return [line]
    line += f": {rounding.widths:.2g} of the clip width {rounding.width:g}"
    if not rounding.decides:
        return [line]
    return [
        line,
        f"warning: rounding takes part in what is clipped ({rounding.decided:.1%} of tokens; {SHARE:g} of a width is "
        f"the limit); model.dtype=float32 computes log-ratios to six digits, wider clip widths need fewer",
    ]


def _passes_nothing(name: str, share_passed: float, length: int) -> list[str]:
    lines = []
    if share_passed < 0.05 and name in ("kalman", "kalman_robust"):
        lines.append(
            f"warning: the filter passes next to nothing in {length} tokens, so the ratio is 1 for every purpose; "
            f"for responses of this length try filter.time_constant={max(1, length // 3)}"
        )
    return lines


def result_table(summary: dict[str, Any]) -> Table:
    table = Table("held-out problems", "before", "after", title=None)
    for kind, before, after in (
        ("greedy accuracy", "accuracy_before", "accuracy_after"),
        ("sampled accuracy", "sampled_before", "sampled_after"),
    ):
        table.add_row(kind, *(_with_interval(summary[key], summary["heldout_problems"]) for key in (before, after)))
    lengths = [f"{summary[key]:.0f}" for key in ("response_length_before", "response_length_after")]
    table.add_row("greedy response, tokens", *lengths)
    for name, of in summary["benchmarks"].items():
        for kind in ("greedy", "sampled"):
            accuracies = [_with_interval(of[f"{kind}_{when}"], of["problems"]) for when in ("before", "after")]
            table.add_row(f"{name}, {kind} accuracy", *accuracies)
    return table


def _with_interval(share: float, count: int) -> str:
    from kpo_cli.intervals.accuracy import proportion  # late: a GPU machine may measure parts of training without scipy

    low, high = proportion(share, count)
    return f"{share:.3f} [{low:.3f}, {high:.3f}]"
