"""The command line. Typer finds the command; everything after it is Hydra's.

Nothing here imports torch or Hydra at the top: `kpo --help` answers at once.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kpo_cli.errors import RunInterrupted, UserError
from kpo_cli.signals import ENDING, LAUNCHER, caught, end_with, interrupting
from kpo_cli.terminal import complain, settle_streams

app = typer.Typer(
    name="kpo",
    help="Train language models with verifiable rewards, evaluate them, and see what the ratios do.",
    epilog='Completion in this shell: eval "$(kpo -sc install=bash)" (or zsh, fish)',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Typer's UsageError: it has no public name of its own.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]

# Hydra parses its own options, --help included.
HYDRA_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kpo {version('kpo-cli')}")
        raise typer.Exit


@app.callback()
def kpo(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a policy: kpo train method=kpo [key=value ...]. See kpo train --help."""
    _run("train", _train, context.args)


def _train(raw: dict[str, Any]) -> None:
    from kpo_cli.training.main import run

    run(raw)


@app.command("eval", context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Evaluate checkpoints: kpo eval RUN benchmarks=[aime24] [key=value ...]. See kpo eval --help."""
    _run("eval", _evaluate, context.args)


def _evaluate(raw: dict[str, Any]) -> None:
    from kpo_cli.evaluation.main import run

    run(raw)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def analyze(context: typer.Context) -> None:
    """See what recorded ratios do: kpo analyze RUN [RUN ...] [key=value ...]. See kpo analyze --help."""
    _run("analyze", _analyze, context.args)


def _analyze(raw: dict[str, Any]) -> None:
    from kpo_cli.analysis.main import run

    run(raw)


def _run(command: str, job: Callable[[dict[str, Any]], None], arguments: list[str]) -> None:
    from kpo_cli.cli.compose import run_with_hydra
    from kpo_cli.cli.texts import with_positional

    run_with_hydra(command, job, with_positional(command, arguments))


def main() -> None:
    """Entry point: a UserError becomes one line on stderr and its exit code (2 for bad input)."""
    settle_streams()
    with caught(interrupting()):
        if launcher := os.environ.pop(LAUNCHER, None):
            end_with(int(launcher))
        message, code = _answer(sys.argv[1:] or ["--help"])
        sys.stdout.flush()
    if code == RunInterrupted.exit_code:
        for number in ENDING:  # what comes now ends us at once, without a word from an interpreter that is closing down
            signal.signal(number, signal.SIG_DFL)
    if message is not None:
        complain(f"kpo: {' '.join(message.split())}")
    sys.exit(code)


def _answer(arguments: list[str]) -> tuple[str | None, int]:
    """Run the command: what is to be said of its failure, and the exit code."""
    try:
        if arguments[0] in ("-sc", "--shell-completion"):
            from kpo_cli.cli.completion import complete

            return complete(arguments)
        # Not Typer's standalone mode: it spreads its own errors over four lines.
        code = app(arguments, prog_name="kpo", standalone_mode=False)
    except UserError as error:
        return str(error), error.exit_code
    except USAGE_ERROR as error:
        return f"{error.format_message().rstrip('.')}; see kpo --help", error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = RunInterrupted.exit_code
    return ("interrupted" if code == RunInterrupted.exit_code else None), code or 0
