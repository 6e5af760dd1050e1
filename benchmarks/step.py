"""Speed and memory of a training step, and the memory of its log-probability stage, with random weights.

    python benchmarks/step.py [--shape tiny|small|0.6b|4b] [--device cpu|cuda] [--tokens N] [--repeats 3] [--json FILE]
    python benchmarks/step.py --stage log_probs [--device cpu|cuda] [--tokens 16384] [--plain-tokens 1024 2048]

A step is what `kpo train` does with a rollout batch, through its own `Updater`: two mini-batches of `--tokens` tokens
each, of which the second needs old log-probabilities. 0.6b and 4b have the shapes of Qwen3-0.6B and Qwen3-4B, small has
4 layers of 256 and a vocabulary of 32,768, and tiny only shows that all of it runs. Weights are float32, and computed
with in bfloat16 on CUDA. Lengths of responses are spread evenly from 1/8 of the longest to the longest. The variants
take turns in every repeat; the first round warms up and is not counted.

- packed, chunked: no padding, no (tokens, vocabulary) logits; what `kpo train` does.
- packed, plain: the same with logits of all response tokens at once.
- padded: rows padded to a rectangle, and plain logits; no pass has more than `--tokens` places.
- recompute: gradient checkpointing.

Columns. `tokens/s` counts tokens without padding, a prompt once for its responses, over the whole step. `peak` is of
the device's allocator on CUDA, and of the process (its 0.3 GiB of libraries included) on a CPU. `pass` is the most
tokens in a forward and backward pass: fewer than asked for if the device ran out of memory. Seconds, medians: `old` is
the forward pass for old log-probabilities, `fwd+bwd` the forward and backward passes with the log-probability stage,
`objective` the loss alone, `optimizer` AdamW; `other` is what is left of `step`, most of it the gradient's norm.

MFU is model flops / (seconds x peak flops of the device), for the whole step and for fwd+bwd alone. The model flops of
a forward and backward pass of M tokens of which R have their successor predicted are

    6 N M + 6 V D R + 12 L H d P

N parameters without the embedding, V D those of the head, L layers of H heads of width d, and P pairs of a token and
one that it looks at (itself and those before it in its row; a prompt's own pairs count once for all its responses). A
forward pass alone is a third. Padding, recomputation and the logits' softmax are not model flops. Peak flops are the
maker's for dense bfloat16 where the device is in PEAK_FLOPS, and else those of a large matmul measured here.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from kpo_cli.core import linear_log_probs, load_objective, token_log_probs
from kpo_cli.policy import scorer as scoring
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.fidelity import choose_way
from kpo_cli.policy.load import choose_kernels, narrow
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.sharding import trained_weights
from kpo_cli.training.optimizer import HostAdamW
from kpo_cli.training.step import Updater

GIB = 2**30
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16, by a part of the device's name."""
GROUP, PROMPTS, MINI_BATCHES = 8, 2, 2
"""Responses to a prompt, prompts of a mini-batch, mini-batches."""


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tokens: int
    """Of a mini-batch, by default."""
    prompt: int


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 16, 128, 1_024, 256, 16),
    "small": Shape(256, 4, 4, 2, 64, 768, 32_768, 2_048, 32),
    "0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151_936, 16_384, 256),
    "4b": Shape(2560, 36, 32, 8, 128, 9728, 151_936, 16_384, 256),
}


@dataclass(frozen=True)
class Variant:
    packed: bool = True
    chunked: bool = True
    method: str = "kpo"
    recompute: bool = False

    def __str__(self) -> str:
        layout = ("packed, chunked" if self.chunked else "packed, plain") if self.packed else "padded"
        return f"{layout}, {self.method}{', recompute' if self.recompute else ''}"


VARIANTS = (
    Variant(),
    Variant(method="grpo"),
    Variant(chunked=False),
    Variant(packed=False, chunked=False),
    Variant(recompute=True),
    Variant(packed=False, chunked=False, recompute=True),
)


