"""Values that are texts arrive as they were typed, whatever Hydra's grammar would make of them.

For Hydra `1e3` and `2026_11_26` are numbers, and `=`, `,`, `~`, `ü` and a `${` that is no reference need quotes of its
own inside those of the shell. Where a key takes a text or a path, its value is put into such quotes here, before Hydra
reads it. What Hydra reads as a text stays, so that its quotes, escapes and references (`${seed}`) work as documented;
so do, with -m, commas, glob() and the other sweeps.
"""

import os
import re
from pathlib import Path
from typing import Any

from kpo_cli.cli.grammar import MULTIRUN, interpolates, parse, quote_value, split_arguments
from kpo_cli.errors import UserError
from kpo_cli.runs.directory import run_of

PATHS = {
    *("run_dir", "resume", "model.path", "data.path", "trainer.eval.data_dir"),
    *("checkpoint", "vs", "regrade", "data_dir", "hydra.sweep.dir"),
}
PATH_LISTS = {"trainer.eval.benchmarks", "benchmarks", "runs"}
TEXTS = {
    *("model.name", "model.chat_template", "model.dtype", "model.device"),
    *("data.name", "data.subset", "data.split", "data.fields.id", "data.fields.problem", "data.fields.answer"),
    *("data.problem_pattern", "data.answer_style", "data.system_prompt", "data.instruction", "data.duplicates"),
    *(f"trainer.eval.data.{key}" for key in ("fields.id", "fields.problem", "fields.answer")),
    *("trainer.eval.data.problem_pattern", "trainer.eval.data.answer_style"),
    *("method.name", "rollout.name", "rollout.correction"),
    *("trainer.old_log_probs", "trainer.kl_estimator", "trainer.offload_optimizer"),
    *("chat_template", "system_prompt", "instruction", "dtype", "device", "eval.name", "eval.rollout"),
}
CALL = re.compile(r"(choice|glob|range|interval|shuffle|sort|tag|extend_list)\((.*)\)", re.DOTALL)
"""Of a function of Hydra's that makes a sweep."""

SETTING = re.compile(r"[+]{0,2}(hydra/)?[\w.@:-]+=|~(hydra/)?[\w.@:-]+(=|$)|=")


def as_typed(override: str, sweep: bool) -> str:
    """An override whose value Hydra will read as the text that was typed; others as they are."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    if not equals or name not in PATHS | PATH_LISTS | TEXTS:
        return override
    one = _list_as_typed if name in PATH_LISTS else _text_as_typed
    if not sweep:
        return f"{key}={one(value)}"
    called = CALL.fullmatch(value)
    if called and called[1] != "choice":
        return override  # what it gives is Hydra's matter
    written = ",".join(map(one, _split(called[2] if called else value)))
    return f"{key}={f'choice({written})' if called else written}"


def literal(text: str) -> str:
    """Any text as a value of Hydra's that stands for just this text."""
    return quote_value(text.replace("${", "\\${"))


def with_positional(command: str, arguments: list[str]) -> list[str]:
    """`arguments` with those that are neither options nor settings turned into what they stand for.

    `kpo analyze PATH ...`: runs=[PATH,...] (and --watch is watch=true); `kpo eval NAME`: checkpoint=NAME; `kpo train
    RUN`: resume=RUN, if that is a run.
    """
    flags, rest = split_arguments(arguments)
    if command == "analyze" and MULTIRUN & set(flags):
        raise UserError("kpo analyze makes no sweeps; give it all runs at once")
    settings = [argument for argument in rest if _is_setting(argument)]
    paths = [argument for argument in rest if argument not in settings]
    if command == "analyze":
        settings += ["watch=true"] if "--watch" in flags else []
        settings += [f"runs=[{','.join(map(literal, paths))}]"] if paths else []
        return [*(flag for flag in flags if flag != "--watch"), *settings]
    key = "checkpoint" if command == "eval" else "resume"
    if not paths or (command == "train" and not _is_run(paths[0])):
        return arguments
    if len(paths) > 1 or any(setting.startswith(f"{key}=") for setting in settings):
        more = "; the one to compare it with is vs=..." if command == "eval" else ""
        raise UserError(f"{paths[-1]}: there is a {key} already{more}")
    return [*flags, f"{key}={literal(paths[0])}", *settings]


def _is_setting(argument: str) -> bool:
    """key=value or ~key: a path may hold "=", but then there is a file, or a slash stands before it."""
    return bool(SETTING.match(argument)) and not os.path.lexists(os.path.expanduser(argument))


def _is_run(path: str) -> bool:
    try:
        return (run_of(Path(os.path.expanduser(path))) / "config.yaml").is_file()
    except OSError:
        return False


def expanded(config: dict[str, Any]) -> dict[str, Any]:
    """The composed configuration with ~ expanded in whatever is a path."""

    def walk(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: walk(child, f"{key}.{name}" if key else name) for name, child in node.items()}
        if key in PATH_LISTS and isinstance(node, list):
            return [os.path.expanduser(item) if isinstance(item, str) else item for item in node]
        return os.path.expanduser(node) if key in PATHS and isinstance(node, str) else node

    plain: dict[str, Any] = walk(config, "")
    return plain


def _text_as_typed(value: str) -> str:
    from hydra.core.override_parser.types import QuotedString

    if value in ("", "null"):
        return value
    parsed = parse(f"k={value}")
    read = None if parsed is None or parsed.is_sweep_override() else parsed._value
    if isinstance(read, QuotedString):
        return value if interpolates(read.text) else literal(read.text)
    if isinstance(read, str) and value == value.strip():
        return value
    return quote_value(value) if interpolates(value) else literal(value)


def _list_as_typed(value: str) -> str:
    if not (value.startswith("[") and value.endswith("]")) or len(_split(value)) > 1:
        return value
    return f"[{','.join(map(_text_as_typed, _split(value[1:-1])))}]"


def _split(value: str) -> list[str]:
    """The parts between commas that stand outside quotes and brackets; brackets without their like are letters."""
    pairs = [pair for pair in ("()", "[]", "{}") if value.count(pair[0]) == value.count(pair[1])]
    opening, closing = ("".join(pair[side] for pair in pairs) for side in (0, 1))
    parts, start, depth, quote = [], 0, 0, ""
    for place, character in enumerate(value):
        if quote:
            if character == quote and value[place - 1] != "\\":
                quote = ""
        elif character in "'\"" and not value[start:place].strip():
            quote = character
        elif character in opening:
            depth += 1
        elif character in closing:
            depth -= 1
        elif character == "," and depth == 0 and value[place - 1 : place] != "\\":
            parts.append(value[start:place])
            start = place + 1
    parts.append(value[start:])
    return [part.strip(" \t") for part in parts] if len(parts) > 1 else parts
