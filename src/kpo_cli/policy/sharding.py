"""Weights in 16 bits to compute with, over float32 masters, by FSDP2 (fully sharded data parallelism, `fully_shard`).

Each process of a mesh keeps its part of the masters, and of their gradients and moments. A layer's weights are
gathered, in the type that is computed in, while the layer runs forward and backward, and given up behind it; its
gradients are reduced in float32. In a mesh of one process there is nothing to gather, and what is left is a cast.
Between passes a model holds its masters, as DTensors. Nothing but the weights changes its type: what a model computes
with weights in 16 bits, it does here.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

Result = TypeVar("Result")


def mesh_of_one(device: torch.device) -> DeviceMesh:
    """This process by itself. A process group is made if there is none, of a kind that opens no connection."""
    if not dist.is_initialized():
        from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the kind

        dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (1,))


def shard(model: Any, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Spread the weights of a float32 `model` over a mesh, in place; it computes in `dtype`, or (None) in float32.

    The model stays what it is to whoever calls it, saves it or asks for its parameters; but a pass that is more than
    a call of the model has to go through `within`.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Said explicitly, for else the root's weights stay gathered, and are no masters, behind a pass without gradients.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.within = MethodType(_call, model)
    register_fsdp_forward_method(model, "within")


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def _layers(model: Any) -> list[Any]:
    """The outermost layers as transformers means them, but for those that share a weight with anything else."""

    def outermost(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        for child in module.children():
            yield from [child] if isinstance(child, GradientCheckpointingLayer) else outermost(child)

    def weights(module: torch.nn.Module) -> Counter[int]:
        return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))

    uses = weights(model)
    layers = dict.fromkeys(outermost(model))
    return [layer for layer in layers if all(uses[key] == count for key, count in weights(layer).items())]


def _call(_: Any, work: Callable[[], Result]) -> Result:
    return work()


def within(model: Any, work: Callable[[], Result]) -> Result:
    """`work()` with all that `model` needs for it: whatever reads weights by another way than a call of the model."""
    result: Result = model.within(work) if is_sharded(model) else work()
    return result


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Within the block the weights stay as they are computed with: for many passes without gradients.

    Nothing may change them meanwhile. They take 2 bytes a weight, and are given up at the end.
    """
    sharded = [module for module in model.modules() if is_sharded(module)]
    if sharded:
        model.set_reshard_after_forward(False)
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        if sharded:
            model.set_reshard_after_forward(True)
        for module in sharded:
            module.reshard()


def local(tensor: Any) -> Any:
    """This process's part of a sharded tensor, which shares its memory; any other, None too, as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, by all processes together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_weights(model: Any) -> list[Tensor]:
    """What an optimizer works on: this process's parts of all that trains, as plain tensors, in order.

    AdamW looks at one number at a time, so that it need not know of the others.
    """
    return [local(parameter) for parameter in model.parameters() if parameter.requires_grad]


def whole_state(model: Any) -> dict[str, Tensor]:
    """`state_dict` with every tensor gathered. On a CPU they may be the model's own: write them before it changes."""
    state = model.state_dict(keep_vars=True)
    whole = {id(tensor): full(tensor.detach()) for tensor in state.values()}  # one with two names is gathered once
    return {name: whole[id(tensor)] for name, tensor in state.items()}


def recover(model: Any) -> None:
    """Let a model pass again after a pass that failed on the way. Nothing to one that is not sharded."""
    if not is_sharded(model):
        return
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
        return
    # torch 2.11 has no word for it: the same by hand.
    states: list[Any] = [module._get_fsdp_state() for module in model.modules() if is_sharded(module)]
    for state in states:
        state._training_state = TrainingState.IDLE
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
        state._comm_ctx.post_forward_order.clear()
        state._comm_ctx.all_gather_state = state._comm_ctx.reduce_scatter_state = None
        if (group := state._fsdp_param_group) is not None:
            group._all_gather_result = None
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            group._to_sharded()
