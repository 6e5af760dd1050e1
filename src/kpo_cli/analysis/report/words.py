"""What the numbers mean, in sentences. Every sentence is decided by the numbers in analysis.json."""

import math
from typing import Any

from kpo_cli.analysis.report.tables import interval, number

LEVEL = 0.05
TESTED = ("switch_frequency", "low_frequency_energy", "autocorrelation")
"""What decides whether there is structure in time; three tests, so each is made at a third of the level."""
NOTHING_PASSED = 0.05


def summary(found: dict[str, Any]) -> str:
    """One paragraph."""
    facts = found["source"]
    if not facts["off_policy_tokens"] or not found["filters"]["raw"]["std"]["value"]:
        return f"{_data(facts)} {_identical(facts)}"
    sentences = [_data(facts), _on_policy(found["on_policy"]), *_structure(found), *_filters(found)]
    sentences += [_drift(found["noise"]), _likelihood(found["noise"]), _mismatch(found["mismatch"])]
    if facts["problems"]:
        sentences.append(f"{len(facts['problems'])} of {facts['files']} files could not be used.")
    return " ".join(sentence for sentence in sentences if sentence)


def _data(facts: dict[str, Any]) -> str:
    steps = len(facts["steps"])
    text = f"{steps} recorded step{'s' * (steps != 1)}, {facts['responses']:,} responses, {facts['tokens']:,} tokens"
    if not facts["mini_batches_recorded"]:
        return f"{text}; mini-batches were not recorded, so all count as off-policy."
    length = facts["mean_off_policy_length"]
    return f"{text}, {facts['off_policy_tokens']:,} of them off-policy{f', {length:.0f} a response' if length else ''}."


def _identical(facts: dict[str, Any]) -> str:
    why = "there was one optimizer step for each batch of rollouts" if not facts["off_policy_tokens"] else "z is 0"
    return (
        f"All ratios are exactly 1 ({why}): every method is the same plain policy gradient here, and nothing can be "
        f"said about filters. Train with trainer.mini_batches=4 to see ratios."
    )


def _on_policy(entry: dict[str, Any]) -> str:
    if not entry["tokens"]:
        return ""
    if entry["identically_zero"]:
        return "In the first mini-batch z is exactly 0; the numbers below are of the others."
    spread = number(entry["filters"]["raw"]["std"])
    return f"The first mini-batch is on-policy, yet z has a standard deviation of {spread} there; it is left out below."


def _structure(found: dict[str, Any]) -> list[str]:
    raw = found["filters"]["raw"]
    switch = raw["switch_frequency"]
    text = f"The sign of the raw log-ratio switches at {number(switch['value'], True)} of neighbours"
    null = switch["null_shuffled"]
    if null is None:
        return [f"{text}; without a null this says nothing about time."]
    band = interval((null["low"], null["high"]), True)
    observed = number(null["observed"], True)
    text = f"{text}; on a sample it is {observed}, and {band} with the tokens of each response shuffled."
    beyond = {name: raw[name]["null_shuffled"] for name in TESTED if _significant(raw[name]["null_shuffled"])}
    if not beyond:
        return [text, "There is no temporal structure beyond the shuffled null (three tests, 5% for all together)."]
    return [text, f"There is some order in time: {', and '.join(_direction(n, null) for n, null in beyond.items())}."]


def _significant(null: dict[str, Any] | None) -> bool:
    return null is not None and null["p_value"] < LEVEL / len(TESTED)


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
    return f"{meaning} ({numbers}, p {null['p_value']:.2g})"


def _filters(found: dict[str, Any]) -> list[str]:
    """What the filters do to the signs, how much of that needs no order in time, and what they let through."""
    filters = {name: entry for name, entry in found["filters"].items() if name != "raw"}
    raw, sentences = found["filters"]["raw"]["switch_frequency"], []
    rates = {name: entry["switch_frequency"] for name, entry in filters.items() if _number(entry["switch_frequency"])}
    if rates:
        values = ", ".join(f"{number(rate['value'], True)} ({name})" for name, rate in rates.items())
        sentences.append(f"After the filters it switches at {values}.")
    explained = [share for rate in rates.values() if (share := _explained(raw, rate)) is not None]
    if explained:
        low, high = min(explained), max(explained)
        shown = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
        sentences.append(f"Of that drop {shown} is there with shuffled tokens as well: smoothing, not structure.")
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


def _number(statistic: dict[str, Any]) -> bool:
    return statistic["value"] is not None and not math.isnan(statistic["value"])


def _explained(raw: dict[str, Any], filtered: dict[str, Any]) -> float | None:
    """Part of the drop in switch frequency that the filter makes of shuffled tokens too; at most all of it."""
    before, after = raw["null_shuffled"], filtered["null_shuffled"]
    if before is None or after is None or before["observed"] <= after["observed"]:
        return None
    share = (before["observed"] - after["mean"]) / (before["observed"] - after["observed"])
    return float(min(1.0, max(0.0, share)))


def _drift(noise: dict[str, Any] | None) -> str:
    fit = noise and noise["drift"]
    if not fit:
        return ""
    if fit["on_floor"]:
        return "The most likely process noise Q is 0: no drift along the response is visible beyond noise."
    tau = 1 / (2 * math.asinh(math.sqrt(fit["q_over_v"]) / 2))
    error = fit["log_q_over_v_error_jackknife"]
    spread = f", to within a factor {math.exp(2 * error):.2g}" if error is not None else ""
    return f"The most likely Q/V is {fit['q_over_v']:.2g}{spread}: a time constant of {tau:,.0f} tokens."


def _likelihood(noise: dict[str, Any] | None) -> str:
    judged = noise and noise["held_out"]
    if not judged:
        return ""
    models = judged["models"]
    best = max(models, key=lambda name: models[name]["log_likelihood_per_token"])
    gain, error = models[best]["gain_over_constant_noise"], models[best]["gain_error"]
    walk = models["random_walk"]["gain_over_constant_noise"]
    text = f"On steps that were not fitted, drift gains {walk:+.3f} nats a token over constant noise"
    if best in ("constant_noise", "random_walk"):
        return f"{text}."
    return f"{text}; the best noise model, {models[best]['description']}, gains {gain:+.2f} ± {error:.2f}."


def _mismatch(m: dict[str, Any] | None) -> str:
    if m is None:
        return ""
    spread = number(m["std"])
    if not m["std"] or not m["drift_std"]:
        return (
            f"Between sampler and trainer log-probabilities differ by {spread} (standard deviation), apart from drift."
        )
    times = m["drift_std"] / m["std"]
    compared = f"1/{times:,.0f} of the drift" if times >= 2 else f"{1 / times:.2g} times the drift"
    return f"Sampler and trainer differ by {spread} (standard deviation of log pi_old - log mu), {compared}."