def make_model(shape: Shape, device: str) -> Any:
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    choose_kernels(torch.device(device))
    with torch.device(device):
        model = Qwen3ForCausalLM(config).eval()
    if reason := choose_way(model).unpacked_because:
        raise SystemExit(f"this model cannot be packed: {reason}")
    return model


def in_its_dtype(model: Any) -> Any:
    """The model as `kpo train` has it compute: in bfloat16 on CUDA."""
    if model.device.type == "cuda":
        narrow(model, torch.bfloat16)
    return model


def make_rows(shape: Shape, tokens: int) -> Batch:
    """A rollout batch whose mini-batches have `tokens` tokens each, as packed, give or take a token a response."""
    draw = torch.Generator().manual_seed(0)
    rows = PROMPTS * GROUP
    if (mean := (tokens - PROMPTS * shape.prompt) / rows + 1) < 8:
        raise SystemExit(f"--tokens {tokens} is too few for {rows} responses and {PROMPTS} prompts")
    spread = torch.linspace(1 / 8, 1, rows) * mean * 16 / 9

    def random_ids(count: int) -> list[int]:
        return torch.randint(shape.vocabulary, (count,), generator=draw).tolist()

    groups = []
    for _ in range(MINI_BATCHES):
        lengths = spread[torch.randperm(rows, generator=draw)].int().tolist()
        groups += [
            [Response(random_ids(n), [0.0] * n, True) for n in lengths[first : first + GROUP]]
            for first in range(0, rows, GROUP)
        ]
    advantages = torch.linspace(-1, 1, GROUP).repeat(len(groups))
    return make_batch([random_ids(shape.prompt) for _ in groups], groups, advantages, advantages)


def model_flops(shape: Shape, batch: Batch) -> float:
    """Of a forward and backward pass of a batch; see the head of this file."""
    width = shape.heads * shape.head_dim
    attention = 2 * shape.hidden * (width + shape.kv_heads * shape.head_dim)
    body = shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    predicted = batch.response_mask.sum(-1).double()
    prompt, prompts = shape.prompt, len(batch.prompt_index.unique())
    places = float((predicted - 1).sum()) + prompts * prompt
    lengths = predicted - 1 + prompt
    pairs = float((lengths * (lengths + 1) / 2).sum()) - (len(batch) - prompts) * prompt * (prompt + 1) / 2
    head = shape.vocabulary * shape.hidden * float(predicted.sum())
    return 6 * body * places + 6 * head + 12 * shape.layers * width * pairs


