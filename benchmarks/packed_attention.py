"""What attention over packed rows moves and computes, in buckets and by varlen attention: counted without a GPU.

    python benchmarks/packed_attention.py

One layer of Qwen3-0.6B's attention (16 heads of 128, 8 for keys and values) in bfloat16, forward and backward, from
queries, keys and values to their gradients: our own code and torch's `varlen_attn` on fake tensors, which have shapes
and types and no memory. 16,384 packed tokens: prompts of 256, and the responses to them.

- gathered: what is gathered into rows in the forward pass, and back from them.
- written: every storage that an operation makes, forward and backward, attention's outputs and gradients included.
- kept: what lives from the forward to the backward pass. peak: the most that lives at any time. Both beside queries,
  keys, values and the gradient of the output.
- flops: 14 H d for each pair of a token and one that it looks at (two products forward, five backward), of the pairs on
  and below the diagonal that a path computes: buckets have the prompt in every row, and padding.
- with a window of 1,024 tokens: buckets have a mask for that, and all pairs of a row's square are computed.

What kernels hold inside is in no number, as gradients of keys and values for every query head are.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from memory import Peak
from torch._subclasses.fake_tensor import FakeTensorMode

from kpo_cli.policy.attention import Packing
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import pack
from kpo_cli.policy.varlen import Segments, installed_kernels

HEADS, SHARED, SIZE = 16, 8, 128
PROMPT, WINDOW = 256, 1024
CASES = {
    "64 of 224": [[224] * 8] * 8,
    "16 of 992": [[992] * 8] * 2,
    "4 of 4,032": [[4032] * 4],
    "8 of 256 to 3,773": [[*range(256, 3275, 503), 3773]],
}
"""Lengths of the responses to each prompt, without their last tokens, which nobody sees."""
MIB = 2**20


@dataclass(frozen=True)
class Counted:
    """Bytes, and pairs of tokens."""

    gathered: int
    written: int
    kept: int
    peak: int
    pairs: int
    windowed: int


class Written(Peak):
    """Bytes of all storages that operations made, and of those that a gather did."""

    def __init__(self) -> None:
        super().__init__()
        self.written = self.gathered = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = dict(self._sizes)
        out = super().__torch_dispatch__(function, types, args, kwargs)
        made = sum(size for key, size in self._sizes.items() if key not in before)
        self.written += made
        if function is torch.ops.aten.embedding.default:
            self.gathered += made
        return out


def rows(groups: Sequence[Sequence[int]]) -> Batch:
    answers = [[Response([1] * (n + 1), [0.0] * (n + 1), True) for n in group] for group in groups]
    nothing = torch.zeros(sum(map(len, answers)))
    return make_batch([[1] * PROMPT] * len(answers), answers, nothing, nothing)


def faked(packing: Packing | Segments, fake: FakeTensorMode) -> Packing | Segments:
    """The same with fake tensors."""
    of = fake.from_tensor
    if isinstance(packing, Packing):
        return Packing(tuple(map(of, packing.buckets)), of(packing.order))
    ends = {"query_ends": of(packing.query_ends), "key_ends": of(packing.key_ends)}
    return replace(packing, places=of(packing.places), **ends)


def pairs(packing: Packing | Segments, window: int | None = None) -> int:
    """That a path computes."""
    if isinstance(packing, Packing):
        shapes = [bucket.shape for bucket in packing.buckets]
        return sum(n * (length * (length + 1) // 2 if window is None else length**2) for n, length in shapes)
    total = 0
    for own, seen in zip(packing.query_ends.diff().tolist(), packing.key_ends.diff().tolist(), strict=True):
        places = torch.arange(seen - own, seen) + 1
        total += int((places if window is None else places.clamp(max=window)).sum())
    return total


def count(packing: Packing | Segments) -> Counted:
    """Attention within the rows, forward and backward."""
    tokens = len(packing.order) if isinstance(packing, Packing) else int(packing.query_ends[-1])
    fake = FakeTensorMode()
    with fake:
        q, k, v = (
            torch.empty(1, tokens, n, SIZE, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for n in (HEADS, SHARED, SHARED)
        )
        upper = torch.empty(1, tokens, HEADS, SIZE, dtype=torch.bfloat16)
        given = faked(packing, fake)
        with Written() as seen:
            for tensor in (q, k, v, upper):
                seen.add(tensor)
            inputs = seen.now
            out = given.attend(q, k, v, None, None)
            kept = seen.now - inputs
            found = torch.autograd.grad(out, (q, k, v), upper)
    assert [t.shape for t in found] == [t.shape for t in (q, k, v)]
    peak = seen.most - inputs
    return Counted(seen.gathered, seen.written, kept, peak, pairs(packing), pairs(packing, WINDOW))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| responses | path | gathered, MiB | written | kept | peak | Gflop | with a window |")
    print("|---|---|---|---|---|---|---|---|")
    ways = {"buckets": Packing.of, "varlen": partial(Segments.of, kernel=installed_kernels()[0])}
    for case, groups in CASES.items():
        batch = rows(groups)
        for name, layout in ways.items():
            packed = pack(batch, torch.device("cpu"), layout)
            assert packed.input_ids.numel() == 16_384
            got = count(packed.packing)
            sizes = [f"{size / MIB:,.0f}" for size in (got.gathered, got.written, got.kept, got.peak)]
            flops = [f"{14 * HEADS * SIZE * n / 1e9:,.0f}" for n in (got.pairs, got.windowed)]
            print(f"| {' | '.join([case, name, *sizes, *flops])} |")


if __name__ == "__main__":
    main()
