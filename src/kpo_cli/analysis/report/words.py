"""What the numbers mean, in sentences. Every sentence is decided by the numbers in analysis.json."""

import math
from typing import Any

from kpo_cli.analysis.report.tables import compared, number, outside
from kpo_cli.core.rounding import SHARE
from kpo_cli.terminal import counted

SPOKEN = ("switch_frequency", "low_frequency_energy", "autocorrelation")
"""Statistics of the raw log-ratios that have a sentence of their own where they lie outside the null."""
NOTHING_PASSED = 0.05


def summary(found: dict[str, Any]) -> str:
    """One paragraph."""
    facts = found["source"]
    raw = found["filters"].get("raw")
    if not raw or not (raw["std"]["value"] or raw["mean"]["value"]):
        return f"{_data(facts)} {_identical(facts)}"
    sentences = [_data(facts), _on_policy(found["on_policy"]), *_structure(found), *_filters(found)]
    sentences += [_drift(found["noise"]), _likelihood(found["noise"]), _mismatch(found["mismatch"])]
    sentences.append(_rounding(found["rounding"]))
    if facts["problems"]:
        sentences.append(f"{len(facts['problems'])} of {facts['files']} files could not be used.")
    return " ".join(sentence for sentence in sentences if sentence)


def _data(facts: dict[str, Any]) -> str:
    steps = len(facts["steps"])
    text = ", ".join(
        [
            counted(steps, "recorded step"),
            counted(facts["responses"], "response"),
            counted(facts["tokens"], "token"),
        ]
    )
    if not facts["mini_batches_recorded"]:
        return f"{text}; mini-batches were not recorded, so all count as off-policy."
    length = facts["mean_off_policy_length"]
    return f"{text}, {facts['off_policy_tokens']:,} of them off-policy{f', {length:.0f} a response' if length else ''}."


def _identical(facts: dict[str, Any]) -> str:
    text = "every method is the same plain policy gradient here, and nothing can be said about filters."
    if facts["off_policy_tokens"]:
        return f"All ratios are exactly 1 (no log-probability moved between optimizer steps): {text}"
    return (
        f"All ratios are exactly 1 (there was one optimizer step for each batch of rollouts): {text} Train with "
        "trainer.mini_batches=4 to see ratios."
    )


def _on_policy(entry: dict[str, Any]) -> str:
    if not entry["tokens"]:
        return ""
    if entry["identically_zero"]:
        return "In the first mini-batch z is exactly 0; the numbers below are of the others."
    spread = number(entry["filters"]["raw"]["std"])
    return f"The first mini-batch is on-policy, yet z has a standard deviation of {spread} there; it is left out below."


def _structure(found: dict[str, Any]) -> list[str]:
    raw, order = found["filters"]["raw"], found["order"]
    switch = raw["switch_frequency"]
    if switch["value"] is None or math.isnan(switch["value"]):
        return ["No token has a neighbour, so that nothing can be said about order in time."]
    text = f"The sign of the raw log-ratio switches at {number(switch['value'], True)} of neighbours"
    null = switch["null_shuffled"]
    if order is None or null is None:
        return [f"{text}; without a null this says nothing about time."]
    observed, band = _compared(null)
    text = f"{text}; on a sample it is {observed}, and {band} with the tokens of each response shuffled."
    return [text, _order(raw, order)]


def _order(raw: dict[str, Any], order: dict[str, Any]) -> str:
    family = order["null_shuffled"]
    tests = f"p {family['p_value']:.2g} for all {family['tests']} statistics together"
    if order["verdict"] == "cannot tell":
        return f"Whether there is order in time cannot be told: so few tokens look alike in any order ({tests})."
    if order["verdict"] == "no order seen":
        return f"No order in time is seen: nothing lies outside what shuffled tokens show ({tests})."
    outside = [name for series, name in family["outside"] if series == "raw"]
    said = [_direction(name, raw[name]["null_shuffled"]) for name in SPOKEN if name in outside]
    said += [_hang_together(name, family["statistics"][name]) for name in TOGETHER if name in outside]
    others = len(family["outside"]) - sum(name in SPOKEN or name in TOGETHER for name in outside)
    if others:
        more = f"{others} {'more ' if said else ''}statistic{'s' * (others != 1)}"
        said.append(f"{more}, marked in the tables, {'lies' if others == 1 else 'lie'} outside")
    return f"There is order in time ({tests}): {'; '.join(said)}."


