"""AdamW, and where its two moments (8 bytes a trained parameter) are kept.

`trainer.offload_optimizer`: `none` leaves them on the device; `sampling` takes them off it while responses are sampled,
until the next optimizer step asks for them; `always` keeps them in host memory and brings them over one parameter at a
time within a step. All three make the same bits: AdamW looks at one parameter at a time. On a CPU there is nowhere to
move to, and none of them does. (`auto` has become one of them by now: training/sampler.py.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kpo_cli.config import TrainerConfig
from kpo_cli.policy.sharding import local, trained_weights


def make_optimizer(model: Any, config: TrainerConfig) -> torch.optim.AdamW:
    """Over the weights of `model` that train; `give_gradients` gives it what those of a sharded one have."""
    weights = trained_weights(model)
    kinds = {"sampling": SamplingAdamW, "always": HostAdamW}
    kind = torch.optim.AdamW if model.device.type == "cpu" else kinds.get(config.offload_optimizer, torch.optim.AdamW)
    return kind(weights, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


class _MovingAdamW(torch.optim.AdamW):
    """AdamW whose state is loaded into host memory, and nowhere else on the way."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As always, but for the place: torch would put each tensor beside its parameter first."""
        super().load_state_dict({**state_dict, "state": {}})
        names = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(names, parameters, strict=True):
            if index in state_dict["state"]:
                self.state[parameter] = {name: to_host(t) for name, t in state_dict["state"][index].items()}


class SamplingAdamW(_MovingAdamW):
    """AdamW whose state is in host memory from `leave_device` to the next step."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One optimizer step; `closure` is not supported."""
        assert closure is None
        for parameter, state in self.state.items():
            _move(state, _to(parameter.device))
        super().step()


class HostAdamW(_MovingAdamW):
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


def give_gradients(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Before a step: the gradients of what trains in `model`, to the tensors that `make_optimizer` took of it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for weight, parameter in zip(optimizer.param_groups[0]["params"], trained, strict=True):
        weight.grad = local(parameter.grad)


def leave_device(optimizer: torch.optim.Optimizer) -> None:
    """Take the state of an optimizer that may leave the device to host memory, for an engine beside us."""
    if isinstance(optimizer, SamplingAdamW):
        for parameter, state in optimizer.state.items():
            if any(tensor.device == parameter.device for tensor in state.values()):
                _move(state, to_host)
        torch.cuda.empty_cache()  # our own tensors would get the blocks anyway, others would not


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
