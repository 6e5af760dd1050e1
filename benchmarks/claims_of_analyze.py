"""What the verdicts of `kpo analyze` are worth: how often each is right and wrong on data of known kinds.

    python benchmarks/claims_of_analyze.py [--trials 100] [--quick] [--seed 60000] [--results claims.jsonl]

Every kind of data is made `trials` times (10 with --quick) and goes the whole way, from a file to the words. Results
are added to a file, one line a data set, and what stands there is not made again. Prints the tables of docs/claims.md.
"""

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from kpo_cli.analysis.config import AnalyzeConfig, analyze_config
from kpo_cli.analysis.report.words import summary
from kpo_cli.analysis.source import find_source
from kpo_cli.analysis.statistics.analyse import analyse
from kpo_cli.cli.compose import conf_dir

Array = np.ndarray
MINI_BATCHES = 4


def noise_of(miss: Array) -> Array:
    """What the built-in policy's log-ratios look like: standard deviation by 1 - p."""
    return np.sqrt(0.86 * miss**2.92) + 1e-6


def white(rng: np.random.Generator, miss: Array) -> Array:
    return rng.normal(size=miss.shape) * noise_of(miss)


def heavy_tailed(rng: np.random.Generator, miss: Array) -> Array:
    return rng.standard_t(2.2, miss.shape) * noise_of(miss)


def autoregression(phi: float) -> Callable[[np.random.Generator, Array], Array]:
    def make(rng: np.random.Generator, miss: Array) -> Array:
        z = rng.normal(size=miss.shape)
        for t in range(1, miss.shape[1]):
            z[:, t] = phi * z[:, t - 1] + math.sqrt(1 - phi**2) * z[:, t]
        return 0.1 * z

    return make


def walk(rng: np.random.Generator, shape: tuple[int, int], q: float) -> Array:
    return np.cumsum(rng.normal(size=shape) * math.sqrt(q), 1)


def walk_in_constant_noise(rng: np.random.Generator, miss: Array) -> Array:
    return 0.1 * rng.normal(size=miss.shape) + walk(rng, miss.shape, 1e-4)


def walk_in_shaped_noise(rng: np.random.Generator, miss: Array) -> Array:
    return white(rng, miss) + walk(rng, miss.shape, 1e-7)


def periodic(rng: np.random.Generator, miss: Array) -> Array:
    """Responses have each their own phase."""
    phase = rng.uniform(0, 2 * math.pi, (len(miss), 1))
    return 0.1 * (rng.normal(size=miss.shape) + 0.6 * np.sin(phase + 2 * math.pi * np.arange(miss.shape[1]) / 6))


def positional(rng: np.random.Generator, miss: Array) -> Array:
    """A slow wave that all responses have in common, and sizes that fall along the response."""
    place = np.arange(miss.shape[1])
    common = 0.5 * np.sin(2 * math.pi * place / 40)
    return 0.1 * (rng.normal(size=miss.shape) + common) * np.exp(-place / 60)


def shifted(rng: np.random.Generator, miss: Array) -> Array:
    """Every response has a shift of its own and no order in time."""
    return 0.1 * (rng.normal(size=miss.shape) + 0.3 * rng.normal(size=(len(miss), 1)))


def identical(rng: np.random.Generator, miss: Array) -> Array:
    return np.zeros(miss.shape)


def moving_average(sizes: Callable[[Array], Array]) -> Callable[[np.random.Generator, Array], Array]:
    """MA(1): each token holds half of the noise of the one before it."""

    def make(rng: np.random.Generator, miss: Array) -> Array:
        noise = rng.normal(size=miss.shape) * sizes(miss)
        return noise + 0.5 * np.pad(noise[:, :-1], ((0, 0), (1, 0)))

    return make


def shifted_autoregression(rng: np.random.Generator, miss: Array) -> Array:
    return autoregression(0.3)(rng, miss) + 0.1 * rng.normal(size=(len(miss), 1))


def regimes(rng: np.random.Generator, miss: Array) -> Array:
    """A level that changes sides every 20 tokens in the mean."""
    side = np.cumsum(rng.random(miss.shape) < 0.05, 1) % 2 * 2 - 1
    return 0.1 * rng.normal(size=miss.shape) + 0.06 * side


def falling(rng: np.random.Generator, miss: Array) -> Array:
    """All responses sink alike."""
    return 0.1 * rng.normal(size=miss.shape) - 0.002 * np.arange(miss.shape[1])


def offset(rng: np.random.Generator, miss: Array) -> Array:
    """All tokens are shifted alike."""
    return 0.1 * rng.normal(size=miss.shape) + 0.05