def step_flops(shape: Shape, batch: Batch) -> tuple[float, float]:
    """Of a whole step, and of its passes with a backward: old log-probs are computed for all but the first part."""
    first = batch.rows(torch.arange(len(batch) // MINI_BATCHES))
    learning = model_flops(shape, batch)
    return learning + (learning - model_flops(shape, first)) / 3, learning


class Clock:
    """Seconds by phase."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start


class TimedObjective:
    """An objective whose calls are timed."""

    def __init__(self, objective: Any, clock: Clock) -> None:
        self.objective, self.clock = objective, clock

    def __call__(self, **tensors: Any) -> Any:
        with self.clock.phase("objective"):
            return self.objective(**tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)


class TimedUpdater(Updater):
    """The updater of `kpo train`, its phases timed from outside."""

    clock: Clock

    def _old_log_probs(self, *arguments: Any) -> Any:
        with self.clock.phase("old"):
            return super()._old_log_probs(*arguments)

    def _learn(self, *arguments: Any) -> Any:
        with self.clock.phase("learn"):
            return super()._learn(*arguments)


@contextmanager
def timed_optimizer(optimizer: torch.optim.Optimizer, clock: Clock) -> Iterator[None]:
    step = optimizer.step

    def timed() -> None:
        with clock.phase("optimizer"):
            step()

    with mock.patch.object(optimizer, "step", timed):
        yield


def plain_log_probs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float,
    *,
    bias: Tensor | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `linear_log_probs` saves: the logits of all tokens."""
    return token_log_probs(F.linear(hidden, weight, bias), token_ids, temperature, entropy_gradient)


class PeakMemory:
    """Bytes, since it was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError, AttributeError):  # Linux with glibc; elsewhere the peak is the process's own
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_step(
    variant: Variant, model: Any, optimizer: torch.optim.Optimizer, batch: Batch, tokens: int
) -> dict[str, float]:
    """Seconds by phase, `peak` bytes, and `pass`, the most tokens of a pass."""
    device = model.device.type
    recompute_layers(model, None if variant.recompute else 0)
    clock = Clock(device)
    updater = TimedUpdater(
        scorer=Scorer(model, 1.0, half=device == "cuda", packed=variant.packed),
        optimizer=optimizer,
        objective=TimedObjective(load_objective(variant.method), clock),
        mini_batches=MINI_BATCHES,
        max_tokens=tokens,
        max_grad_norm=1.0,
        mask_truncated=False,
    )
    updater.clock = clock
    log_probs = linear_log_probs if variant.chunked else plain_log_probs
    memory = PeakMemory(device)
    patched = mock.patch.object(scoring, "linear_log_probs", log_probs)
    with patched, timed_optimizer(optimizer, clock), clock.phase("step"):
        updater.update(batch)
    seconds = clock.seconds
    seconds["fwd+bwd"] = seconds.pop("learn") - seconds["objective"]
    parts = ("old", "fwd+bwd", "objective", "optimizer")
    return seconds | {
        "other": seconds["step"] - sum(seconds[name] for name in parts),
        "peak": memory.read(),
        "pass": updater.max_tokens,
    }


def measured_flops(device: str) -> float:
    """Of a matmul in the dtype of the forward pass, the best of three."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock, best = Clock(device), 0.0
    for _ in range(4):
        start = clock.now()
        a @ b
        best = max(best, 2 * size**3 / (clock.now() - start))
    return best


def peak_flops(device: str) -> tuple[float, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    for part, flops in PEAK_FLOPS.items():
        if device == "cuda" and part in name:
            return flops, f"{name}, {flops / 1e12:.0f} Tflop/s by its maker"
    flops = measured_flops(device)
    return flops, f"{name}, {flops / 1e12:.3g} Tflop/s measured"


def make_optimizer(model: Any, host: bool) -> torch.optim.Optimizer:
    """AdamW as `kpo train` makes it; `host`: as under trainer.offload_optimizer=always."""
    return (HostAdamW if host else torch.optim.AdamW)(trained_weights(model), lr=1e-7, fused=True)


def measure_steps(
    name: str,
    device: str,
    tokens: int,
    repeats: int,
    variants: Sequence[Variant] = VARIANTS,
    peak: tuple[float, str] | None = None,
    host: bool = False,
) -> list[dict[str, Any]]:
    """A row of medians for each of the `variants`; `peak` is the flops a second that MFU is of, and what they are."""
    shape = SHAPES[name]
    batch = make_rows(shape, tokens)
    model = in_its_dtype(make_model(shape, device))
    optimizer = make_optimizer(model, host)
    flops, learning_flops = step_flops(shape, batch)
    peak, device_label = peak or peak_flops(device)
    rounds: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(repeats + 1):
        for variant, found in rounds.items():
            fits = int(found[-1]["pass"]) if found else tokens  # what the updater came down to, it remembers
            found.append(one_step(variant, model, optimizer, batch, fits))
    lengths = batch.response_mask.sum(-1)
    trained = int((lengths - 1).sum()) + MINI_BATCHES * PROMPTS * shape.prompt
    about = (
        f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f}M parameters; {device_label}\n"
        f"{MINI_BATCHES} mini-batches of {trained / MINI_BATCHES:,.0f} tokens: {PROMPTS} prompts of {shape.prompt} "
        f"with {GROUP} responses each, of {int(lengths.min()):,} to {int(lengths.max()):,}; medians of {repeats}"
    )
    rows = []
    for variant, found in rounds.items():
        row = {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}
        row["tokens/s"] = trained / row["step"]
        row["MFU step"] = flops / row["step"] / peak
        row["MFU fwd+bwd"] = learning_flops / row["fwd+bwd"] / peak
        named = {"variant": str(variant), "shape": name, "device": device_label, "about": about}
        rows.append(named | asdict(variant) | row)
    return rows


STEP_COLUMNS = {
    "tokens/s": "{:,.0f}",
    "MFU step": "{:.1%}",
    "MFU fwd+bwd": "{:.1%}",
    "peak": "{:.2f}",
    "pass": "{:,}",
    "step": "{:.3f}",
    "old": "{:.3f}",
    "fwd+bwd": "{:.3f}",
    "objective": "{:.4f}",
    "optimizer": "{:.3f}",
    "other": "{:.3f}",
}


def log_prob_stage(kind: str, tokens: int, shape: Shape, device: str, threads: int) -> dict[str, Any]:
    """One forward and backward pass from hidden states to log-probabilities, in a process of its own."""
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(tokens, shape.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = shape.hidden**-0.5 * torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype)
    weight.requires_grad_()
    ids = torch.randint(shape.vocabulary, (tokens,), device=device)
    clock, memory = Clock(device), PeakMemory(device)
    compute = linear_log_probs if kind == "chunked" else plain_log_probs
    with clock.phase("stage"):
        log_probs, _ = compute(hidden, weight, ids, 1.0)
        log_probs.mean().backward()
    return {"kind": kind, "tokens": tokens, "seconds": clock.seconds["stage"], "peak": memory.read()}


def measure_log_probs(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Plain at a few sizes and a line through them; chunked at the size asked for."""
    shape = SHAPES["0.6b"]
    tokens = options.tokens or shape.tokens
    console.print(
        f"log-probabilities and entropies from hidden states of {shape.hidden} and a vocabulary of "
        f"{shape.vocabulary:,}, forward and backward, on {options.device}; a process each, weights, gradients and "
        f"libraries included"
    )
    jobs = [("plain", size) for size in options.plain_tokens] + [("chunked", tokens)]
    rows: list[dict[str, Any]] = []
    for kind, size in jobs:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(log_prob_stage, (kind, size, shape, options.device, options.threads)))
    (x0, y0), (x1, y1) = ((row["tokens"], row["peak"]) for row in (rows[0], rows[-2]))
    line = y1 + (tokens - x1) * (y1 - y0) / (x1 - x0)
    rows.append({"kind": "plain, by the line through its rows", "tokens": tokens, "seconds": None, "peak": line})
    return [row | {"share": row["peak"] / line if row["tokens"] == tokens else None} for row in rows]


def show(rows: list[dict[str, Any]], columns: dict[str, str], console: Console) -> None:
    first = next(iter(rows[0]))
    table = Table()
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(f"{name} GiB" if name == "peak" else name, justify="right", no_wrap=True)
    for row in rows:
        shown = row | {"peak": row["peak"] / GIB}
        cells = ("" if shown[name] is None else form.format(shown[name]) for name, form in columns.items())
        table.add_row(row[first], *cells)
    console.print(table)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["step", "log_probs"], default="step")
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--tokens", type=int, help="of a mini-batch; by default 2,048 for small, else 16,384")
    parser.add_argument("--plain-tokens", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.shape = options.shape or ("0.6b" if options.device == "cuda" else "small")
    torch.set_num_threads(options.threads)
    console = Console(width=180)
    if options.stage == "step":
        tokens = options.tokens or SHAPES[options.shape].tokens
        rows, columns = measure_steps(options.shape, options.device, tokens, options.repeats), STEP_COLUMNS
        console.print(rows[0]["about"])
    else:
        if len(set(options.plain_tokens)) < 2:
            parser.error("--plain-tokens needs two sizes for a line")
        rows = measure_log_probs(options, console)
        columns = {"tokens": "{:,}", "seconds": "{:.1f}", "peak": "{:.2f}", "share": "{:.1%}"}
    show(rows, columns, console)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
