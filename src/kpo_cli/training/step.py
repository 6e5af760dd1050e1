"""One rollout batch's worth of learning: old log-probabilities, then one optimizer step for each mini-batch."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kpo_cli.core import Denominators, Objective
from kpo_cli.core.diagnostics import Mean, RatioSums
from kpo_cli.core.filters import AdaptiveFilter
from kpo_cli.core.objective import ObjectiveOutput
from kpo_cli.errors import RunStopped
from kpo_cli.policy.batch import Batch
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.threads import Workers

Result = TypeVar("Result")


@dataclass
class UpdateRecord:
    """What an update saw of every response, filled as it goes; token tensors are (N, T), in the batch's order."""

    old_log_probs: Tensor
    log_ratio: Tensor
    filtered_log_ratio: Tensor
    entropy: Tensor
    mini_batch_index: Tensor  # (N,)
    sums: RatioSums = field(default_factory=RatioSums)
    means: dict[str, Mean] = field(default_factory=dict)
    """Of the objective's optional parts."""
    grad_norms: list[float] = field(default_factory=list)
    """Of each optimizer step, before clipping."""

    @classmethod
    def empty(cls, rows: int, length: int) -> "UpdateRecord":
        old, raw, filtered, entropy = (torch.zeros(rows, length) for _ in range(4))
        return cls(old, raw, filtered, entropy, torch.zeros(rows, dtype=torch.long))

    def add(self, micro: "Micro") -> None:
        self.sums += micro.out.sums
        for name, mean in micro.out.means.items():
            self.means[name] = self.means[name] + mean if name in self.means else mean
        self._put(
            micro.rows,
            micro.mask,
            old_log_probs=micro.old_log_probs,
            log_ratio=micro.out.log_ratio,
            filtered_log_ratio=micro.out.filtered_log_ratio,
            entropy=micro.entropy,
        )

    def _put(self, rows: Tensor, mask: Tensor, **values: Tensor) -> None:
        """Store token tensors (len(rows), t) of some rows, zero outside `mask`."""
        for name, value in values.items():
            getattr(self, name)[rows, : mask.shape[1]] = torch.where(mask, value.detach().cpu().float(), 0.0)


class Micro(NamedTuple):
    """What a micro-batch leaves behind, all of it detached; token tensors are (rows, t)."""

    rows: Tensor  # (rows,) within the batch
    mask: Tensor
    old_log_probs: Tensor
    entropy: Tensor
    out: ObjectiveOutput
    gradients: tuple[Tensor | None, ...] | None
    """None if they are in the parameters already."""


