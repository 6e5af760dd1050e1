"""Some responses of an update, scored in float32 beside the 16-bit arithmetic of the run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kpo_cli.core import Objective
from kpo_cli.core.rounding import Rounding
from kpo_cli.policy.batch import Batch
from kpo_cli.policy.memory import lacks_memory
from kpo_cli.policy.unrounded import Unrounded

RESPONSES = 8
"""That are measured in a step, spread over its second mini-batch, the first one with ratios."""


@dataclass(frozen=True)
class Exact:
    """Responses of the second mini-batch with their exact old log-probabilities, taken before the first step."""

    unrounded: Unrounded
    rows: Tensor
    """(n,) within the batch."""
    old_log_probs: Tensor
    """(n, T), zero outside the mask."""
    max_tokens: int

    @classmethod
    def begin(cls, unrounded: Unrounded | None, batch: Batch, parts: list[Tensor], max_tokens: int) -> "Exact | None":
        """None where the run computes in float32, has one mini-batch, or no memory for a pass in float32."""
        if unrounded is None or len(parts) < 2:
            return None
        places = torch.linspace(0, len(parts[1]) - 1, min(RESPONSES, len(parts[1]))).round().long()
        rows = parts[1][places]
        old = _log_probs(unrounded, batch, rows, max_tokens)
        return None if old is None else cls(unrounded, rows, old, max_tokens)

    def rounding(self, batch: Batch, objective: Objective, old: Tensor, z: Tensor) -> Rounding | None:
        """Behind the first step: how far the run's own numbers, (N, T) each, are off in these responses."""
        exact = _log_probs(self.unrounded, batch, self.rows, self.max_tokens)
        if exact is None:
            return None
        part = batch.rows(self.rows)
        before, change = (values[self.rows, : exact.shape[1]].double() for values in (old, z))
        pairs = (before, before + change), (self.old_log_probs.double(), exact.double())
        return Rounding.of(objective, *pairs, part.advantages, part.response_mask)


@torch.no_grad()
def _log_probs(unrounded: Unrounded, batch: Batch, rows: Tensor, max_tokens: int) -> Tensor | None:
    """(n, T) of some rows; None where memory does not suffice. Nothing that is only measured may stop a run."""
    mask = batch.rows(rows).response_mask
    values = torch.zeros(mask.shape)
    places = {row: place for place, row in enumerate(rows.tolist())}
    try:
        with unrounded.weighted() as scorer:
            for micro in scorer.split(batch, rows, max_tokens):
                log_probs = scorer(batch.rows(micro))[0].cpu()
                values[[places[row] for row in micro.tolist()], : log_probs.shape[1]] = log_probs
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return None
    return torch.where(mask, values, 0.0)
