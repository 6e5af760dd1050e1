"""What each objective costs next to the training step around it: `python benchmarks/objectives.py`.

A step is the forward and backward pass of Qwen3-0.6B over the same responses, without the sampling, the old
log-probabilities and the optimizer that a real step has as well, so the shares here are upper bounds.

On a GPU (`--device cuda`) both are measured. On a CPU the model is too slow: a smaller one of the same proportions is
measured, its floating-point rate computed, and the step of the full shape estimated from its floating-point operations:
6 for each weight and token, and 6 L H T^2 a response for causal attention (L layers of total head width H).
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kpo_cli.core import list_methods, load_objective, token_log_probs

FULL = {"layers": 28, "hidden": 1024, "heads": 16, "vocabulary": 151_936}
SMALL = {"layers": 3, "hidden": 256, "heads": 4, "vocabulary": 16_384}


def model_of(shape: dict[str, int], device: str) -> Qwen3ForCausalLM:
    """Random weights in Qwen3-0.6B's proportions: feed-forward 3x, heads 2x in all, half as many for keys."""
    config = Qwen3Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=3 * shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"] // 2,
        head_dim=2 * shape["hidden"] // shape["heads"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Qwen3ForCausalLM(config).to(device=device, dtype=dtype)


def flops(shape: dict[str, int], rows: int, length: int) -> float:
    """Floating-point operations of a forward and a backward pass over `rows` responses of `length` tokens."""
    hidden = shape["hidden"]
    weights = shape["layers"] * (2 * 2 * hidden**2 + 2 * hidden**2 + 9 * hidden**2) + shape["vocabulary"] * hidden
    attention = 6 * shape["layers"] * 2 * hidden * length**2
    return rows * (6.0 * weights * length + attention)


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call after one to warm up; processor time on one CPU thread."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats + 1):
        start = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return sorted(times[1:])[repeats // 2]


def step_seconds(shape: dict[str, int], rows: int, length: int, device: str, repeats: int) -> float:
    model = model_of(shape, device)
    ids = torch.randint(0, shape["vocabulary"], (rows, length), device=device)

    def step() -> None:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        log_probs, _ = token_log_probs(logits[:, :-1], ids[:, 1:], 1.0)
        log_probs.mean().backward()

    return seconds(step, device, repeats)


def objective_seconds(method: str, rows: int, length: int, device: str, repeats: int) -> float:
    """Loss, metrics and gradient with respect to the log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, length, generator=generator)
    log_probs = (old + 0.05 * torch.randn(rows, length, generator=generator)).to(device).requires_grad_()
    old, mask = old.to(device), torch.ones(rows, length, dtype=torch.bool, device=device)
    advantages = torch.linspace(-1, 1, rows, device=device) if rows > 1 else torch.ones(1, device=device)
    objective = load_objective(method)

    def run() -> None:
        objective(log_probs=log_probs, old_log_probs=old, advantages=advantages, response_mask=mask).loss.backward()

    return seconds(run, device, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="responses in a micro-batch")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, length, device = options.rows, options.length, options.device
    if device == "cuda":
        step = step_seconds(FULL, rows, length, device, options.repeats)
        print(
            f"{torch.cuda.get_device_name()}: forward and backward of {rows} x {length} tokens, {step:.4f} s measured"
        )
    else:
        small_length = min(length, 256)
        rate = flops(SMALL, 1, small_length) / step_seconds(SMALL, 1, small_length, device, 3)
        step = flops(FULL, rows, length) / rate
        print(
            f"CPU, {options.threads} thread(s), {rate / 1e9:.1f} GFLOP/s: forward and backward of {rows} x {length} "
            f"tokens, {step:.0f} s estimated"
        )
    print("\n| method | ms | share of the step |\n|---|---|---|")
    for method in list_methods():
        spent = objective_seconds(method, rows, length, device, options.repeats)
        print(f"| {method} | {1e3 * spent:.2f} | {100 * spent / step:.4f}% |")


if __name__ == "__main__":
    main()