@dataclass(frozen=True)
class Kind:
    make: Callable[[np.random.Generator, Array], Array]
    """Log-ratios from 1 - p of their tokens."""
    steps: int = 2
    prompts: int = 16
    """A step."""
    width: int = 80
    """Tokens of the longest response."""
    group: int = 4
    """Responses to a prompt."""


KINDS = {
    "white": Kind(white),
    "heavy-tailed": Kind(heavy_tailed),
    "a shift a response": Kind(shifted),
    "an offset of all": Kind(offset),
    "short": Kind(white, width=4),
    "few prompts": Kind(white, steps=1, prompts=4),
    "one prompt": Kind(white, steps=1, prompts=1),
    "one response": Kind(white, steps=1, prompts=1, group=1),
    "MA(1)": Kind(moving_average(lambda miss: 0.1 * np.ones(miss.shape))),
    "MA(1) in shaped noise": Kind(moving_average(noise_of)),
    "AR(0.3)": Kind(autoregression(0.3)),
    "AR(0.3) and a shift": Kind(shifted_autoregression),
    "AR(0.6)": Kind(autoregression(0.6)),
    "AR(0.95)": Kind(autoregression(0.95)),
    "few prompts, AR(0.95)": Kind(autoregression(0.95), steps=1, prompts=4),
    "AR(-0.3)": Kind(autoregression(-0.3)),
    "regimes": Kind(regimes),
    "periodic": Kind(periodic),
    "positional": Kind(positional),
    "falling": Kind(falling),
    "walk in constant noise": Kind(walk_in_constant_noise),
    "walk in shaped noise": Kind(walk_in_shaped_noise),
    "identical": Kind(identical, steps=1),
}
ORDERLESS = (
    "white",
    "heavy-tailed",
    "a shift a response",
    "an offset of all",
    "short",
    "few prompts",
    "one prompt",
    "one response",
)
SHORT_RANGE = ("MA(1)", "MA(1) in shaped noise", "AR(0.3)", "AR(0.3) and a shift", "AR(0.6)", "regimes")
FADING = (*SHORT_RANGE, "AR(0.95)", "few prompts, AR(0.95)")
DRIFTS = {"walk in constant noise": 1e-4, "walk in shaped noise": 1e-7}
DRIFTLESS = (*ORDERLESS, *FADING, "AR(-0.3)", "periodic", "positional", "falling")


