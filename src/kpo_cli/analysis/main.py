"""`kpo analyze`, from configuration to files."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kpo_cli.analysis.config import AnalyzeConfig, analyze_config
from kpo_cli.analysis.report.page import write_analysis
from kpo_cli.analysis.report.tables import terminal_tables
from kpo_cli.analysis.report.terminal import ReadingBar
from kpo_cli.analysis.report.words import summary
from kpo_cli.analysis.source import Source, find_source
from kpo_cli.analysis.statistics.analyse import analyse
from kpo_cli.errors import UserError
from kpo_cli.terminal import complain, make_console, say, show


def run(raw: dict[str, Any]) -> None:
    """Entry point of the command; `raw` is the composed configuration. Raises UserError."""
    raw.pop("overrides")
    config = analyze_config(raw)
    sources = [find_source(path) for path in config.paths]
    torch.set_num_threads(1)  # rows are short: more threads only wait for each other
    console = make_console()
    if config.watch:
        from kpo_cli.analysis.watch import watch

        watch(sources[0], config, console)
    elif len(sources) == 1:
        folder = Path(config.run_dir) if config.run_dir is not None else sources[0].output
        check_writable(folder)
        analyse_one(sources[0], folder, config, console)
    else:
        _several(sources, config, console)


def analyse_one(source: Source, folder: Path, config: AnalyzeConfig, console: Console) -> dict[str, Any]:
    """Analyse one source, print what was found, and write it to `folder`; returns the content of analysis.json."""
    with ReadingBar(source.name, len(source.files), console) as bar:
        analysis = analyse(source, config, bar.file, bar.stage)
        found = analysis.found
        found["summary"] = summary(found)
        write_analysis(analysis, folder, config, bar.stage)
    for problem in source.problems:
        complain(f"kpo: {problem}")
    _print(found, console)
    what = "report.html, analysis.json and figures" if config.report else "analysis.json"
    say(console, f"{what} {'are' if config.report else 'is'} in {folder}")
    return found


def _print(found: dict[str, Any], console: Console) -> None:
    say(console, found["summary"], wrap=True)
    for table in terminal_tables(found):
        say(console)
        show(console, table.for_terminal())
    if found["subsample"]:
        sample = found["subsample"]
        say(
            console,
            f"\nvalue: all off-policy tokens, with its interval over prompts. sample, shuffled, signs flipped: "
            f"{sample['responses']} responses drawn at random (seed {sample['seed']}), and the "
            f"bands in which all statistics of all series lie together in 95% of {found['settings']['nulls']['draws']} "
            f"draws of the null; *: the sample lies outside",
            wrap=True,
        )


def check_writable(folder: Path) -> None:
    """Raise UserError before the work is done if its result could not be written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"run_dir={folder}: {existing} is a file; choose another run_dir=")
    if not os.access(existing, os.W_OK):
        raise UserError(f"no permission to write in {existing}; choose another place with run_dir=")


def _several(sources: list[Source], config: AnalyzeConfig, console: Console) -> None:
    from kpo_cli.analysis.compare.comparison import compare

    base = Path("outputs") / "analyze" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(config.run_dir) if config.run_dir is not None else base
    check_writable(folder)
    compare(sources, folder, config, console)
