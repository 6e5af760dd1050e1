"""Named methods: which filter, surrogate and aggregation a paper's name stands for."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from kpo_cli.core.aggregation import AGGREGATIONS
from kpo_cli.core.filters import FILTERS, q_over_v_of
from kpo_cli.core.objective import Objective
from kpo_cli.core.surrogates import SURROGATES

T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """A preset. `filter_defaults` and `surrogate_defaults` are the paper's values."""

    filter: str
    surrogate: str
    aggregation: str
    source: str
    filter_defaults: Mapping[str, float] = field(default_factory=dict)
    surrogate_defaults: Mapping[str, float] = field(default_factory=dict)


_SEQ = "seq_mean_token_mean"
_TIGHT = {"eps_low": 3e-4, "eps_high": 4e-4}
_WIDE = {"eps_low": 0.2, "eps_high": 0.2}

METHODS: dict[str, Method] = {
    "grpo": Method("identity", "clip", _SEQ, "2402.03300", surrogate_defaults=_WIDE),
    "grpo_tight": Method("identity", "clip", _SEQ, "control: KPO without its filter", surrogate_defaults=_TIGHT),
    # A loss that is constant along a response has the same mean over responses whichever way tokens are averaged, so
    # GSPO's "mean over responses" is seq-mean-token-mean of the broadcast ratio.
    "gspo": Method("sequence_mean", "clip", _SEQ, "2507.18071", surrogate_defaults=_TIGHT),
    "token_clip": Method(
        "identity", "truncated_weight", _SEQ, "the family KPO argues against", surrogate_defaults=_WIDE
    ),
    "kpo": Method("kalman", "clip", _SEQ, "2602.10609", {"q": 1e-6, "v": 1.0}, _TIGHT),
    "kpo_unclipped": Method("kalman", "unclipped", _SEQ, "2602.10609", {"q": 1e-4, "v": 1.0}),
}


def list_methods() -> list[str]:
    """Names that `load_objective` takes."""
    return sorted(METHODS)


def load_objective(method: str, **overrides: Any) -> Objective:
    """The objective of a named method, with some of its parameters replaced.

    `overrides` are fields of the method's filter or surrogate (`q=1e-6, v=1.0, eps_low=3e-4`), or `time_constant` in
    tokens in place of `q`. Raises ValueError for a method or a parameter that does not exist, naming the nearest.
    """
    preset = lookup(METHODS, method, "method")
    filter_fields = _field_names(FILTERS[preset.filter])
    surrogate_fields = _field_names(SURROGATES[preset.surrogate])
    if "q" in filter_fields:
        overrides = with_q(overrides, float(overrides.get("v", preset.filter_defaults["v"])))
    known = filter_fields | surrogate_fields
    for name in overrides:
        if name not in known:
            raise ValueError(f"{method} has no parameter {name!r}; {nearest(name, known)}")
    return build_objective(
        filter_name=preset.filter,
        filter_parameters={**preset.filter_defaults, **_only(overrides, filter_fields)},
        surrogate_name=preset.surrogate,
        surrogate_parameters={**preset.surrogate_defaults, **_only(overrides, surrogate_fields)},
        aggregation_name=preset.aggregation,
    )


def build_objective(
    *,
    filter_name: str,
    filter_parameters: Mapping[str, Any],
    surrogate_name: str,
    surrogate_parameters: Mapping[str, Any],
    aggregation_name: str,
) -> Objective:
    """Compose an objective from the names of its stages. Raises ValueError for unknown names or bad parameters."""
    return Objective(
        build(FILTERS, filter_name, filter_parameters, "filter"),
        build(SURROGATES, surrogate_name, surrogate_parameters, "surrogate"),
        build(AGGREGATIONS, aggregation_name, {}, "aggregation"),
    )


def with_q(parameters: Mapping[str, Any], v: float) -> dict[str, Any]:
    """`parameters` with `time_constant` (tokens) replaced by the `q` it stands for at observation noise `v`."""
    remaining = {name: value for name, value in parameters.items() if name != "time_constant"}
    time_constant = parameters.get("time_constant")
    if time_constant is None:
        return remaining
    if remaining.get("q") is not None:
        raise ValueError(
            f"q={remaining['q']} and time_constant={time_constant} both say how slowly the filter moves; keep one"
        )
    return {**remaining, "q": q_over_v_of(float(time_constant)) * v}


def build(registry: Mapping[str, Callable[..., T]], name: str, parameters: Mapping[str, Any], kind: str) -> T:
    """An entry of a registry made with its parameters; a ValueError names the nearest of what exists."""
    make = lookup(registry, name, kind)
    known = _field_names(make)
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"{kind} {name!r} has no parameter {parameter!r}; {nearest(parameter, known)}")
    return make(**parameters)


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, registry)}")
    return registry[name]


def nearest(name: str, known: Mapping[str, Any] | set[str]) -> str:
    """A hint that names the closest known name, or lists them."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from {', '.join(sorted(known))}" if known else "it takes none"


def _field_names(make: Any) -> set[str]:
    return {f.name for f in fields(make)}


def _only(parameters: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name in names}
