"""Hands the arguments to hydra.main, and turns what Hydra raises into one line.

Hydra's own behaviour stays: overrides, groups, --cfg, --help, -m, plugins. Four things are added:
- `model.path=` and `data.path=` alone choose the groups `model=hub` and `data=file`;
- errors name the nearest key and become a UserError (exit code 2) instead of a stack trace (exit code 1);
- a job gets plain containers and the list of its overrides;
- sweeps run every job in a process of its own (`hydra_plugins.kpo_isolated_launcher`).
"""

import difflib
import os
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from kpo_cli.errors import UserError

IMPLIED_GROUPS = {"model.path": "model=hub", "data.path": "data=file"}
OPTIONS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"} | {
    *("--config-dir", "-cd", "--experimental-rerun")
}


def conf_dir() -> Path:
    """The configuration directory: inside the installed package, or at the top of a source checkout."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "conf", here.parents[1] / "conf") if path.is_dir())


def run_with_hydra(command: str, job: Callable[[dict[str, Any]], None], arguments: list[str]) -> None:
    """Run `job` with the composed configuration, once or for every point of a sweep.

    The job gets one dictionary: the configuration, plus `overrides`, the task overrides as typed. Raises UserError.
    """
    import hydra

    flags, overrides = split_arguments(arguments)
    _check_flags(command, flags)
    _check_overrides(command, flags, overrides)
    overrides = _with_implied_groups(overrides)
    sweep_dir = None
    if {"-m", "--multirun"} & set(flags):
        overrides, sweep_dir = _with_sweep_dir(overrides)
    show_traces = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are, instead of sys.exit(1)
    sys.argv = [f"kpo {command}", *flags, *overrides]
    failures: list[UserError] = []
    task = _as_task(job, failures)
    main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)(task)
    try:
        main()
    except Exception as error:
        _remove_empty_sweep(sweep_dir)
        message = _explain(command, error)
        if show_traces or message is None:
            raise
        raise UserError(message) from error
    if failures:
        raise failures[0]


def _as_task(job: Callable[[dict[str, Any]], None], failures: list[UserError]) -> Callable[[Any], None]:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    def task(config: Any) -> None:
        hydra_config = HydraConfig.get()
        try:
            raw: Any = OmegaConf.to_container(config, resolve=True)
            job({**raw, "overrides": list(hydra_config.overrides.task)})
        except UserError as error:
            if hydra_config.mode != RunMode.RUN:
                raise  # a launcher must see that its job failed
            failures.append(error)  # Hydra would print a line of its own first

    return task


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options (with their values) and overrides, each in order."""
    flags, overrides, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        if argument in OPTIONS_WITH_VALUE and rest:
            flags.append(rest.pop(0))
    return flags, overrides


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
    parser.parse_args(flags)


def _check_overrides(command: str, flags: list[str], overrides: list[str]) -> None:
    """What Hydra would accept in silence or refuse without saying which."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException:
            raise UserError(
                f"cannot read {override!r}; settings are written key=value, and [ ] {{ }} , quoted for the shell"
            ) from None
    experiments = {path.stem for path in (conf_dir() / "experiment").glob("*.yaml")}
    for override in overrides:
        # The experiment is optional in the defaults list, so Hydra passes over a name that does not exist.
        name = override.removeprefix("experiment=")
        own_dir = {"--config-dir", "-cd"} & set(flags)
        if name != override and name != "null" and "," not in name and name not in experiments and not own_dir:
            raise UserError(f"experiment={name} does not exist; {_hint(name, sorted(experiments))}")


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
        return overrides, Path(given[-1].split("=", 1)[1])
    named = [o for o in overrides if o.startswith("run_dir=") and "," not in o]
    path = named[-1].split("=", 1)[1] if named else f"outputs/sweeps/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return [*(o for o in overrides if o not in named), f"hydra.sweep.dir={path}"], Path(path)


def _remove_empty_sweep(sweep_dir: Path | None) -> None:
    """Hydra makes the sweep's directory before it looks at the overrides; take it away if no job came of it."""
    if sweep_dir and sweep_dir.is_dir() and {p.name for p in sweep_dir.iterdir()} <= {"multirun.yaml"}:
        (sweep_dir / "multirun.yaml").unlink(missing_ok=True)
        sweep_dir.rmdir()


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
    """The nearest of the dotted keys, by the whole name or else by its last part (`stepz` for `trainer.steps`)."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return close[0]
    by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
    close = difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1)
    return by_last[close[0]] if close else None


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"
