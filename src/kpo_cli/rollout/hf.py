"""Sampling with the training weights themselves, through any transformers causal language model.

The loop is our own, not `generate`: that applies top-k 50 by default, and whatever the model's generation_config
adds (top-p, penalties, another temperature), and each of these makes the ratios of the objective wrong. Here
a token is drawn from softmax(logits / temperature) and nothing else, by inverting its cumulative distribution in
float64 with one uniform number.

Nothing is computed twice: a prompt goes through the model once for all its samples, its keys and values are shared out,
and responses that ended leave the batch. Where a model cannot do that, `trial.py` finds another way (`ways.py`).
"""

import copy
import threading
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kpo_cli.errors import RunStopped
from kpo_cli.policy.load import SMALL_MODEL
from kpo_cli.policy.lora import merged_once
from kpo_cli.policy.response import Response
from kpo_cli.policy.sharding import gathered
from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import decoder
from kpo_cli.rollout.decoder import Decoder
from kpo_cli.rollout.running import Rereading, Running
from kpo_cli.rollout.ways import Ways

REPORT_EVERY = 16
"""Tokens between two calls of `progress`."""
CUDA_CHECK_EVERY = 8
"""Tokens between two looks at what has ended on a GPU, which has to wait for each. A CPU looks at every token."""
CUDA_CACHE_BLOCK = 128
"""Attention on a GPU reads the keys and values of a multiple of so many tokens. On a CPU it reads what there is, and so
it does for a model that is not made for a cache with room at its end."""
COMPACT_SHARE = 1 / 16
"""Ended responses leave the batch once they are more than this share of it."""
LEAN_BATCH = 128
"""Responses in a batch of `Decoder` at most: enough for its operations, and few enough to occupy two threads."""
BLOCK = 128
"""Tokens of the vocabulary in one block of `invert_cdf`."""

Report = Callable[[int, int], None]
"""Told how many responses have ended, and how many tokens all of them have so far."""


