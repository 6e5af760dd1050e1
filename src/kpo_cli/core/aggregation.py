"""Aggregation: from a loss for each token to one number.

Denominators are explicit, so that a batch may be cut into micro-batches, packed, or spread over ranks: each part is
divided by the whole's counts and the parts add up to the same loss and gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Denominators(NamedTuple):
    """Counts of the whole mini-batch, over all its micro-batches and ranks."""

    sequences: int
    """Responses with at least one valid token (a zero advantage does not remove a response; an empty mask does)."""
    tokens: int

    @classmethod
    def of(cls, mask: Tensor) -> "Denominators":
        sequences, tokens = torch.stack([mask.any(-1).sum(), mask.sum()]).tolist()  # one wait for the device
        return cls(sequences, tokens)


class Aggregation(Protocol):
    def __call__(self, token_loss: Tensor, mask: Tensor, denominators: Denominators) -> Tensor: ...


@dataclass(frozen=True)
class SeqMeanTokenMean:
    """Mean over the tokens of a response, then over responses: every response weighs the same (2402.03300, eq. 3)."""

    def __call__(self, token_loss: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
        lengths = mask.sum(-1).clamp(min=1)
        return (token_loss.sum(-1) / lengths).sum() / denominators.sequences


@dataclass(frozen=True)
class TokenMean:
    """Mean over all tokens: every token weighs the same, long responses more (DAPO, 2503.14476, eq. 8)."""

    def __call__(self, token_loss: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
        return token_loss.sum() / denominators.tokens


@dataclass(frozen=True)
class ConstantLength:
    """Sum over the tokens of a response divided by a constant `length`, then mean over responses (2503.20783).

    Dr. GRPO: a token weighs the same in a short and in a long response. `length` is the most tokens that a response
    may have (`rollout.max_response_tokens`).
    """

    length: int = 1024

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1")

    def __call__(self, token_loss: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
        return token_loss.sum() / (self.length * denominators.sequences)


AGGREGATIONS: dict[str, Callable[..., Aggregation]] = {
    "seq_mean_token_mean": SeqMeanTokenMean,
    "token_mean": TokenMean,
    "constant_length": ConstantLength,
}
