"""One rollout batch's worth of learning: old log-probabilities, then one optimizer step for each mini-batch."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kpo_cli.core import Denominators, Objective, token_log_probs
from kpo_cli.core.diagnostics import Mean, RatioSums
from kpo_cli.core.filters import AdaptiveFilter
from kpo_cli.errors import RunStopped
from kpo_cli.training.batch import Batch


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

    def put(self, rows: Tensor, mask: Tensor, **values: Tensor) -> None:
        """Store token tensors (len(rows), t) of some rows, zero outside `mask`."""
        for name, value in values.items():
            getattr(self, name)[rows, : mask.shape[1]] = torch.where(mask, value.detach().cpu().float(), 0.0)


@dataclass
class Updater:
    """Everything that turns a batch into changed weights. An adaptive filter replaces `objective` between batches."""

    model: Any
    optimizer: torch.optim.Optimizer
    objective: Objective
    temperature: float
    mini_batches: int
    micro_batch: int
    max_grad_norm: float
    mask_truncated: bool
    reference: Any = None
    """The policy that a reference KL is taken to."""

    def update(self, batch: Batch) -> UpdateRecord:
        """One optimizer step for each mini-batch, in order."""
        parts = self._split(batch)
        # Gradient checkpointing works in train mode only; there is no dropout that the mode could switch on.
        self.model.train(self.model.is_gradient_checkpointing)
        # The first mini-batch is on-policy: its old log-probs are its own, from the same forward pass (z = 0 exactly).
        old = [None, *(self._old_log_probs(batch, rows) for rows in parts[1:])]
        record = UpdateRecord.empty(*batch.response_ids.shape)
        for number, (rows, old_log_probs) in enumerate(zip(parts, old, strict=True)):
            record.mini_batch_index[rows] = number
            self._optimizer_step(batch, rows, old_log_probs, record)
        self.model.eval()
        return record

    def refit(self, sums: Tensor) -> str | None:
        """Fit an adaptive filter to its accumulated sums; returns its note, if any."""
        ratio_filter = self.objective.ratio_filter
        if not isinstance(ratio_filter, AdaptiveFilter):
            return None
        fitted, note = ratio_filter.refit(sums)
        self.objective = replace(self.objective, ratio_filter=fitted)
        return note

    def _split(self, batch: Batch) -> list[Tensor]:
        """Rows of each mini-batch. Cut by prompt, so that a group is never torn apart."""
        prompts = np.array_split(np.arange(int(batch.prompt_index[-1]) + 1), self.mini_batches)
        return [torch.isin(batch.prompt_index, torch.from_numpy(part)).nonzero().squeeze(-1) for part in prompts]

    def _micro_batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.micro_batch)

    @torch.no_grad()
    def _old_log_probs(self, batch: Batch, rows: Tensor) -> Tensor:
        """(len(rows), T), in micro-batches of the same shape as the update's."""
        old = torch.zeros(len(rows), batch.response_ids.shape[1])
        start = 0
        for micro in self._micro_batches(rows):
            log_probs, _ = response_log_probs(self.model, batch.rows(micro), self.temperature)
            old[start : start + len(micro), : log_probs.shape[1]] = log_probs.cpu()
            start += len(micro)
        return old

    def _optimizer_step(self, batch: Batch, rows: Tensor, old_log_probs: Tensor | None, record: UpdateRecord) -> None:
        loss_mask = self._loss_mask(batch)
        counts = Denominators.of(loss_mask[rows])
        # A mini-batch of truncated responses alone (mask_truncated) has a loss of 0 over 1, and is not stepped on.
        denominators = Denominators(max(1, counts.sequences), max(1, counts.tokens))
        self.optimizer.zero_grad(set_to_none=True)
        start = 0
        for micro in self._micro_batches(rows):
            part = batch.rows(micro)
            length = part.response_ids.shape[1]
            bonus = self.objective.entropy_bonus != 0
            log_probs, entropy = response_log_probs(self.model, part, self.temperature, entropy_gradient=bonus)
            if log_probs.isnan().any():
                raise RunStopped("log-probabilities are NaN: the weights have exploded; lower trainer.lr")
            old = log_probs.detach()
            if old_log_probs is not None:
                old = old_log_probs[start : start + len(micro), :length].to(log_probs.device)
            out = self.objective(
                log_probs=log_probs,
                old_log_probs=old,
                advantages=part.advantages.to(log_probs.device),
                response_mask=loss_mask[micro, :length].to(log_probs.device),
                denominators=denominators,
                rollout_log_probs=part.rollout_log_probs.to(log_probs.device),
                ref_log_probs=self._ref_log_probs(part),
                entropy=entropy,
            )
            out.loss.backward()
            start += len(micro)
            record.sums += out.sums
            record.means |= {k: record.means[k] + m if k in record.means else m for k, m in out.means.items()}
            record.put(
                micro,
                part.response_mask,
                old_log_probs=old,
                log_ratio=out.log_ratio,
                filtered_log_ratio=out.filtered_log_ratio,
                entropy=entropy,
            )
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        if not np.isfinite(norm):
            raise RunStopped("the gradient is not finite: the weights have exploded; lower trainer.lr")
        record.grad_norms.append(norm)
        if counts.tokens:
            self.optimizer.step()

    @torch.no_grad()
    def _ref_log_probs(self, batch: Batch) -> Tensor | None:
        return None if self.reference is None else response_log_probs(self.reference, batch, self.temperature)[0]

    def _loss_mask(self, batch: Batch) -> Tensor:
        return batch.response_mask & ~batch.truncated[:, None] if self.mask_truncated else batch.response_mask


def response_log_probs(
    model: Any, batch: Batch, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens and entropies (nats), both (N, T), on the model's device.

    Outside the response mask they are finite and mean nothing.
    """
    input_ids, attention_mask = _joined(batch)
    length = batch.response_ids.shape[1]
    # The logits that predict the response begin one token before it; earlier ones are not computed.
    first = int(batch.prompt_lengths.min()) - 1
    keep = input_ids.shape[1] - first
    logits = model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        logits_to_keep=keep,
        use_cache=False,
    ).logits
    columns = (batch.prompt_lengths - 1 - first)[:, None] + torch.arange(length)
    columns = columns.clamp(max=keep - 1).to(logits.device)
    rows = torch.arange(len(batch), device=logits.device)[:, None]
    ids = batch.response_ids.to(logits.device)
    return token_log_probs(logits[rows, columns], ids, temperature, entropy_gradient)


def _joined(batch: Batch) -> tuple[Tensor, Tensor]:
    """Prompt and response end to end, `input_ids` and `attention_mask` (N, L), padded on the right."""
    response_lengths = batch.response_mask.sum(-1)
    total = batch.prompt_lengths + response_lengths
    ids = torch.zeros(len(batch), int(total.max()), dtype=torch.long)
    for row in range(len(batch)):
        prompt, end = int(batch.prompt_lengths[row]), int(total[row])
        ids[row, :prompt] = batch.prompt_ids[row, :prompt]
        ids[row, prompt:end] = batch.response_ids[row, : end - prompt]
    return ids, (torch.arange(ids.shape[1]) < total[:, None]).long()
