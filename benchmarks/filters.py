"""How exact and how fast the ratio filters are, in one run: `python benchmarks/filters.py`.

Prints three tables. Errors are relative to the largest |x| of a row, against the float64 recursion token by token.
Times are medians, on one thread unless `--threads` says otherwise, next to two things that people write instead: a
Python loop over tokens (all rows at once) and the float32 cumulative-sum form x_t = d_t cumsum(K z / d)_t with
d = cumprod(1 - K), whose d underflows.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kpo_cli.core import kalman_filter
from kpo_cli.core.filters import FILTERS, AdaptiveKalman
from kpo_cli.core.recursion import eta_of
from kpo_cli.core.scans import closed_form_terms

RATIOS = [1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e2]


def python_loop(z: Tensor, q: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The recursion as it is written, V = 1; in float64 it is the truth."""
    x = torch.zeros(len(z), dtype=dtype, device=z.device)
    p, out = torch.zeros_like(x), torch.empty_like(z, dtype=dtype)
    for t in range(z.shape[1]):
        p = p + q
        gain = p / (p + 1)
        x = x + gain * (z[:, t] - x)
        p = (1 - gain) * p
        out[:, t] = x
    return out


def cumulative_sum(z: Tensor, q: float) -> Tensor:
    """The float32 cumulative-sum form, given exact gains."""
    h, g = closed_form_terms(eta_of(q), 0.0, z.shape[1], z.device)
    gain = (h / g)[1:].float()
    decay = (1 - gain).cumprod(0)
    return decay * (gain * z / decay).cumsum(-1)


def relative_error(got: Tensor, want: Tensor) -> float:
    error = ((got.double() - want).abs() / want.abs().amax(-1, keepdim=True)).max()
    return float(error)


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call after two to warm up; on one CPU thread its processor time, free of what else runs."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats + 2):
        start = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 1e3 * sorted(times[2:])[repeats // 2]


def log_ratios(rows: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """(B, T) log-ratios and a mask whose responses have between half and all of the tokens."""
    generator = torch.Generator().manual_seed(0)
    z = 0.1 * torch.randn(rows, length, generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    return z.to(device), (torch.arange(length) < lengths).to(device)


def accuracy_table(length: int, device: str) -> None:
    print(f"\nLargest relative error over {length} tokens, 4 rows, full length\n")
    print("| Q/V | kalman_filter | float32 Python loop | float32 cumulative sum |")
    print("|---|---|---|---|")
    z, _ = log_ratios(4, length, device)
    full = torch.ones_like(z, dtype=torch.bool)
    for q in RATIOS:
        want = python_loop(z.double(), q, torch.float64)
        columns = (kalman_filter(z, full, q=q, v=1.0), python_loop(z, q), cumulative_sum(z, q))
        print(f"| {q:.0e} | " + " | ".join(error_text(relative_error(x, want)) for x in columns) + " |")


def error_text(error: float) -> str:
    return "NaN" if math.isnan(error) else f"{error:.1e}"


def speed_table(batches: list[int], lengths: list[int], device: str, repeats: int) -> None:
    print("\nkalman_filter at Q/V = 1e-6, checks included\n")
    print("| B x T | ms | Python loop takes | float32 cumulative sum takes |")
    print("|---|---|---|---|")
    for rows in batches:
        for length in lengths:
            z, mask = log_ratios(rows, length, device)
            ours = milliseconds(partial(kalman_filter, z, mask, q=1e-6, v=1.0), device, repeats)
            loop = milliseconds(partial(python_loop, z, 1e-6), device, 1)
            cumulative = milliseconds(partial(cumulative_sum, z, 1e-6), device, repeats)
            print(f"| {rows} x {length} | {ours:.2f} | {loop / ours:.0f}x | {cumulative / ours:.1f}x |", flush=True)


def family_table(rows: int, length: int, device: str, repeats: int) -> None:
    print(f"\nAll filters at {rows} x {length}\n")
    print("| filter | ms | kalman takes |")
    print("|---|---|---|")
    z, mask = log_ratios(rows, length, device)
    old = -torch.rand(rows, length, device=device)
    base = milliseconds(partial(FILTERS["kalman"](), z, mask, old), device, repeats)
    for name, make in FILTERS.items():
        spent = milliseconds(partial(make(), z, mask, old), device, max(1, repeats // 3))
        print(f"| {name} | {spent:.2f} | {base / spent:.2f}x |", flush=True)
    holes = mask.clone()
    holes[:, length // 4 : length // 3] = False
    spent = milliseconds(partial(FILTERS["kalman"](), z, holes, old), device, max(1, repeats // 3))
    print(f"| kalman, a gap in every row | {spent:.2f} | {base / spent:.2f}x |")
    spent = milliseconds(partial(AdaptiveKalman().sums, z, mask, old), device, 1)
    print(f"| kalman_adaptive, its fit once a rollout batch | {spent:.2f} | {base / spent:.3f}x |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--length", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--accuracy-length", type=int, default=32768)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}")
    accuracy_table(options.accuracy_length, options.device)
    speed_table(options.batch, options.length, options.device, options.repeats)
    family_table(options.batch[len(options.batch) // 2], 4096, options.device, options.repeats)


if __name__ == "__main__":
    main()