TOGETHER = {
    "sign_correlogram": "signs at some distances hang together",
    "sign_by_place": "signs at one place of all responses agree",
    "size_by_place": "sizes at one place of all responses agree",
}


def _hang_together(name: str, null: dict[str, Any]) -> str:
    return f"{TOGETHER[name]} {'more' if null['observed'] > null['mean'] else 'less'} than shuffled"


def _direction(name: str, null: dict[str, Any]) -> str:
    more = null["observed"] > null["mean"]
    meaning = {
        ("switch_frequency", True): "signs switch more often than shuffled ones, the opposite of a slow drift",
        ("switch_frequency", False): "signs switch less often than shuffled ones",
        ("low_frequency_energy", True): "slow waves hold more energy than shuffled",
        ("low_frequency_energy", False): "slow waves hold less energy than shuffled, the opposite of a slow drift",
        ("autocorrelation", True): "neighbours are more alike than shuffled",
        ("autocorrelation", False): "neighbours are less alike than shuffled, the opposite of a slow drift",
    }[name, more]
    share = name != "autocorrelation"
    numbers = f"{number(null['observed'], share)} against {number(null['mean'], share)}"
    return f"{meaning} ({numbers})"


def _filters(found: dict[str, Any]) -> list[str]:
    """What the filters do to the signs, whether that needs order in time, and what they let through."""
    filters = {name: entry for name, entry in found["filters"].items() if name != "raw"}
    sentences = []
    rates = {name: entry["switch_frequency"] for name, entry in filters.items() if _number(entry["switch_frequency"])}
    if rates:
        values = ", ".join(f"{number(rate['value'], True)} ({name})" for name, rate in rates.items())
        sentences.append(f"After the filters it switches at {values}.")
    nulls = {name: rate["null_shuffled"] for name, rate in rates.items() if rate["null_shuffled"] is not None}
    if nulls:
        sentences.append(_beyond_smoothing(nulls))
    passed = {name: entry["share_passed"] for name, entry in filters.items() if entry["share_passed"] is not None}
    if passed:
        shares = ", ".join(f"{number(share, True)} ({name})" for name, share in passed.items())
        sentences.append(f"Of a constant shift the filters pass {shares} at this length.")
        sentences += [
            f"`{name}` passes {number(share, True)}: the ratio is 1 for every purpose."
            for name, share in passed.items()
            if abs(share) < NOTHING_PASSED
        ]
    return sentences


def _beyond_smoothing(nulls: dict[str, dict[str, Any]]) -> str:
    """Shuffled tokens have no order, and a filter smooths them all the same."""
    lying = {name: _compared(null) for name, null in nulls.items() if outside(null)}
    beyond = [f"{name} ({observed} where shuffled tokens give {band})" for name, (observed, band) in lying.items()]
    if not beyond:
        return "Shuffled tokens, filtered, switch as seldom: the drop is no sign of order in time."
    others = "; the others switch as shuffled tokens do" if len(beyond) < len(nulls) else ""
    return f"Shuffled tokens, filtered, drop as well; outside what they do lie {', '.join(beyond)}{others}."


def _compared(null: dict[str, Any]) -> tuple[str, str]:
    """A share of the sample, and the band of its null."""
    observed, band = compared([null], share=True)
    return observed, band.rstrip(" *")


def _number(statistic: dict[str, Any]) -> bool:
    return statistic["value"] is not None and not math.isnan(statistic["value"])


