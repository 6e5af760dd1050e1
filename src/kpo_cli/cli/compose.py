"""Hands the arguments to hydra.main, and turns what Hydra raises into one line.

Hydra's own behaviour stays: overrides, groups, --cfg, --help, -m, plugins. Four things are added:
- `model.path=` and `data.path=` alone choose the groups `model=hub` and `data=file`;
- errors name the nearest key and become a UserError (exit code 2) instead of a stack trace (exit code 1);
- a job gets plain containers and the list of its overrides;
- sweeps run every job in a process of its own (`hydra_plugins.kpo_isolated_launcher`).
"""

import difflib
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from kpo_cli.errors import UserError
from kpo_cli.runs.directory import check_new, missing_parents, remove_empty

IMPLIED_GROUPS = {"model.path": "model=hub", "data.path": "data=file"}
OPEN_MAPPINGS = ("model.chat_template_kwargs", "chat_template_kwargs", "rollout.engine", "eval.engine")
"""Their keys are the chat template's and vLLM's, not ours."""
OPTIONS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
OPTIONS_WITH_VALUE |= {"--config-dir", "-cd", "--experimental-rerun"}
INFO_OPTIONS = {"--info", "-i"}
INFO_TOPICS = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}
SHOW_TRACES = os.environ.get("HYDRA_FULL_ERROR") == "1"
"""Whether the user asked for stack traces: read here, because the variable is set for Hydra's sake later on."""


def conf_dir() -> Path:
    """The configuration directory: inside the installed package, or at the top of a source checkout."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here.parent / "conf", here.parents[2] / "conf") if path.is_dir())


def run_with_hydra(command: str, job: Callable[[dict[str, Any]], None], arguments: list[str]) -> None:
    """Run `job` with the composed configuration, once or for every point of a sweep.

    The job gets one dictionary: the configuration, plus `overrides`, the task overrides as typed. Raises UserError.
    """
    import hydra

    flags, overrides = split_arguments(arguments)
    _check_flags(command, flags)
    _check_overrides(command, flags, overrides)
    overrides = _with_implied_groups(_open_mappings(_without_null_experiment(overrides)))
    created: list[Path] = []
    if {"-m", "--multirun"} & set(flags):
        overrides, sweep_dir = _with_sweep_dir(overrides)
        created = [sweep_dir, *missing_parents(sweep_dir)] if not sweep_dir.exists() else []
    logging.raiseExceptions = False  # a closed pipe, as with `--info | head`, is no reason for a stack trace
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are, instead of sys.exit(1)
    sys.argv = [f"kpo {command}", *flags, *overrides]
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
    return plain


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options (with their values) and overrides, each in order."""
    flags, overrides, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument == "-":
            overrides.append(argument)
            continue
        flags.append(argument)
        if rest and (argument in OPTIONS_WITH_VALUE or (argument in INFO_OPTIONS and rest[0] in INFO_TOPICS)):
            flags.append(rest.pop(0))
    return flags, overrides


def with_paths(command: str, arguments: list[str], key: str) -> list[str]:
    """`arguments` with those that are no options and no settings gathered as `key=[...]`, and --watch as watch=true."""
    flags, rest = split_arguments(arguments)
    if {"-m", "--multirun"} & set(flags):
        raise UserError(f"kpo {command} makes no sweeps; give it all {key} at once")
    settings = [a for a in rest if ("=" in a or a.startswith("~")) and not os.path.exists(a)]
    paths = [argument for argument in rest if argument not in settings]
    if "--watch" in flags:
        settings.append("watch=true")
    if paths:
        settings.append(f"{key}=[{','.join(quote_value(path) for path in paths)}]")
    return [*(flag for flag in flags if flag != "--watch"), *settings]


def _check_flags(command: str, flags: list[str]) -> None:
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise UserError(f"{message}; see kpo {command} --help")

    parser.error = refuse  # type: ignore[assignment]
    for flag in flags:
        name = flag.split("=", 1)[0]
        if name.startswith("--") and name not in parser._option_string_actions:
            close = _closest(name.lstrip("-").replace("-", "_"), _config_keys(command))
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
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    for override in overrides:
        parsed = _parse(override)
        if parsed is None:
            raise UserError(f"cannot read {override!r}; {_how_to_write(override)}")
        if parsed.key_or_group == "filter.name":  # the other keys would stay those of the old filter
            raise UserError(f"{override}: a filter is chosen as a group, filter=NAME")
        swept = parsed.is_sweep_override()
        chosen = [parsed.value()] if not swept else list(parsed.sweep_iterator()) if parsed.is_choice_sweep() else []
        if override == "experiment=null" or parsed.is_delete():
            continue
        if parsed.key_or_group in groups:
            for option in chosen:
                if not isinstance(option, str) or option in ("", "null"):
                    options = sorted(path.stem for path in (conf_dir() / parsed.key_or_group).glob("*.yaml"))
                    raise UserError(f"{override}: choose one {parsed.key_or_group} of: {', '.join(options)}")
    experiments = {path.stem for path in (conf_dir() / "experiment").glob("*.yaml")}
    for override in overrides:
        # The experiment is optional in the defaults list, so Hydra passes over a name that does not exist.
        name = override.removeprefix("experiment=")
        own_dir = {"--config-dir", "-cd"} & set(flags)
        if name != override and name != "null" and "," not in name and name not in experiments and not own_dir:
            raise UserError(f"experiment={name} does not exist; {_hint(name, sorted(experiments))}")


