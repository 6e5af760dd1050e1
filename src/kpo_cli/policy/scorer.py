"""From a batch to the log-probabilities of its response tokens.

Two ways with the same values and gradients. Packed: no padding, each prompt once for all its responses, and no
(tokens, vocabulary) logits. Padded: a plain call of the model, for architectures that cannot be packed.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kpo_cli.core import linear_log_probs, token_log_probs
from kpo_cli.policy.attention import NAME, Packing
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.response import Response

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
TOLERANCE = 1e-4
"""Between the log-probs of both ways. Where float32 rounds by more, as in a deep model, float64 has to decide."""
PROBE_WINDOW = 4
"""Of `make_packable`'s rows, which have 5 to 14 tokens."""


@dataclass(frozen=True)
class PackedBatch:
    """A batch of R response tokens as M tokens without padding, each prompt once."""

    input_ids: Tensor  # (1, M) int64
    position_ids: Tensor  # (1, M) int64: place in the row, counted from its prompt's first token
    packing: Packing
    predictors: Tensor  # (R,) int64: the place whose hidden state predicts a response token; row after row
    targets: Tensor  # (R,) int64: that token


def pack(batch: Batch, device: torch.device) -> PackedBatch:
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
        Packing.of(rows, tokens, device),
        torch.cat(predictors).to(device),
        batch.response_ids[batch.response_mask].to(device),
    )


@dataclass(frozen=True)
class Scorer:
    """Log-probabilities of response tokens under `model`, at the temperature that they were sampled at."""

    model: Any
    temperature: float
    half: bool = False
    """The forward pass runs in bfloat16, over float32 weights."""
    packed: bool = False
    """See `make_packable`."""

    def __call__(self, batch: Batch, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the response tokens and entropies (nats), both (N, T), on the model's device.

        Outside the response mask they are finite and mean nothing.
        """
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.half):
            return (self._packed if self.packed else self._padded)(batch, entropy_gradient)

    def _packed(self, batch: Batch, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        inputs = pack(batch, self.model.device)
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
        forward = type(self.model).forward  # without the autocast that the sampler's calls are wrapped in
        logits = forward(
            self.model,
            input_ids=input_ids.to(self.model.device),
            attention_mask=attention_mask.to(self.model.device),
            logits_to_keep=keep,
            use_cache=False,
        ).logits
        columns = (batch.prompt_lengths - 1 - first)[:, None] + torch.arange(length)
        columns = columns.clamp(max=keep - 1).to(logits.device)
        rows = torch.arange(len(batch), device=logits.device)[:, None]
        ids = batch.response_ids.to(logits.device)
        return token_log_probs(logits[rows, columns], ids, self.temperature, entropy_gradient)

    def split(self, batch: Batch, rows: Tensor, max_tokens: int) -> list[Tensor]:
        """Cut `rows` of a batch into micro-batches of at most `max_tokens` in the forward pass, or one row each."""
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


def make_packable(model: Any) -> str | None:
    """Switch a model (in float32, not under autocast) to packed attention; else a reason why it cannot be.

    Decided by trying: a few made-up rows must get the same log-probabilities both ways, which also says that nothing
    but a linear head stands between the decoder's hidden states and the logits.
    """
    config = model.config.get_text_config()
    own = model.config._attn_implementation
    if own not in ("sdpa", NAME):
        return f"its attention is {own}"
    if other := set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS:
        return f"it has layers of {', '.join(sorted(other))}"
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return f"its head is not a plain linear layer ({type(head).__name__})"
    batch = _probe(config.vocab_size)
    try:
        gap = _gap(model, batch)
        if not gap < TOLERANCE:
            with _in_float64(model):
                gap = _gap(model, batch)
        reason = None if gap < TOLERANCE else f"log-probabilities differ by {gap:.2g}"
    except Exception as error:  # a stranger's model code may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    model.set_attn_implementation(own if reason else NAME)
    return reason


@torch.no_grad()
def _gap(model: Any, batch: Batch) -> float:
    """The largest difference of the log-probabilities, padded and packed."""
    own = model.config._attn_implementation
    with _short_windows(model):
        expected, _ = Scorer(model, 1.0)(batch)
        model.set_attn_implementation(NAME)
        try:
            values, _ = Scorer(model, 1.0, packed=True)(batch)
        finally:
            model.set_attn_implementation(own)
    return float((values - expected)[batch.response_mask.to(values.device)].abs().max())


@contextmanager
def _in_float64(model: Any) -> Iterator[None]:
    """Within the block the model computes in float64, with no more than one layer and the head copied at a time.

    What it rounds to float32 by itself, as in its norms, it rounds both ways alike.
    """
    narrow: dict[torch.nn.Parameter, Tensor] = {}
    head = list(model.get_output_embeddings().parameters())  # read from outside its forward pass

    def widen(parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.dtype == torch.float32:
                narrow[parameter] = parameter.data
                parameter.data = parameter.data.double()

    def restore(parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter in narrow:
                parameter.data = narrow.pop(parameter)

    handles = []
    experts = model.config._experts_implementation
    for module, own in _units(model):
        passing = [parameter for parameter in own if not any(parameter is other for other in head)]
        handles.append(module.register_forward_pre_hook(lambda *_, own=passing: widen(own)))
        handles.append(module.register_forward_hook(lambda *_, own=passing: restore(own)))
    try:
        if experts is not None:
            model.set_experts_implementation("eager")  # a grouped product has no float64
        widen(head)
        yield
    finally:
        if experts is not None:
            model.set_experts_implementation(experts)
        for handle in handles:
            handle.remove()
        restore(list(narrow))


def _units(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, list[torch.nn.Parameter]]]:
    """The layers of a model, each with all of its parameters, and what stands around them with its own."""
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from ((layer, list(layer.parameters())) for layer in child)
        else:
            yield from _units(child)


@contextmanager
def _short_windows(model: Any) -> Iterator[None]:
    """Within the block sliding windows are so short that the probe sees them act: some layers have theirs in the
    mask alone, which packed attention does not read."""
    holders = [*model.modules(), model.config.get_text_config()]
    own = [(holder, window) for holder in holders if isinstance(window := getattr(holder, "sliding_window", None), int)]
    for holder, window in own:
        holder.sliding_window = min(window, PROBE_WINDOW)
    try:
        yield
    finally:
        for holder, window in own:
            holder.sliding_window = window


def _probe(vocabulary: int) -> Batch:
    """Two prompts with two responses each, of different lengths, of tokens spread over the vocabulary."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=draw).tolist()

    groups = [[Response(tokens(count), [0.0] * count, True) for count in counts] for counts in ((4, 9), (7, 2))]
    return make_batch([tokens(3), tokens(5)], groups, torch.zeros(4), torch.zeros(4))


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
