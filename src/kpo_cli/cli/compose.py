"""Hands the arguments to hydra.main, and turns what Hydra raises into one line.

Hydra's own behaviour stays: overrides, groups, --cfg, --help, -m, plugins. Five things are added:
- `model.path=` and `data.path=` alone choose the groups `model=hub` and `data=file`;
- paths and other texts arrive as they were typed (`texts`);
- errors name the nearest key and become a UserError (exit code 2) instead of a stack trace (exit code 1);
- a job gets plain containers and the list of its overrides;
- sweeps run every job in a process of its own (`hydra_plugins.kpo_isolated_launcher`).
"""

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from kpo_cli.cli.grammar import MULTIRUN, OPTIONS_WITH_VALUE, parse, quote_value, split_arguments, value_of
from kpo_cli.cli.names import closest, conf_dir, config_keys, groups_of, hint_of
from kpo_cli.cli.texts import CALL, PATH_LISTS, as_typed, expanded
from kpo_cli.errors import UserError
from kpo_cli.runs.directory import check_new, missing_parents, remove_empty

IMPLIED_GROUPS = {"model.path": "model=hub", "data.path": "data=file"}
OPTIONAL_GROUPS = ("experiment", "pair")
COMPLETION = {"-sc", "--shell-completion"}
NO_SETTINGS = ("experiment=null", "~experiment", "pair=null", "~pair")
"""Ways to ask for the defaults alone."""
OPEN_MAPPINGS = ("model.chat_template_kwargs", "chat_template_kwargs", "rollout.engine", "eval.engine")
"""Their keys are the chat template's and vLLM's, not ours."""
SHOW_TRACES = os.environ.get("HYDRA_FULL_ERROR") == "1"
"""Whether the user asked for stack traces: read here, because the variable is set for Hydra's sake later on."""
typed: list[str] = []
"""The arguments as they were typed, for what a sweep says of itself."""


def run_with_hydra(command: str, job: Callable[[dict[str, Any]], None], arguments: list[str]) -> None:
    """Run `job` with the composed configuration, once or for every point of a sweep.

    The job gets one dictionary: the configuration, plus `overrides`, the task overrides as typed. Raises UserError.
    """
    import hydra
    from omegaconf import OmegaConf

    typed[:] = arguments
    flags, overrides = split_arguments(arguments)
    _check_flags(command, flags)
    sweep = bool(MULTIRUN & set(flags))
    overrides = [as_typed(override, sweep) for override in overrides]
    _check_overrides(command, flags, overrides)
    overrides = _with_implied_groups(_open_mappings(_without_settings(overrides)))
    created: list[Path] = []
    if sweep:
        overrides, sweep_dir = _with_sweep_dir(overrides)
        created = [sweep_dir, *missing_parents(sweep_dir)] if not sweep_dir.exists() else []
    logging.raiseExceptions = False  # a closed pipe, as with `--info | head`, is no reason for a stack trace
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are, instead of sys.exit(1)
    # Completion asks for the program's name, not the command's.
    sys.argv = ["kpo" if COMPLETION & set(flags) else f"kpo {command}", *flags, *overrides]
    OmegaConf.register_new_resolver(
        "kpo.groups", lambda: _groups_described(command, flags, overrides), replace=True
    )  # for the help texts: Hydra lists the groups of all commands
    failures: list[UserError] = []
    task = _as_task(command, job, failures)
    main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)(task)
    try:
        main()
    except Exception as error:
        _remove_empty_sweep(created)
        message = _explain(command, error)
        if SHOW_TRACES or message is None:
            raise
        raise UserError(message) from error
    if failures:
        raise failures[0]


def _as_task(command: str, job: Callable[[dict[str, Any]], None], failures: list[UserError]) -> Callable[[Any], None]:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    def task(config: Any) -> None:
        hydra_config = HydraConfig.get()
        try:
            job({**_as_containers(command, config), "overrides": list(hydra_config.overrides.task)})
        except UserError as error:
            if hydra_config.mode != RunMode.RUN:
                raise  # a launcher must see that its job failed
            failures.append(error)  # Hydra would print a line of its own first

    return task


def _as_containers(command: str, config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_explain(command, error)) from error
    return expanded(plain)


