"""Time and memory of `kpo analyze` on a long run: 500 recorded steps of 256 responses of 128 tokens by default.

    python benchmarks/analysis.py [--steps 500] [--rows 256] [--width 128] [key=value ...]

Writes records made up of noise into a temporary directory, runs the command on them, and prints wall time and the
largest resident memory. Further arguments go to `kpo analyze`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

GROUP, MINI_BATCHES = 8, 4


def write_records(folder: Path, steps: int, rows: int, width: int) -> None:
    """Records as `kpo train` writes them, lengths between a third of `width` and all of it."""
    folder.mkdir(parents=True)
    for step in range(1, steps + 1):
        rng = np.random.default_rng(step)
        mask = np.arange(width) < rng.integers(width // 3, width + 1, (rows, 1))
        prompt = np.arange(rows) // GROUP
        mini_batch = prompt * MINI_BATCHES // (prompt[-1] + 1)
        old = np.where(mask, -rng.exponential(0.5, (rows, width)), 0.0)
        z = rng.normal(size=(rows, width)) * (1 - np.exp(old)) ** 1.4 * 0.1
        z = np.where(mask & (mini_batch > 0)[:, None], z, 0.0)
        floats = {
            "log_ratio": z,
            "filtered_log_ratio": z / 2,
            "old_log_probs": old,
            "rollout_log_probs": old,
            "entropy": np.where(mask, rng.exponential(0.3, (rows, width)), 0.0),
            "advantages": rng.normal(size=rows),
            "rewards": rng.integers(0, 2, rows),
        }
        integers = {
            "response_ids": np.where(mask, rng.integers(0, 17, (rows, width)), 0),
            "prompt_index": prompt,
            "mini_batch_index": mini_batch,
        }
        content = {name: torch.tensor(value, dtype=torch.float32) for name, value in floats.items()}
        content |= {name: torch.tensor(value, dtype=torch.int32) for name, value in integers.items()}
        facts = {"format": "kpo-ratios-1", "step": step, "eps_low": 3e-4, "eps_high": 4e-4}
        facts |= {"surrogate": {"name": "clip"}, "filter": {"name": "identity"}}
        metadata = {name: json.dumps(value) for name, value in facts.items()}
        save_file(content | {"response_mask": torch.tensor(mask)}, folder / f"step-{step:06d}.safetensors", metadata)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("steps", 500), ("rows", 256), ("width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("settings", nargs="*", help="of kpo analyze")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder) / "run" / "ratios", given.steps, given.rows, given.width)
        began = time.perf_counter()
        command = [sys.executable, "-m", "kpo_cli", "analyze", f"{folder}/run", *given.settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{given.steps} steps of {given.rows} x {given.width} tokens: {wall:.1f} s, {memory:.2f} GB")


if __name__ == "__main__":
    main()
