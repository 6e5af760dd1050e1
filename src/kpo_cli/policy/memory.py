"""What a run needs in memory, told before the weights are loaded."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kpo_cli.config import LoraConfig, TrainConfig
from kpo_cli.errors import UserError
from kpo_cli.policy.activations import Decoder, NoEstimate, Pass, activation_bytes, cache_bytes
from kpo_cli.policy.fidelity import Way
from kpo_cli.policy.load import SMALL_MODEL
from kpo_cli.policy.lora import adaptable
from kpo_cli.runs.directory import first_line

GIB = 2**30
FILLED = 0.9
"""Of what is free, what a plan that chooses may take: kernels, the allocator and the estimate's own error take more."""
LESS_MEMORY = "lower trainer.max_tokens_per_micro_batch or rollout.batch_size, or set model.gradient_checkpointing=true"
"""A run that is resumed may do so."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device. Weights, gradients and optimizer are exact, activations and cache are estimates."""

    parameters: int
    """A count, not bytes."""
    weights: int
    gradients: int
    """They and the activations are there while the policy learns, and are not while it samples."""
    optimizer: int
    activations: int
    """Of the largest micro-batch."""
    available: int
    device: str
    loading: int = 0
    """While the weights are loaded; it counts only where it is more than what training needs."""
    ways_out: tuple[tuple[str, int], ...] = ()
    """Settings that need less, and how much they need before activations."""
    cache: int = 0
    """Of rollout=hf: keys, values and logits of its largest batch, and the weights in 16 bits."""
    offloaded: int = 0
    """What of the optimizer is off the device while the policy samples."""
    unknown: str | None = None
    """Why there are no estimates."""
    recomputed: tuple[int, int] = (0, 0)
    """Layers whose activations are computed again, and all of them."""

    @property
    def fixed(self) -> int:
        return max(self.weights + self.gradients + self.optimizer, self.loading)

    @property
    def sampling(self) -> int:
        return self.weights + self.optimizer - self.offloaded + self.cache

    @property
    def most(self) -> int:
        return max(self.fixed + self.activations, self.sampling)

    def describe(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in ("weights", "gradients", "optimizer"))
        free = f"{self.available / GIB:.1f} GiB free on {self.device}"
        if self.unknown:
            return f"memory: no estimate ({self.unknown}), but {self.fixed / GIB:.1f} GiB before any ({parts}), {free}"
        again, layers = self.recomputed
        recomputed = f" with {again} of {layers} layers recomputed" if again else ""
        return (
            f"memory: about {self.most / GIB:.1f} GiB ({parts}, activations about {self.activations / GIB:.2f}"
            f"{recomputed}, or the cache while sampling about {self.cache / GIB:.2f}), {free}"
        )


def max_tokens(parameters: int, device: torch.device) -> int:
    """Tokens of a forward and backward pass to begin with, where none are configured.

    Too many for a GPU are found out and halved (step.py). On a CPU more tokens gain nothing, since a small model is
    fastest while its activations fit the caches; and running out of memory there cannot be caught.
    """
    if device.type == "cuda":
        return 32_768
    return 2_048 if parameters < SMALL_MODEL else 4_096


