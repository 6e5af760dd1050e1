"""Records and runs made up for the tests."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def tensors(seed=0, prompts=8, group=4, width=40, mini_batches=4, drift=0.0, scale=0.02):
    """A record as `kpo train` writes it, from white noise plus a random walk of step `drift`."""
    rng = np.random.default_rng(seed)
    rows = prompts * group
    lengths = rng.integers(width // 2, width + 1, rows)
    mask = np.arange(width) < lengths[:, None]
    prompt = np.repeat(np.arange(prompts), group)
    mini_batch = prompt * mini_batches // prompts
    z = rng.normal(size=(rows, width)) * scale + np.cumsum(rng.normal(size=(rows, width)) * drift, 1)
    z = np.where(mask & (mini_batch > 0)[:, None], z, 0.0)
    old = np.where(mask, -rng.exponential(0.5, (rows, width)), 0.0)
    entropy = np.where(mask, rng.exponential(0.3, (rows, width)), 0.0)
    floats = {
        "log_ratio": z,
        "filtered_log_ratio": z / 2,
        "old_log_probs": old,
        "rollout_log_probs": np.where(mask, old + rng.normal(size=(rows, width)) * 1e-3, 0.0),
        "entropy": entropy,
        "advantages": rng.normal(size=rows),
        "rewards": rng.integers(0, 2, rows),
    }
    ints = {
        "response_ids": np.where(mask, rng.integers(0, 17, (rows, width)), 0),
        "prompt_ids": rng.integers(0, 17, (rows, 6)),
        "prompt_lengths": np.full(rows, 6),
        "prompt_index": prompt,
        "mini_batch_index": mini_batch,
    }
    return {
        **{name: torch.tensor(value, dtype=torch.float32) for name, value in floats.items()},
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in ints.items()},
        "response_mask": torch.tensor(mask),
        "truncated": torch.zeros(rows, dtype=torch.bool),
    }


def write_record(path: Path, step: int, content=None, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "format": "kpo-ratios-1",
        "step": step,
        "seed": 0,
        "method": "kpo",
        "filter": {"name": "kalman", "q": 1e-2, "v": 1.0, "time_constant": None, "p0": 0.0},
        "surrogate": {"name": "clip", "eps_low": 3e-4, "eps_high": 4e-4},
        "eps_low": 3e-4,
        "eps_high": 4e-4,
        "temperature": 1.0,
        "tokenizer": "nowhere",
        **metadata,
    }
    content = tensors(step) if content is None else content
    save_file(content, path, {name: json.dumps(value) for name, value in facts.items()})
    return path


def write_run(run: Path, steps=(1, 2, 3), **content):
    for step in steps:
        write_record(run / "ratios" / f"step-{step:06d}.safetensors", step, tensors(step, **content))
    return run
