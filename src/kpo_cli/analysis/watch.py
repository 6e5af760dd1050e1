"""`kpo analyze --watch RUN`: a terminal view of a run in progress; reads its files and writes nothing."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from kpo_cli.analysis.compare.curves import Run, load_run
from kpo_cli.analysis.config import AnalyzeConfig
from kpo_cli.analysis.report.tables import Table, number
from kpo_cli.analysis.source import Source, find_source, read_file
from kpo_cli.analysis.statistics.series import Series, series_of
from kpo_cli.analysis.statistics.spectrum import spectra
from kpo_cli.analysis.statistics.sums import response_sums, statistics
from kpo_cli.errors import UserError
from kpo_cli.runs.ratios import BadRecord
from kpo_cli.terminal import text_of

SHOWN = {
    "reward_mean": "reward",
    "accuracy_sampled": "accuracy",
    "entropy": "entropy",
    "clip_fraction_active": "clip",
    "kl_k3": "KL k3",
    "log_ratio_std": "std of z",
    "response_length_mean": "length",
}
ROWS = 12
"""The newest steps on the screen."""


def watch(source: Source, config: AnalyzeConfig, console: Console) -> None:
    """Show the run until it has written its summary.json, or Ctrl-C. Raises UserError if it is no run."""
    run = source.run
    if run is None:
        raise UserError(f"{source.name} is a file; --watch takes a run directory")
    series = series_of(config)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            finished = (run / "summary.json").is_file()  # before looking, so that nothing is missed
            live.update(view(find_source(run), series, config, finished), refresh=True)
            if finished:
                return
            time.sleep(config.refresh)


def view(source: Source, series: list[Series], config: AnalyzeConfig, finished: bool) -> Group:
    """What the run looks like now."""
    assert source.run is not None
    parts: list[Any] = [text_of(f"{source.run}: {'finished' if finished else 'in progress, Ctrl-C to leave'}")]
    try:
        parts.append(steps_table(load_run(source.name, source.run)).for_terminal())
    except UserError as error:
        parts.append(text_of(str(error)))
    newest = ratios_table(source, series, config)
    return Group(*parts, newest.for_terminal() if newest else text_of("no ratios recorded yet"))


def steps_table(run: Run) -> Table:
    """The newest steps of metrics.jsonl."""
    rows = [[str(row["step"]), *(number(row.get(key)) for key in SHOWN)] for row in run.rows[-ROWS:]]
    return Table("Newest steps", ["step", *SHOWN.values()], rows)


def ratios_table(source: Source, series: list[Series], config: AnalyzeConfig) -> Table | None:
    """Signs and sizes in the newest record that can be read; no nulls, which take longer than a look."""
    for path in reversed(source.files):
        try:
            batches = list(read_file(path))
        except BadRecord:
            continue
        batch = batches[0][0]
        later = batch.rows(batch.off_policy)
        if not later.mask.any():
            return Table(f"Ratios of {path.name}: all are exactly 1", ["series"], [])
        rows = []
        for each in series:
            x = each.of(later)
            sums = response_sums(x, later.mask, config.dead_zone, spectra(x, later.mask, config.cutoff).low).sum(0)
            values = statistics(sums)
            shares = [number(float(values[name]), True) for name in ("switch_frequency", "low_frequency_energy")]
            sizes = [number(float(values[name])) for name in ("mean_off_policy_run_length", "std")]
            rows.append([each.name, *shares, *sizes])
        columns = ["series", "switch", "low-frequency", "mean off-policy run", "std"]
        note = "off-policy tokens; a drop after a filter is no finding without the nulls of kpo analyze"
        return Table(f"Ratios of {path.name}", columns, rows, note)
    return None