def _drift(noise: dict[str, Any] | None) -> str:
    fit = noise and noise["drift"]
    if not noise or not fit:
        return ""
    p = fit["p_values"] and fit["p_values"]["prediction"]
    tested = f"p {p['null_shuffled']:.2g} shuffled, {p['null_sign_flipped']:.2g} with signs flipped" if p else ""
    if fit["verdict"] == "no drift seen":
        return f"No drift along the response is seen: the past does not predict the next log-ratio ({tested})."
    if fit["verdict"] == "not determined":
        why = ", and ".join(fit["against"])
        return (
            f"Whether there is a drift along the response is not determined: {why}"
            f"{f' (that the past predicts the next log-ratio: {tested})' if tested else ''}."
        )
    memory = noise["memory"]
    if fit["verdict"] == "fades":
        return (
            f"The past predicts the next log-ratio ({tested}), but no drift that lasts is seen: where they were not "
            f"fitted a state that fades, by a factor e within about {_tokens(memory['tokens'])}, gains "
            f"{_gain(memory, 'fading')} nats a token over a walk and over independent noise."
        )
    low, high = fit["q_interval"]
    return (
        f"There is a drift along the response: the past predicts the next log-ratio ({tested}), and a walk gains "
        f"{_gain(memory, 'walk')} nats a token over states that fade within {_tokens(memory['short'])}. "
        f"The most likely walk has Q = {fit['q']:.2g} (95%: {low:.2g} to {high:.2g}), moves by {number(fit['moved'])} "
        f"over a response, and its filter has a time constant of {number(fit['time_constant'])} tokens."
    )


def _tokens(number_of: float) -> str:
    shown = f"{number_of:.2g}"
    return f"{shown} token{'s' * (shown != '1')}"


def _likelihood(noise: dict[str, Any] | None) -> str:
    judged = noise and noise["held_out"]
    if not judged:
        return ""
    models = judged["models"]
    best = max(models, key=lambda name: models[name]["log_likelihood_per_token"])
    walk = models.get("walk_in_shaped_noise", models["random_walk"])
    text = (
        f"On {judged['by']} that were not fitted a walk gains {_gain(walk, 'gain_of_walk')} nats a token over the same "
        f"noise without one"
    )
    if best == "constant_noise":
        return f"{text}."
    gain = _gain(models[best], "gain_over_constant_noise", "gain_error")
    return f"{text}; the best model of the table, {models[best]['description']}, gains {gain} over constant noise."


def _gain(model: dict[str, Any], name: str, error: str = "") -> str:
    """With two digits of its error, and three places at least."""
    spread = model[error or f"{name}_error"]
    if spread is None:
        return f"{model[name]:+z.3f}"
    places = min(6, max(3, 1 - math.floor(math.log10(spread)))) if spread else 3
    return f"{model[name]:+z.{places}f} ± {spread:.{places}f} (standard error over prompts)"


def _mismatch(m: dict[str, Any] | None) -> str:
    if m is None:
        return ""
    spread = number(m["std"])
    if not m["std"] or not m["drift_std"]:
        return f"Sampler and trainer differ by {spread} (standard deviation of log pi_old - log mu)."
    times = m["drift_std"] / m["std"]
    compared = f"1/{times:,.0f} of that of z" if times >= 2 else f"{1 / times:.2g} times that of z"
    return f"Sampler and trainer differ by {spread} (standard deviation of log pi_old - log mu), {compared}."


def _rounding(found: dict[str, Any] | None) -> str:
    """What of z is 16-bit arithmetic, and whether that takes part in what is clipped."""
    if found is None:
        return ""
    of_z = f", {found['z_error'] / found['z']:.2g} times their own size" if found["z"] else ""
    text = f"In {found['dtype']} log-ratios are off by {number(found['z_error'])} (root mean square){of_z}"
    if found["widths"] is None:
        return f"{text}, and behind the run's filter by {number(found['filtered_error'])}."
    share = f"{number(found['widths'])} of the clip width {found['width']:g}"
    part = f"rounding takes part in what is clipped, at {number(found['decided'], True)} of tokens"
    if found["widths"] <= SHARE:
        part = f"below {SHARE:g}, too little to take part in what is clipped"
    return f"{text}, and behind the run's filter by {share}: {part}."
