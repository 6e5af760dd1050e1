"""What the plan of `kpo train` says of memory against what fake tensors count, without a GPU.

    python benchmarks/memory.py [--shapes 0.6b 4b] [--tokens 16384] [--layers N]

Fake tensors have shapes and types and no memory: the project's own scorer, objective and AdamW run on them as they do
on a device, every storage that an operation makes is counted while it lives, and the peak is what is compared. The
pass is that of a micro-batch in the middle of a run: gradients and both moments are there. Its rows are all of the
longest length (a prompt of 256 tokens for 8 responses), as the plan has them. The operations are a CPU's, in which
bfloat16 logits pass through two types more than on a GPU; what kernels and allocator take for themselves is in
neither number. AdamW's step is its peak against 16 bytes a trained parameter and the weights that are frozen.
"""

import argparse
import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from kpo_cli.config import LoraConfig
from kpo_cli.core import Denominators, load_objective
from kpo_cli.core.diagnostics import RatioSums
from kpo_cli.policy import scorer as scoring
from kpo_cli.policy.activations import Decoder, Pass, activation_bytes
from kpo_cli.policy.attention import NAME, Packing
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.load import narrow
from kpo_cli.policy.lora import adaptable, add_adapters
from kpo_cli.policy.memory import GIB, state_bytes
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import PackedBatch, Scorer, pack
from kpo_cli.policy.sharding import local, mesh_of_one, trained_weights
from kpo_cli.training.optimizer import give_gradients

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}

NO_ADAPTERS = LoraConfig(0, None, "all-linear", False)


def qwen3(name: str, layers: int | None = None) -> Qwen3Config:
    shape = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    return Qwen3Config(vocab_size=151_936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **shape)


