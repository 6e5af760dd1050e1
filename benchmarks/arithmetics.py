"""One policy's log-probabilities and gradients in several arithmetics, for `benchmarks/precision.py`.

Masters are float32 weights by name; every arithmetic computes from the same ones, through the project's own packed
pass (`policy/scorer.py`). With `sharded` the weights are cast for computing by FSDP2 on a mesh of one, else by
autocast. Logits are float32 in all of them, as `core/log_probs.py` has them on a GPU.

On a CPU, products of 16-bit matrices are summed in float32 and rounded once, as tensor cores do it: what torch does
there by itself means the same and takes fifty times as long where the CPU has no such units.
"""

import contextlib
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from memory import Peak
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kpo_cli.core import load_objective
from kpo_cli.policy.batch import Batch
from kpo_cli.policy.scorer import Scorer, pack

Masters = dict[str, Tensor]
LOSS_SCALE = 2.0**16
"""Where float16 begins: what torch's GradScaler begins with. Halved for as long as a gradient overflows."""
LEAST_SCALE = 2.0**-16


@dataclass(frozen=True)
class Arithmetic:
    name: str
    dtype: torch.dtype
    """Of matrix products."""
    sharded: bool = False
    """Weights and activations are of that type."""
    wide_residual: bool = False
    """What layers add to is float32. Under autocast it is in any case."""

    @property
    def half(self) -> bool:
        return self.dtype.itemsize == 2


REFERENCE = Arithmetic("float64", torch.float64)
ARITHMETICS = (
    Arithmetic("float32", torch.float32),
    Arithmetic("autocast bf16", torch.bfloat16),
    Arithmetic("bf16 weights", torch.bfloat16, sharded=True),
    Arithmetic("bf16 weights, float32 residual", torch.bfloat16, sharded=True, wide_residual=True),
    Arithmetic("autocast fp16", torch.float16),
    Arithmetic("fp16 weights", torch.float16, sharded=True),
    Arithmetic("fp16 weights, float32 residual", torch.float16, sharded=True, wide_residual=True),
)


@dataclass(frozen=True)
class Gradient:
    values: Masters
    """float32, or float64 for the reference."""
    overflows: int
    """Times that the loss scale was halved."""
    seconds: float
    """Of one forward and backward pass; on a CPU the processor's."""


