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
    """A preset: names of the three stages, and the paper's values where they differ from the stage's own defaults."""

    filter: str
    surrogate: str
    aggregation: str
    source: str
    filter_defaults: Mapping[str, Any] = field(default_factory=dict)
    surrogate_defaults: Mapping[str, float] = field(default_factory=dict)


_SEQ = "seq_mean_token_mean"
_TIGHT = {"eps_low": 3e-4, "eps_high": 4e-4}
_WIDE = {"eps_low": 0.2, "eps_high": 0.2}
_KPO = {"q": 1e-6, "v": 1.0}

# A loss that is constant along a response has the same mean over responses whichever way tokens are averaged, so the
# "mean over responses" of GSPO and GMPO is seq-mean-token-mean of the broadcast loss.
METHODS: dict[str, Method] = {
    "grpo": Method("identity", "clip", _SEQ, "2402.03300", surrogate_defaults=_WIDE),
    "grpo_tight": Method("identity", "clip", _SEQ, "control: KPO without its filter", surrogate_defaults=_TIGHT),
    "dapo": Method("identity", "clip", "token_mean", "2503.14476", {}, {"eps_low": 0.2, "eps_high": 0.28}),
    "dr_grpo": Method("identity", "clip", "constant_length", "2503.20783", surrogate_defaults=_WIDE),
    "gspo": Method("sequence_mean", "clip", _SEQ, "2507.18071", surrogate_defaults=_TIGHT),
    "gspo_token": Method("sequence_mean", "clip", _SEQ, "2507.18071", {"straight_through": True}, _TIGHT),
    "gmpo": Method("identity", "geometric_mean", _SEQ, "2507.20673", {}, {"eps_low": 0.4, "eps_high": 0.4}),
    "token_clip": Method("identity", "truncated_weight", _SEQ, "the family KPO argues against", {}, _WIDE),
    "cispo": Method("identity", "capped_weight", "token_mean", "2506.13585", {}, {"cap": 5.0}),
    "sapo": Method("identity", "soft_gate", _SEQ, "2511.20347", {}, {"tau_positive": 1.0, "tau_negative": 1.05}),
    "ctpo": Method("prefix_sum", "growing_band", "token_mean", "2605.07331", {}, {"eps_low": 0.025, "eps_high": 0.05}),
    "vespo": Method("identity", "sequence_kernel", "token_mean", "2602.10693"),
    "dppo": Method("identity", "probability_mask", "token_mean", "2602.04879", {}, {"delta": 0.15}),
    "kpo": Method("kalman", "clip", _SEQ, "2602.10609", _KPO, _TIGHT),
    "kpo_unclipped": Method("kalman", "unclipped", _SEQ, "2602.10609", {"q": 1e-4, "v": 1.0}),
    "ema_kpo": Method("steady_kalman", "clip", _SEQ, "control: KPO with a constant gain", _KPO, _TIGHT),
    "robust_kpo": Method(
        "kalman_robust", "clip", _SEQ, "robust Kalman filtering", {"q": 1e-10, "v": 1e-4, "kappa": 3.0}, _TIGHT
    ),
}


def list_methods() -> list[str]:
    """Names that `load_objective` takes."""
    return sorted(METHODS)


def load_objective(method: str, **overrides: Any) -> Objective:
    """The objective of a named method, with some of its parameters replaced.

    `overrides` are fields of the method's filter, surrogate or aggregation (`q=1e-6, v=1.0, eps_low=3e-4`), or
    `time_constant` in tokens in place of `q`; and `correction`, `reference_kl`, `entropy_bonus` (core/penalties.py).
    Raises ValueError for a method or a parameter that does not exist, naming the nearest.
    """
    preset = lookup(METHODS, method, "method")
    stages = {
        "filter": (FILTERS[preset.filter], preset.filter_defaults),
        "surrogate": (SURROGATES[preset.surrogate], preset.surrogate_defaults),
        "aggregation": (AGGREGATIONS[preset.aggregation], {}),
    }
    extras = {name: overrides.pop(name) for name in OPTIONAL_PARTS if name in overrides}
    if "q" in _field_names(FILTERS[preset.filter]):
        overrides = with_q(overrides, float({"v": 1.0, **preset.filter_defaults, **overrides}["v"]))
    known = set().union(*(_field_names(make) for make, _ in stages.values()))
    for name in overrides:
        if name not in known:
            raise ValueError(f"{method} has no parameter {name!r}; {nearest(name, known | set(OPTIONAL_PARTS))}")
    made = {
        stage: {**defaults, **{k: v for k, v in overrides.items() if k in _field_names(make)}}
        for stage, (make, defaults) in stages.items()
    }
    return build_objective(
        filter={"name": preset.filter, **made["filter"]},
        surrogate={"name": preset.surrogate, **made["surrogate"]},
        aggregation={"name": preset.aggregation, **made["aggregation"]},
        **extras,
    )


OPTIONAL_PARTS = ("correction", "reference_kl", "entropy_bonus")


def build_objective(
    *, filter: Mapping[str, Any], surrogate: Mapping[str, Any], aggregation: Mapping[str, Any], **optional_parts: Any
) -> Objective:
    """Compose an objective from stages given as {"name": ..., parameter: value}.

    Raises ValueError for unknown names or bad parameters.
    """
    return Objective(
        build(FILTERS, filter, "filter"),
        build(SURROGATES, surrogate, "surrogate"),
        build(AGGREGATIONS, aggregation, "aggregation"),
        **optional_parts,
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


def build(registry: Mapping[str, Callable[..., T]], stage: Mapping[str, Any], kind: str) -> T:
    """An entry of a registry, made from {"name": ..., parameter: value}; a ValueError names what is wrong."""
    parameters = dict(stage)
    name = parameters.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"{kind} has no name; choose from {', '.join(sorted(registry))}")
    make = lookup(registry, name, kind)
    known = _field_names(make)
    for parameter, value in parameters.items():
        if parameter not in known:
            raise ValueError(f"{kind} {name!r} has no parameter {parameter!r}; {nearest(parameter, known)}")
        if known[parameter] is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{kind} {parameter}={value} must be a number")
        if known[parameter] is not float and type(value) is not known[parameter]:
            raise ValueError(f"{kind} {parameter}={value} must be a {known[parameter].__name__}")
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


def _field_names(make: Any) -> dict[str, type]:
    """Parameters of a stage and their types."""
    # A module with `from __future__ import annotations` gives its types by name.
    scalars: dict[Any, type] = {key: kind for kind in (float, int, bool) for key in (kind, kind.__name__)}
    return {f.name: scalars[f.type] for f in fields(make)}
