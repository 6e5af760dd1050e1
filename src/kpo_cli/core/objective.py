"""The objective: ratio filter, surrogate and aggregation, composed.

    z          = log_probs - old_log_probs
    x          = ratio_filter(sg[z])                      sg: stop-gradient
    log_ratio  = sg[x] + log_probs - sg[log_probs]        straight-through: x's value, log pi's gradient
    loss       = aggregate(surrogate(log_ratio, ...))

See docs/methods.md for which composition is which method, and `kpo_cli.core.methods` for the presets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kpo_cli.core.aggregation import Aggregation, Denominators
from kpo_cli.core.checks import as_mask, check_finite, check_same_shape
from kpo_cli.core.diagnostics import RatioSums
from kpo_cli.core.filters import RatioFilter
from kpo_cli.core.surrogates import Surrogate


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns; token tensors are (B, T), zero or false outside the mask, and detached."""

    loss: Tensor
    """Scalar with gradient, to be minimised."""
    log_ratio: Tensor
    """The raw z."""
    filtered_log_ratio: Tensor
    """x, what the filter made of z."""
    clipped: Tensor
    """True where the surrogate's limit decided the loss."""
    sums: RatioSums

    @property
    def metrics(self) -> dict[str, float]:
        """Ratio metrics of this call (docs/metrics.md). Add `sums` of several calls first to get those of all."""
        return self.sums.metrics()


@dataclass(frozen=True)
class Objective:
    """A policy-gradient objective. Two objectives that compare equal compute the same thing."""

    ratio_filter: RatioFilter
    surrogate: Surrogate
    aggregation: Aggregation

    def __call__(
        self,
        *,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        denominators: Denominators | None = None,
    ) -> ObjectiveOutput:
        """Loss of a batch of responses.

        `log_probs` and `old_log_probs` (B, T), log-probability of each response token under the policy that learns
        (with gradient) and under the one that sampled; `advantages` (B,) or (B, T); `response_mask` (B, T), true on
        the response's tokens. `denominators` are the counts of the whole mini-batch where this is a part of it.

        Computes in float32 or wider, also under autocast. Raises ValueError for shapes or dtypes that do not fit, for
        an empty mask, and for a non-finite number on a valid token.
        """
        mask = as_mask(response_mask)
        if advantages.dim() == 1 and advantages.shape[0] == log_probs.shape[0]:
            advantages = advantages[:, None].expand_as(log_probs)
        check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, response_mask=mask, advantages=advantages)
        check_finite("log_probs", log_probs, mask)
        check_finite("old_log_probs", old_log_probs, mask)
        check_finite("advantages", advantages, mask)
        if denominators is None:
            denominators = Denominators.of(mask)
        if denominators.tokens < 1:
            raise ValueError("response_mask is empty: no valid token in the batch")
        with torch.autocast(log_probs.device.type, enabled=False):
            return self._loss(log_probs, old_log_probs, advantages, mask, denominators)

    def _loss(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        denominators: Denominators,
    ) -> ObjectiveOutput:
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        log_probs = torch.where(mask, log_probs.to(dtype), 0.0)
        old_log_probs = torch.where(mask, old_log_probs.detach().to(dtype), 0.0)
        advantages = torch.where(mask, advantages.detach().to(dtype), 0.0)
        z = log_probs - old_log_probs
        if self.ratio_filter.straight_through:
            log_ratio = self.ratio_filter(z.detach(), mask) + (log_probs - log_probs.detach())
        else:
            log_ratio = self.ratio_filter(z, mask)
        token = self.surrogate(log_ratio, log_probs, advantages, mask)
        loss = self.aggregation(token.loss, mask, denominators)
        z, x = z.detach(), log_ratio.detach()
        sums = RatioSums.of(z, x, token.active, token.outside, mask)
        return ObjectiveOutput(loss, z, x, token.active, sums)