def plan_memory(
    config: TrainConfig, model_config: Any, device: torch.device, half: bool, way: Way | None = None
) -> MemoryPlan:
    """Count the parameters of a model by its transformers config. `half`: computed in 16 bits.

    Without a `way` it is not loaded yet, and will be packed for all that one knows; with it its weights are on the
    device.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    count = sum(p.numel() for p in model.parameters())
    lora, offload, gpu = config.model.lora, config.trainer.offload_optimizer, device.type != "cpu"
    weights, gradients, optimizer = state_bytes(model, lora, half, config.trainer.kl_coefficient != 0)
    ways_out = {}
    if not lora.rank:
        ways_out["model.lora.rank=16"] = max(sum(state_bytes(model, replace(lora, rank=16), half)), 4 * count)
    if gpu and offload != "always":
        ways_out["trainer.offload_optimizer=always"] = max(weights + gradients, 4 * count)
    optimizer = 0 if gpu and offload == "always" else optimizer
    available, loading = _free(device) + (0 if way is None else 4 * count), 4 * count
    room = FILLED * available - max(weights + gradients + optimizer, loading)
    activations, cache, recomputed, unknown = _estimates(config, model_config, model, half, gpu, room, way)
    return MemoryPlan(
        parameters=count,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        available=available,
        device=str(device),
        loading=loading,
        ways_out=tuple(ways_out.items()),
        cache=cache,
        offloaded=0 if not gpu or offload == "none" else optimizer,
        unknown=unknown,
        recomputed=recomputed,
    )


def state_bytes(model: Any, lora: LoraConfig, half: bool, reference: bool = False) -> tuple[int, int, int]:
    """Bytes of the weights of `model` (without adapters), their gradients and the optimizer's state.

    What does not train is kept in the type that is computed in (`half`: 16 bits). A reference for a KL is a second
    model; with adapters it is the one below them.
    """
    count, width = sum(p.numel() for p in model.parameters()), 2 if half else 4
    if not lora.rank:
        return 4 * count + (width * count if reference else 0), 4 * count, 8 * count
    trained = sum(lora.rank * sum(layer.weight.shape) for layer in adaptable(model, lora))
    return width * count + 4 * trained, 4 * trained, 8 * trained


def _estimates(
    config: TrainConfig, model_config: Any, model: Any, half: bool, gpu: bool, room: float, way: Way | None
) -> tuple[int, int, tuple[int, int], str | None]:
    """Activations, the sampler's cache, how many layers of all are recomputed so that activations fit into `room`, and
    why there are no estimates: one that fails must not stop a run."""
    lora, rollout, trainer = config.model.lora, config.rollout, config.trainer
    try:
        decoder = Decoder.of(model_config.get_text_config(), model)
        adapters = lora.rank * len(adaptable(model, lora)) / decoder.layers
        count = sum(p.numel() for p in model.parameters())
        tokens, gathered, predicted, rows = largest_micro_batch(config, count, gpu, way)
        eager = way is not None and way.attention == "eager"

        def needed(recomputed: int) -> int:
            sizes = Pass(tokens, gathered, predicted, half, recomputed, adapters, gpu, rows, eager)
            return activation_bytes(decoder, sizes)

        recomputed = _recomputed(config.model.gradient_checkpointing, decoder.layers, needed, room)
        activations, shown = needed(recomputed), (recomputed, decoder.layers)
        if rollout.name == "vllm":
            return activations, 0, shown, None
        rows = min(rollout.batch_size, max(trainer.prompts_per_step * trainer.group_size, config.data.heldout))
        length = rollout.max_prompt_tokens + rollout.max_response_tokens
        cache = cache_bytes(decoder, rows, length, half)
        return activations, cache + (2 * count if half else 0), shown, None
    except NoEstimate as reason:
        return 0, 0, (0, 0), str(reason)
    except Exception as error:  # a stranger's configuration may hold anything
        return 0, 0, (0, 0), f"{type(error).__name__}: {first_line(error)}"


def _recomputed(setting: bool | int | str, layers: int, needed: Callable[[int], int], room: float) -> int:
    """How many layers model.gradient_checkpointing means; `auto`: as few as make activations fit into `room` bytes.

    All but the last is the most that helps: to compute that again needs what it would have kept, at the same moment.
    """
    if setting == "auto":
        return next((count for count in range(layers) if needed(count) <= room), layers - 1)
    return layers if setting is True else min(int(setting), layers)


def largest_micro_batch(
    config: TrainConfig, parameters: int, gpu: bool, way: Way | None = None
) -> tuple[int, int, int, int]:
    """Its tokens, those of its rows with a prompt each, response tokens, and rows if they are padded (0: packed).

    All are of full length.
    """
    trainer, rollout = config.trainer, config.rollout
    prompt, response, group = rollout.max_prompt_tokens, rollout.max_response_tokens, trainer.group_size
    mini_batch = -(-trainer.prompts_per_step // trainer.mini_batches) * (prompt + group * response)
    if trainer.supervised.steps:
        mini_batch = max(mini_batch, trainer.supervised.batch_tokens)
    limit = trainer.max_tokens_per_micro_batch or max_tokens(parameters, torch.device("cuda" if gpu else "cpu"))
    if way is not None and not way.packed:
        most = -(-trainer.prompts_per_step // trainer.mini_batches) * group
        count = 1 if way.alone else max(1, min(limit // (prompt + response), most))
        return count * (prompt + response), count * (prompt + response), count * response, count
    tokens = max(prompt + response, min(limit, mini_batch))
    rows = tokens / (prompt / group + response) if tokens > prompt + response else 1
    return tokens, int(rows * (prompt + response)), int(rows * response), 0


def check_memory(plan: MemoryPlan) -> str | None:
    """A warning if the run may not fit; raises UserError if weights, gradients and optimizer alone do not."""
    if plan.fixed > plan.available:
        ways_out = [f"set {setting} ({need / GIB:.1f} GiB)" for setting, need in plan.ways_out if need < plan.available]
        raise UserError(
            f"{plan.parameters / 1e9:.2f}B parameters need {plan.fixed / GIB:.1f} GiB for weights, gradients and "
            f"optimizer before any activations, but {plan.device} has {plan.available / GIB:.1f} GiB free; "
            f"{' or '.join([*ways_out, 'take a smaller model or a larger device'])}"
        )
    if plan.most > plan.available:
        return f"this may run out of memory; {LESS_MEMORY}, or lower rollout.max_response_tokens"
    return None


def lacks_memory(error: BaseException) -> bool:
    """What is raised where memory runs out; cuBLAS, CUDA's own calls (for pinned host memory, or a kernel's needs) and
    the allocator of a CPU have no exception of their own for it."""
    told = (
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "not enough memory",
        "can't allocate memory",
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in told)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text("ascii").split("\n"):
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
