"""The objective: ratio filter, surrogate and aggregation, composed.

    z          = log_probs - old_log_probs
    x          = ratio_filter(sg[z])                      sg: stop-gradient
    log_ratio  = sg[x] + log_probs - sg[log_probs]        straight-through: x's value, log pi's gradient
    loss       = aggregate(weight * surrogate(log_ratio, ...) + KL - entropy bonus)

The weight (rollout mismatch), the KL and the bonus are optional and never touch z. See docs/methods.md for which
composition is which method, and `kpo_cli.core.methods` for the presets.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kpo_cli.core.aggregation import Aggregation, Denominators
from kpo_cli.core.checks import as_mask, check_same_shape, cleaned
from kpo_cli.core.diagnostics import Mean, RatioSums
from kpo_cli.core.filters import RatioFilter
from kpo_cli.core.penalties import MismatchCorrection, ReferenceKL, mismatch_log_weight
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
    means: dict[str, Mean] = field(default_factory=dict)
    """Of the optional parts: `ref_kl`, `correction_weight`, `correction_cut_fraction`."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of this call (docs/metrics.md). Add `sums` and `means` of several calls first to get those of all."""
        return self.sums.metrics() | {name: mean.value for name, mean in self.means.items()}


@dataclass(frozen=True)
class Objective:
    """A policy-gradient objective. Two objectives that compare equal compute the same thing."""

    ratio_filter: RatioFilter
    surrogate: Surrogate
    aggregation: Aggregation
    correction: MismatchCorrection | None = None
    reference_kl: ReferenceKL | None = None
    entropy_bonus: float = 0.0

    def __call__(
        self,
        *,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        denominators: Denominators | None = None,
        rollout_log_probs: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Loss of a batch of responses.

        `log_probs` and `old_log_probs` (B, T), log-probability of each response token under the policy that learns
        (with gradient) and under the one that sampled; `advantages` (B,) or (B, T); `response_mask` (B, T), true on
        the response's tokens. `denominators` are the counts of the whole mini-batch where this is a part of it.
        `rollout_log_probs`, `ref_log_probs` and `entropy` (with gradient) are (B, T) each, needed where the objective
        has a correction, a reference KL, or an entropy bonus.

        Computes in float32 or wider, also under autocast. Raises ValueError for shapes or dtypes that do not fit, for
        an empty mask, and for a non-finite number on a valid token.
        """
        mask = as_mask(response_mask)
        if advantages.dim() == 1 and advantages.shape[0] == log_probs.shape[0]:
            advantages = advantages[:, None].expand_as(log_probs)
        tensors = {"log_probs": log_probs, "old_log_probs": old_log_probs, "advantages": advantages}
        tensors |= self._optional(rollout_log_probs=rollout_log_probs, ref_log_probs=ref_log_probs, entropy=entropy)
        check_same_shape(**tensors, response_mask=mask)
        clean = cleaned(mask, **tensors)
        if denominators is None:
            denominators = Denominators.of(mask)
        if denominators.tokens < 1:
            raise ValueError("response_mask is empty: no valid token in the batch")
        with torch.autocast(log_probs.device.type, enabled=False):
            dtype = torch.promote_types(log_probs.dtype, torch.float32)
            return self._loss(mask, denominators, **{name: tensor.to(dtype) for name, tensor in clean.items()})

    def _optional(self, **given: Tensor | None) -> dict[str, Tensor]:
        """The optional inputs that this objective needs; a ValueError names one that is missing."""
        needed = {
            "rollout_log_probs": self.correction is not None,
            "ref_log_probs": self.reference_kl is not None,
            "entropy": self.entropy_bonus != 0,
        }
        for name, need in needed.items():
            if need and given[name] is None:
                raise ValueError(f"this objective needs {name}")
        return {name: tensor for name, tensor in given.items() if needed[name] and tensor is not None}

    def _loss(
        self,
        mask: Tensor,
        denominators: Denominators,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        rollout_log_probs: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Inputs are of one dtype and zero outside the mask."""
        old_log_probs, advantages = old_log_probs.detach(), advantages.detach()
        z = log_probs - old_log_probs
        if self.ratio_filter.straight_through:
            x = self.ratio_filter(z.detach(), mask, old_log_probs)
            log_ratio = x.to(z.dtype) + (log_probs - log_probs.detach())
        else:
            log_ratio = self.ratio_filter(z, mask, old_log_probs)
        token = self.surrogate(log_ratio, log_probs, advantages, mask)
        token_loss, means = token.loss, {}
        if self.correction is not None and rollout_log_probs is not None:
            sequence_level = self.surrogate.sequence_level or not self.ratio_filter.straight_through
            log_weight = mismatch_log_weight(old_log_probs, rollout_log_probs.detach(), mask, sequence_level)
            weight, cut = self.correction(log_weight)
            token_loss = token_loss * weight
            means["correction_weight"] = Mean.of(weight, mask)
            means["correction_cut_fraction"] = Mean.of(cut, mask)
        if self.reference_kl is not None and ref_log_probs is not None:
            kl = self.reference_kl(log_probs, ref_log_probs.detach())
            token_loss = token_loss + self.reference_kl.coefficient * kl
            means["ref_kl"] = Mean.of(kl, mask)
        if entropy is not None:
            token_loss = token_loss - self.entropy_bonus * entropy
        loss = self.aggregation(token_loss, mask, denominators)
        z, x = z.detach(), torch.where(mask, log_ratio.detach(), 0.0)
        sums = RatioSums.of(z, x, token.active, token.outside, mask)
        return ObjectiveOutput(loss, z, x, token.active, sums, means)
