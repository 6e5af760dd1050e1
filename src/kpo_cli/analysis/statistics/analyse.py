"""From a source to everything that is known of it: the dictionary that becomes analysis.json (docs/analysis.md)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kpo_cli.analysis.config import AnalyzeConfig
from kpo_cli.analysis.source import Source
from kpo_cli.analysis.statistics import breakdowns, memory, noise_models
from kpo_cli.analysis.statistics.collect import (
    LONGEST_RUN,
    TRUNCATION,
    Collector,
    energy_of_largest,
    fitting,
    percentiles,
)
from kpo_cli.analysis.statistics.family import LEVEL
from kpo_cli.analysis.statistics.nulls import NULLS, NullResult, Nulls, nulls_of
from kpo_cli.analysis.statistics.series import RAW, RECORDED, Series, describe, own_filter, series_of, share_passed
from kpo_cli.analysis.statistics.spectrum import BINS, quotient
from kpo_cli.analysis.statistics.sums import AT, COVERED, Sums, autocorrelations, statistics
from kpo_cli.errors import UserError
from kpo_cli.intervals.clusters import cluster_intervals
from kpo_cli.runs.ratios import Ratios

SCHEMA = "kpo-analysis-2"
LEVELS = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)
REPRODUCES = 1e-3
"""A rebuilt filter stands for the recorded one if it is so close, relative to the largest recorded value: the record is
float32, and an adaptive filter's parameters move on from the ones that are stored."""


@dataclass(frozen=True)
class Analysis:
    """What was found, and the responses that figures and the report show."""

    found: dict[str, Any]
    sample: Ratios
    series: list[Series]


@dataclass(frozen=True)
class _Pass:
    """One pass over the records of a source."""

    collector: Collector
    keys: NDArray[np.int64]
    """(C, 3): step, prompt, mini-batch."""
    clusters: Sums
    """(C, S, K)."""

    def pooled(self, chosen: Any) -> Sums:
        """(S, K): the sums of some of the clusters."""
        return self.clusters[chosen].sum(0)

    @property
    def off_policy(self) -> NDArray[np.bool_]:
        return self.keys[:, 2] > 0


def analyse(
    source: Source,
    config: AnalyzeConfig,
    file_read: Callable[[], None] = lambda: None,
    stage: Callable[[str], None] = lambda name: None,
) -> Analysis:
    """Read all records of `source` once and compute everything. The callbacks hear of each file and of each
    later stage.

    Raises UserError if nothing could be read.
    """
    done, series = _read(source, config, file_read)
    sample = done.collector.reservoir.kept
    off_policy = done.pooled(done.off_policy)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "source": _source_facts(source, done),
        "settings": {**dataclasses.asdict(config), "runs": [source.name]},
        "filters": {},
        "on_policy": _on_policy(done, series),
        "rounding": _rounding(source),
    }
    if sample is None:
        found |= {"mini_batches": _by_mini_batch(done, series), "steps": [], "subsample": None}
        return Analysis(found, _empty(), series)
    series = [_rebuilt(each, source, sample) for each in series]
    null_sample = sample.rows(slice(fitting(sample.lengths, config.nulls.tokens)))
    stage("nulls")
    nulls = nulls_of(null_sample, series, config)
    stage("intervals")
    for i, each in enumerate(series):
        clusters = done.clusters[done.off_policy][:, i]
        own_intervals = cluster_intervals(clusters, statistics, COVERED)
        entry = _entry(each, off_policy[i], own_intervals, nulls.series.get(each.name, {}) if nulls else {})
        found["filters"][each.name] = entry | _distributions(done.collector, i, off_policy[i])
        found["filters"][each.name]["share_passed"] = _passed(each, null_sample, off_policy[0])
    stage("noise models")
    found |= {
        "subsample": {"responses": len(null_sample), "tokens": int(null_sample.mask.sum()), "seed": config.seed},
        "mini_batches": _by_mini_batch(done, series),
        "steps": _by_step(done, series),
        "breakdowns": _breakdowns(done.collector, series),
        "clip_what_if": _what_if(done.collector, series, off_policy[0][AT["tokens"]]),
        "mismatch": _mismatch(done.collector, float(found["filters"][RAW]["std"]["value"] or 0.0)),
        "order": _order(nulls, series),
        "noise": _noise(sample, null_sample, nulls, config),
    }
    return Analysis(found, sample, series)