def _check_flags(command: str, flags: list[str]) -> None:
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise UserError(f"{message}; see kpo {command} --help")

    parser.error = refuse  # type: ignore[assignment]
    for flag in flags:
        name = flag.split("=", 1)[0]
        if name.startswith("--") and name not in parser._option_string_actions:
            close = closest(name.lstrip("-").replace("-", "_"), config_keys(command))
            hint = f", did you mean {close}=...?" if close else ""
            raise UserError(f"no such option {name}; settings are written key=value{hint}")
    given = parser.parse_args(flags)
    if given.resolve and not (given.cfg or given.help):
        refuse("--resolve goes with --cfg or --help")
    if sum(map(bool, (given.run, given.multirun, given.cfg, given.info, given.shell_completion))) > 1:
        refuse("only one of --run, --multirun, --cfg, --info and --shell-completion can be given")
    if given.experimental_rerun and not Path(given.experimental_rerun).is_file():
        refuse(f"--experimental-rerun {given.experimental_rerun}: no such file")


def _check_overrides(command: str, flags: list[str], overrides: list[str]) -> None:
    """What Hydra would accept in silence or refuse without saying which."""
    groups = groups_of(command)
    for override in overrides:
        parsed = parse(override)
        if parsed is None:
            raise UserError(f"cannot read {override!r}; {_how_to_write(override)}")
        key = parsed.key_or_group
        if key == "filter.name":  # the other keys would stay those of the old filter
            raise UserError(f"{override}: a filter is chosen as a group, filter=NAME")
        if key in PATH_LISTS and not MULTIRUN & set(flags) and not isinstance(parsed._value, list):
            raise UserError(f"{override} must be a list: {key}=[{override.partition('=')[2]}]")
        if parsed.is_delete():
            _check_deletion(command, override, key)
        elif key in groups and override not in NO_SETTINGS:
            _check_choice(override, parsed, _options(key, flags, overrides))


def _check_deletion(command: str, override: str, key: str) -> None:
    """A key that a command reads cannot be left out: what it is then would have to be guessed."""
    if override in NO_SETTINGS or key.startswith(("hydra", "known.", *OPEN_MAPPINGS)):
        return
    known = config_keys(command)
    if key in known or any(name.startswith(f"{key}.") for name in known):
        raise UserError(f"{override}: {key} cannot be removed; leave {override} out, or set it with {key}=...")


def _check_choice(override: str, parsed: Any, options: list[str] | None) -> None:
    """Each option chosen of a group is a name; of the groups that need not be there, one of `options`, if known.

    Those are optional in the defaults list, so that Hydra passes over a name that does not exist.
    """
    group, swept = parsed.key_or_group, parsed.is_sweep_override()
    is_list = not swept or (parsed.is_choice_sweep() and not CALL.match(override.partition("=")[2]))
    chosen = [] if not is_list else list(parsed.sweep_iterator()) if swept else [parsed.value()]
    for option in chosen:
        if not isinstance(option, str) or option in ("", "null"):
            names = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
            raise UserError(f"{override}: choose one {group} of: {', '.join(names)}")
        if group in OPTIONAL_GROUPS and options is not None and option not in options:
            raise UserError(f"{group}={option} does not exist; {hint_of(option, options)}")


def _options(group: str, flags: list[str], overrides: list[str]) -> list[str] | None:
    """Names of a group's files in all directories that Hydra searches; None if one of them cannot be looked into."""
    folders = [str(conf_dir())]
    for flag, value in zip(flags, [*flags[1:], ""], strict=False):
        name, equals, attached = flag.partition("=")
        if name in OPTIONS_WITH_VALUE and name in ("--config-dir", "-cd", "--config-path", "-cp"):
            folders.append(attached if equals else value)
    for override in overrides:
        if override.startswith("hydra.searchpath="):
            value = parse(override).value()
            folders += [str(path).removeprefix("file://") for path in (value if isinstance(value, list) else [value])]
    if any(":" in folder for folder in folders):  # pkg://, or another provider's
        return None
    files = [(path, folder) for folder in folders for path in (Path(folder) / group).rglob("*.y*ml")]
    return sorted({path.relative_to(Path(folder) / group).with_suffix("").as_posix() for path, folder in files})


