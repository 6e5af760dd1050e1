"""What the intervals of evaluations and comparisons cover, and how often the claims in words are wrong and are found.

    python benchmarks/intervals.py [--quick] [--write]

Problems and runs are made up, so that the truth is known. Minutes on one core; --quick is for a look and shows noise.
--write puts the tables into docs/claims.md, between the markers of this command.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import binom

from kpo_cli.analysis.statistics.sums import COVERED, LIMITS, response_sums, statistics
from kpo_cli.intervals import accuracy
from kpo_cli.intervals.clusters import cluster_intervals
from kpo_cli.intervals.means import mean_interval

COMMAND = "python benchmarks/intervals.py"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "claims.md"
SAMPLES = 16
PROBLEMS = (15, 30, 200, 500)
SEEDS = (2, 3, 5)
CLUSTERS = (6, 12, 24, 100)
RESPONSES, TOKENS = 4, 30

Draw = Callable[[np.random.Generator, int], Any]
Table = tuple[str, list[str], list[list[str]]]

DIFFICULTIES: dict[str, Draw] = {
    "spread: beta(.6, .9)": lambda rng, n: rng.beta(0.6, 0.9, n),
    "near 0: beta(.3, 6)": lambda rng, n: rng.beta(0.3, 6, n),
    "near 1: beta(5, 1)": lambda rng, n: rng.beta(5, 1, n),
    "near 1: beta(6, .8)": lambda rng, n: rng.beta(6, 0.8, n),
    "bimodal: .03 or .97": lambda rng, n: np.where(rng.random(n) < 0.5, 0.97, 0.03),
    "all but solved: .995, 5% .5": lambda rng, n: np.where(rng.random(n) < 0.05, 0.5, 0.995),
    "all but unsolved: .005, 3% .9": lambda rng, n: np.where(rng.random(n) < 0.03, 0.9, 0.005),
}
"""The chance of a right answer to each problem."""


def moved(chances: Any, shift: float) -> Any:
    """All odds multiplied by exp(shift)."""
    return expit(logit(np.clip(chances, 1e-12, 1 - 1e-12)) + shift)


EFFECTS: dict[str, Draw] = {
    "none": lambda rng, chances: chances,
    "odds doubled": lambda rng, chances: moved(chances, np.log(2)),
    "5% become solved": lambda rng, chances: np.where(rng.random(len(chances)) < 0.05, 1.0, chances),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    accuracy.DRAWS = 1000
    trials = 10 if options.quick else 200
    made, begun = [], time.monotonic()
    for table in tables(trials):
        made.append(markdown(table))
        print(made[-1], flush=True)
    print(f"{time.monotonic() - begun:.0f} s")
    if options.write:
        write(PAGE, COMMAND, "\n".join(made))


def tables(trials: int) -> Iterator[Table]:
    yield claims(trials)
    yield over_problems(trials)
    yield of_differences(trials)
    yield over_seeds(trials * 20)
    yield over_clusters(trials)
    yield of_shares()


def markdown(table: Table) -> str:
    title, head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(page: Path, command: str, text: str) -> None:
    """Put `text` between the page's markers of a command."""
    begin, end = f"<!-- {command} -->", f"<!-- end of {command} -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    found, count = pattern.subn(lambda _: f"{begin}\n\n{text}\n{end}", page.read_text("utf-8"))
    if count != 1:
        raise SystemExit(f"{page} needs the lines {begin} and {end} once")
    page.write_text(found, "utf-8")


def sampled(rng: np.random.Generator, chances: Any) -> Any:
    """(Q, SAMPLES) verdicts."""
    return rng.random((len(chances), SAMPLES)) < chances[:, None]


def cell(hits: int, trials: int, width: float) -> str:
    return f"{100 * hits / trials:.1f} ({width / trials:.{3 if width / trials > 0.03 else 4}f})"


def over_problems(trials: int) -> Table:
    """avg@n and pass@k: the truth is the mean over all problems that could be asked."""
    rows = []
    for name, draw in DIFFICULTIES.items():
        everything = draw(np.random.default_rng(1), 1_000_000)
        truths = [float(np.mean(1 - (1 - everything) ** k)) for k in (1, 4, 8)]
        for count in PROBLEMS:
            rng = np.random.default_rng([2, count])
            hits, widths, deviating = [0, 0, 0], [0.0, 0.0, 0.0], np.zeros(3)
            for trial in range(trials):
                correct = sampled(rng, draw(rng, count))
                for i, k in enumerate((1, 4, 8)):
                    found = accuracy.pass_at_k(correct, k, trial)
                    hits[i] += found.low <= truths[i] <= found.high
                    widths[i] += found.high - found.low
                    deviating[i] += accuracy.deviating(pass_values(correct, k))
            cells = [f"{cell(h, trials, w)}, {d / trials:.0f}" for h, w, d in zip(hits, widths, deviating, strict=True)]
            rows.append([name, str(count), *cells])
    title = (
        f"**Intervals over problems**, {SAMPLES} samples each: how often they hold the truth, in percent "
        f"(mean width), and the effective number of problems that deviate from the median. {trials} trials."
    )
    return title, ["difficulty", "problems", "avg@16", "pass@4", "pass@8"], rows


