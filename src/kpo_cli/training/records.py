"""What an update saw of every token, as a ratio record for `kpo analyze`."""

from pathlib import Path
from typing import Any

from kpo_cli.config import TrainConfig
from kpo_cli.policy.batch import Batch
from kpo_cli.runs.ratios import write_ratios
from kpo_cli.training.step import UpdateRecord


def record_ratios(
    run: Path, step: int, batch: Batch, record: UpdateRecord, config: TrainConfig, tokenizer: str, dtype: str
) -> None:
    """Write the record of a step; `dtype` is what the policy computes in."""
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
        "seed": config.seed,
        "method": config.method.name,
        "filter": config.filter,
        "surrogate": surrogate,
        "aggregation": config.method.aggregation,
        "eps_low": surrogate.get("eps_low"),
        "eps_high": surrogate.get("eps_high"),
        "temperature": config.rollout.temperature,
        "tokenizer": tokenizer,
        "dtype": dtype,
        "rounding": None if record.rounding is None else record.rounding.facts(),
    }
    write_ratios(run, step, tensors, metadata)
