"""A policy that computes in 16 bits, scored in float32 beside itself."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kpo_cli.policy.load import Policy
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.sharding import full


@dataclass(frozen=True)
class Unrounded:
    """A twin of a policy's model that computes in float32 and has no weights of its own."""

    model: Any
    """The policy's."""
    twin: Scorer

    @classmethod
    def of(cls, policy: Policy, temperature: float) -> "Unrounded":
        """To be called before `policy.narrow`, while its layers are those of transformers."""
        blank = {id(p): torch.nn.Parameter(p.new_empty(0), requires_grad=False) for p in policy.model.parameters()}
        return cls(policy.model, policy.way.scorer(copy.deepcopy(policy.model, blank), temperature))

    @contextmanager
    def weighted(self) -> Iterator[Scorer]:
        """The twin's scorer. Within the block it has the policy's present weights: the float32 masters themselves, and
        copies of what is kept in 16 bits alone."""
        pairs = list(zip(self.twin.model.parameters(), self.model.parameters(), strict=True))
        try:
            for own, weight in pairs:
                own.data = full(weight.detach()).float()
            yield self.twin
        finally:
            for own, _ in pairs:
                own.data = own.new_empty(0)