def _read(source: Source, config: AnalyzeConfig, file_read: Callable[[], None]) -> tuple[_Pass, list[Series]]:
    collector: Collector | None = None
    series = series_of(config)
    last: Path | None = None
    for path, batch in source.batches():
        if collector is None:
            if batch.filtered_log_ratio is not None:
                series.insert(1, Series(RECORDED, "what the run's own filter made of them"))
            collector = Collector(series, config)
        if path != last:
            file_read()
        last = path
        if series[1:] and series[1].name == RECORDED and batch.filtered_log_ratio is None:
            source.problem(path, "it has no filtered_log_ratio, unlike the files before it")
            continue
        collector.add(batch, _own_widths(source.metadata))
    if collector is None or not collector.responses:
        raise UserError(_nothing(source))
    return _Pass(collector, *collector.clusters()), series


def _nothing(source: Source) -> str:
    if source.problems:
        others = f" (and {len(source.problems) - 1} more files)" if len(source.problems) > 1 else ""
        return f"nothing to analyse in {source.name}: {source.problems[0].removesuffix('; left out')}{others}"
    return f"{source.run or source.name} has no ratio records; train with trainer.ratios_every=1"


def _own_widths(metadata: dict[str, Any]) -> tuple[float, float] | None:
    low, high = metadata.get("eps_low"), metadata.get("eps_high")
    surrogate = metadata.get("surrogate")
    if not isinstance(surrogate, dict) or surrogate.get("name") != "clip":
        return None  # the widths of other surrogates mean something else
    return (float(low), float(high)) if isinstance(low, float) and isinstance(high, float) else None


def _rebuilt(series: Series, source: Source, sample: Ratios) -> Series:
    """`recorded` with the filter that made it, if that can be told from the record and gives the same numbers."""
    if series.name != RECORDED or sample.filtered_log_ratio is None:
        return series
    own = own_filter(source.metadata)
    if own is None:
        return series
    recorded = sample.filtered_log_ratio.astype(np.float64)
    again = own.apply(sample.log_ratio, sample.mask, sample.old_log_probs)
    close = np.abs(again - recorded).max(initial=0.0) <= REPRODUCES * np.abs(recorded).max(initial=0.0)
    return own if close else series


def _source_facts(source: Source, done: _Pass) -> dict[str, Any]:
    collector = done.collector
    tokens = done.pooled(slice(None))[0, AT["tokens"]]
    off_policy = done.pooled(done.off_policy)[0, AT["tokens"]]
    names = ("method", "seed", "filter", "surrogate", "eps_low", "eps_high", "temperature", "tokenizer")
    return {
        "name": source.name,
        "files": len(source.files),
        "problems": source.problems,
        "steps": sorted({int(step) for step in done.keys[:, 0]}),
        "responses": collector.responses,
        "off_policy_responses": collector.off_policy_responses,
        "tokens": int(tokens),
        "off_policy_tokens": int(off_policy),
        "mean_off_policy_length": off_policy / collector.off_policy_responses if off_policy else None,
        "mini_batches_recorded": collector.has_mini_batches,
        **{name: source.metadata.get(name) for name in names},
    }


def _rounding(source: Source) -> dict[str, Any] | None:
    """What 16-bit arithmetic did to log-ratios, over the tokens of all steps that it was measured in."""
    measured = list(source.roundings.values())
    if not measured:
        return None
    weights = np.array([facts["tokens"] for facts in measured])

    def rms(name: str) -> float:
        return float(np.average([facts[name] ** 2 for facts in measured], weights=weights) ** 0.5)

    width = measured[-1]["width"]
    filtered = rms("filtered_error")
    return {
        "dtype": source.metadata.get("dtype"),
        "steps": len(measured),
        "responses": int(sum(facts["responses"] for facts in measured)),
        "tokens": int(weights.sum()),
        "z": rms("z"),
        "z_error": rms("z_error"),
        "filtered_error": filtered,
        "width": width,
        "widths": filtered / width if width else None,
        "decided": float(np.average([facts["decided"] for facts in measured], weights=weights)),
    }