def _parse(override: str) -> Any:
    """Hydra's Override, or None where it is not one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override.encode()
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, UnicodeEncodeError):
        return None
    return parsed if parsed.key_or_group else None


def _how_to_write(override: str) -> str:
    key, equals, value = override.partition("=")
    quoted = f"{key}={quote_value(value)}"
    if equals and value and not {value[0], value[-1]} & set("[]{}'\"") and _parse(quoted):
        return f"its value needs quotes of its own: {shlex.quote(quoted)}"
    return "settings are written key=value, and [ ] { } , quoted for the shell"


def quote_value(value: str) -> str:
    """A value in quotes of Hydra's grammar, so that it is taken as it stands."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(value, Quote.single if '"' in value else Quote.double).with_quotes()


def value_of(override: str) -> str:
    """The value of an override as a text, its quotes taken off."""
    return str(_parse(override).value())


def _without_null_experiment(overrides: list[str]) -> list[str]:
    """Hydra removes a group with `~experiment`, and fails on the `experiment=null` that one would write."""
    return ["~experiment" if override == "experiment=null" else override for override in overrides]


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
    """A sweep lives in one directory: `run_dir=DIR` names it, else it is named by the time."""
    given = [o for o in overrides if o.startswith("hydra.sweep.dir=")]
    if given:
        return overrides, Path(value_of(given[-1]))
    named = [o for o in overrides if o.startswith("run_dir=") and not _parse(o).is_sweep_override()]
    path = value_of(named[-1]) if named else f"outputs/sweeps/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if not Path(path).is_dir():  # a second sweep may go where a first one is
        check_new(Path(path))
    return [*(o for o in overrides if o not in named), f"hydra.sweep.dir={quote_value(path)}"], Path(path)


def _remove_empty_sweep(created: list[Path]) -> None:
    """Hydra makes the sweep's directory before it looks at the overrides; take it away if no job came of it."""
    if created and created[0].is_dir() and {p.name for p in created[0].iterdir()} <= {"multirun.yaml"}:
        (created[0] / "multirun.yaml").unlink(missing_ok=True)
        remove_empty(created)


def _explain(command: str, error: Exception) -> str | None:
    """One line for an error of Hydra or OmegaConf; None for any other."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = " ".join(str(part) for part in (error, error.__cause__) if part is not None)
    if match := re.search(r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", text):
        key = match[1]
        if "is not in struct" not in text and "No match in the defaults list" not in text:
            return f"cannot set {key}: {' '.join(text.split())}"
        close = _closest(key, _config_keys(command))
        if close == key:
            return f"{key} does not exist with this {key.split('.')[0]}; see kpo {command} --cfg job"
        return f"unknown key {key}; {f'did you mean {close}?' if close else f'see kpo {command} --cfg job'}"
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, name = match[1].rpartition("/")
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        return f"{group}={name} does not exist; {_hint(name, options)}"
    return " ".join(text.split())


def _config_keys(command: str) -> list[str]:
    """Every key and group of the default configuration, dotted."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose(command))
    GlobalHydra.instance().clear()
    groups = [path.name for path in conf_dir().iterdir() if path.is_dir()]

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return [prefix]
        return [key for name, child in node.items() for key in walk(child, f"{prefix}.{name}" if prefix else name)]

    return groups + walk(plain, "")


def _closest(name: str, known: list[str]) -> str | None:
    """The nearest of the dotted keys: one of the same group, or else by the whole name or the last part.

    `trainer.stepz` and `stepz` both stand for `trainer.steps`; a wrong key of a known group is not that group.
    """
    group, _, last = name.rpartition(".")
    parts = [key.rpartition(".") for key in known]
    siblings = {own: key for key, (prefix, _, own) in zip(known, parts, strict=True) if prefix == group}
    anywhere = {own: key for key, (_, _, own) in reversed(list(zip(known, parts, strict=True)))}
    whole = {} if group and siblings else {key: key for key in known}
    for wanted, names in ((last, siblings), (name, whole), (last, anywhere)):
        if close := difflib.get_close_matches(wanted, names, n=1):
            return names[close[0]]
    return None


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
