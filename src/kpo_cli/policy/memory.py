"""What a run needs in memory, told before the weights are loaded."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kpo_cli.config import LoraConfig, TrainConfig
from kpo_cli.errors import UserError
from kpo_cli.policy.load import SMALL_MODEL
from kpo_cli.policy.lora import adaptable

GIB = 2**30
LOGITS = 2**28
"""In a chunk of the log-probability stage, at most."""
LESS_MEMORY = (
    "lower trainer.max_tokens_per_micro_batch, rollout.batch_size or rollout.max_response_tokens, "
    "or set model.gradient_checkpointing=true"
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. The first four are exact, `activations` is an estimate of the largest micro-batch or sampling batch."""

    parameters: int
    """A count, not bytes."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    available: int
    device: str
    loading: int = 0
    """While the weights are loaded; it counts only where it is more than what training needs."""
    ways_out: tuple[tuple[str, int], ...] = ()
    """Settings that need less, and how much they need before activations."""

    @property
    def fixed(self) -> int:
        return max(self.weights + self.gradients + self.optimizer, self.loading)

    def describe(self) -> str:
        parts = ", ".join(
            f"{name} {getattr(self, name) / GIB:.2f}" for name in ("weights", "gradients", "optimizer", "activations")
        )
        total = (self.fixed + self.activations) / GIB
        return (
            f"memory: about {total:.1f} GiB ({parts}; activations are an estimate), "
            f"{self.available / GIB:.1f} GiB free on {self.device}"
        )


def max_tokens(parameters: int, device: torch.device) -> int:
    """Tokens of a forward and backward pass to begin with, where none are configured.

    Too many for a GPU are found out and halved (step.py). On a CPU more tokens gain nothing, since a small model is
    fastest while its activations fit the caches; and running out of memory there cannot be caught.
    """
    if device.type == "cuda":
        return 32_768
    return 2_048 if parameters < SMALL_MODEL else 4_096


def plan_memory(config: TrainConfig, model_config: Any, device: torch.device, half: bool) -> MemoryPlan:
    """Count the parameters of a model by its transformers config, without loading it. `half`: bfloat16 forward pass."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    count = sum(p.numel() for p in model.parameters())
    lora, offload = config.model.lora, config.trainer.offload_optimizer
    parts = _with_adapters(model, lora, half) if lora.rank else _with_all_weights(config, count, half)
    ways_out = {}
    if not lora.rank:
        ways_out["model.lora.rank=16"] = max(sum(_with_adapters(model, replace(lora, rank=16), half)), 4 * count)
    if device.type != "cpu" and offload != "always":
        ways_out["trainer.offload_optimizer=always"] = max(sum(parts[:2]), 4 * count)
    weights, gradients, optimizer = parts
    if device.type != "cpu" and offload == "always":
        optimizer = 0
    activations = _activations(config, model_config.get_text_config(), 2 if half else 4, count, device)
    free = _free(device)
    return MemoryPlan(
        count, weights, gradients, optimizer, activations, free, str(device), 4 * count, tuple(ways_out.items())
    )


def _with_all_weights(config: TrainConfig, count: int, half: bool) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer when every weight trains."""
    copies = 2 if config.trainer.kl_coefficient else 1
    return 4 * count * copies + (2 * count if half else 0), 4 * count, 8 * count  # autocast keeps a bfloat16 copy


def _with_adapters(model: Any, lora: LoraConfig, half: bool) -> tuple[int, int, int]:
    """The same when adapters train. Frozen layers are in the forward pass's type, and serve a reference KL as well."""
    layers = adaptable(model, lora)
    frozen = sum(p.numel() for layer in layers for p in layer.parameters())
    trained = sum(lora.rank * sum(layer.weight.shape) for layer in layers)
    others = sum(p.numel() for p in model.parameters()) - frozen
    return (2 if half else 4) * frozen + 4 * others + (6 if half else 4) * trained, 4 * trained, 8 * trained


def check_memory(plan: MemoryPlan) -> str | None:
    """A warning if the run may not fit; raises UserError if weights, gradients and optimizer alone do not."""
    if plan.fixed > plan.available:
        ways_out = [f"set {setting} ({need / GIB:.1f} GiB)" for setting, need in plan.ways_out if need < plan.available]
        raise UserError(
            f"{plan.parameters / 1e9:.2f}B parameters need {plan.fixed / GIB:.1f} GiB for weights, gradients and "
            f"optimizer before any activations, but {plan.device} has {plan.available / GIB:.1f} GiB free; "
            f"{' or '.join([*ways_out, 'take a smaller model or a larger device'])}"
        )
    if plan.fixed + plan.activations > plan.available:
        return f"this may run out of memory; {LESS_MEMORY}"
    return None


def _activations(config: TrainConfig, model: Any, width: int, parameters: int, device: torch.device) -> int:
    """The larger of a training micro-batch and a sampling batch's cache. `width`: bytes of an activation.

    A decoder layer keeps about 18 hidden and 3 intermediate vectors for its backward pass, or one hidden vector with
    gradient checkpointing; of the logits there is one chunk at a time, with as much again twice while it is worked on.
    """
    hidden, layers = model.hidden_size, model.num_hidden_layers
    intermediate = getattr(model, "intermediate_size", None) or 4 * hidden
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or hidden // model.num_attention_heads
    length = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    rows = config.trainer.prompts_per_step * config.trainer.group_size / config.trainer.mini_batches
    chosen = config.trainer.max_tokens_per_micro_batch or max_tokens(parameters, device)
    tokens = max(length, min(chosen, rows * length))
    layer = hidden if config.model.gradient_checkpointing else 18 * hidden + 3 * intermediate
    logits = 3 * 4 * min(tokens * model.vocab_size, LOGITS)
    training = tokens * layers * layer * width + logits
    sampling = config.rollout.batch_size * length * layers * 2 * heads * head_dim * width
    return int(max(training, sampling))


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