@dataclass(frozen=True)
class Counted:
    """Bytes."""

    weights: int
    gradients: int
    moments: int
    forward_and_backward: int
    """The peak of a pass, with everything that is there anyway."""
    step: int
    """The peak of AdamW's step."""


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        self._note(local(tensor).untyped_storage())

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            weakref.finalize(storage, self._free, storage._cdata)
        size = storage.nbytes()
        self.now += size - self._sizes.get(storage._cdata, 0)
        self._sizes[storage._cdata] = size
        self.most = max(self.most, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __enter__(self) -> "Peak":
        """Sharding frees weights by making their storage small, which is no operation."""
        resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            resize(storage, size)
            if storage._cdata in self._sizes:
                self._note(storage)

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", noted)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


def rows_of(groups: int, group: int, prompt: int, response: int) -> Batch:
    """Rows of full length."""
    answers = [[Response([1] * response, [0.0] * response, True)] * group] * groups
    return make_batch([[1] * prompt] * groups, answers, torch.zeros(groups * group), torch.zeros(groups * group))


@dataclass(frozen=True)
class Job:
    """A training pass on fake tensors."""

    model: Any
    optimizer: torch.optim.Optimizer
    run: Callable[[], None]
    """The scorer, the objective and their backward pass."""

    def step(self) -> None:
        give_gradients(self.model, self.optimizer)
        self.optimizer.step()


@contextmanager
def on_fake_tensors(
    config: PretrainedConfig,
    batch: Batch,
    *,
    half: bool = False,
    lora: LoraConfig = NO_ADAPTERS,
    weights: Any = torch.float32,
) -> Iterator[Job]:
    """Within the block: a micro-batch of all rows of `batch`, a model of that configuration and its AdamW.

    `half`: it computes in bfloat16 as `kpo train` does; `weights` are all that there are of another type.
    """
    # Both read numbers, which fake tensors do not have.
    packed, mesh = pack(batch, torch.device("cpu")), mesh_of_one(torch.device("cpu"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval().to(weights)
    if lora.rank:
        add_adapters(model, lora)
    fake = FakeTensorMode()
    inputs = Batch(**{name: fake.from_tensor(value) for name, value in vars(batch).items()})
    with fake, _without_numbers(_faked(packed, fake)):
        _leave_meta(model)
        if half:
            with mock.patch("kpo_cli.policy.load.mesh_of_one", return_value=mesh):
                narrow(model, torch.bfloat16)
        optimizer = torch.optim.AdamW(trained_weights(model), fused=True)
        scorer, objective = Scorer(model, 1.0, half, packed=True), load_objective("grpo")
        yield Job(model, optimizer, partial(_pass, scorer, objective, inputs))


def count(config: PretrainedConfig, batch: Batch, *, half: bool, recomputed: int, lora: LoraConfig) -> Counted:
    """A micro-batch of all rows of `batch` through a model of that configuration."""
    with on_fake_tensors(config, batch, half=half, lora=lora) as job, Peak() as peak:
        recompute_layers(job.model, recomputed)
        for parameter in job.model.parameters():
            peak.add(parameter)
        weights = peak.now
        job.run()
        job.step()
        peak.most = peak.now
        job.run()
        passed, before = peak.most, peak.now
        peak.most = before
        job.optimizer.step()
        gradients = sum(p.grad.nbytes for p in job.optimizer.param_groups[0]["params"] if p.grad is not None)
        moments = sum(tensor.nbytes for state in job.optimizer.state.values() for tensor in state.values())
    return Counted(weights, gradients, moments, passed, weights + gradients + moments + peak.most - before)


def _leave_meta(model: Any) -> None:
    """Give a model on meta fake tensors on the CPU, the same one where it has one tensor twice."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, own in held.items():
                if own is None:
                    continue
                if id(own) not in made:
                    new = torch.empty(own.shape, dtype=own.dtype, device="cpu")
                    made[id(own)] = torch.nn.Parameter(new, own.requires_grad) if held is module._parameters else new
                held[name] = made[id(own)]


def _pass(scorer: Scorer, objective: Any, batch: Batch) -> None:
    log_probs, entropy = scorer(batch)
    out = objective(
        log_probs=log_probs,
        old_log_probs=log_probs.detach(),
        advantages=batch.advantages,
        response_mask=batch.response_mask,
        denominators=Denominators(1, 1),
        entropy=entropy,
    )
    out.loss.backward()


def _faked(packed: PackedBatch, fake: FakeTensorMode) -> PackedBatch:
    def of(tensor: Tensor) -> Tensor:
        return fake.from_tensor(tensor)

    packing = Packing(tuple(map(of, packed.packing.buckets)), of(packed.packing.order))
    ids, positions = of(packed.input_ids), of(packed.position_ids)
    return PackedBatch(ids, positions, packing, of(packed.predictors), of(packed.targets))


@contextmanager
def _without_numbers(packed: PackedBatch) -> Iterator[None]:
    """Within the block nothing asks for a number: the packing is given, no check is made and no metric computed."""
    with contextlib.ExitStack() as patches:
        for target, replacement in (
            (mock.patch.object(scoring, "pack"), lambda *_: packed),
            (mock.patch("kpo_cli.core.objective.as_mask"), lambda mask: mask),
            (mock.patch("kpo_cli.core.objective.cleaned"), lambda mask, **tensors: tensors),
            (mock.patch.object(RatioSums, "of"), lambda *tensors: RatioSums()),
        ):
            patches.enter_context(target).side_effect = replacement
        yield


def planned(config: PretrainedConfig, batch: Batch, *, half: bool, recomputed: int, lora: LoraConfig) -> Counted:
    """The same by the formulas of `kpo train`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights, gradients, moments = state_bytes(model, lora, half)
    packed, decoder = pack(batch, torch.device("cpu")), Decoder.of(config, model)
    adapters = lora.rank * len(adaptable(model, lora)) / decoder.layers if lora.rank else 0
    rows = sum(bucket.numel() for bucket in packed.packing.buckets)
    sizes = packed.input_ids.numel(), rows, packed.predictors.numel()
    state = weights + gradients + moments
    peak = state + activation_bytes(decoder, Pass(*sizes, half, recomputed, adapters, on_gpu=False))
    return Counted(weights, gradients, moments, peak, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument(
        "--layers", type=int, help="fewer than the model has: all but the constant part is linear in it"
    )
    arguments = parser.parse_args()
    print("| shape | type | recompute | lora | pass: plan, GiB | counted | ratio | step: plan | counted | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    started = time.perf_counter()
    prompt, group = 256, 8
    response = (arguments.tokens - 2 * prompt) // (2 * group) + 1
    batch = rows_of(2, group, prompt, response)
    for shape, half, share, rank in product(arguments.shapes, (True, False), (0, 0.5, 1), (0, 16)):
        config = qwen3(shape, arguments.layers)
        settings: dict[str, Any] = {
            "half": half,
            "recomputed": int(share * config.num_hidden_layers),
            "lora": LoraConfig(rank, None, "all-linear", False),
        }
        plan, found = planned(config, batch, **settings), count(config, batch, **settings)
        cells = [shape, "bfloat16" if half else "float32", {0: "", 0.5: "half", 1: "yes"}[share], str(rank or "")]
        for name in ("forward_and_backward", "step"):
            one, other = getattr(plan, name), getattr(found, name)
            cells += [f"{one / GIB:.2f}", f"{other / GIB:.2f}", f"{one / other:.3f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{arguments.tokens} packed tokens, {time.perf_counter() - started:.0f} s on fake tensors")


if __name__ == "__main__":
    main()
