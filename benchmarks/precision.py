"""How much of a log-ratio is arithmetic: z, what each method's filter leaves of it, and gradients, against float64.

    python benchmarks/precision.py [--shapes 64x8 ...] [--model DIR ...] [--lrs 1e-6 1e-5] [--results FILE.jsonl]
    python benchmarks/precision.py --table FILE.jsonl ...          # the tables of earlier runs, together
    python benchmarks/precision.py --lengths                       # what filters leave of noise, by length of responses
    python benchmarks/precision.py --quick                         # that it runs: seconds

Models: shapes of Qwen3 (hidden size x layers) with random weights, a directory of transformers, or `builtin`, the
built-in policy behind the 30 steps of a `kpo train`. Random weights are scaled so that every product keeps its
size and logits have a standard deviation of 3. A seed is other random weights, or other problems; and other samples.

For each seed the policy samples some mini-batches at temperature 1. In each group of responses a half, drawn at
random, is right. AdamW's moments are warmed on all mini-batches but two (in float32, lr 0, the defaults of
`kpo train`), then one step is made on the next at each learning rate. On the last mini-batch, which that step did not
see, z is the log-probability behind the step minus that before it, in each arithmetic and in float64, from the same
masters. `checkpoint` masters lie on the grid of bf16, as released weights do; `trained` ones anywhere in their cells.

- z: its standard deviation. error: root mean square of z minus float64's. switches: neighbours of different sign.
- noise: root mean square of the filtered z minus float64's filtered z, in the method's narrower clip width.
- differ: share of tokens that one of the two cuts and the other does not.
- white: noise over what errors of that size would leave if those of different tokens had nothing in common.
- gradient: |g - g64| / |g64| of the policy gradient at z = 0.
- seconds of a forward and backward pass for each packed token (of processor time on a CPU), and bytes at its peak
  beside the masters, by count.

Kernels are the device's. A CPU's 16-bit products are made of float32 ones here, so its seconds say nothing of a GPU's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from arithmetics import (
    ARITHMETICS,
    REFERENCE,
    Masters,
    Pass,
    changed_share,
    masters_of,
    on_grid,
    packed_tokens,
    spread,
)
from gpu_parts import composed
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from kpo_cli.analysis.statistics.signs import sign_statistics
from kpo_cli.core import Objective, group_normalised, load_objective
from kpo_cli.core.rounding import Rounding
from kpo_cli.data.load import load_problems
from kpo_cli.data.prompts import PromptBuilder
from kpo_cli.errors import UserError
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.fidelity import choose_way
from kpo_cli.policy.load import choose_kernels, load_policy
from kpo_cli.rollout import HFSampler

SHAPES = ("64x4", "64x8", "64x16", "64x32", "128x8", "256x8")
BUILTIN = "builtin"
METHODS: dict[str, Objective] = {
    "grpo": load_objective("grpo"),
    "grpo_tight": load_objective("grpo_tight"),
    "gspo": load_objective("gspo"),
    "kpo": load_objective("kpo"),
    "kpo, 100 tokens": load_objective("kpo", time_constant=100),
    "kpo, 30 tokens": load_objective("kpo", time_constant=30),
}
"""Time constants of conf/: the paper's (1,000 tokens), that of kpo_unclipped, and the built-in task's."""
GROUP, WARM = 4, 3
VOCABULARY, PROMPT, LOGITS = 2048, 16, 3.0
"""Of random models: tokens, tokens in a prompt, standard deviation of logits."""
LENGTHS = (64, 256, 1024, 4096)
SPREAD = 1_000_000
"""Added to a seed where weights are spread: the random weights themselves came from the seed alone."""
TENTH = 0.1
Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A policy and what it is asked."""

    name: str
    model: Any
    """float32, with packed attention."""
    prompts: list[list[int]]
    stop_ids: Sequence[int]


