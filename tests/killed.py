"""Runs of a process of their own, for tests that kill one."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest

# Forked from a server that has imported everything and computed nothing. PyTorch's threads do not survive a fork, so
# that a fork of the tests' own process may wait for one forever; a new interpreter each time would import for seconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["small_runs", "kpo_cli.evaluation.main"])


def run_apart(function: Callable[..., Any], *arguments: Any, limit_s: float = 120) -> int:
    """`function(*arguments)`, silent, in a process of its own: its exit status, or minus the signal that killed it."""
    process = _context.Process(target=_silently, args=(function, *arguments))
    process.start()
    process.join(limit_s)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"{function.__name__} did not end in {limit_s:g} seconds")
    return process.exitcode


def _silently(function: Callable[..., Any], *arguments: Any) -> None:
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
    function(*arguments)
