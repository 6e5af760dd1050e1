"""Work spread over threads of this process, with results that do not depend on how many there are.

PyTorch's own threads split single operations, which a small model's are too short for; here each thread takes whole
parts of a batch. What the parts are must not depend on the number of threads: then neither does any result, to the bit.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """`count` threads. With one, everything runs in the caller's."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        # Within a worker an operation has one thread, and so it has outside: else some sums would round differently.
        self._pool = ThreadPoolExecutor(count, "kpo-worker", torch.set_num_threads, (1,)) if count > 1 else None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`work` of each item, in the order of the items. After an error nothing new begins, and nothing goes on."""
        if self._pool is None:
            return [work(item) for item in items]
        futures = [self._pool.submit(work, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
        failed = [future for future in futures if not future.cancelled() and future.exception() is not None]
        return [future.result() for future in (failed or futures)]