def random_source(shape: str, seed: int, prompts: int, device: str) -> Source:
    """Every matrix keeps the size of what passes through; the final norm gives logits theirs."""
    hidden, layers = map(int, shape.split("x"))
    heads = max(2, hidden // 32)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(LOGITS)
    asked = torch.randint(VOCABULARY, (prompts, PROMPT)).tolist()
    return Source(shape, _packed(model.to(device), shape), asked, [VOCABULARY])  # a token that is never drawn


def policy_source(path: Path, name: str, seed: int, prompts: int, device: str) -> Source:
    """A model of transformers, asked problems of the built-in task."""
    config = composed(f"model.path='{path}'", f"model.device={device}", "model.dtype=float32", "data=arithmetic")
    try:
        policy = load_policy(config.model)
    except UserError as error:
        raise SystemExit(f"{name}: {error}") from None
    builder = PromptBuilder(policy.tokenizer, config.model, config.data)
    problems = load_problems(config.data).train[seed * prompts : (seed + 1) * prompts]
    asked = [builder.build(problem).token_ids for problem in problems]
    return Source(name, _packed(policy.model, name), asked, policy.stop_ids)


def _packed(model: Any, name: str) -> Any:
    if reason := choose_way(model).unpacked_because:
        raise SystemExit(f"{name} cannot be packed, and only packed passes are measured: {reason}")
    return model


def trained_builtin(folder: Path) -> Path:
    """The last checkpoint of a run of 30 steps."""
    run = folder / "run"
    command = [sys.executable, "-m", "kpo_cli", "train", f"run_dir={run}", "trainer.eval_every=0", "trainer.threads=1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return max(path.parent for path in (run / "checkpoints").glob("*/model.safetensors"))


def sampled(source: Source, seed: int, rows: int, length: int) -> list[Batch]:
    """Mini-batches of `rows` responses each."""
    sampler = HFSampler(
        source.model, stop_ids=source.stop_ids, temperature=1.0, max_response_tokens=length, batch_size=64
    )
    groups = sampler.sample(source.prompts, GROUP, [seed])
    draw, prompts = torch.Generator().manual_seed(seed), rows // GROUP
    batches = []
    for start in range(0, len(groups), prompts):
        order = [torch.randperm(GROUP, generator=draw) for _ in range(prompts)]
        rewards = (torch.cat(order) < GROUP // 2).float()
        advantages = group_normalised(rewards, GROUP).advantages
        part = slice(start, start + prompts)
        batches.append(make_batch(source.prompts[part], groups[part], rewards, advantages))
    return batches


def stepped(model: Any, masters: Masters, batches: list[Batch], lrs: Sequence[float]) -> dict[float, Masters]:
    """The masters behind a step on the last of `batches`, by learning rate; the others warm the moments."""
    computing = Pass(model, ARITHMETICS[0]).load(masters)
    parameters = dict(computing.model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.1, fused=True)
    for batch in batches:
        for name, gradient in computing.gradient(batch).values.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        if batch is not batches[-1]:
            optimizer.step()
    warm, after = deepcopy(optimizer.state_dict()), {}
    for lr in lrs:
        computing.load(masters)
        optimizer.load_state_dict(deepcopy(warm))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        after[lr] = masters_of(computing.model)
    return after


def measured(source: Source, seed: int, batches: list[Batch], lrs: Sequence[float]) -> Iterator[Record]:
    """Of one seed: a record of ratios for each kind of masters, arithmetic and learning rate, and one of each pass."""
    batch, own = batches[-1], masters_of(source.model)
    kinds = {"checkpoint": on_grid(own), "trained": spread(own, torch.Generator().manual_seed(SPREAD + seed))}
    for kind, masters in kinds.items():
        points = {0.0: masters} | stepped(source.model, masters, batches[:-1], lrs)
        changed = {lr: changed_share(masters, point) for lr, point in points.items()}
        truth: dict[float, Tensor] = {}
        true_gradient: Masters = {}
        for arithmetic in (REFERENCE, *ARITHMETICS):
            said = {"model": source.name, "seed": seed, "masters": kind, "arithmetic": arithmetic.name}
            computing = Pass(source.model, arithmetic)
            values = {lr: computing.load(point).log_probs(batch) for lr, point in points.items()}
            truth = truth or values
            for lr in lrs:
                ratios = (values[0.0], values[lr]), (truth[0.0], truth[lr])
                yield said | {"lr": lr, "changed": changed[lr]} | compared(*ratios, batch)
            if kind == "trained":
                gradient = computing.load(masters).gradient(batch)
                true_gradient = gradient.values if arithmetic is REFERENCE else true_gradient
                yield said | {
                    "gradient": relative(gradient.values, true_gradient),
                    "overflows": gradient.overflows,
                    "seconds": gradient.seconds / packed_tokens(batch),
                    "bytes": computing.count(batch) if seed == 0 else None,
                }


def relative(values: Masters, truth: Masters) -> float:
    """|values - truth| / |truth|."""
    apart = sum(float((values[name].double() - truth[name]).square().sum()) for name in truth)
    return (apart / sum(float(value.square().sum()) for value in truth.values())) ** 0.5


def compared(pair: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], batch: Batch) -> Record:
    """Numbers of z from log-probabilities (N, T) before and behind a step, and of each method's filter."""
    mask = batch.response_mask
    z, true_z = pair[1] - pair[0], truth[1] - truth[0]
    if not bool(z[mask].isfinite().all()):
        return {"overflown": int((~z[mask].isfinite()).sum())}
    error = rms((z - true_z)[mask])
    record: Record = {
        "z": float(z[mask].double().std()),
        "error": error,
        "switches": sign_statistics(z, mask).switch_frequency,
        "methods": {},
    }
    lengths = tuple(mask.sum(-1).tolist())
    for name, objective in METHODS.items():
        rounding = Rounding.of(objective, pair, truth, batch.advantages.to(z), mask)
        white = error * gain(objective, lengths) / objective.surrogate.eps_low
        record["methods"][name] = {
            "noise": rounding.widths,
            "white": rounding.widths / white if white else None,
            "cut": cut_share(objective, *pair, batch),
            "differ": rounding.decided,
        }
    return record


def cut_share(objective: Objective, old: Tensor, new: Tensor, batch: Batch) -> float:
    """Of tokens."""
    mask = batch.response_mask
    out = objective(log_probs=new, old_log_probs=old, advantages=batch.advantages.to(new), response_mask=mask)
    return out.metrics["clip_fraction_active"]


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def gain(objective: Objective, lengths: tuple[int, ...]) -> float:
    """What a filter leaves of noise of size 1 that is new at each token, root mean square over responses' tokens."""
    variances = torch.cat([_variances(objective, length) for length in lengths])
    return float(variances.mean().sqrt())


@cache
def _variances(objective: Objective, length: int) -> Tensor:
    """(length,): filters are linear, so they are known by what they make of a 1 at each place."""
    places = torch.eye(length, dtype=torch.float64)
    mask = torch.ones_like(places, dtype=torch.bool)
    return objective.ratio_filter(places, mask, torch.zeros_like(places)).square().sum(0)


def number(value: float) -> str:
    """Two digits, all of those before the point."""
    return f"{value:.2g}" if abs(value) < 99.5 else f"{value:.0f}"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f}"


def spanned(values: Iterable[float | None], shown: Callable[[float], str] = number) -> str:
    """The median over seeds and the range."""
    kept = [value for value in values if value is not None]
    if not kept:
        return ""
    texts = [shown(value) for value in (statistics.median(kept), min(kept), max(kept))]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} ({texts[1]}-{texts[2]})"


