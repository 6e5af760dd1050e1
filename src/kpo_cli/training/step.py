"""One rollout batch's worth of learning: old log-probabilities, then one optimizer step for each mini-batch."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kpo_cli.core import Denominators, Objective
from kpo_cli.core.diagnostics import Mean, RatioSums
from kpo_cli.core.filters import AdaptiveFilter
from kpo_cli.core.objective import ObjectiveOutput
from kpo_cli.core.penalties import MismatchCorrection
from kpo_cli.core.rounding import Rounding
from kpo_cli.errors import RunStopped, SamplingFailed
from kpo_cli.policy.batch import Batch
from kpo_cli.policy.memory import lacks_memory
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.sharding import full, recover
from kpo_cli.policy.threads import Workers
from kpo_cli.policy.unrounded import Unrounded
from kpo_cli.rollout.check import GROSS, SERVES, Gap
from kpo_cli.training.exact import Exact
from kpo_cli.training.optimizer import HostAdamW, give_gradients

Result = TypeVar("Result")


@dataclass
class UpdateRecord:
    """What an update saw of every response, filled as it goes; token tensors are (N, T), in the batch's order."""

    old_log_probs: Tensor
    log_ratio: Tensor
    filtered_log_ratio: Tensor
    entropy: Tensor
    mini_batch_index: Tensor  # (N,)
    uneven: Tensor
    """(N,) bool: old and new log-probabilities come from micro-batches of different sizes (see `Updater._begin`)."""
    sums: RatioSums = field(default_factory=RatioSums)
    means: dict[str, Mean] = field(default_factory=dict)
    """Of the objective's optional parts."""
    grad_norms: list[float] = field(default_factory=list)
    """Of each optimizer step, before clipping."""
    rounding: Rounding | None = None
    """Of a recorded step in 16 bits."""

    @classmethod
    def empty(cls, rows: int, length: int) -> "UpdateRecord":
        old, raw, filtered, entropy = (torch.zeros(rows, length) for _ in range(4))
        return cls(
            old, raw, filtered, entropy, torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
        )

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
    """The sampler's log-probabilities serve as the old ones, as long as they are trusted."""
    watched: bool = False
    """The sampler computes in float32 with the same weights, so that its numbers should be the trainer's: compared in
    every update."""
    trusted: bool = True
    """They were seen to be the trainer's and no update has found otherwise."""
    correction: MismatchCorrection | None = None
    """Of the objective, once they are not trusted."""
    gap: Gap | None = None
    """Found by the last update, over whatever the trainer scored before its first optimizer step."""
    reference: Scorer | None = None
    """The policy that a reference KL is taken to."""
    unrounded: Unrounded | None = None
    """The same policy in float32, where the run computes in 16 bits."""
    workers: Workers = field(default_factory=Workers)
    _proven: int = 0
    """Tokens of the largest micro-batch that was rehearsed, since memory last ran out."""

    def update(self, batch: Batch, for_record: bool = False, measured: bool = False) -> UpdateRecord:
        """One optimizer step for each mini-batch, in order.

        `measured`: the record says what rounding did to log-ratios, where the run computes in 16 bits.

        `for_record`: old log-probabilities are the trainer's in any case. The sampler's differ by rounding, which is
        nothing to the loss but decides the signs of the smallest log-ratios, and signs are what is analysed.
        """
        parts = self._mini_batches(batch)
        exact = Exact.begin(self.unrounded, batch, parts, self.max_tokens) if measured else None
        old, learned = self._begin(batch, parts, for_record)
        record, size = UpdateRecord.empty(*batch.response_ids.shape), self.max_tokens
        for number, (rows, old_log_probs) in enumerate(zip(parts, old, strict=True)):
            if number:
                learned = self._learn_all(batch, rows, old_log_probs)
            record.mini_batch_index[rows] = number
            record.uneven[rows] = self.scorer.half and self.max_tokens < size
            for micro in learned:
                record.add(micro)
            if number == 1 and exact is not None:  # here the weights are one step from the old ones
                record.rounding = exact.rounding(batch, self.objective, record.old_log_probs, record.log_ratio)
            self._optimizer_step(batch, rows, learned, record)
        self._drop_gradients()  # sampling has better use for the memory
        return record

    def distrust(self) -> None:
        """From here on old log-probabilities are the trainer's, and importance weights correct for the sampler's."""
        self.trusted = False
        if self.correction is not None:
            self.objective = replace(self.objective, correction=self.correction)

    def refit(self, sums: Tensor) -> str | None:
        """Fit an adaptive filter to its accumulated sums; returns its note, if any."""
        ratio_filter = self.objective.ratio_filter
        if not isinstance(ratio_filter, AdaptiveFilter):
            return None
        fitted, note = ratio_filter.refit(sums)
        self.objective = replace(self.objective, ratio_filter=fitted)
        return note

    def takes(self, sums: Tensor) -> bool:
        """Whether these are sums that the objective's filter makes and can be fitted to."""
        ratio_filter, empty = self.objective.ratio_filter, torch.zeros(1, 1)
        return (
            isinstance(ratio_filter, AdaptiveFilter) and sums.shape == ratio_filter.sums(empty, empty > 0, empty).shape
        )

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

    def _begin(self, batch: Batch, parts: list[Tensor], for_record: bool) -> tuple[list[Tensor | None], list["Micro"]]:
        """Old log-probabilities of every mini-batch but the first, and what the first one learns.

        The first one's old log-probabilities are its own, from the same forward pass (z = 0 exactly). In bfloat16 a
        log-probability depends on what else is in its micro-batch, by far more than clip widths of 3e-4: old and new
        ones must come from the same micro-batches, and where these had to be made smaller on the way, everything is
        computed again. Once the weights have changed that is too late, hence the rehearsal. All is computed again, too,
        where the first mini-batch, or another one that was scored, shows that the sampler's log-probabilities are not
        to be trusted.
        """
        with self._room_for_moments():
            while True:
                size = self.max_tokens
                serves = self.sampler_log_probs and self.trusted and not for_record
                known = batch.rollout_log_probs if serves else None
                self._rehearse(batch, parts)
                old = [known if known is not None else self._old_log_probs(batch, rows) for rows in parts[1:]]
                learned = self._learn_all(batch, parts[0], None)
                scored = [] if known is not None else list(zip(parts[1:], old, strict=True))
                if self.watched and not self._still_trusted(batch, learned, scored):
                    self.distrust()
                elif self.max_tokens == size or known is not None:
                    return [None, *old], learned

    def _still_trusted(self, batch: Batch, learned: list["Micro"], scored: list[tuple[Tensor, Tensor]]) -> bool:
        """Whether nothing is new in how the sampler's log-probabilities compare with those of the first mini-batch, and
        with those of `scored` others, rows and (N, T) each.

        Raises SamplingFailed where nothing could make up for the difference.
        """
        said = [batch.rollout_log_probs[micro.rows, : micro.mask.shape[1]][micro.mask] for micro in learned]
        own = [micro.old_log_probs.cpu()[micro.mask] for micro in learned]
        for rows, values in scored:
            mask = batch.response_mask[rows]
            said.append(batch.rollout_log_probs[rows][mask])
            own.append(values[rows][mask])
        self.gap = Gap.of(torch.cat(said), torch.cat(own))
        if not self.gap.mean <= GROSS:
            raise SamplingFailed(
                f"the sampler does not sample the policy: its log-probabilities differ from the trainer's by "
                f"{self.gap} (allowed: {GROSS:g} in the mean); this kind of model may need rollout=vllm"
            )
        return not self.trusted or self.gap.within(SERVES)

    def _rehearse(self, batch: Batch, parts: list[Tensor]) -> None:
        """Find out whether the largest micro-batch fits, unless one as large did: in bfloat16, where it matters."""
        while self.scorer.half:
            cut = [self.scorer.split(batch, rows, self.max_tokens) for rows in parts]
            largest = max((micro for micros in cut for micro in micros), key=lambda micro: self._tokens(batch, micro))
            tokens, crowded = self._tokens(batch, largest), max(map(len, cut)) > 1
            if tokens <= self._proven:
                return
            size = self.max_tokens
            self._learn_all(batch, largest, None, beside_gradients=crowded)
            self._drop_gradients()
            if self.max_tokens == size:
                self._proven = tokens

    def _tokens(self, batch: Batch, rows: Tensor) -> int:
        """In a forward pass of `rows`."""
        lengths = batch.response_mask[rows].sum(-1)
        if not self.scorer.packed:
            return len(rows) * int((batch.prompt_lengths[rows] + lengths).max())
        prompts = dict(zip(batch.prompt_index[rows].tolist(), batch.prompt_lengths[rows].tolist(), strict=True))
        return int((lengths - 1).sum()) + sum(prompts.values())

    @contextmanager
    def _room_for_moments(self) -> Iterator[None]:
        """Holds the memory that AdamW's moments will take in the first step and do not yet, since they were never made
        or are in host memory: so what fits before it fits behind it."""
        kept_away = isinstance(self.optimizer, HostAdamW)
        weights = self.optimizer.param_groups[0]["params"]
        absent = [weight for weight in weights if not kept_away and not self._has_moments(weight)]
        room = [torch.empty_like(p) for p in absent for _ in range(2)]
        try:
            yield
        finally:
            room.clear()

    def _has_moments(self, weight: Tensor) -> bool:
        """On its device."""
        return any(t.dim() > 0 and t.device == weight.device for t in self.optimizer.state.get(weight, {}).values())

    def _parameters(self) -> list[Tensor]:
        return [p for p in self.scorer.model.parameters() if p.requires_grad]

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scorer.model.zero_grad(set_to_none=True)  # the same ones, but where they are parts of sharded ones

    def _optimizer_step(self, batch: Batch, rows: Tensor, learned: list["Micro"], record: UpdateRecord) -> None:
        parameters = self._parameters()
        for micro in learned:
            if micro.gradients is not None:
                _add_gradients(parameters, micro.gradients)
        norm = float(full(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)))
        if not np.isfinite(norm):
            raise RunStopped("the gradient is not finite: the weights have exploded; lower trainer.lr")
        record.grad_norms.append(norm)
        if self._loss_mask(batch)[rows].any():  # else truncated responses alone (mask_truncated): not stepped on
            give_gradients(self.scorer.model, self.optimizer)
            self.optimizer.step()

    def _learn_all(
        self, batch: Batch, rows: Tensor, old_log_probs: Tensor | None, beside_gradients: bool = False
    ) -> list["Micro"]:
        """Forward and backward passes of a mini-batch, in micro-batches."""
        counts = Denominators.of(self._loss_mask(batch)[rows])
        # A mini-batch of truncated responses alone (mask_truncated) has a loss of 0 over 1.
        denominators = Denominators(max(1, counts.sequences), max(1, counts.tokens))
        parameters = self._parameters()

        def learn(micro: Tensor) -> Micro:
            if beside_gradients:  # as behind the first micro-batch of several
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
            return self._learn(batch, micro, old_log_probs, denominators, parameters)

        return self._map(learn, batch, rows)

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
        if not log_probs.isfinite().all():
            raise RunStopped("log-probabilities are not finite: the weights have exploded; lower trainer.lr")
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
        if self.mask_truncated:  # what is not learned from has ratios all the same
            z = torch.where(part.response_mask.to(device), log_probs.detach() - old, 0.0)
            x = self.objective.ratio_filter(z, part.response_mask.to(device), old)
            out = replace(out, log_ratio=z, filtered_log_ratio=x)
        return Micro(rows, part.response_mask, old, entropy.detach(), out, gradients)

    def _map(self, work: Callable[[Tensor], Result], batch: Batch, rows: Tensor) -> list[Result]:
        """`work` on each micro-batch of `rows`. Begun anew with smaller ones when the device is out of memory."""
        while True:
            self._drop_gradients()
            parts = self.scorer.split(batch, rows, self.max_tokens)
            try:
                return self.workers.map(work, parts)
            except (RuntimeError, MemoryError) as error:
                recover(self.scorer.model)  # also for whoever saves it
                if not lacks_memory(error) or len(parts) == len(rows):  # nothing left to cut
                    raise
            # Out of the handler, so that the failed pass is not kept alive by the error's traceback.
            self.max_tokens //= 2
            self._proven = 0
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
