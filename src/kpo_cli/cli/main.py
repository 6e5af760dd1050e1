"""The command line. Typer finds the command; everything after it is Hydra's.

Nothing here imports torch or Hydra at the top: `kpo --help` answers at once.
"""

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from kpo_cli.errors import UserError

app = typer.Typer(
    name="kpo",
    help="Train language models with verifiable rewards, evaluate them, and see what the ratios do.",
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
    from kpo_cli.cli.compose import run_with_hydra

    run_with_hydra("train", _train, context.args)


def _train(raw: dict[str, Any]) -> None:
    from kpo_cli.training.main import run

    run(raw)


@app.command("eval", context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Evaluate checkpoints: kpo eval checkpoint=RUN benchmarks=[aime24] [key=value ...]. See kpo eval --help."""
    from kpo_cli.cli.compose import run_with_hydra

    run_with_hydra("eval", _evaluate, context.args)


def _evaluate(raw: dict[str, Any]) -> None:
    from kpo_cli.evaluation.main import run

    run(raw)


@app.command(context_settings=HYDRA_ARGUMENTS, add_help_option=False)
def analyze(context: typer.Context) -> None:
    """See what recorded ratios do: kpo analyze RUN [RUN ...] [key=value ...]. See kpo analyze --help."""
    from kpo_cli.cli.compose import run_with_hydra, with_paths

    run_with_hydra("analyze", _analyze, with_paths("analyze", context.args, "runs"))


def _analyze(raw: dict[str, Any]) -> None:
    from kpo_cli.analysis.main import run

    run(raw)


def main() -> None:
    """Entry point: a UserError becomes one line on stderr and its exit code (2 for bad input)."""
    try:
        # Not Typer's standalone mode: it spreads its own errors over four lines.
        code = app(sys.argv[1:] or ["--help"], prog_name="kpo", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe can be answered
    except UserError as error:
        _fail(str(error), error.exit_code)
    except USAGE_ERROR as error:
        _fail(f"{error.format_message().rstrip('.')}; see kpo --help", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if code == 130:
        _fail("interrupted", code)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    print(f"kpo: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)
