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
ROUNDINGS, MOST = 4, 1e-2
"""Where the untouched model itself rounds by more, so many times that, up to so many nats, is no gap."""
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
    rounding: float
    """Largest difference of the untouched model from itself in float64; 0 where nobody needs to know."""

    @property
    def allowed(self) -> float:
        return max(TOLERANCE, min(ROUNDINGS * self.rounding, MOST))


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
    rounding = 0.0 if max(sampler, trainer) <= TOLERANCE else rounding_of(model, record, truths)
    lengths = int(record.lengths.min()), int(record.lengths.max())
    return Gap(sampler, trainer, float(torch.cat(truths).std()), lengths, rounding)


def rounding_of(model: Any, record: Ratios, truths: list[Tensor]) -> float:
    """How far `truths`, in float32, are from the same model's in float64, which it is from here on."""
    if model.config._experts_implementation is not None:
        model.set_experts_implementation("eager")  # a grouped product has no float64
    model.double()
    return max(float((untouched(model, record, row) - truth).abs().max()) for row, truth in enumerate(truths))


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
