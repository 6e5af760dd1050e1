"""The response of a sampler."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    token_ids: list[int]
    """The stop token included, if there was one."""
    log_probs: list[float]
    """log softmax(logits / temperature) of each token, as the sampler saw it."""
    finished: bool
    """True: it ended with a stop token. False: it hit the length limit."""
