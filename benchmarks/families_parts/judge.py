"""Whether a run recorded the log-probabilities of the model as its authors define it.

Nothing of `policy/` or `rollout/` is imported here, nor was it in this process: the truth is an untouched copy, eager
attention, float32, eval mode, one row at a time and no cache, from the weights that the step began with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kpo_cli.runs.ratios import Ratios, read_ratios

TOLERANCE = 1e-4
SPREAD = 0.3
"""Of the log-probabilities, at least, or the model says nothing and its gaps neither."""


@dataclass(frozen=True)
class Gap:
    """Largest differences of one step's log-probabilities from the untouched model's, in nats."""

    sampler: float
    trainer: float
    spread: float
    """Standard deviation of the untouched model's."""
    lengths: tuple[int, int]
    """Of the responses: shortest and longest."""


def gap_of(run: Path, step: int, weights: Path) -> Gap:
    """Of a recorded `step` that began with `weights`."""
    model = AutoModelForCausalLM.from_pretrained(weights, attn_implementation="eager", dtype=torch.float32).eval()
    (record, _), *_ = read_ratios(run / "ratios" / f"step-{step:06d}.safetensors")
    sampler, trainer, truths = 0.0, 0.0, []
    for row in range(len(record)):
        truth = untouched(model, record, row)
        truths.append(truth)
        count = len(truth)
        sampler = worse(sampler, truth, record.rollout_log_probs[row, :count])
        trainer = worse(trainer, truth, record.old_log_probs[row, :count])
    lengths = record.lengths
    return Gap(sampler, trainer, float(torch.cat(truths).std()), (int(lengths.min()), int(lengths.max())))


@torch.no_grad()
def untouched(model: Any, record: Ratios, row: int) -> Tensor:
    """(T,) log-probabilities of a response's tokens, at temperature 1."""
    prompt = record.prompt_ids[row, : record.prompt_lengths[row]].tolist()
    response = record.response_ids[row, : record.lengths[row]].tolist()
    logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


def worse(gap: float, truth: Tensor, recorded: Any) -> float:
    """The larger of two gaps; what is not a number is the largest."""
    new = float((truth - torch.from_numpy(recorded).double()).abs().max())
    return new if new != new or new > gap else gap
