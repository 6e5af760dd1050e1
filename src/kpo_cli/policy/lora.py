"""LoRA (Hu et al., 2106.09685) through peft: y = W x + (alpha / rank) B A x, where W is frozen and A and B train.

The adapters are put into the transformers model, not around it: for whoever samples from it, asks for its decoder or
calls its forward pass it stays the model that it was.

In 16 bits a layer computes with the merged weight, rounded as a sampling engine gets it. Small updates vanish in that
rounding; if the trainer added them unrounded, every ratio of the two would hold what the engine never saw.
"""

import copy
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kpo_cli.config import LoraConfig
from kpo_cli.errors import UserError, in_time
from kpo_cli.policy.sharding import full

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""As peft names them."""
NAME = "default"
"""Of the adapter in peft."""
PREFIX = "base_model.model."
"""Of every name in peft's file."""
PATTERN_SECONDS = 10.0
MERGED = "merged"
"""The folder of the whole model in a checkpoint of adapters."""


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Freeze `model` and put adapters into it, in place; they are float32 and change nothing yet (B = 0).

    A begins the same in every run, as the other weights do: a seed is for data and sampling. Raises UserError if peft
    is not installed or a target is not there.
    """
    peft = _peft(f"model.lora.rank={config.rank}")
    widest = max((max(layer.weight.shape) for layer in adaptable(model, config)), default=config.rank)
    if config.rank > widest:
        raise UserError(f"model.lora.rank={config.rank} is above {widest}, the model's widest layer; lower it")
    base = model.name_or_path
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scaled_alpha,
        target_modules=sorted(linear_layers(model)) if config.targets == "all-linear" else config.targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            peft.inject_adapter_in_model(adapter, model, NAME)
        except ValueError as error:  # also peft's NoMatchingPeftModuleError
            raise UserError(f"model.lora.targets={config.targets}: {' '.join(str(error).split())}") from None
    if not all(_is_linear(layer.get_base_layer()) for layer in adapted(model)):
        raise UserError(f"model.lora.targets={config.targets}: only linear layers can have adapters here")


def adapted(model: Any) -> list[Any]:
    """The layers of `model` that have adapters; [] for a model without."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def adaptable(model: Any, config: LoraConfig) -> list[Any]:
    """The linear layers of a model without adapters that would get them. Needs no peft: it is for planning."""

    def wanted(name: str) -> bool:
        return config.targets == "all-linear" or any(f".{name}".endswith(f".{target}") for target in config.targets)

    return [layer for name, layer in linear_layers(model).items() if wanted(name)]


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers but the head, by their names."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if module is not head and _is_linear(module)}


@torch.no_grad()
def _is_linear(layer: Any) -> bool:
    """Whether it is one and computes as one: routers of experts inherit from `nn.Linear` too, and return choices."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    if not isinstance(layer, torch.nn.Linear) or type(layer).forward is torch.nn.Linear.forward:
        return isinstance(layer, torch.nn.Linear | Conv1D)
    try:
        out = layer(layer.weight.new_zeros(1, layer.in_features))
    except Exception:  # a stranger's model code may raise anything
        return False
    return isinstance(out, Tensor) and out.shape == (1, layer.out_features)


def merge_in_forward(model: Any) -> None:
    """Let adapted layers compute with the merged weight in the type of their frozen one, which is 16 bits wide."""
    for layer in adapted(model):
        kind: Any = type(layer)
        layer.__class__ = _merging(kind)  # not a wrapped method: that of a copied model would be the first one's


@contextmanager
def merged_once(model: Any) -> Iterator[None]:
    """Within the block a forward pass without gradients does not merge anew; for sampling, token by token.

    The weights must stay as they are meanwhile. What is kept takes 2 bytes a frozen weight.
    """
    layers: list[Any] = [layer for layer in adapted(model) if isinstance(layer, _Merging)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.kept = _merged(layer).to(layer.get_base_layer().weight.dtype)
        yield
    finally:
        for layer in layers:
            layer.kept = None


class _Merging:
    """What `merge_in_forward` adds to a layer of peft."""

    kept: Tensor | None = None
    """The merged weight, within `merged_once`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(..., out) from `x` (..., in), in the type of the frozen weight."""
        base = self.get_base_layer()
        x = x.to(base.weight.dtype)
        if self.kept is not None and not torch.is_grad_enabled():
            return _linear(x, self.kept, base.bias, self.fan_in_fan_out)
        a, b = self.lora_A[NAME].weight, self.lora_B[NAME].weight
        merged: Tensor = _MergedLinear.apply(x, a, b, self)
        return merged


@cache
def _merging(kind: Any) -> type:
    return type(f"Merging{kind.__name__}", (_Merging, kind), {})


class _MergedLinear(torch.autograd.Function):
    """y = x M^T + bias with M = W + s B A rounded as x is; the gradient passes through the rounding as it is.

    M is made again for the backward pass: kept, it would be a copy of all weights. With g the gradient of y, that of
    x is g M, and those of A and B are s (g B)^T x and s g^T (x A^T), for which the one of M is never formed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.layer = layer
        return _linear(x, _merged(layer).to(x.dtype), layer.get_base_layer().bias, layer.fan_in_fan_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        layer, scale = ctx.layer, ctx.layer.scaling[NAME]
        x_grad = a_grad = b_grad = None
        if ctx.needs_input_grad[0]:
            merged = _merged(layer).to(x.dtype)
            x_grad = gradient @ (merged.t() if layer.fan_in_fan_out else merged)
        rows, gradients = x.flatten(0, -2), gradient.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            a_grad = ((gradients @ b.to(x.dtype)).t() @ rows).to(a.dtype) * scale
        if ctx.needs_input_grad[2]:
            b_grad = (gradients.t() @ (rows @ a.to(x.dtype).t())).to(b.dtype) * scale
        return x_grad, a_grad, b_grad, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """What nn.Linear computes or, `transposed`, GPT-2's Conv1D, to the bit."""
    if not transposed:
        return F.linear(x, weight, bias)
    assert bias is not None
    return torch.addmm(bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def _merged(layer: Any) -> Tensor:
    """W + (alpha / rank) B A of an adapted layer, float32 and detached, in the layout of W."""
    merged: Tensor = layer.get_base_layer().weight.detach() + layer.get_delta_weight(NAME).detach()
    return merged


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters in peft's format."""
    import peft

    state = peft.get_peft_model_state_dict(model, adapter_name=NAME)
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE)
    adapter = copy.copy(model.peft_config[NAME])
    adapter.target_modules = sorted(adapter.target_modules)
    adapter.inference_mode = True
    adapter.save_pretrained(str(folder))


def load_adapters(model: Any, folder: Path) -> None:
    """Set the adapters that `model` has to those of `save_adapters`."""
    import peft

    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    expected = peft.get_peft_model_state_dict(model, adapter_name=NAME)
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in expected.items()}:
        raise UserError(f"{folder}: its adapters are not those that model.lora asks for")
    peft.set_peft_model_state_dict(model, tensors, adapter_name=NAME)


