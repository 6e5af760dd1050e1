"""How a batch of responses goes through a model, from the fastest way on: not every model can be sampled in each."""

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Ways:
    """What a sampler makes use of; `trial.py` finds out what a model computes its own log-probabilities with."""

    shortcuts: bool = True
    """`Decoder` in the model's place and caches in blocks, where the sampler has them."""
    mask: bool = False
    """The model is always told mask and positions, not only where there is padding. Bamba's first tokens need it."""
    padding: bool = True
    """Prompts of unequal length share a batch. A state that reads one token after another may read the padding too."""
    reorder: bool = True
    """Rows of the cache are copied and dropped: a prompt is computed once for all its samples, and what ended leaves.

    MiniMax keeps some of them where `reorder_cache` does not reach."""
    cache: bool = True
    """Else every token has the whole text read again."""

    def __str__(self) -> str:
        """What is slow about it, to stand behind "sampled"."""
        if not self.cache:
            return "without a cache, every token at the price of the whole text before it"
        lacks = [
            *(["with a mask throughout"] if self.mask else []),
            *([] if self.padding else ["in batches of prompts of one length"]),
            *([] if self.reorder else ["with each prompt computed for every sample, and ended responses kept"]),
            *([] if self.shortcuts or self.mask or not (self.padding and self.reorder) else ["by its own decoding"]),
        ]
        return ", ".join(lacks)


CACHED = (
    Ways(),
    *(
        Ways(shortcuts=False, mask=mask, padding=padding, reorder=reorder)
        for reorder, padding, mask in product((True, False), (True, False), (False, True))
    ),
)
"""From the fastest on."""
REREADING = Ways(shortcuts=False, padding=False, cache=False)
"""The model's plain forward pass; the last resort."""