def records(kind: Kind, seed: int) -> dict[str, Any]:
    """The tensors of one step; the first of four mini-batches has z = 0. One token in two is nearly sure."""
    rng = np.random.default_rng(seed)
    prompts, width, rows = kind.prompts, kind.width, kind.prompts * kind.group
    mask = np.arange(width) < rng.integers(max(2, width // 2), width + 1, (rows, 1))
    prompt = np.repeat(np.arange(prompts), kind.group)
    mini_batch = prompt * MINI_BATCHES // prompts if prompts > 1 else prompt + 1
    miss = 10 ** rng.uniform(-4, 0, (rows, width))
    z = np.where(mask & (mini_batch > 0)[:, None], kind.make(rng, miss), 0.0)
    old = np.where(mask, np.log1p(-np.minimum(miss, 0.999)), 0.0)
    floats = {"log_ratio": z, "old_log_probs": old}
    content = {name: torch.tensor(value, dtype=torch.float32) for name, value in floats.items()}
    integers = {"prompt_index": prompt, "mini_batch_index": mini_batch}
    content |= {name: torch.tensor(value, dtype=torch.int32) for name, value in integers.items()}
    return content | {"response_mask": torch.tensor(mask)}


def write_kind(folder: Path, kind: str, seed: int) -> Path:
    """Ratio records of one data set."""
    (folder / "ratios").mkdir(parents=True)
    for step in range(1, KINDS[kind].steps + 1):
        content = records(KINDS[kind], 100 * seed + step)
        metadata = {"format": '"kpo-ratios-1"', "step": str(step), "filter": '{"name": "identity"}'}
        save_file(content, folder / "ratios" / f"step-{step:06d}.safetensors", metadata)
    return folder


@cache
def configuration(*overrides: str) -> AnalyzeConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("analyze", ["runs=[RUN]", *overrides])
    return analyze_config(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]


def analysed(kind: str, seed: int, *overrides: str) -> dict[str, Any]:
    """analysis.json of one data set, its summary included."""
    with tempfile.TemporaryDirectory() as folder:
        found = analyse(find_source(write_kind(Path(folder) / "run", kind, seed)), configuration(*overrides)).found
    return {**found, "summary": summary(found)}


def said(found: dict[str, Any], kind: str) -> dict[str, Any]:
    """The verdicts, and what can be checked of them."""
    order, drift = found.get("order"), (found.get("noise") or {}).get("drift")
    if order is None:
        return {"order": "all ratios 1" if "exactly 1" in found["summary"] else "no null", "drift": "none made"}
    low, high = (drift["q_interval"] or (math.nan, math.nan)) if drift else (math.nan, math.nan)
    return {
        "order": order["verdict"],
        "flipped": order["null_sign_flipped"]["p_value"] <= order["level"],
        "drift": drift["verdict"],
        "memory": (found["noise"]["memory"] or {}).get("tokens") if drift and drift["verdict"] == "fades" else None,
        "q_inside": low <= DRIFTS[kind] <= high if kind in DRIFTS and drift["verdict"] == "drift" else None,
    }


def missing(trials: int, seed: int, results: Path) -> Iterator[tuple[str, int]]:
    done = {(line["kind"], line["seed"]) for line in lines(results)}
    for trial in range(trials):
        yield from ((kind, seed + trial) for kind in KINDS if (kind, seed + trial) not in done)


def lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []


def tables(found: list[dict[str, Any]]) -> str:
    """Markdown: each claim with its size and power, and the verdicts by kind of data."""
    ordered = [kind for kind in KINDS if kind not in (*ORDERLESS, "identical")]
    unfading = {*KINDS} - {*FADING, "periodic", "identical"}
    independent = [kind for kind in ORDERLESS if kind not in ("a shift a response", "an offset of all")]
    inside = [line["q_inside"] for line in found if line.get("q_inside") is not None]

    def rate(key: str, verdict: Any, kinds: Iterable[str]) -> str:
        own = [line[key] == verdict for line in found if line["kind"] in kinds and key in line]
        return f"{share(sum(own), len(own))} of {len(own)}"

    text = ["| claim | level | said of data where it is wrong | said of data where it is right |", "|---|---|---|---|"]
    rows = [
        ("There is order in time", "5%", rate("order", "order", ORDERLESS), rate("order", "order", ordered)),
        ("No order in time is seen", "-", rate("order", "no order seen", ordered),
         rate("order", "no order seen", ORDERLESS)),
        ("a star beside flipped signs", "5%", rate("flipped", True, independent), rate("flipped", True, ordered)),
        ("There is a drift", "5%", rate("drift", "drift", DRIFTLESS), rate("drift", "drift", DRIFTS)),
        ("No drift that lasts is seen, but a state that fades", "5%", rate("drift", "fades", unfading),
         rate("drift", "fades", FADING)),
        ("No drift is seen", "-", rate("drift", "no drift seen", (*DRIFTS, *FADING)),
         rate("drift", "no drift seen", unfading - {*DRIFTS})),
        ("Q lies in its 95% interval", "5%", "", f"{share(sum(inside), len(inside))} of {len(inside)}"),
        ("All ratios are exactly 1", "exact", rate("order", "all ratios 1", {*KINDS} - {"identical"}),
         rate("order", "all ratios 1", ["identical"])),
    ]  # fmt: skip
    text += [f"| {' | '.join(row)} |" for row in rows]
    text += [
        "",
        "| data | sets | order | no order seen | cannot tell | drift | fades | no drift seen | not determined |",
    ]
    text += ["|---|---|---|---|---|---|---|---|---|"]
    for kind in KINDS:
        own = [line for line in found if line["kind"] == kind]
        order, drift = Counter(line["order"] for line in own), Counter(line["drift"] for line in own)
        memories = [line["memory"] for line in own if line.get("memory")]
        cells = [order["order"], order["no order seen"], order["cannot tell"]]
        cells += [drift["drift"], drift["fades"], drift["no drift seen"], drift["not determined"]]
        shown = [share(cell, len(own)) for cell in cells]
        shown[4] += f" ({np.median(memories):.2g})" if memories else ""
        text.append(f"| {kind} | {len(own)} | {' | '.join(shown)} |")
    return "\n".join(text)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=60000)
    parser.add_argument("--results", type=Path, default=Path("claims.jsonl"))
    parser.add_argument("overrides", nargs="*", help="settings of kpo analyze")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for kind, seed in missing(10 if given.quick else given.trials, given.seed, given.results):
        line = {"kind": kind, "seed": seed, **said(analysed(kind, seed, *given.overrides), kind)}
        with given.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    print(tables(lines(given.results)))


if __name__ == "__main__":
    main()