def adapter_base(source: str | Path) -> str | None:
    """The model that the adapters in a directory belong to; None if it holds no adapters, or is a model besides."""
    folder = Path(source)
    if not (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        return None
    try:
        base = json.loads((folder / CONFIG_FILE).read_text("utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise UserError(f"{folder} holds adapters, but {CONFIG_FILE} does not say of which model")
    if base.startswith((".", "/", "~")) and not os.path.isdir(base):
        raise UserError(f"{folder} holds adapters of {base}, which is not there; mend the path in {CONFIG_FILE}")
    return base


def with_merged_adapters(model: Any, folder: Path) -> Any:
    """`model` with the adapters of a directory merged into its weights; whatever kind peft can merge."""
    peft = _peft(f"{folder} holds adapters and")
    _check_patterns(model, folder)
    merged = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    vars(merged).pop("peft_config", None)  # a model like any other: it may get new adapters
    return merged.requires_grad_(True)


def _check_patterns(model: Any, folder: Path) -> None:
    """Raise UserError if a directory's adapters name a program, or layers by patterns that never end.

    peft would import the one by its name, and match the others against every layer."""
    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    if config.get("megatron_config"):
        raise UserError(f"{folder}: its {CONFIG_FILE} asks for a program (megatron_config), and kpo runs none")
    fields = (config.get(name) for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"))
    patterns = [pattern for field in fields for pattern in ([field] if isinstance(field, str) else field or [])]
    with in_time(PATTERN_SECONDS, f"the patterns of layers in {folder}/{CONFIG_FILE} cannot be matched"):
        for name, _ in model.named_modules():
            for pattern in patterns:
                re.fullmatch(rf"(.*\.)?({pattern})", name)


def without_adapters(model: Any) -> Any:
    """The model below the adapters, as a second model that shares every tensor with the first."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    below = copy.deepcopy(model, shared)
    for name, module in list(below.named_modules()):
        if hasattr(module, "lora_A"):
            below.set_submodule(name, module.get_base_layer())
    return below


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name in the model without adapters, with them merged: W + (alpha / rank) B A, float32.

    What a sampling engine must be given. One merged or gathered tensor is alive at a time; the others are the model's
    own, in the type that it has. The names and their order are those of `state_dict`, so tied weights come under each.
    """
    layers = {f"{name}.base_layer.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, tensor in model.state_dict().items():
        if name in layers:
            yield name.replace(".base_layer.", "."), _merged(layers[name])
        elif ".base_layer." in name:
            yield name.replace(".base_layer.", "."), tensor
        elif ".lora_" not in name:
            yield name, full(tensor)


def save_merged(model: Any, folder: Path) -> None:
    """Write the model with its adapters merged, float32, as transformers and engines load it."""
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    wide: dict[int, Tensor] = {}  # a tensor with two names stays one: by that transformers knows which are tied
    weights = {}
    for name, tensor in named_weights(model):
        host, place = tensor.float().cpu(), tensor.data_ptr()
        weights[name] = wide.setdefault(place, host) if place in own else host
    below = without_adapters(model)
    below.save_pretrained(folder, state_dict=weights)
    below.config.dtype = torch.float32  # what is written, where that above is what is in memory
    below.config.save_pretrained(folder)


def _peft(what: str) -> ModuleType:
    try:
        import peft
    except ImportError:
        raise UserError(f"{what} needs peft: pip install 'kpo-cli[lora]'") from None
    return peft
