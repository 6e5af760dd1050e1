"""Whether a sampler draws from the policy, found out by trying, before anything is made.

It samples a little, in every circumstance that a rollout may bring (prompts of equal and unequal length, very short
ones, several samples of one, responses that end at different times), and its log-probabilities are compared with the
trainer's of the same tokens. Nothing is asked of a model's name.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpo_cli.errors import UserError
from kpo_cli.policy.fidelity import WideSoftmax, in_float64, marks_of, short_windows
from kpo_cli.rollout.check import CLOSE, GROSS, SERVES, Gap, Score
from kpo_cli.rollout.hf import HFSampler
from kpo_cli.rollout.ways import CACHED, REREADING, Ways

PROMPTS = ((1, 2, 3, 9), (1, 1), (3, 3), (9, 9))
"""Tokens of the prompts of each batch: an unequal one has padding and a mask, equal ones have none."""
SAMPLES = 2
"""To each prompt."""
TOKENS = 12
"""Of a response at most. Windows are shorter within the trial (`short_windows`)."""
STOP_EVERY = 6
"""One token of so many ends a response, so that they end at different times."""
TOLERANCE = 1e-4
"""Between log-probs, nats. Where float32 rounds by more, as in a deep model, float64 has to decide."""
AS_BEFORE = "as before"
"""Why a resumed run is sampled in a way, where no faster one was tried."""
NEARLY = 2
"""Where none is exact, a way that is off by so many times what another is, is as good if it is faster."""


@dataclass(frozen=True)
class Trial:
    """How a policy is sampled, and how far its log-probabilities are from the trainer's then."""

    ways: Ways
    gap: Gap
    exact: bool
    """The difference is rounding."""
    because: str
    """Why not in the fastest way."""

    @property
    def serves(self) -> bool:
        """The sampler's log-probabilities may be the old ones."""
        return self.exact and self.gap.within(SERVES)

    def notes(self) -> list[str]:
        """What the user should know of it."""
        lacks = "" if self.ways.reorder else "its cache cannot be reordered, "
        slow = [f"note: this model is sampled {self.ways}: {lacks}{self.because}"] if self.ways != Ways() else []
        if self.exact:
            return slow
        return [
            *slow,
            f"warning: sampled token by token this model says other log-probabilities than in one pass over a text, by "
            f"{self.gap}",
        ]


def choose_ways(sampler: HFSampler, score: Score, prompts: Sequence[list[int]], before: Ways | None = None) -> Trial:
    """The fastest of the ways in which `sampler` gives the log-probabilities of `score`, a trainer's, both in float32.

    Tokens are those of `prompts`. A way that is a little off is taken before one without a cache. `before` is how a run
    that goes on sampled: it stays so while it is close, since with another its numbers would change in the middle.
    Raises UserError if there is none.
    """
    with short_windows(sampler.model):
        return _Trials(sampler, score, prompts).choose(before)


class _Trials:
    def __init__(self, sampler: HFSampler, score: Score, prompts: Sequence[list[int]]) -> None:
        known = sorted({token for prompt in prompts for token in prompt})
        draw = torch.Generator().manual_seed(0)
        self.batches = [
            [[known[i] for i in torch.randint(len(known), (length,), generator=draw).tolist()] for length in lengths]
            for lengths in PROMPTS
        ]
        vocabulary = sampler.model.get_input_embeddings().num_embeddings
        marks = marks_of(sampler.model)  # in one prompt beside shorter ones, and in one beside another of its length
        self.batches[0][-1][3:3] = marks
        self.batches[-1][-1][2:7] = [*marks, *self.batches[-1][-1][2:7]][:5]
        self.sampler = sampler.changed(
            stop_ids=torch.arange(0, vocabulary, STOP_EVERY, device=sampler.model.device),
            max_response_tokens=min(TOKENS, sampler.max_response_tokens),
            top_p=1.0,
            progress=None,
        )
        self.score = score
        self.looked = False
        """In float64, once: what is not rounding in one way is hardly so in another."""
        self.scored: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def choose(self, before: Ways | None) -> Trial:
        tried: dict[Ways, Gap] = {}
        failed: dict[Ways, str] = {}
        for ways in dict.fromkeys([*([] if before is None else [before]), *self._cached(), REREADING]):
            if ways == REREADING != before and any(gap.mean <= CLOSE for gap in tried.values()):
                break
            try:
                gap = tried[ways] = self._gap(ways)
            except Exception as error:  # a stranger's model code may raise anything
                failed[ways] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                continue
            if self._is_rounding(ways, gap):
                return Trial(ways, gap, exact=True, because=_why(Ways(), tried, failed))
            if ways == before and gap.mean <= CLOSE:
                return Trial(ways, gap, exact=False, because=AS_BEFORE)
        # A plain pass that is off by however little looks ahead: no weights make up for tokens that are not there yet.
        cached = {ways: gap for ways, gap in tried.items() if ways.cache}
        least = min((gap.mean for gap in cached.values()), default=torch.inf)
        if not least <= GROSS:
            raise UserError(
                f"this model cannot be sampled: with a cache, {_why(Ways(), tried, failed)}; without one, "
                f"{_why(REREADING, tried, failed)}; take another architecture, or rollout=vllm"
            )
        best = next(ways for ways, gap in cached.items() if gap.mean <= NEARLY * least)
        return Trial(best, tried[best], exact=False, because=_why(Ways(), tried, failed))

    def _cached(self) -> Iterator[Ways]:
        """Without those that are another one over again."""
        shortcuts = self.sampler.lean or self.sampler.cache_block is not None
        return (ways for ways in CACHED if shortcuts or ways != Ways(shortcuts=False))

    def _is_rounding(self, ways: Ways, gap: Gap) -> bool:
        if gap.largest <= TOLERANCE:
            return True
        if self.looked or gap.mean > CLOSE:
            return False
        self.looked, kept, self.scored = True, self.scored, {}
        try:
            with in_float64(self.sampler.model), WideSoftmax():
                return self._gap(ways).largest <= TOLERANCE
        except Exception:  # it has no float64
            return False
        finally:
            self.scored = kept

    def _gap(self, ways: Ways) -> Gap:
        sampler = self.sampler.changed(ways=ways)
        said, own = [], []
        for number, batch in enumerate(self.batches):
            for prompt, group in zip(batch, sampler.sample(batch, SAMPLES, (0, number)), strict=True):
                for response in group:
                    said += response.log_probs
                    own.append(self._scored(prompt, response.token_ids))
        return Gap.of(torch.tensor(said), torch.cat(own))

    def _scored(self, prompt: list[int], token_ids: list[int]) -> Tensor:
        key = tuple(prompt), tuple(token_ids)
        if key not in self.scored:
            self.scored[key] = self.score(prompt, token_ids)
        return self.scored[key]


def _why(ways: Ways, tried: dict[Ways, Gap], failed: dict[Ways, str]) -> str:
    """What is wrong with one of them, in words."""
    if ways in failed:
        return failed[ways]
    if ways not in tried:
        return AS_BEFORE
    return f"log-probabilities differ from those of a plain forward pass by {tried[ways]}"
