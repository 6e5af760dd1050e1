"""Hydra's grammar of overrides: reading them, and writing values that it reads as they stand."""

from typing import Any


def parse(override: str) -> Any:
    """Hydra's Override, or None where it is not one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override.encode()
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, UnicodeEncodeError):
        return None
    return parsed if parsed.key_or_group else None


def quote_value(value: str) -> str:
    """A value in quotes of Hydra's grammar, so that it is taken as it stands."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(value, Quote.single if '"' in value else Quote.double).with_quotes()


def value_of(override: str) -> str:
    """The value of an override as a text, its quotes taken off."""
    return str(parse(override).value())


def interpolates(text: str) -> bool:
    """Whether every ${ in a text begins a reference (or is escaped), so that OmegaConf can read it."""
    from omegaconf import grammar_parser
    from omegaconf.errors import GrammarParseError

    if "${" not in text:
        return True
    try:
        grammar_parser.parse(text)
    except GrammarParseError:
        return False
    return True


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


OPTIONS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"}
OPTIONS_WITH_VALUE |= {"--config-dir", "-cd", "--experimental-rerun"}
INFO_OPTIONS = {"--info", "-i"}
INFO_TOPICS = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}
MULTIRUN = {"-m", "--multirun"}
