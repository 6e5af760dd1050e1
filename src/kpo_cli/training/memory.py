"""What a run needs in memory, told before the weights are loaded."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kpo_cli.config import TrainConfig
from kpo_cli.errors import UserError

GIB = 2**30
LESS_MEMORY = (
    "lower trainer.micro_batch, rollout.batch_size or rollout.max_response_tokens, "
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

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.optimizer

    def describe(self) -> str:
        parts = ", ".join(
            f"{name} {getattr(self, name) / GIB:.2f}" for name in ("weights", "gradients", "optimizer", "activations")
        )
        total = (self.fixed + self.activations) / GIB
        return (
            f"memory: about {total:.1f} GiB ({parts}; activations are an estimate), "
            f"{self.available / GIB:.1f} GiB free on {self.device}"
        )


def plan_memory(config: TrainConfig, source: str, device: torch.device, half: bool) -> MemoryPlan:
    """Count the parameters of `source` (a directory or hub name) without loading it. `half`: bfloat16 forward pass."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    count = sum(p.numel() for p in model.parameters())
    copies = 2 if config.trainer.kl_coefficient else 1
    weights = 4 * count * copies + (2 * count if half else 0)  # autocast keeps a bfloat16 copy during a pass
    activations = _activations(config, model_config.get_text_config(), 2 if half else 4)
    return MemoryPlan(count, weights, 4 * count, 8 * count, activations, _free(device), str(device))


def check_memory(plan: MemoryPlan) -> str | None:
    """A warning if the run may not fit; raises UserError if weights, gradients and optimizer alone do not."""
    if plan.fixed > plan.available:
        raise UserError(
            f"{plan.parameters / 1e9:.2f}B parameters need {plan.fixed / GIB:.1f} GiB for float32 weights, gradients "
            f"and optimizer, but {plan.device} has {plan.available / GIB:.1f} GiB free; take a smaller model or a "
            f"larger device"
        )
    if plan.fixed + plan.activations > plan.available:
        return f"this may run out of memory; {LESS_MEMORY}"
    return None


def _activations(config: TrainConfig, model: Any, width: int) -> int:
    """The larger of a training micro-batch and a sampling batch's cache. `width`: bytes of an activation.

    A decoder layer keeps about 18 hidden and 3 intermediate vectors for its backward pass, or one hidden vector with
    gradient checkpointing; a logit takes about 20 bytes: itself, its log-softmax, their gradients and temporaries.
    """
    hidden, layers = model.hidden_size, model.num_hidden_layers
    intermediate = getattr(model, "intermediate_size", None) or 4 * hidden
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or hidden // model.num_attention_heads
    length = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = config.trainer.micro_batch * length
    layer = hidden if config.model.gradient_checkpointing else 18 * hidden + 3 * intermediate
    logits = config.trainer.micro_batch * config.rollout.max_response_tokens * model.vocab_size
    training = tokens * layers * layer * width + 20 * logits
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