class Pass:
    """A copy of `model` (float32, packed attention) that computes in one arithmetic, from masters that are put in."""

    def __init__(self, model: Any, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic
        self.model = deepcopy(model).requires_grad_()
        if arithmetic is REFERENCE:
            self.model.double()
        if arithmetic.wide_residual:
            widen_residual(self.model, arithmetic.dtype)
        if arithmetic.sharded:
            shard(self.model, arithmetic)

    def load(self, masters: Masters) -> "Pass":
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                _local(parameter).copy_(masters[name])
        return self

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> Tensor:
        """(N, T) on the CPU, 0 outside the mask; float32, or float64 for the reference."""
        with self._arithmetic():
            return self._score(batch).cpu()

    def gradient(self, batch: Batch) -> Gradient:
        """Of the policy gradient where z is 0, at which all methods are the same."""
        scale, overflows = (LOSS_SCALE if self.arithmetic.dtype == torch.float16 else 1.0), 0
        while True:
            clock = time.perf_counter if self._on_gpu else time.process_time  # others may be at work on a CPU
            started = clock()
            self._backward(batch, scale)
            seconds = clock() - started
            values = {
                name: (torch.zeros_like(p) if p.grad is None else _local(p.grad).clone()).div_(scale).cpu()
                for name, p in self.model.named_parameters()
            }
            self.model.zero_grad(set_to_none=True)
            if all(value.isfinite().all() for value in values.values()) or scale <= LEAST_SCALE:
                return Gradient(values, overflows, seconds)
            scale, overflows = scale / 2, overflows + 1

    def count(self, batch: Batch) -> int:
        """Bytes of a forward and backward pass at their peak, its gradients included, beside the masters."""
        with self._arithmetic(), counted() as peak:
            self._backward(batch, 1.0)
            most = peak.most
        self.model.zero_grad(set_to_none=True)
        return most

    @property
    def _on_gpu(self) -> bool:
        return next(self.model.parameters()).device.type != "cpu"

    def _backward(self, batch: Batch, scale: float) -> None:
        with self._arithmetic():
            log_probs = self._score(batch)
            objective = load_objective("grpo")
            out = objective(
                log_probs=log_probs,
                old_log_probs=log_probs.detach(),
                advantages=batch.advantages.to(log_probs),
                response_mask=batch.response_mask.to(log_probs.device),
            )
            (out.loss * scale).backward()
            if self._on_gpu:
                torch.cuda.synchronize()

    def _score(self, batch: Batch) -> Tensor:
        if self.arithmetic.sharded:
            return self.model.token_values(batch)
        half = self.arithmetic.half
        with torch.autocast(self.model.device.type, self.arithmetic.dtype if half else None, enabled=half):
            return token_values(self.model, batch)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.arithmetic is REFERENCE:
                stack.enter_context(InFloat64())
            elif self.arithmetic.half and not self._on_gpu:
                stack.enter_context(RoundedOnce())
                stack.enter_context(mock.patch("kpo_cli.core.log_probs._matmul", _matmul_as_on_a_gpu))
            yield


def token_values(model: Any, batch: Batch) -> Tensor:
    """(N, T) log-probabilities, in whatever arithmetic is on."""
    return Scorer(model, 1.0, packed=True)._packed(batch, entropy_gradient=False)[0]


def shard(model: Any, arithmetic: Arithmetic) -> None:
    """FSDP2 on a mesh of one, which casts the weights of a layer when the layer begins."""
    if not dist.is_initialized():
        kind = "cpu:gloo,cuda:nccl" if model.device.type == "cuda" else "gloo"
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(model.device.type, (1,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=arithmetic.dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=not arithmetic.wide_residual,
        ),
    }
    for layer in model.get_decoder().layers:
        fully_shard(layer, **settings)
    # Left unsharded, the root's parameters would be 16-bit copies behind a pass without gradients.
    fully_shard(model, reshard_after_forward=True, **settings)
    model.token_values = types.MethodType(token_values, model)
    register_fsdp_forward_method(model, "token_values")


def widen_residual(model: Any, dtype: torch.dtype) -> None:
    """Embeddings leave in float32 and layers add to that; each product casts what comes in, as do rotations."""
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, out: out.float())
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
        elif name.endswith("rotary_emb"):
            module.register_forward_hook(lambda _, inputs, out: tuple(part.to(dtype) for part in out))

    def narrow(_: Any, inputs: Any, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state.to(dtype)
        return out

    model.get_decoder().register_forward_hook(narrow)


class InFloat64(TorchFunctionMode):
    """What asks for float32 gets float64: norms, rotations and softmaxes of transformers narrow by themselves."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        given = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return function(*map(_widened, args), **given)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class RoundedOnce(TorchDispatchMode):
    """Products of 16-bit matrices, summed in float32."""

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.PRODUCTS and (dtype := args[-1].dtype).itemsize == 2:
            return function(*(tensor.float() for tensor in args), **kwargs).to(dtype)
        return function(*args, **kwargs)


def _matmul_as_on_a_gpu(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(a.float() @ b.float())


@contextmanager
def counted() -> Iterator[Peak]:
    """Counts what operations make within the block, and what FSDP takes and frees by resizing storages."""
    peak, plain = Peak(), torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = plain(storage, size)
        peak.now += size - peak._sizes.get(storage._cdata, 0)
        peak.most = max(peak.most, peak.now)
        peak._sizes[storage._cdata] = size
        return result

    with peak, mock.patch.object(torch.UntypedStorage, "resize_", resize_):
        yield peak


def packed_tokens(batch: Batch) -> int:
    """In one pass of all rows."""
    return pack(batch, torch.device("cpu")).input_ids.numel()


def masters_of(model: Any) -> Masters:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def on_grid(masters: Masters) -> Masters:
    """Rounded to bf16, as released checkpoints are."""
    return {name: value.bfloat16().float() for name, value in masters.items()}


def spread(masters: Masters, generator: torch.Generator) -> Masters:
    """Each weight anywhere between the midpoints to its neighbours in bf16, evenly: as after some training.

    Weights of exactly 0 stay.
    """
    out = {}
    for name, value in masters.items():
        bits = value.cpu().bfloat16().view(torch.int16)
        centre, outer, inner = (part.view(torch.bfloat16).float() for part in (bits, bits + 1, bits - 1))
        draw = torch.rand(value.shape, generator=generator) * 2 - 1
        moved = centre + draw.clamp(min=0) / 2 * (outer - centre) + draw.clamp(max=0) / 2 * (centre - inner)
        out[name] = torch.where(centre == 0, centre, moved).to(value.device)
    return out


def changed_share(before: Masters, after: Masters) -> float:
    """Share of all weights whose value in bf16 is another one."""
    changed = sum(int((before[name].bfloat16() != after[name].bfloat16()).sum()) for name in before)
    return changed / sum(value.numel() for value in before.values())


def _local(tensor: Tensor) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