def _on_policy(done: _Pass, series: list[Series]) -> dict[str, Any]:
    """The mini-batch that no optimizer step came before: raw and filtered, and whether z is exactly 0 there."""
    sums = done.pooled(~done.off_policy)
    tokens, nonzero = sums[0, AT["tokens"]], sums[0, AT["x2"]] > 0
    values = {each.name: _values(sums[i]) for i, each in enumerate(series)} if tokens else {}
    return {"tokens": int(tokens), "identically_zero": bool(tokens and not nonzero), "filters": values}


def _values(sums: Sums) -> dict[str, float]:
    return {name: float(value) for name, value in statistics(sums).items()}


def _entry(
    series: Series, sums: Sums, own: dict[str, tuple[float, float]] | None, nulls: dict[str, NullResult]
) -> dict[str, Any]:
    """A series as in analysis.json: value, interval and nulls of each statistic."""
    entry: dict[str, Any] = {"description": describe(series)}
    for name, value in _values(sums).items():
        entry[name] = {"value": value, "ci": list(own[name]) if own and name in own else None}
        for kind in NULLS:
            null = nulls[kind].statistics[name] if kind in nulls else None
            entry[name][kind] = None if null is None else dataclasses.asdict(null)
    entry["curves"] = {
        kind: {
            "autocorrelation": null.autocorrelation["z"].tolist(),
            "sign_autocorrelation": null.autocorrelation["sign"].tolist(),
            "spectrum": null.spectrum.tolist(),
            "run_lengths": null.run_lengths.tolist(),
        }
        for kind, null in nulls.items()
    }
    return entry


def _distributions(collector: Collector, i: int, sums: Sums) -> dict[str, Any]:
    """What cannot be said in one number: run lengths, autocorrelation, spectrum, percentiles."""
    runs, off_policy_runs = collector.run_lengths[i]
    correlation = autocorrelations(sums, collector.lags[i])
    return {
        "run_lengths": {
            "median": _median(runs),
            "median_off_policy": _median(off_policy_runs),
            "longest_counted": LONGEST_RUN,
            "counts": _sparse(runs),
            "off_policy_counts": _sparse(off_policy_runs),
        },
        "autocorrelation_by_lag": {name: values.tolist() for name, values in correlation.items()},
        "spectrum": {
            "frequency": [(bin + 0.5) / (2 * BINS) for bin in range(BINS)],
            "relative_to_white_noise": quotient(*collector.spectrum[i]).tolist(),
        },
        "percentiles": percentiles(collector.magnitudes[i], LEVELS),
        "energy_of_largest_percent": energy_of_largest(collector.magnitudes[i], 0.01),
    }


def _sparse(counts: NDArray[np.float64]) -> dict[str, int]:
    return {str(length): int(counts[length]) for length in np.flatnonzero(counts)}


