"""Flops and bytes of a training pass, and what they take at a GPU's roofs: counted without a GPU.

    python benchmarks/count.py [--shapes 0.6b 4b] [--tokens 16384]
    python benchmarks/count.py --saved                       # what layers keep for the backward pass

The project's own scorer, objective, clipping and AdamW run on fake tensors, as in benchmarks/memory.py: the branches of
`linear_log_probs` are a GPU's, attention is in buckets. Every operation is counted as it is dispatched:

- flops by torch's own formulas (`torch.utils.flop_counter`), and two of ours for a CPU's attention, which torch does
  not count: two products forward and five backward, of the pairs of tokens that a causal kernel computes;
- bytes as the sizes of what it reads and of what it writes: views and empty tensors are nothing, a gather reads as much
  as it gives, what is filled or copied into is not read.

An operation takes flops / roof or bytes / bandwidth, whichever is more; a part takes the sum over its operations. These
are limits of the hardware and no forecasts: launches, caches, kernels that read twice and the host are in no number.
Roofs of an H100: 790 Tflop/s of bfloat16 products (large ones reach that), 67 Tflop/s of float32 (its maker's), and
3.0 TB/s of copies. Models of one and of two layers are counted: all else is linear in their number.

MFU is (6 N M + 6 V D R + 12 L H d P) / seconds / 989 Tflop/s, as in benchmarks/step.py, which says what the letters
mean; the optimizer's step is in the seconds.

Columns, all of one micro-batch that is a whole mini-batch:
- autocast: float32 weights, bfloat16 products. What `kpo train` did before.
- bf16 weights: bfloat16 copies of float32 masters, made before the forward and the backward pass, and gradients that
  are widened again: what `kpo train` does, by FSDP2's mixed precision. The head's logits are float32.
- recompute: every layer's forward pass a second time (model.gradient_checkpointing=true).
- fused: layers compiled. Counted on the graphs that torch.compile's own tracing and partitioning make of a layer around
  its attention: products as they are; element-wise operations and reductions with no product between them are one
  kernel, which reads what was made before it and writes what is read behind it, once.
- and head: of a chunk of logits the forward pass reads each once, and the backward pass reads it and writes its
  gradient in bfloat16: 4 + 4 + 2 bytes, beside what the products write and read. No such kernels are there today.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass, field, replace
from functools import partial, wraps
from math import prod
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from memory import Job, Peak, on_fake_tensors, qwen3
from step import GROUP, PEAK_FLOPS, PROMPTS, SHAPES, make_rows, model_flops
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry, shape_wrapper
from transformers import PretrainedConfig

from kpo_cli.core import log_probs
from kpo_cli.policy import attention
from kpo_cli.policy.batch import Batch
from kpo_cli.policy.scorer import pack

aten = torch.ops.aten
BFLOAT16, FLOAT32, COPIES = 790e12, 67e12, 3.0e12
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm}
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
NOTHING = {
    aten.empty,
    aten.new_empty,
    aten.empty_like,
    aten.empty_strided,
    aten._unsafe_view,
    aten.detach,
    aten.lift_fresh,
}
ONLY_WRITE = {
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full),
    *(aten.copy_, aten.fill_, aten.zero_),
}
"""Whatever they are given to write into, or to be like, is not read."""
GATHERS = {aten.embedding, aten.gather, aten.index_select, aten.index}
SCATTERS = {aten.scatter_, aten.scatter_add_}
PARTS = (
    "layers: products",
    "layers: element-wise",
    "layers: gathers",
    "attention",
    "weights between types",
    "head: products",
    "head: element-wise",
    "head: weight gradient",
    "optimizer",
)


def _pairs(query: Any, key: Any, causal: bool) -> int:
    (rows, heads, length, _), others = query, key[2]
    return rows * heads * (length * (length + 1) // 2 if causal else length * others)


def _attention_flops(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return 2 * _pairs(query, key, causal) * (query[3] + value[3])


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, *rest: Any, **_: Any
) -> int:
    return 2 * _pairs(query, key, rest[1]) * (3 * query[3] + 2 * value[3])


def _in_place_flops(total: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * prod(a) * b[1]


OWN_FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten.addmm_: _in_place_flops,
}
FORMULAS = flop_registry | {operation: shape_wrapper(formula) for operation, formula in OWN_FORMULAS.items()}


@dataclass
class Tally:
    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0
    computing: float = 0.0
    """Seconds that flops and not bytes decide."""

    def add(self, flops: int, size: int, roof: float) -> None:
        compute, copy = flops / roof, size / COPIES
        self.flops += flops
        self.bytes += size
        self.seconds += max(compute, copy)
        self.computing += compute if compute > copy else 0.0


@dataclass
class Count:
    parts: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in PARTS})

    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    def with_layers(self, layers: int, two: "Count") -> "Count":
        """Of so many layers, if `self` is of one and `two` of two: all is linear in their number."""
        parts = {}
        for name, one in self.parts.items():
            more = zip(astuple(one), astuple(two.parts[name]), strict=True)
            parts[name] = Tally(*(a + (layers - 1) * (b - a) for a, b in more))  # type: ignore[arg-type]
        return Count(parts)


class Ledger(TorchDispatchMode):
    """Adds what is dispatched to the parts of a `Count`."""

    def __init__(self, weights: set[torch.Size]) -> None:
        super().__init__()
        self.count, self.weights = Count(), weights
        self.room: str | None = None
        """The head or the optimizer, within them."""
        self.fusing = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch.compile would leave alone what runs under a mode

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        operation = function.overloadpacket
        part = self._part(operation, args)
        if function.namespace == "prim" or (self.fusing and operation not in PRODUCTS):
            return out  # a question about a tensor, or counted as a kernel of its graph
        flops = FORMULAS[operation](*args, **kwargs, out_val=out) if operation in FORMULAS else 0
        narrow = any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in args)
        self.count.parts[part].add(flops, moved(function, args, kwargs, out), BFLOAT16 if narrow else FLOAT32)
        return out

    def _part(self, operation: Any, args: Any) -> str:
        if self.room == "head":
            return "head: products" if operation in PRODUCTS else "head: element-wise"
        if self.room is not None:
            return self.room
        if operation in ATTENTION:
            return "attention"
        if operation in PRODUCTS:
            return "layers: products"
        if operation in GATHERS or operation is aten.embedding_dense_backward:
            return "layers: gathers"
        if operation is aten._to_copy and args[0].shape in self.weights:
            return "weights between types"
        return "layers: element-wise"

    def within(self, room: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            outer, self.room = self.room, room
            try:
                return function(*args, **kwargs)
            finally:
                self.room = outer

        return inside


def moved(function: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation reads and writes."""
    operation, schema = function.overloadpacket, function._schema
    if operation in NOTHING or any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return 0
    if operation in GATHERS:
        return 2 * size(out) + sum(size(t) for t in tree_leaves(args[1:]) if isinstance(t, Tensor) and t is not out)
    if operation in SCATTERS:  # a few places of a large tensor
        return size(args[2]) + (3 if operation is aten.scatter_add_ else 2) * size(args[3])
    total = 0
    for place, argument in enumerate(schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        unread = (operation in ONLY_WRITE and place == 0) or (written and argument.kwarg_only)
        unread |= argument.name == "self" and kwargs.get("beta", 1) == 0
        total += sum(size(t) * (written + (not unread)) for t in tree_leaves(given) if isinstance(t, Tensor))
    fresh = (t for t, r in zip(_listed(out), schema.returns, strict=False) if r.alias_info is None)
    return total + sum(size(t) for t in tree_leaves(list(fresh)) if isinstance(t, Tensor))


def _listed(out: Any) -> Sequence[Any]:
    return out if isinstance(out, tuple) else [out]


def size(tensor: Tensor) -> int:
    """Bytes of its distinct elements."""
    return tensor.element_size() * prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


@contextmanager
def as_on_a_gpu(ledger: Ledger) -> Iterator[None]:
    """Within the block fake tensors say that they are on CUDA, and the parts of `core/log_probs.py` are told apart."""
    head, chunk_of, add_product = log_probs._LinearLogProbs, log_probs.chunk_of, log_probs._add_product
    with ExitStack() as patches:
        for patch in (
            mock.patch.object(FakeTensor, "is_cuda", True),
            mock.patch.object(log_probs, "chunk_of", lambda vocabulary, _: chunk_of(vocabulary, True)),
            mock.patch.object(head, "forward", staticmethod(ledger.within("head", head.forward))),
            mock.patch.object(head, "backward", staticmethod(ledger.within("head", head.backward))),
            mock.patch.object(log_probs, "_add_product", ledger.within("head: weight gradient", add_product)),
        ):
            patches.enter_context(patch)
        yield


@contextmanager
def compiled_layers(job: Job, ledger: Ledger) -> Iterator[None]:
    """Within the block layers run as the graphs that torch.compile makes of them, their kernels counted as fused."""

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        kernels = fused_bytes(graph.graph)

        def run(*args: Any) -> Any:
            ledger.count.parts["layers: element-wise"].add(0, kernels, FLOAT32)
            ledger.fusing = True
            try:
                return graph(*args)
            finally:
                ledger.fusing = False

        return make_boxed_func(run)

    made = aot_autograd(fw_compiler=backend, bw_compiler=backend, partition_fn=min_cut_rematerialization_partition)
    kind = type(job.model.get_decoder().layers[0])
    apart = torch.compiler.disable(attention.packed_attention)
    torch.compiler.reset()
    with (
        mock.patch.object(attention, "packed_attention", apart),
        mock.patch.object(kind, "forward", torch.compile(kind.forward, backend=made, dynamic=False)),
    ):
        yield


def fused_bytes(graph: torch.fx.Graph) -> int:
    """What the kernels of a graph read and write, its products left out."""
    level: dict[Any, int] = {}
    for node in graph.nodes:
        behind = (level[before] + _is_product(before) for before in node.all_input_nodes)
        level[node] = max(behind, default=0)
    roots = {node: _root(node) for node in graph.nodes}
    total = 0
    for number in sorted(set(level.values())):
        kernel = {node for node in graph.nodes if level[node] == number and _computes(node)}
        read = {roots[before] for node in kernel for before in node.all_input_nodes} - kernel
        written = {node for node in kernel if any(u not in kernel for u in _users(node))}
        total += sum(size(node.meta["val"]) for node in read | written)
    return total


def _is_product(node: Any) -> bool:
    return node.op == "call_function" and getattr(node.target, "overloadpacket", None) in PRODUCTS


def _is_view(node: Any) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", [])
    return node.op == "call_function" and (
        node.target.overloadpacket in NOTHING or any(r.alias_info is not None for r in returns)
    )


def _computes(node: Any) -> bool:
    return node.op == "call_function" and not _is_product(node) and not _is_view(node)


def _root(node: Any) -> Any:
    """What a view is of."""
    while _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _users(node: Any) -> Iterator[Any]:
    """Those who read a node, through views as well."""
    for user in node.users:
        if _is_view(user):
            yield from _users(user)
        else:
            yield user


@dataclass(frozen=True)
class Row:
    autocast: bool
    fused: bool = False
    kept: Any = None
    """Operations of a layer whose outputs are kept for the backward pass; None: all."""
    fused_head: bool = False

    def __str__(self) -> str:
        kind = "autocast" if self.autocast else "bf16 weights"
        fused = (", fused" if self.fused else "") + (" and head" if self.fused_head else "")
        return f"{kind}{'' if self.kept is None else ', recompute'}{fused}"


NONE = frozenset[Any]()
ROWS = tuple(
    Row(half, fused, kept) for half, fused in ((True, False), (False, False), (False, True)) for kept in (NONE, None)
)


def count_whole(name: str, batch: Batch, row: Row) -> Count:
    one, two = (count_pass(qwen3(name, layers), batch, row) for layers in (1, 2))
    return one.with_layers(SHAPES[name].layers, two)


def with_fused_head(count: Count, logits: int) -> Count:
    head = Tally()
    head.add(0, 10 * logits, FLOAT32)
    return Count(count.parts | {"head: element-wise": head})


def autocast(enabled: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def count_pass(config: PretrainedConfig, batch: Batch, row: Row) -> Count:
    """A micro-batch of all rows of `batch`, and the optimizer's step behind it."""
    with on_fake_tensors(config, batch, weights=torch.float32 if row.autocast else torch.bfloat16) as job:
        ledger = Ledger({p.shape for p in job.model.parameters() if p.dim() == 2})
        compiled = compiled_layers(job, ledger) if row.fused else nullcontext()
        with as_on_a_gpu(ledger), compiled, keeping(job, row.kept), ledger, autocast(row.autocast):
            job.run()
        step(job, ledger)
    return ledger.count


def step(job: Job, ledger: Ledger) -> None:
    """Clipping and AdamW on float32 masters, and where weights are not those, what it costs that they are two."""
    parameters, gradients = [*job.model.parameters()], [p.grad for p in job.model.parameters()]
    masters = [torch.nn.Parameter(p.detach().float()) for p in parameters]
    with ledger:
        for parameter, master, gradient in zip(parameters, masters, gradients, strict=True):
            if parameter.dtype != master.dtype:
                ledger.within("weights between types", lambda m=master: [m.detach().bfloat16() for _ in range(2)])()
                master.grad = ledger.within("weights between types", gradient.float)()
            else:
                master.grad = gradient
        optimizer = torch.optim.AdamW(masters, fused=True)
    optimizer.step()  # makes the moments
    with ledger:
        ledger.within("optimizer", torch.nn.utils.clip_grad_norm_)(masters, 1.0)
        ledger.within("optimizer", optimizer.step)()


def time_table(name: str, batch: Batch) -> None:
    """Milliseconds of each part in every row."""
    counts, flops = {row: count_whole(name, batch, row) for row in ROWS}, model_flops(SHAPES[name], batch)
    logits = SHAPES[name].vocabulary * int(batch.response_mask.sum())
    fused = {row: count for row, count in counts.items() if row.fused}
    counts |= {replace(row, fused_head=True): with_fused_head(count, logits) for row, count in fused.items()}
    print(f"\n| {name}, ms | {' | '.join(map(str, counts))} |")
    print(f"|---|{'---|' * len(counts)}")
    for part in PARTS:
        cells = [f"{1e3 * count.parts[part].seconds:,.1f}" for count in counts.values()]
        print(f"| {part} | {' | '.join(cells)} |")
    totals, peak = [count.seconds() for count in counts.values()], PEAK_FLOPS["H100"]
    print(f"| sum | {' | '.join(f'{1e3 * total:,.0f}' for total in totals)} |")
    print(f"| MFU | {' | '.join(f'{flops / total / peak:.1%}' for total in totals)} |")
    first, count = next(iter(counts.items()))
    print(f"\n| {name}, {first} | Tflop | GB | flops a byte | ms | of them limited by flops |")
    print("|---|---|---|---|---|---|")
    for part, tally in count.parts.items():
        share = tally.computing / tally.seconds if tally.seconds else 0
        intensity = tally.flops / tally.bytes if tally.bytes else 0
        print(
            f"| {part} | {tally.flops / 1e12:,.2f} | {tally.bytes / 1e9:,.1f} | {intensity:,.0f} | "
            f"{1e3 * tally.seconds:,.1f} | {share:.0%} |"
        )


KEPT = {
    "everything": None,
    "products and attention": PRODUCTS | ATTENTION,
    "attention": ATTENTION,
    "their inputs": NONE,
}
"""What layers keep for the backward pass: the outputs of these operations, where not everything."""


@contextmanager
def keeping(job: Job, operations: Any) -> Iterator[None]:
    """Within the block layers keep their inputs and what these operations give, and compute the rest again."""
    kind = type(job.model.get_decoder().layers[0])
    own = kind.forward

    def policy(_: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = function.overloadpacket in operations
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(partial(own, layer, **kwargs), *args, use_reentrant=False, context_fn=contexts)

    with mock.patch.object(kind, "forward", own if operations is None else forward):
        yield


def saved_bytes(config: PretrainedConfig, batch: Batch, cast: bool, operations: Any) -> int:
    """What lives between forward and backward pass beside the weights; autocast's copies of them are a part of it."""
    weights, found = torch.float32 if cast else torch.bfloat16, []
    with on_fake_tensors(config, batch, weights=weights) as job, Peak() as peak, keeping(job, operations):
        for parameter in job.model.parameters():
            peak.add(parameter)
        before = peak.now
        forward_only = mock.patch.object(Tensor, "backward", lambda _: found.append(peak.now - before))  # noqa: PT008
        with forward_only, autocast(cast):
            job.run()
    return found[0]


def saved_table(name: str, batch: Batch) -> None:
    """Bytes that a layer keeps of a token, and the milliseconds that it takes to compute the rest again."""
    tokens, layers = len(pack(batch, torch.device("cpu")).position_ids[0]), SHAPES[name].layers
    print(f"\n| {name}: kept | | KB a token and layer | GiB of {tokens:,} tokens | products again, ms | the rest, ms |")
    print("|---|---|---|---|---|---|")
    for cast in (True, False):
        counts = {}
        for kept, operations in KEPT.items():
            one, two = (saved_bytes(qwen3(name, n), batch, cast, operations) for n in (1, 2))
            counts[kept] = parts = count_whole(name, batch, Row(cast, kept=operations)).parts
            more = {part: 1e3 * (parts[part].seconds - counts["everything"][part].seconds) for part in parts}
            products, rest = more.pop("layers: products"), sum(more.values())
            print(
                f"| {kept} | {'autocast' if cast else 'bf16 weights'} | {(two - one) / tokens / 1e3:.1f} | "
                f"{(two - one) * layers / 2**30:.1f} | {products:,.1f} | {rest:,.1f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["0.6b", "4b"], default=["0.6b", "4b"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--saved", action="store_true", help="what layers keep, in place of times")
    arguments = parser.parse_args()
    started = time.perf_counter()
    for name in arguments.shapes:
        batch = make_rows(SHAPES[name], arguments.tokens).rows(torch.arange(PROMPTS * GROUP))
        (saved_table if arguments.saved else time_table)(name, batch)
    print(f"\n{arguments.tokens:,} packed tokens, {time.perf_counter() - started:.0f} s on fake tensors")


if __name__ == "__main__":
    main()