def _groups_described(command: str, flags: list[str], overrides: list[str]) -> str:
    found = {group: _options(group, flags, overrides) or ["?"] for group in groups_of(command)}
    return "\n".join(f"{group}: {', '.join(options)}" for group, options in found.items())


def _how_to_write(override: str) -> str:
    if not override.isascii() and any("\ud800" <= character <= "\udfff" for character in override):
        return "its bytes are no text in this locale; set PYTHONUTF8=1"
    key, equals, value = override.partition("=")
    quoted = f"{key}={quote_value(value)}"
    if equals and value and not {value[0], value[-1]} & set("[]{}'\"") and parse(quoted):
        return f"its value needs quotes of its own: {shlex.quote(quoted)}"
    return "settings are written key=value, and [ ] { } , quoted for the shell"


def _without_settings(overrides: list[str]) -> list[str]:
    """Hydra removes a group with `~pair`, and fails on the `pair=null` that one would write."""
    asked = any(override in NO_SETTINGS for override in overrides)
    return [*(o for o in overrides if o not in NO_SETTINGS), *(["~pair"] if asked else [])]


def _open_mappings(overrides: list[str]) -> list[str]:
    """Let mappings with keys of the user's own take new ones without Hydra's `+`."""

    def is_open(override: str) -> bool:
        key = override.split("=", 1)[0]
        return any(key == name or key.startswith(f"{name}.") for name in OPEN_MAPPINGS)

    return [f"++{override}" if is_open(override) else override for override in overrides]


def _with_implied_groups(overrides: list[str]) -> list[str]:
    names = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    implied = [
        group
        for key, group in IMPLIED_GROUPS.items()
        if key in names and group.split("=")[0] not in names and f"{key}=null" not in overrides
    ]
    return overrides if "resume" in names else implied + overrides


def _with_sweep_dir(overrides: list[str]) -> tuple[list[str], Path]:
    """A sweep lives in one directory: `run_dir=DIR` names it, else it is named by the time.

    Not where run_dir itself is swept or refers to what is (`run_dir=runs/${seed}`): then every job has its own.
    """
    given = [o for o in overrides if o.startswith("hydra.sweep.dir=")]
    named = [o for o in overrides if o.startswith("run_dir=") and not of_each_job(o)]
    path = os.path.expanduser(value_of([*given, *named][-1])) if given or named else ""
    if path in ("", "None"):
        path = f"outputs/sweeps/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    kept = [o for o in overrides if o not in (*given, *named)]
    place = Path(path.replace("\\${", "${"))
    if not given and not place.is_dir():  # a second sweep may go where a first one is
        check_new(place)
    return [*kept, f"hydra.sweep.dir={quote_value(path)}"], place


def of_each_job(override: str) -> bool:
    """Whether the value of an override is swept, or refers to other keys."""
    return parse(override).is_sweep_override() or bool(re.search(r"(?<!\\)\$\{", value_of(override)))


def _remove_empty_sweep(created: list[Path]) -> None:
    """Hydra makes the sweep's directory before it looks at the overrides; take it away if no job came of it."""
    if created and created[0].is_dir() and {p.name for p in created[0].iterdir()} <= {"multirun.yaml"}:
        (created[0] / "multirun.yaml").unlink(missing_ok=True)
        remove_empty(created)


def _explain(command: str, error: Exception) -> str | None:
    """One line for an error of Hydra or OmegaConf; None for any other."""
    from hydra.errors import HydraException
    from omegaconf.errors import GrammarParseError, OmegaConfBaseException

    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = " ".join(str(part) for part in (error, error.__cause__) if part is not None)
    if match := re.search(r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", text):
        key = match[1]
        if "is not in struct" not in text and "No match in the defaults list" not in text:
            return f"cannot set {key}: {' '.join(text.split())}"
        close = closest(key, config_keys(command))
        if close == key:
            return f"{key} does not exist with this {key.split('.')[0]}; see kpo {command} --cfg job"
        return f"unknown key {key}; {f'did you mean {close}?' if close else f'see kpo {command} --cfg job'}"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, name = match[1].rpartition("/")
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"{group}={name} does not exist; {hint_of(name, options)}"
    if isinstance(error, GrammarParseError):
        text += "; a ${ that is no reference is written \\${"
    return " ".join(text.split())