@dataclass
class Updater:
    """Everything that turns a batch into changed weights. An adaptive filter replaces `objective` between batches."""

    scorer: Scorer
    optimizer: torch.optim.Optimizer
    objective: Objective
    mini_batches: int
    max_tokens: int
    """In one forward and backward pass. Halved when the device is out of memory."""
    max_grad_norm: float
    mask_truncated: bool
    sampler_log_probs: bool = False
    """The sampler's log-probabilities serve as the old ones: it computes in float32, with the same weights."""
    reference: Scorer | None = None
    """The policy that a reference KL is taken to."""
    workers: Workers = field(default_factory=Workers)

    def update(self, batch: Batch, for_record: bool = False) -> UpdateRecord:
        """One optimizer step for each mini-batch, in order.

        `for_record`: old log-probabilities are the trainer's in any case. The sampler's differ by rounding, which is
        nothing to the loss but decides the signs of the smallest log-ratios, and signs are what is analysed.
        """
        parts = self._mini_batches(batch)
        model = self.scorer.model
        # Gradient checkpointing works in train mode only; there is no dropout that the mode could switch on.
        model.train(model.is_gradient_checkpointing)
        # The first mini-batch is on-policy: its old log-probs are its own, from the same forward pass (z = 0 exactly).
        known = self.sampler_log_probs and not for_record
        old = [None, *(batch.rollout_log_probs if known else self._old_log_probs(batch, rows) for rows in parts[1:])]
        record = UpdateRecord.empty(*batch.response_ids.shape)
        for number, (rows, old_log_probs) in enumerate(zip(parts, old, strict=True)):
            record.mini_batch_index[rows] = number
            self._optimizer_step(batch, rows, old_log_probs, record)
        self.optimizer.zero_grad(set_to_none=True)  # sampling has better use for the memory
        model.eval()
        return record

    def refit(self, sums: Tensor) -> str | None:
        """Fit an adaptive filter to its accumulated sums; returns its note, if any."""
        ratio_filter = self.objective.ratio_filter
        if not isinstance(ratio_filter, AdaptiveFilter):
            return None
        fitted, note = ratio_filter.refit(sums)
        self.objective = replace(self.objective, ratio_filter=fitted)
        return note

    def _mini_batches(self, batch: Batch) -> list[Tensor]:
        """Rows of each mini-batch. Cut by prompt, so that a group is never torn apart."""
        prompts = np.array_split(np.arange(int(batch.prompt_index[-1]) + 1), self.mini_batches)
        return [torch.isin(batch.prompt_index, torch.from_numpy(part)).nonzero().squeeze(-1) for part in prompts]

    @torch.no_grad()
    def _old_log_probs(self, batch: Batch, rows: Tensor) -> Tensor:
        """(N, T), set in `rows`; computed in the micro-batches of the update."""

        def score(micro: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():  # a thread of its own does not inherit it
                return micro, self.scorer(batch.rows(micro))[0].cpu()

        old = torch.zeros(batch.response_ids.shape)
        for micro, log_probs in self._map(score, batch, rows):
            old[micro, : log_probs.shape[1]] = log_probs
        return old

    def _optimizer_step(self, batch: Batch, rows: Tensor, old_log_probs: Tensor | None, record: UpdateRecord) -> None:
        counts = Denominators.of(self._loss_mask(batch)[rows])
        # A mini-batch of truncated responses alone (mask_truncated) has a loss of 0 over 1, and is not stepped on.
        denominators = Denominators(max(1, counts.sequences), max(1, counts.tokens))
        parameters = [p for p in self.scorer.model.parameters() if p.requires_grad]
        learned = self._map(
            lambda micro: self._learn(batch, micro, old_log_probs, denominators, parameters), batch, rows
        )
        for micro in learned:
            record.add(micro)
            if micro.gradients is not None:
                _add_gradients(parameters, micro.gradients)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        if not np.isfinite(norm):
            raise RunStopped("the gradient is not finite: the weights have exploded; lower trainer.lr")
        record.grad_norms.append(norm)
        if counts.tokens:
            self.optimizer.step()

    def _learn(
        self,
        batch: Batch,
        rows: Tensor,
        old_log_probs: Tensor | None,
        denominators: Denominators,
        parameters: list[Tensor],
    ) -> Micro:
        """Forward and backward pass of a micro-batch; its gradients add to those of the mini-batch."""
        part = batch.rows(rows)
        length = part.response_ids.shape[1]
        log_probs, entropy = self.scorer(part, entropy_gradient=self.objective.entropy_bonus != 0)
        if log_probs.isnan().any():
            raise RunStopped("log-probabilities are NaN: the weights have exploded; lower trainer.lr")
        device = log_probs.device
        old = log_probs.detach() if old_log_probs is None else old_log_probs[rows, :length].to(device)
        out = self.objective(
            log_probs=log_probs,
            old_log_probs=old,
            advantages=part.advantages.to(device),
            response_mask=self._loss_mask(part).to(device),
            denominators=denominators,
            rollout_log_probs=part.rollout_log_probs.to(device),
            ref_log_probs=self._ref_log_probs(part),
            entropy=entropy,
        )
        gradients = None
        if self.workers.count == 1:
            out.loss.backward()
        else:  # threads may not share .grad
            gradients = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        out = replace(out, loss=out.loss.detach())
        return Micro(rows, part.response_mask, old, entropy.detach(), out, gradients)

    def _map(self, work: Callable[[Tensor], Result], batch: Batch, rows: Tensor) -> list[Result]:
        """`work` on each micro-batch of `rows`. Begun anew with smaller ones when the device is out of memory."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            parts = self.scorer.split(batch, rows, self.max_tokens)
            try:
                return self.workers.map(work, parts)
            except torch.OutOfMemoryError:
                if len(parts) == len(rows):  # nothing left to cut
                    raise
            # Out of the handler, so that the failed pass is not kept alive by the error's traceback.
            self.max_tokens //= 2
            gc.collect()
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _ref_log_probs(self, batch: Batch) -> Tensor | None:
        return None if self.reference is None else self.reference(batch)[0]

    def _loss_mask(self, batch: Batch) -> Tensor:
        return batch.response_mask & ~batch.truncated[:, None] if self.mask_truncated else batch.response_mask


def _add_gradients(parameters: list[Tensor], gradients: tuple[Tensor | None, ...]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