def pass_values(correct: Any, k: int) -> Any:
    """pass@k of each problem: one less the chance that k of its samples, drawn without replacement, are all wrong."""
    wrong, n = (~correct).sum(axis=1)[:, None], correct.shape[1]
    return 1 - np.prod(np.maximum(wrong - np.arange(k), 0) / (n - np.arange(k)), axis=1)


def of_differences(trials: int) -> Table:
    rows = []
    for name, draw in DIFFICULTIES.items():
        everything = draw(np.random.default_rng(1), 1_000_000)
        for count in PROBLEMS:
            cells = []
            for i, change in enumerate(EFFECTS.values()):
                truth = float(np.mean(change(np.random.default_rng(3), everything) - everything))
                rng, hits, width = np.random.default_rng([4, count, i]), 0, 0.0
                for trial in range(trials):
                    chances = draw(rng, count)
                    first, second = (sampled(rng, c).mean(axis=1) for c in (change(rng, chances), chances))
                    found = accuracy.mean_over_problems(first - second, trial, (-1.0, 1.0))
                    hits += found.low <= truth <= found.high
                    width += found.high - found.low
                cells.append(cell(hits, trials, width))
            rows.append([name, str(count), *cells])
    title = f"**Intervals of a difference of avg@{SAMPLES}**, paired by problem, by what changed. {trials} trials."
    return title, ["difficulty", "problems", *EFFECTS], rows


def claims(trials: int) -> Table:
    """Each claim in words, at no difference and at one."""
    rows = []
    for count in (30, 200):
        sizes, powers = [], []
        for draw in DIFFICULTIES.values():
            size, power = paired_claims(draw, count, trials)
            sizes.append(size)
            powers.append(power)
        claim = "`p` below 0.05; power: at what the evaluation calls `detectable (80% power)`"
        rows.append([claim, f"{count} problems", "5%", span(sizes), span(powers)])
    for seeds in SEEDS:
        sizes, powers = [], []
        for level in (0.5, 0.85, 0.99):
            sizes.append(seed_claims(level, 0.0, seeds, trials * 20)[0])
        for level in (0.5, 0.8):
            powers.append(seed_claims(level, 0.1, seeds, trials * 20)[0])
        rows.append(["A *ends* x *above* B", f"{seeds} seeds", "5% a pair", span(sizes), f"{span(powers)} at .1"])
    title = (
        "**Claims.** Size: how often it is made where nothing differs; power: how often where something does. From the "
        f"smallest to the largest over the difficulties below ({trials} trials each), or over accuracies of .5 "
        f"to .99 of 200 held-out problems ({trials * 20} trials each; runs of one setting differ by a deviation "
        "of .02 and by sampling)."
    )
    return title, ["claim", "of", "level", "size", "power"], rows


def span(values: list[float]) -> str:
    known = [100 * value for value in values if np.isfinite(value)]
    return f"{min(known):.1f} to {max(known):.1f}%" if known else "-"


def paired_claims(draw: Draw, count: int, trials: int) -> tuple[float, float]:
    """How often p < 0.05 where nothing differs, and where the difference is the `detectable` of such a comparison."""
    everything = draw(np.random.default_rng(1), 100_000)
    side = 1 if everything.mean() <= 0.5 else -1
    shifts = np.linspace(0, 8, 200)
    gains = np.array([abs(np.mean(moved(everything, side * shift) - everything)) for shift in shifts])
    rng, wrong, right, stated = np.random.default_rng([5, count]), 0, 0, 0

    def compared(shift: float, trial: int) -> accuracy.Paired:
        chances = draw(rng, count)
        first, second = (sampled(rng, c).mean(axis=1) for c in (moved(chances, shift), chances))
        return accuracy.paired(first, second, SAMPLES, trial)

    for trial in range(trials):
        found = compared(0.0, trial)
        wrong += found.p_value < 0.05
        if found.detectable < gains[-1]:
            stated += 1
            shift = side * float(np.interp(found.detectable, gains, shifts))
            right += compared(shift, trial).p_value < 0.05
    return wrong / trials, right / stated if stated > trials / 2 else np.nan