def _median(counts: NDArray[np.float64]) -> float | None:
    total = counts.sum()
    if not total:
        return None
    middle = np.searchsorted(counts.cumsum(), [(total - 1) // 2 + 1, total // 2 + 1])
    return float(middle.mean())


def _passed(series: Series, sample: Ratios, raw: Sums) -> float | None:
    """Share of a constant shift of one standard deviation of z; None where there is no filter to ask."""
    size = float(statistics(raw)["std"])
    return share_passed(series, sample, size) if series.ratio_filter is not None and size > 0 else None


def _by_mini_batch(done: _Pass, series: list[Series]) -> list[dict[str, Any]]:
    """All statistics for each mini-batch of the rollout batch; 0 is on-policy."""
    table = []
    for index in sorted({int(i) for i in done.keys[:, 2]}) if done.collector.has_mini_batches else []:
        sums = done.pooled(done.keys[:, 2] == index)
        values = {each.name: _values(sums[i]) for i, each in enumerate(series)}
        table.append({"mini_batch": index, "tokens": int(sums[0, AT["tokens"]]), "filters": values})
    return table


def _by_step(done: _Pass, series: list[Series]) -> list[dict[str, Any]]:
    """The same for each recorded step, over off-policy responses."""
    table = []
    for step in sorted({int(step) for step in done.keys[done.off_policy, 0]}):
        sums = done.pooled(done.off_policy & (done.keys[:, 0] == step))
        values = {each.name: _values(sums[i]) for i, each in enumerate(series)}
        table.append({"step": step, "tokens": int(sums[0, AT["tokens"]]), "filters": values})
    return table


def _breakdowns(collector: Collector, series: list[Series]) -> dict[str, Any]:
    clip = collector.own_widths is not None
    return {
        kind: {
            each.name: breakdowns.rows(kind, sums[i], clip, collector.has_advantages) for i, each in enumerate(series)
        }
        for kind, sums in collector.breakdowns.items()
        if kind in collector.available
    }


def _what_if(collector: Collector, series: list[Series], tokens: float) -> list[dict[str, Any]]:
    """Shares of off-policy tokens above and below each interval, and of those whose gradient would be cut."""
    return [
        {
            "filter": each.name,
            "eps_low": low,
            "eps_high": high,
            "above": collector.clipped[i, j, 0] / tokens,
            "below": collector.clipped[i, j, 1] / tokens,
            "cut": collector.clipped[i, j, 2] / tokens if collector.has_advantages else None,
        }
        for i, each in enumerate(series)
        for j, (low, high) in enumerate(collector.widths)
    ]


def _mismatch(collector: Collector, drift: float) -> dict[str, Any] | None:
    """The sampling engine's log-probabilities against the trainer's, old weights both: no part of the drift z."""
    m = collector.mismatch
    if not m.tokens:
        return None
    mean = m.total / m.tokens
    return {
        "tokens": int(m.tokens),
        "mean": mean,
        "std": max(m.squares / m.tokens - mean**2, 0.0) ** 0.5,
        "largest": m.largest,
        "kl_k3": m.k3 / m.tokens,
        "truncation": TRUNCATION,
        "truncated": m.truncated / m.tokens,
        "drift_std": drift,
    }


def _order(nulls: Nulls | None, series: list[Series]) -> dict[str, Any] | None:
    """Each null's family and what is outside it; the verdict is that of the shuffled one. None without nulls."""
    if nulls is None:
        return None
    found: dict[str, Any] = {}
    for kind, family in nulls.families.items():
        outside = [key for key, one in family.judged.items() if one is not None and one.p_adjusted <= LEVEL]
        found[kind] = {
            "tests": family.size,
            "p_value": family.p_value,
            "outside": [[RAW, key] if isinstance(key, str) else list(key) for key in outside],
            "statistics": {
                name: None if one is None else dataclasses.asdict(one) for name, one in nulls.order[kind].items()
            },
        }
    shuffled = nulls.families["null_shuffled"]
    verdict = "order" if shuffled.p_value <= LEVEL else "no order seen" if shuffled.refutable else "cannot tell"
    return {"verdict": verdict, "level": LEVEL, **found}


def _noise(sample: Ratios, null_sample: Ratios, nulls: Nulls | None, config: AnalyzeConfig) -> dict[str, Any] | None:
    """Noise models of the raw log-ratios, on subsamples."""
    if not config.likelihood_tokens:
        return None
    chosen = sample.rows(slice(fitting(sample.lengths, config.likelihood_tokens)))
    held = noise_models.held_out(chosen)
    against = memory.contest(null_sample) if nulls else None
    return {"drift": noise_models.drift(chosen, nulls, held, against), "memory": against, "held_out": held}


def _empty() -> Ratios:
    return Ratios(log_ratio=np.zeros((0, 1)), mask=np.zeros((0, 1), bool), step=np.zeros(0, int))
