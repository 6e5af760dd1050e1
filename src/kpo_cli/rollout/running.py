"""The responses of a batch that have not ended, and how the model reads one more token of each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kpo_cli.rollout.cache import rounded_up, spread
from kpo_cli.rollout.decoder import Decoder
from kpo_cli.rollout.ways import Ways

CACHES = ("past_key_values", "cache_params")
"""What models call their cache, in and out; the second is Mamba's."""


@dataclass
class Running:
    """With a cache."""

    model: Any
    lean: Decoder | None
    """What takes the place of the model behind the prompts, where there is one."""
    cache: Any
    cache_name: str
    """One of `CACHES`."""
    rows: Tensor
    """(R,): the place in the batch of each."""
    mask: Tensor | None
    """(R, all tokens there may be), 0 at the left padding; None if there is none: then the model builds no mask.

    With a block it is always there, and 0 at what is not sampled yet as well."""
    length: int
    """Tokens in the cache, padding included."""
    padding: Tensor | None
    """(R, 1): to the left of each; None where there is no mask: then the model knows the positions by itself."""
    block: int | None
    """See `GrowingLayer`."""

    @classmethod
    def start(
        cls,
        model: Any,
        lean: Decoder | None,
        prompts: list[list[int]],
        room: int,
        ways: Ways,
        *,
        block: int | None,
    ) -> tuple["Running", Tensor]:
        """Put the prompts through the model, each once; also the logits (B, V) behind each.

        `room` is the most tokens that a response will have. Raises LookupError if there is no cache.
        """
        unique = list(dict.fromkeys(map(tuple, prompts))) if ways.reorder else [tuple(prompt) for prompt in prompts]
        place = {prompt: i for i, prompt in enumerate(unique)}
        source = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=model.device)
        input_ids, mask = left_pad([list(prompt) for prompt in unique], model.device)
        length = input_ids.shape[1]
        masked = ways.mask or any(len(prompt) < length for prompt in unique)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if masked else {}
        out = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **inputs)
        name = next((name for name in CACHES if getattr(out, name, None) is not None), None)
        if name is None:
            raise LookupError("it returns no cache of keys and values")
        cache, logits = getattr(out, name), out.logits[:, -1]
        if ways.reorder:
            spread(cache, source, length + room, block=block)
            mask, logits = mask[source], logits.index_select(0, source)
        rows = torch.arange(len(prompts), device=model.device)
        running = cls(model, lean, cache, name, rows, None, length, None, block)
        if masked or block is not None:
            running.padding = length - mask.sum(-1, keepdim=True)
            ahead = mask.new_ones(len(prompts), room)
            if block is not None:
                ahead = mask.new_zeros(len(prompts), rounded_up(length + room, block) - length)
            running.mask = torch.cat([mask, ahead], dim=1)
        return running, logits

    def forward(self, token: Tensor) -> Tensor:
        """The logits (R, V) behind one more token (R,) of each response."""
        if self.lean is not None:
            return self._lean_forward(token, self.lean)
        inputs: dict[str, Any] = {self.cache_name: self.cache}
        if self.mask is not None and self.padding is not None:
            length = self.length + 1
            if self.block is not None:
                self.mask[:, self.length] = 1
                length = rounded_up(length, self.block)
            inputs |= {"attention_mask": self.mask[:, :length], "position_ids": self.length - self.padding}
        out = self.model(input_ids=token[:, None], use_cache=True, logits_to_keep=1, **inputs)
        self.cache = getattr(out, self.cache_name)
        self.length += 1
        logits: Tensor = out.logits[:, -1]
        return logits

    def _lean_forward(self, token: Tensor, lean: Decoder) -> Tensor:
        self.length += 1
        if self.mask is None or self.padding is None:
            return lean.step(token, self.cache, self.length - 1, None)
        position = (self.length - 1 - self.padding).squeeze(-1)
        return lean.step(token, self.cache, position, self.mask[:, None, None, : self.length].bool())

    def keep(self, chosen: Tensor) -> None:
        """Go on with the responses `chosen` alone, in that order."""
        self.cache.reorder_cache(chosen)
        self.rows = self.rows[chosen]
        if self.mask is not None and self.padding is not None:
            self.mask, self.padding = self.mask[chosen], self.padding[chosen]


@dataclass
class Rereading:
    """Without one: the plain forward pass of the whole texts, all of one length, for every token."""

    model: Any
    rows: Tensor
    """(R,): the place in the batch of each."""
    ids: Tensor
    """(R, tokens so far)."""

    @classmethod
    def start(cls, model: Any, prompts: list[list[int]]) -> tuple["Rereading", Tensor]:
        """The prompts, and the logits (B, V) behind each."""
        ids = torch.tensor(prompts, device=model.device)
        running = cls(model, torch.arange(len(prompts), device=model.device), ids[:, :-1])
        return running, running.forward(ids[:, -1])

    def forward(self, token: Tensor) -> Tensor:
        """The logits (R, V) behind one more token (R,) of each response."""
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        logits: Tensor = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits

    def keep(self, chosen: Tensor) -> None:
        """Go on with the responses `chosen` alone, in that order."""
        self.rows, self.ids = self.rows[chosen], self.ids[chosen]


def left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as `input_ids` and `attention_mask` (B, P), aligned at their ends. The padding's id is never read."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
