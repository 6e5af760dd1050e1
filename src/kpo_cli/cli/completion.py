"""Shell completion: Hydra's, told which of our commands is being typed."""

import os
from typing import Any

from kpo_cli.cli.compose import run_with_hydra
from kpo_cli.errors import UserError
from kpo_cli.terminal import make_console, say

COMMANDS = ("train", "eval", "analyze")


def complete(arguments: list[str]) -> tuple[str | None, int]:
    """`kpo -sc install=SHELL` prints what the shell has to evaluate, and `-sc query=SHELL` what may come next.

    A shell that asks puts the line typed so far into COMP_LINE. Returns what is to be said of a failure, and the exit
    code; what cannot be completed is no failure.
    """
    if not any(argument.startswith("query=") for argument in arguments):
        run_with_hydra("train", _nothing, arguments)
        return None, 0
    program, _, typed = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
    command, space, rest = typed.lstrip().partition(" ")
    if not space:
        say(make_console(), " ".join(name for name in COMMANDS if name.startswith(command)))
    elif command in COMMANDS:
        os.environ["COMP_LINE"] = f"{program} {rest}"
        try:
            run_with_hydra(command, _nothing, arguments)
        except UserError:
            return None, 1
    return None, 0


def _nothing(raw: dict[str, Any]) -> None:
    """There is no job to do."""