def seed_claims(level: float, gain: float, seeds: int, trials: int) -> tuple[float, float, float]:
    """How often a difference is claimed, how often its interval holds the truth, and its width; 200 problems."""
    rng, claimed, hits, width = np.random.default_rng([6, seeds, int(100 * level)]), 0, 0, 0.0
    for _ in range(trials):
        first, second = (shares(rng, level + extra, seeds) for extra in (gain, 0.0))
        low, high = mean_interval(first - second, (-1.0, 1.0), np.sqrt(2) / 200)["ci"]
        claimed += not low <= 0 <= high
        hits += low <= gain <= high
        width += high - low
    return claimed / trials, hits / trials, width / trials


def shares(rng: np.random.Generator, level: float, seeds: int) -> Any:
    """Final accuracies: runs differ by a standard deviation of .02 (less near 0 and 1), and by 200 draws each."""
    spread = min(0.02, (1 - level) / 3)
    return rng.binomial(200, np.clip(level + spread * rng.uniform(-(3**0.5), 3**0.5, seeds), 0, 1)) / 200


def over_seeds(trials: int) -> Table:
    rows = []
    for level in (0.5, 0.85, 0.99):
        for seeds in SEEDS:
            rng, hits, width = np.random.default_rng([7, seeds]), 0, 0.0
            for _ in range(trials):
                low, high = mean_interval(shares(rng, level, seeds), (0.0, 1.0), 1 / 200)["ci"]
                hits += low <= level <= high
                width += high - low
            _, held, between = seed_claims(level, 0.0, seeds, trials)
            rows.append(
                [
                    f"{level}",
                    str(seeds),
                    cell(hits, trials, width),
                    cell(round(held * trials), trials, between * trials),
                ]
            )
    title = (
        "**Intervals over seeds** (Student's t): accuracies of 200 problems, and their differences where nothing "
        f"differs. {trials} trials."
    )
    return title, ["accuracy", "seeds", "mean", "difference"], rows


def prompts(rng: np.random.Generator, count: int) -> Any:
    """(count, columns): sums of prompts whose log-ratios differ in size (lognormal, .5), mean and autocorrelation."""
    scale = 0.1 * np.exp(0.5 * rng.normal(size=(count, 1, 1)))
    mean, memory = 0.02 * rng.normal(size=(count, 1, 1)), np.clip(0.2 + 0.2 * rng.normal(size=(count, 1, 1)), -0.8, 0.8)
    noise = rng.normal(size=(count, RESPONSES, TOKENS))
    for t in range(1, TOKENS):
        noise[..., t : t + 1] = memory * noise[..., t - 1 : t] + np.sqrt(1 - memory**2) * noise[..., t : t + 1]
    values = (scale * noise + mean).reshape(-1, TOKENS)
    power = np.abs(np.fft.rfft(values))[:, 1:] ** 2
    sums = response_sums(values, np.ones(values.shape, bool), 0.0, power[:, :1].sum(1) / power.sum(1))
    return sums.reshape(count, RESPONSES, -1).sum(1)


def over_clusters(trials: int) -> Table:
    everything = sum(prompts(np.random.default_rng([8, i]), 20_000).sum(0) for i in range(5))
    truth = {name: float(value) for name, value in statistics(everything).items()}
    hits = {name: dict.fromkeys(CLUSTERS, 0) for name in truth}
    widths: dict[str, dict[int, list[float]]] = {name: {count: [] for count in CLUSTERS} for name in truth}
    for count in CLUSTERS:
        rng = np.random.default_rng([9, count])
        for _ in range(trials):
            found = cluster_intervals(prompts(rng, count), statistics, LIMITS)
            assert found is not None
            for name, (low, high) in found.items():
                hits[name][count] += low <= truth[name] <= high
                widths[name][count].append(high - low)
    rows = [
        [
            name if name in COVERED else f"{name} (not printed)",
            f"{truth[name]:.4g}",
            *(cell(hits[name][n], trials, trials * float(np.median(widths[name][n]))) for n in CLUSTERS),
        ]
        for name in truth
        if name != "off_policy_share"  # always 1 here
    ]
    title = (
        f"**Intervals over prompts** (`kpo analyze`; {RESPONSES} responses of {TOKENS} tokens; prompts differ in the "
        f"size, mean and autocorrelation of their log-ratios), with median widths. {trials} trials."
    )
    return title, ["statistic", "truth", *(f"{n} prompts" for n in CLUSTERS)], rows


def of_shares() -> Table:
    rows = []
    for count in (30, 200):
        right = np.arange(count + 1)
        low, high = np.array([accuracy.proportion(k / count, count) for k in right]).T
        chances = np.linspace(0.0005, 0.5, 1000)
        covered = [binom.pmf(right, count, p)[(low <= p) & (p <= high)].sum() for p in chances]
        rows.append([str(count), f"{100 * min(covered):.1f}", f"{100 * float(np.mean(covered)):.1f}"])
    return (
        "**Interval of one share** (`kpo train`), exact over chances from 0 to .5.",
        ["problems", "least", "mean"],
        rows,
    )


if __name__ == "__main__":
    main()