def grouped(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def tables(records: list[Record]) -> str:
    ratios, passes = [r for r in records if "lr" in r], [r for r in records if "gradient" in r]
    out = []
    for (model,), own in grouped(ratios, "model").items():
        out += [f"\n{model}: z, its error against float64, sign switches\n", *ratio_table(own)]
        out += [f"\n{model}: noise behind the filter in clip widths; share of decisions that differ\n"]
        out += filter_table(own)
    least = min(r["lr"] for r in ratios)
    shown = [r for r in ratios if r["lr"] == least and r["masters"] == "trained" and r["arithmetic"] != REFERENCE.name]
    out += [f"\nError of z, trained masters, lr {least:g}\n", *model_table(shown, "error")]
    out += ["\nThe same: noise behind the filter over that of errors with nothing in common\n", *white_table(shown)]
    titles = {
        "gradient": ("Relative error of the gradient", number),
        "seconds": ("Seconds for each packed token, forward and backward", number),
        "bytes": ("MiB beside the masters at the peak of a pass, by count", mebibytes),
    }
    for name, (title, form) in titles.items():
        out += [f"\n{title}\n", *model_table(passes, name, form)]
    out += [f"\nTimes that float16's loss scale was halved: {max(r['overflows'] for r in passes)} at most"]
    overflown = sum(r.get("overflown", 0) for r in ratios)
    out += [f"Log-ratios that are not finite: {overflown}"]
    return "\n".join(out)


def ratio_table(records: list[Record]) -> list[str]:
    rows = [
        [kind, f"{lr:g}", name, *(spanned(r.get(column) for r in own) for column in ("z", "error", "switches"))]
        for (kind, lr, name), own in _by_step(records)
    ]
    changed = {key: spanned((r["changed"] for r in own), "{:.2%}".format) for key, own in _steps(records).items()}
    said = "; ".join(f"{kind}, lr {lr:g}: {share}" for (kind, lr), share in changed.items())
    return [
        *lines(("masters", "lr", "arithmetic", "z", "error", "switches"), rows),
        f"\nWeights whose bf16 value the step changed: {said}",
    ]


def _by_step(records: list[Record]) -> list[tuple[tuple[Any, ...], list[Record]]]:
    """Sorted by masters and learning rate; arithmetics as they came."""
    return sorted(grouped(records, "masters", "lr", "arithmetic").items(), key=lambda item: item[0][:2])


def _steps(records: list[Record]) -> dict[tuple[Any, ...], list[Record]]:
    return grouped((r for r in records if r["arithmetic"] == REFERENCE.name), "masters", "lr")


def filter_table(records: list[Record]) -> list[str]:
    rows = []
    for (kind, lr, name), own in _by_step(records):
        kept = [r["methods"] for r in own if "methods" in r]
        cells = []
        for method in METHODS:
            noise = spanned(m[method]["noise"] for m in kept)
            differ = spanned((m[method]["differ"] for m in kept), "{:.1%}".format)
            cut = spanned((m[method]["cut"] for m in kept), "{:.1%}".format)
            cells.append(f"cuts {cut}" if name == REFERENCE.name else f"{noise}; {differ}")
        rows.append([kind, f"{lr:g}", name, *cells])
    return lines(("masters", "lr", "arithmetic", *METHODS), rows)


def white_table(records: list[Record]) -> list[str]:
    """All models and seeds together."""
    rows = []
    for (name,), own in grouped((r for r in records if "methods" in r), "arithmetic").items():
        rows.append([name, *(spanned(r["methods"][method]["white"] for r in own) for method in METHODS)])
    return lines(("arithmetic", *METHODS), rows)


def model_table(records: list[Record], value: str, shown: Callable[[float], str] = number) -> list[str]:
    """Arithmetics down, models across."""
    cells = grouped(records, "arithmetic", "model")
    models = list(dict.fromkeys(model for _, model in cells))
    rows = [
        [name, *(spanned((r.get(value) for r in cells.get((name, m), [])), shown) for m in models)]
        for name in dict.fromkeys(name for name, _ in cells)
    ]
    return lines(("arithmetic", *models), rows)


def length_table() -> list[str]:
    """What a filter leaves of an error of z that is new at each token, and the error that leaves a tenth of a width."""
    rows = []
    for name, objective in METHODS.items():
        gains = [gain(objective, (length,)) for length in LENGTHS]
        limit = TENTH * objective.surrogate.eps_low
        rows.append([name, *(f"{number(g)}; {number(limit / g)}" for g in gains)])
    return lines(("method", *(f"{length:,} tokens" for length in LENGTHS)), rows)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help=f"HIDDENxLAYERS, hidden a multiple of 32 (default: {SHAPES})")
    parser.add_argument("--model", nargs="+", help=f"directories, or {BUILTIN} (the default beside --shapes)")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-6, 1e-5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8, help=f"responses of a mini-batch, a multiple of {GROUP}")
    parser.add_argument("--length", type=int, default=192, help="tokens in a response at most")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--results", type=Path, help="a file that records are appended to as they come")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of such files")
    parser.add_argument("--lengths", action="store_true", help="print what filters leave of noise, and nothing else")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.rows < GROUP or options.rows % GROUP:
        parser.error(f"--rows must be a multiple of {GROUP}: a group is {GROUP} responses")
    if options.quick:
        options.shapes, options.seeds, options.rows, options.length = options.shapes or ["64x2"], 1, GROUP, 12
    if options.shapes is None and options.model is None:
        options.shapes, options.model = SHAPES, [BUILTIN]
    return options


def sources(options: argparse.Namespace, folder: Path) -> Iterator[tuple[int, Source]]:
    """Each with its seed."""
    prompts = (WARM + 2) * options.rows // GROUP
    for shape in options.shapes or []:
        for seed in range(options.seeds):
            yield seed, random_source(shape, seed, prompts, options.device)
    for name in options.model or []:
        path = trained_builtin(folder) if name == BUILTIN else Path(name)
        for seed in range(options.seeds):
            yield seed, policy_source(path, name, seed, prompts, options.device)


def main() -> None:
    options = arguments()
    if options.table:
        print(tables([record for path in options.table for record in read(path)]))
        return
    if options.lengths:
        print("\n".join(length_table()))
        return
    choose_kernels(torch.device(options.device))
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, source in sources(options, Path(folder)):
            batches = sampled(source, seed, options.rows, options.length)
            for record in measured(source, seed, batches, options.lrs):
                records.append(record)
                if options.results:
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
            print(f"{source.name}, seed {seed}: done", file=sys.stderr, flush=True)
    print(tables(records))


if __name__ == "__main__":
    main()
