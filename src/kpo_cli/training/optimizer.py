"""AdamW, and where its two moments (8 bytes a trained parameter) are kept.

`trainer.offload_optimizer`: `none` leaves them on the device; `sampling` takes them off it while responses are sampled;
`always` keeps them in host memory and brings them over one parameter at a time within an optimizer step. All three make
the same bits: AdamW looks at one parameter at a time. On a CPU there is nowhere to move to, and none of them does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kpo_cli.config import TrainerConfig


def make_optimizer(model: Any, config: TrainerConfig) -> torch.optim.AdamW:
    """Over the weights of `model` that train."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = HostAdamW if config.offload_optimizer == "always" and model.device.type != "cpu" else torch.optim.AdamW
    return kind(weights, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


class HostAdamW(torch.optim.AdamW):
    """AdamW whose state lives in host memory. On the device there is never more than that of one parameter."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One optimizer step; `closure` is not supported. Leaves the gradients where they are."""
        assert closure is None
        gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        for parameter in gradients:
            parameter.grad = None
        for parameter, gradient in gradients.items():  # a step passes over parameters that have no gradient
            parameter.grad = gradient
            _move(self.state[parameter], _to(parameter.device))
            super().step()
            _move(self.state[parameter], to_host)
            parameter.grad = None
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As always, but for the place."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            _move(state, to_host)


@contextmanager
def off_device(optimizer: torch.optim.Optimizer, wanted: bool) -> Iterator[None]:
    """If `wanted`, the optimizer's state is in host memory within the block; on a CPU nothing moves."""
    device = optimizer.param_groups[0]["params"][0].device
    if not wanted or device.type == "cpu":
        yield
        return
    for state in optimizer.state.values():
        _move(state, to_host)
    torch.cuda.empty_cache()  # for an engine beside us; our own tensors would get the blocks anyway
    try:
        yield
    finally:
        for state in optimizer.state.values():
            _move(state, _to(device))


def _to(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory, which a device reads without detours."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available())
    return host.copy_(tensor)


def _move(state: dict[str, Tensor], move: Callable[[Tensor], Tensor]) -> None:
    """Moments and step count alike: a fused step wants them beside the parameter."""
    for name, tensor in state.items():
        state[name] = move(tensor)
