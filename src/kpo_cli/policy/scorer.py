"""From a batch to the log-probabilities of its response tokens.

Two ways with the same values and gradients. Packed: no padding, each prompt once for all its responses, and no
(tokens, vocabulary) logits. Padded: a plain call of the model, for architectures that cannot be packed.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kpo_cli.core import linear_log_probs, token_log_probs
from kpo_cli.policy.attention import Layout, Packing, Rows
from kpo_cli.policy.batch import Batch
from kpo_cli.policy.sharding import within


@dataclass(frozen=True)
class PackedBatch:
    """A batch of R response tokens as M tokens without padding, each prompt once."""

    input_ids: Tensor  # (1, M) int64
    position_ids: Tensor  # (1, M) int64: place in the row, counted from its prompt's first token
    packing: Rows
    predictors: Tensor  # (R,) int64: the place whose hidden state predicts a response token; row after row
    targets: Tensor  # (R,) int64: that token


def pack(batch: Batch, device: torch.device, layout: Layout = Packing.of) -> PackedBatch:
    """Lay a batch out without padding. The last token of a response predicts nothing and is left out."""
    lengths = batch.response_mask.sum(-1).tolist()
    prompt_lengths, index = batch.prompt_lengths.tolist(), batch.prompt_index.tolist()
    ids, positions, rows, predictors = [], [], [], []
    prompts: dict[int, Tensor] = {}  # the places of each prompt's tokens
    tokens = 0
    for row, (length, prompt_length) in enumerate(zip(lengths, prompt_lengths, strict=True)):
        if index[row] not in prompts:
            prompts[index[row]] = torch.arange(tokens, tokens + prompt_length)
            ids.append(batch.prompt_ids[row, :prompt_length])
            positions.append(torch.arange(prompt_length))
            tokens += prompt_length
        ids.append(batch.response_ids[row, : length - 1])
        positions.append(torch.arange(prompt_length, prompt_length + length - 1))
        rows.append(torch.cat([prompts[index[row]], torch.arange(tokens, tokens + length - 1)]))
        predictors.append(rows[-1][prompt_length - 1 :])
        tokens += length - 1
    return PackedBatch(
        torch.cat(ids)[None].to(device),
        torch.cat(positions)[None].to(device),
        layout(rows, tokens, device),
        torch.cat(predictors).to(device),
        batch.response_ids[batch.response_mask].to(device),
    )


@dataclass(frozen=True)
class Scorer:
    """Log-probabilities of response tokens under `model`, at the temperature that they were sampled at."""

    model: Any
    temperature: float
    half: bool = False
    """The model computes in 16 bits (`Policy.narrow`), so that a value depends on what else is in its micro-batch."""
    packed: bool = False
    """The model has packed attention (`fidelity.choose_way`)."""
    alone: bool = False
    """Each row is a micro-batch of its own: the model is another one where rows are padded."""
    layout: Layout = Packing.of
    """Of packed rows, for attention."""

    def __call__(self, batch: Batch, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the response tokens and entropies (nats), both (N, T), on the model's device.

        Outside the response mask they are finite and mean nothing.
        """
        score = self._packed if self.packed else self._padded
        return within(self.model, lambda: score(batch, entropy_gradient))

    def _packed(self, batch: Batch, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        inputs = pack(batch, self.model.device, self.layout)
        # A mask of four dimensions is passed on as it is; packed attention does not read it.
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.model.device)
        hidden = self.model.get_decoder()(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            attention_mask=no_mask,
            packing=inputs.packing,
            use_cache=False,
        ).last_hidden_state.squeeze(0)
        head = self.model.get_output_embeddings()
        token_values = linear_log_probs(
            F.embedding(inputs.predictors, hidden),
            head.weight,
            inputs.targets,
            self.temperature,
            bias=head.bias,
            entropy_gradient=entropy_gradient,
        )
        mask = batch.response_mask.to(hidden.device)
        log_probs, entropy = (v.new_zeros(mask.shape).masked_scatter(mask, v) for v in token_values)
        return log_probs, entropy

    def _padded(self, batch: Batch, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        input_ids, attention_mask = _joined(batch)
        length = batch.response_ids.shape[1]
        # The logits that predict the response begin one token before it; earlier ones are not computed.
        first = int(batch.prompt_lengths.min()) - 1
        keep = input_ids.shape[1] - first
        logits = (
            type(self.model)
            .forward(  # not the call, which is what `within` is one of
                self.model,
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                logits_to_keep=keep,
                use_cache=False,
            )
            .logits[:, -keep:]
        )  # some models compute them all
        columns = (batch.prompt_lengths - 1 - first)[:, None] + torch.arange(length)
        columns = columns.clamp(max=keep - 1).to(logits.device)
        rows = torch.arange(len(batch), device=logits.device)[:, None]
        ids = batch.response_ids.to(logits.device)
        log_probs, entropy = token_log_probs(logits[rows, columns], ids, self.temperature, entropy_gradient)
        return log_probs.clone(), entropy  # it is a view, and sharding cannot tell whether somebody writes into it

    def split(self, batch: Batch, rows: Tensor, max_tokens: int) -> list[Tensor]:
        """Cut `rows` of a batch into micro-batches of at most `max_tokens` in the forward pass, or one row each."""
        if self.alone:
            return list(rows.split(1))
        return (_split_packed if self.packed else _split_padded)(batch, rows, max_tokens)


def _split_packed(batch: Batch, rows: Tensor, max_tokens: int) -> list[Tensor]:
    """As few parts as can be, of nearly equal size; in order, so that the responses to a prompt mostly share it."""
    lengths = (batch.response_mask.sum(-1) - 1).tolist()
    prompts, index = batch.prompt_lengths.tolist(), batch.prompt_index.tolist()

    def cut(limit: int) -> list[list[int]]:
        """Into parts of at most `limit` tokens, but for single rows that are longer."""
        parts: list[list[int]] = []
        size, seen = 0, set[int]()
        for row in rows.tolist():
            more = lengths[row] + (0 if index[row] in seen else prompts[row])
            if not parts or size + more > limit:
                parts.append([])
                size, seen, more = 0, set(), lengths[row] + prompts[row]
            parts[-1].append(row)
            seen.add(index[row])
            size += more
        return parts

    fewest = len(cut(max_tokens))
    limit = bisect_left(range(max_tokens), -fewest, key=lambda limit: -len(cut(limit)))
    return [torch.tensor(part) for part in cut(limit)]


def _split_padded(batch: Batch, rows: Tensor, max_tokens: int) -> list[Tensor]:
    """Rows of like length together: each is padded to the longest of its part."""
    lengths = (batch.prompt_lengths + batch.response_mask.sum(-1))[rows]
    lengths, order = lengths.sort(descending=True, stable=True)
    parts = []
    while len(order):
        count = max(1, max_tokens // int(lengths[0]))
        parts.append(rows[order[:count]])
        lengths, order = lengths[count:], order[count:]
    return parts


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