class HFSampler:
    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        temperature: float,
        max_response_tokens: int,
        batch_size: int,
        top_p: float = 1.0,
        workers: Workers | None = None,
        progress: Report | None = None,
    ) -> None:
        """`stop_ids` end a response; at most `batch_size` responses are sampled at a time by each of `workers`.

        `top_p` below 1 samples from the nucleus. It is for evaluation alone: a policy is not trained on it.
        `progress` is told now and then how far the present `sample` is, from any thread but never from two at a time.
        """
        self.model = model
        self.stop_ids = torch.tensor(sorted(stop_ids), device=model.device)
        self.temperature = temperature
        self.top_p = top_p
        self.max_response_tokens = max_response_tokens
        cpu = model.device.type == "cpu"
        self.check_every = 1 if cpu else CUDA_CHECK_EVERY
        # Some models count from the end of the keys (GPT-Neo's windows), and transformers knows which do not.
        self.cache_block = None if cpu or not model._can_compile_fullgraph else CUDA_CACHE_BLOCK
        self.workers = Workers() if workers is None else workers
        self.lean = cpu and model.num_parameters() < SMALL_MODEL and decoder.fits(model)
        self.batch_size = min(batch_size, LEAN_BATCH) if self.lean else batch_size
        self.progress = progress
        self.ways = Ways()

    def changed(self, **changes: Any) -> "HFSampler":
        """Another one of the same model, with other attributes."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def sample(
        self,
        prompts: Sequence[list[int]],
        samples: int,
        seed: Sequence[int],
        *,
        greedy: bool = False,
        places: Sequence[int] | None = None,
    ) -> list[list[Response]]:
        places = range(len(prompts)) if places is None else places
        tally = _Tally(self.progress)
        longest = max(map(len, prompts), default=0) + self.max_response_tokens
        lean = self.lean and self.cache_block is None and self.ways.shortcuts
        decoder = Decoder.of(self.model, longest) if lean else None

        def work(batch: list[tuple[int, int]]) -> list[Response]:
            seeds = None if greedy else [[*seed, places[i], j] for i, j in batch]
            return self._sample_batch([prompts[i] for i, _ in batch], seeds, decoder, tally.of_batch())

        batches = self._batches(prompts, samples)
        with gathered(self.model), merged_once(self.model):
            sampled = dict(zip(chain(*batches), chain(*self.workers.map(work, batches)), strict=True))
        return [[sampled[i, j] for j in range(samples)] for i in range(len(prompts))]

    def refresh(self) -> None:
        """Nothing to take over: it samples from the training weights themselves."""

    def release(self) -> None:
        """Nothing to give back: what a `sample` call took is free again when it returns."""

    def _batches(self, prompts: Sequence[list[int]], samples: int) -> list[list[tuple[int, int]]]:
        """Every (prompt, sample), in batches of nearly equal size with prompts of nearly equal length.

        They do not depend on the number of workers: the batch that a response is in decides how its numbers round.
        """
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        rows = [(i, j) for i in by_length for j in range(samples)]
        groups = [rows]
        if not self.ways.padding:
            groups = [list(group) for _, group in groupby(rows, key=lambda row: len(prompts[row[0]]))]
        return [batch for group in groups for batch in evenly(group, self.batch_size)]

    @torch.no_grad()
    def _sample_batch(
        self, prompts: list[list[int]], seeds: list[list[int]] | None, lean: Decoder | None, progress: Report
    ) -> list[Response]:
        """A response to each prompt; `seeds` are one a response, None samples greedily."""
        tokens, log_probs = self._decode(prompts, self._uniforms(seeds), lean, progress)
        if log_probs.isnan().any():
            raise RunStopped("the policy's probabilities are NaN: its weights have exploded; lower trainer.lr")
        responses = self._cut(tokens, log_probs)
        progress(len(responses), sum(len(response.token_ids) for response in responses))
        return responses

    def _decode(
        self, prompts: list[list[int]], uniforms: Tensor | None, lean: Decoder | None, progress: Report
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities (B, T); what stands behind a row's first stop token means nothing."""
        running, logits = self._start(prompts, lean)
        shape = (self.max_response_tokens, len(prompts))
        tokens = torch.zeros(shape, dtype=torch.long, device=logits.device)
        log_probs = torch.zeros(shape, device=logits.device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=logits.device)
        going, sampled = len(prompts), 0
        for step in range(self.max_response_tokens):
            uniform = None if uniforms is None else uniforms[step].index_select(0, running.rows)
            token, log_prob = self._choose(logits, uniform)
            tokens[step].index_copy_(0, running.rows, token)
            log_probs[step].index_copy_(0, running.rows, log_prob)
            ended |= torch.isin(token, self.stop_ids)
            if (step + 1) % self.check_every == 0:
                count = int(ended.sum())
                sampled += self.check_every * going
                going = len(ended) - count
                if (step + 1) % REPORT_EVERY == 0:
                    progress(len(prompts) - going, sampled)
                if going == 0:
                    break
                if self.ways.reorder and count > COMPACT_SHARE * len(ended):
                    keep = survivors(ended)
                    running.keep(keep)
                    token, ended = token[keep], ended[keep]  # none of them ended
            if step + 1 < self.max_response_tokens:
                logits = running.forward(token)
        return tokens[: step + 1].T, log_probs[: step + 1].T

    def _start(self, prompts: list[list[int]], lean: Decoder | None) -> tuple[Running | Rereading, Tensor]:
        if not self.ways.cache:
            return Rereading.start(self.model, prompts)
        block = self.cache_block if self.ways.shortcuts else None
        return Running.start(self.model, lean, prompts, self.max_response_tokens, self.ways, block=block)

    def _uniforms(self, seeds: list[list[int]] | None) -> Tensor | None:
        """Uniform numbers (max_response_tokens, B) in [0, 1), float64, each column from a generator of its own."""
        if seeds is None:
            return None
        draws = [np.random.default_rng(seed).random(self.max_response_tokens) for seed in seeds]
        return torch.from_numpy(np.stack(draws, axis=1)).to(self.model.device)

    def _choose(self, logits: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """A token (B,) and its log-probability (B,) from logits (B, V)."""
        scaled = logits.float() / self.temperature
        if uniform is None:
            log_prob, token = torch.log_softmax(scaled, dim=-1).max(-1)
            return token, log_prob
        probabilities = torch.softmax(scaled, dim=-1)
        token = invert_cdf(probabilities if self.top_p == 1 else nucleus(probabilities, self.top_p), uniform)
        # In place of a log-softmax of the whole vocabulary; a float32 probability has all its digits, however small.
        return token, probabilities.gather(-1, token[:, None]).squeeze(-1).log()

    def _cut(self, tokens: Tensor, log_probs: Tensor) -> list[Response]:
        """End every row (B, T) behind its first stop token; what the batch made of it after that is dropped."""
        stops = torch.isin(tokens, self.stop_ids)
        finished = stops.any(-1)
        lengths = torch.where(finished, stops.int().argmax(-1) + 1, tokens.shape[1])
        columns = zip(tokens.tolist(), log_probs.tolist(), lengths.tolist(), finished.tolist(), strict=True)
        return [Response(ids[:length], values[:length], done) for ids, values, length, done in columns]


class _Tally:
    """How far all batches of one `sample` have come, for `progress`."""

    def __init__(self, progress: Report | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._finished = self._tokens = 0

    def of_batch(self) -> Report:
        """What a batch calls with how far it has come itself: (finished responses, tokens)."""
        finished_before = tokens_before = 0

        def report(finished: int, tokens: int) -> None:
            nonlocal finished_before, tokens_before
            if self._progress is None:
                return
            with self._lock:
                self._finished += finished - finished_before
                self._tokens += tokens - tokens_before
                self._progress(self._finished, self._tokens)
            finished_before, tokens_before = finished, tokens

        return report


def evenly(rows: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """In as few parts of at most `size` as can be, of nearly equal size."""
    count = -(-len(rows) // size)
    return [rows[len(rows) * k // count : len(rows) * (k + 1) // count] for k in range(count)]


def survivors(ended: Tensor) -> Tensor:
    """The rows that have not `ended` (R,), the last of them in the places of those that have: few rows move."""
    alive = (~ended).nonzero().squeeze(-1)
    holes = ended[: len(alive)]
    order = torch.arange(len(alive), device=ended.device)
    order[holes] = alive[alive >= len(alive)]
    return order


def invert_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which the cumulative distribution of `probabilities` (B, V) passes `uniform` (B,) in [0, 1).

    A token of probability 0 is never returned. A large vocabulary is searched by blocks, then within the block.
    """
    vocabulary = probabilities.shape[-1]
    uniform = uniform.double()[:, None]
    if vocabulary <= 4 * BLOCK:
        cumulative = probabilities.double().cumsum(-1)
        return _first_above(cumulative, uniform * cumulative[:, -1:]).squeeze(-1)
    whole = vocabulary - vocabulary % BLOCK
    sums = probabilities[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    rest = probabilities[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    cumulative = torch.cat([sums, rest], dim=-1).cumsum(-1)
    target = uniform * cumulative[:, -1:]
    block = _first_above(cumulative, target)
    before = functional.pad(cumulative, (1, 0)).gather(-1, block)
    tokens = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = probabilities.gather(-1, tokens.clamp(max=vocabulary - 1)).double().masked_fill(tokens >= vocabulary, 0.0)
    found = block * BLOCK + _first_above(inside.cumsum(-1), target - before)
    return found.squeeze(-1).clamp(max=vocabulary - 1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first column (B, 1) of `cumulative` (B, N) that is above `target` (B, 1)."""
    total = cumulative[:, -1:]
    # The target may have been rounded up to the total, behind the last column of any weight.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # Only NaN reaches the clamp; it is reported once the batch is done.
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """`probabilities` (B, V), zero outside the fewest most likely tokens that together reach `top_p`."""
    ordered, index = probabilities.sort(-1, descending=True)
    before = ordered.double().cumsum(-1) - ordered.double()
    return torch.zeros_like(probabilities).scatter(-1, index, torch.where(before < top_p, ordered, 0.0))
