"""Ratio records: what an update saw of every token, for `kpo analyze`. Format: docs/run-directory.md."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kpo_cli.config import TrainConfig
from kpo_cli.training.batch import Batch
from kpo_cli.training.step import UpdateRecord

FORMAT = "kpo-ratios-1"


def write_ratios(run: Path, step: int, batch: Batch, record: UpdateRecord, config: TrainConfig, tokenizer: str) -> Path:
    """Write ratios/step-NNNNNN.safetensors: (N, T) token tensors, (N,) row tensors, and what made them as metadata."""
    tensors = {
        "log_ratio": record.log_ratio,
        "filtered_log_ratio": record.filtered_log_ratio,
        "old_log_probs": record.old_log_probs,
        "rollout_log_probs": batch.rollout_log_probs,
        "entropy": record.entropy,
        "response_mask": batch.response_mask,
        "response_ids": batch.response_ids.int(),
        "prompt_ids": batch.prompt_ids.int(),
        "prompt_lengths": batch.prompt_lengths.int(),
        "advantages": batch.advantages,
        "rewards": batch.rewards,
        "truncated": batch.truncated,
        "prompt_index": batch.prompt_index.int(),
        "mini_batch_index": record.mini_batch_index.int(),
    }
    surrogate = config.method.surrogate
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "seed": config.seed,
        "method": config.method.name,
        "filter": config.filter,
        "surrogate": surrogate,
        "aggregation": config.method.aggregation,
        "eps_low": surrogate.get("eps_low"),
        "eps_high": surrogate.get("eps_high"),
        "temperature": config.rollout.temperature,
        "tokenizer": tokenizer,
    }
    folder = run / "ratios"
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{step:06d}.safetensors"
    draft = final.with_name(f".{final.name}.{os.getpid()}")
    contiguous = {name: tensor.to(torch.device("cpu")).contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, draft, metadata={key: json.dumps(value) for key, value in metadata.items()})
    draft.rename(final)
    return final
