"""LoRA (Hu et al., 2106.09685) through peft: y = W x + (alpha / rank) B A x, where W is frozen and A and B train.

The adapters are put into the transformers model, not around it: for whoever samples from it, asks for its decoder or
calls its forward pass it stays the model that it was.
"""

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kpo_cli.config import LoraConfig
from kpo_cli.errors import UserError, in_time

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
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    peft = _peft(f"model.lora.rank={config.rank}")
    widest = max((max(layer.weight.shape) for layer in adaptable(model, config)), default=config.rank)
    if config.rank > widest:
        raise UserError(f"model.lora.rank={config.rank} is above {widest}, the model's widest layer; lower it")
    base = model.name_or_path
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scaled_alpha,
        target_modules=config.targets,
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
    if not all(isinstance(layer.get_base_layer(), torch.nn.Linear | Conv1D) for layer in adapted(model)):
        raise UserError(f"model.lora.targets={config.targets}: only linear layers can have adapters here")


def adapted(model: Any) -> list[Any]:
    """The layers of `model` that have adapters; [] for a model without."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def adaptable(model: Any, config: LoraConfig) -> list[Any]:
    """The linear layers of a model without adapters that would get them. Needs no peft: it is for planning."""
    from transformers.pytorch_utils import Conv1D

    def wanted(name: str) -> bool:
        return config.targets == "all-linear" or any(f".{name}".endswith(f".{target}") for target in config.targets)

    head = model.get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and wanted(name)
    ]


def halve_frozen_layers(model: Any) -> None:
    """Keep the frozen weights of adapted layers in bfloat16, for a forward pass in bfloat16.

    That changes no number: autocast would round the same weights in the same way, again in each pass.
    """
    for layer in adapted(model):
        layer.get_base_layer().to(torch.bfloat16)


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
        base = json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"]
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
    vars(below).pop("forward", None)  # one that is wrapped in autocast would still be the other model's
    for name, module in list(below.named_modules()):
        if hasattr(module, "lora_A"):
            below.set_submodule(name, module.get_base_layer())
    return below


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name in the model without adapters, with them merged: W + (alpha / rank) B A, float32.

    What a sampling engine must be given. One merged tensor is alive at a time; the others are the model's own. The
    names and their order are those of `state_dict`, so tied weights come under each of their names.
    """
    layers = {f"{name}.base_layer.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, tensor in model.state_dict().items():
        if name in layers:
            yield name.replace(".base_layer.", "."), tensor.float() + layers[name].get_delta_weight(NAME).detach()
        elif ".base_layer." in name:
            yield name.replace(".base_layer.", "."), tensor.float()
        elif ".lora_" not in name:
            yield name, tensor


def save_merged(model: Any, folder: Path) -> None:
    """Write the model with its adapters merged, float32, as transformers and engines load it."""
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    # The model's own tensors stay where they are: by their addresses transformers knows which are tied.
    weights = {name: t if t.data_ptr() in own else t.cpu() for name, t in named_weights(model)}
    without_adapters(model).save_pretrained(folder, state_dict=weights)


def _peft(what: str) -> ModuleType:
    try:
        import peft
    except ImportError:
        raise UserError(f"{what} needs peft: pip install 'kpo-cli[lora]'") from None
    return peft
