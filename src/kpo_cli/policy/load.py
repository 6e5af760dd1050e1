"""Loading a policy: weights, tokenizer, and the ids that end a response."""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kpo_cli.builtin import POLICY_DIR
from kpo_cli.config import Architecture, ModelConfig
from kpo_cli.errors import UserError
from kpo_cli.policy.fidelity import Way, choose_way
from kpo_cli.policy.kernels import choose_kernel, kernels_for
from kpo_cli.policy.lora import (
    MERGED,
    adapted,
    adapter_base,
    add_adapters,
    load_adapters,
    merge_in_forward,
    save_adapters,
    save_merged,
    with_merged_adapters,
)
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.policy.sharding import mesh_of_one, shard, whole_state
from kpo_cli.policy.threads import Workers
from kpo_cli.runs.checkpoints import check_format
from kpo_cli.runs.directory import first_line, sha256_of

RANDOM_WEIGHTS = 0
"""Seed of random weights. Fixed: runs that differ in their seed start from the same ones."""
SMALL_MODEL = 5_000_000
"""Parameters below which threads share batches and not operations: the matrices are too small."""
LOADING = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    AttributeError,
    TypeError,
    re.error,
    pickle.UnpicklingError,
)
"""What damaged or strange files make transformers and torch raise."""


@dataclass(frozen=True)
class Policy:
    model: Any
    """A transformers causal language model with float32 weights, in eval mode for good.

    Whatever is found out of it, it is in float32; then `narrow` has it compute in `dtype`."""
    way: Way
    """How its log-probabilities are computed, so that they are the model's own."""
    tokenizer: Any
    stop_ids: tuple[int, ...]
    parameters: int
    """Without adapters."""
    dtype: str
    """That it computes in."""
    identity: dict[str, Any]
    """Where the weights came from and their hash, for the manifest."""
    merge_checkpoints: bool = False
    """With LoRA, save the whole model beside the adapters."""

    @property
    def half(self) -> bool:
        """It computes in 16 bits."""
        return self.dtype != "float32"

    def narrow(self) -> None:
        """Compute in `dtype` from here on, in place. To be called once; nothing to a policy in float32."""
        if self.half:
            narrow(self.model, getattr(torch, self.dtype))

    def save(self, folder: Path) -> None:
        """Write tokenizer and weights: those of the model, or the adapters and, if asked for, the model in merged/."""
        self.tokenizer.save_pretrained(folder)
        if not adapted(self.model):
            self.model.save_pretrained(folder, state_dict=whole_state(self.model))
            return
        save_adapters(self.model, folder)
        if self.merge_checkpoints:
            save_merged(self.model, folder / MERGED)
            self.tokenizer.save_pretrained(folder / MERGED)

    def decode(self, token_ids: list[int]) -> str:
        """The text of a response, without special tokens, but for those that mark a thought: the grader reads them."""
        text, start = "", 0
        for place in [*(i for i, token in enumerate(token_ids) if token in self._thought_marks), len(token_ids)]:
            text += self.tokenizer.decode(
                token_ids[start:place], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            text += "".join(self._thought_marks[token] for token in token_ids[place : place + 1])
            start = place + 1
        return text

    @cached_property
    def _thought_marks(self) -> dict[int, str]:
        """Special tokens that open or close a thought."""
        added = self.tokenizer.added_tokens_decoder
        return {i: t.content for i, t in added.items() if t.special and t.content in ("<think>", "</think>")}


def narrow(model: Any, dtype: torch.dtype) -> None:
    """Let a float32 model compute in 16 bits, in place.

    What trains keeps float32 weights, of which each pass has copies in `dtype` (policy/sharding.py), or it is adapters,
    merged in float32 (policy/lora.py). What does not train is kept in `dtype` alone.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if adapted(model):
        merge_in_forward(model)
    elif any(parameter.requires_grad for parameter in model.parameters()):
        shard(model, mesh_of_one(model.device), dtype)


def load_policy(config: ModelConfig, weights: Path | None = None, before: Way | None = None) -> Policy:
    """The policy of a configuration, in float32 yet; `weights` is a checkpoint to take them from in its place.

    `before` is how the run that it goes on with computed. Raises UserError if it is not a model, its tokenizer does not
    fit, or there is no way to compute what it is.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every load and save would tear ours apart
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # an unreachable hub is one line of ours, not one for each retry
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else a model in .bin is sent to a service of the hub's
    path = model_source(config)
    source = path if weights is None or config.lora.rank else str(weights)
    with loading_errors(config):
        _config_of(source)  # first: AutoTokenizer stumbles over an unknown model type
        has_tokenizer = (Path(source) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(source if has_tokenizer else base_of(source), trust_remote_code=False)
        if config.architecture is not None and weights is None:
            loaded: Any = random_model(config.architecture), {"missing_keys": []}
        else:
            loaded = _pretrained(source)
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers makes them up and goes on
        raise UserError(
            f"model.path={config.path}: {len(missing)} weights are in no file ({missing[0]}, ...); download it again"
        )
    if damaged := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise UserError(
            f"model.path={config.path}: {len(damaged)} of its weights hold NaN or infinity ({damaged[0]}, ...): they "
            f"are damaged, or exploded in training; take others"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"model.path={config.path}: the tokenizer has {len(tokenizer)} tokens but the model only {vocabulary}; "
            f"they do not belong together"
        )
    if config.chat_template == "required" and not tokenizer.chat_template:
        raise UserError(
            f"model.path={config.path}: its tokenizer has no chat template; set model.chat_template=none for plain text"
        )
    _check_reloads(config, model)
    stop_ids = _stop_ids(tokenizer, model)
    parameters = sum(p.numel() for p in model.parameters())
    if config.lora.rank:
        add_adapters(model, config.lora)
        if weights is not None:
            load_adapters(model, weights)
    device, dtype = choose_device(config)
    way = _prepare(model, tokenizer, stop_ids, config, device, before)
    way = choose_kernel(model, way, kernels_for(device, dtype != "float32"))
    identity = model_identity(config, model)
    return Policy(model, way, tokenizer, stop_ids, parameters, dtype, identity, config.lora.merge_checkpoints)


def _pretrained(source: str) -> tuple[Any, dict[str, Any]]:
    """A model in float32 and how its loading went; a directory of adapters is their model with them merged."""
    from transformers import AutoModelForCausalLM

    base = adapter_base(source)
    if base is None:
        settings = {"config": _config_of(source), "dtype": torch.float32, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **settings)
        return loaded
    model, loading = _pretrained(base)
    return with_merged_adapters(model, Path(source)), loading


def _config_of(source: str) -> Any:
    """A model's configuration, without what its file says of how to compute: that is found out (fidelity.py), and what
    one machine had, as flash attention, another has not."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_of(source), trust_remote_code=False)
    _check_kernels(config)
    config._attn_implementation = "eager" if config.output_attentions else None
    config._experts_implementation = None
    return config


def _check_kernels(config: Any) -> None:
    """Raise UserError if a model's config.json asks for a kernel of the hub: those are compiled programs."""
    wanted = getattr(config, "_attn_implementation", None)
    if isinstance(wanted, str) and "/" in wanted:
        raise UserError(
            f"{config.name_or_path}: its config.json asks for the program {wanted} (attn_implementation), and kpo runs "
            f"none that comes with a model; take that line out"
        )


def _check_reloads(config: ModelConfig, model: Any) -> None:
    """Raise UserError for the text part of some image models: a checkpoint of it is a model that nobody can open."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model.path={config.path}: of this model only a part is a language model ({type(model).__name__}), and "
            f"transformers cannot open that by itself, so no checkpoint of it could be read; take another architecture"
        )


def base_of(source: str) -> str:
    """The model below however many layers of adapters: `source` itself if it is no directory of adapters."""
    base = adapter_base(source)
    return source if base is None else base_of(base)


def _prepare(
    model: Any,
    tokenizer: Any,
    stop_ids: tuple[int, ...],
    config: ModelConfig,
    device: torch.device,
    before: Way | None,
) -> Way:
    from transformers import GenerationConfig

    # Whatever the model's own file says of top-k, temperature or penalties must not travel on with checkpoints.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(stop_ids), pad_token_id=tokenizer.pad_token_id
    )
    again = config.gradient_checkpointing  # auto only where nothing could be planned
    able = recompute_layers(model, None if again is True or again == "auto" else int(again))
    if not able and again not in (False, "auto"):
        raise UserError(
            f"model.path={config.path}: transformers cannot recompute the layers of this architecture; set "
            f"model.gradient_checkpointing=false"
        )
    choose_kernels(device)
    model.eval().to(device)  # eval for good: in train mode dropout would make every ratio noise
    return choose_way(model, before)


def choose_kernels(device: torch.device) -> None:
    """Set, for this process, which of a GPU's kernels a policy may run on; on a CPU there is nothing to choose."""
    if device.type != "cuda":
        return
    # On recent cards torch prefers cuDNN's attention, which builds a plan for every new shape, a second or so each; and
    # our shapes are ragged. It might also have one plan for inference and another for training, so that the ratio of
    # a policy to itself was not 1.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Whatever ran before us: with TF32 a float32 product has 10 bits, and the ratios of float32 policies are noise.
    torch.set_float32_matmul_precision("highest")


def random_model(architecture: Architecture) -> Any:
    """A built-in decoder with random weights, the same ones each time; PyTorch's own generator stays where it is."""
    from kpo_cli.builtin.warmup import build_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS)
        return build_model(architecture)


def transformers_config(config: ModelConfig) -> Any:
    """The model's configuration in transformers, without its weights."""
    from kpo_cli.builtin.warmup import architecture_config

    if config.architecture is not None:
        return architecture_config(config.architecture)
    return _config_of(model_source(config))


def choose_device(config: ModelConfig) -> tuple[torch.device, str]:
    """The device, and the type to compute in."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError(
            "model.device=cuda but torch sees no GPU; set model.device=cpu or install a CUDA build of torch"
        )
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return device, auto if config.dtype == "auto" else config.dtype


def share_threads(threads: int | None, policy: Policy) -> Workers:
    """Set PyTorch's CPU threads and return workers for a policy; `threads` None: all that we may use.

    A small model's operations are too short to be shared, so that its batches are, by workers of one thread each. In 16
    bits they are not: a sharded model runs one pass at a time.
    """
    threads = threads or len(os.sched_getaffinity(0))
    small = policy.model.device.type == "cpu" and policy.parameters < SMALL_MODEL and not policy.half
    torch.set_num_threads(1 if small else threads)
    return Workers(threads if small else 1)


def model_source(config: ModelConfig) -> str:
    """A local directory, or a hub name as it stands. A built-in architecture has the built-in policy's tokenizer."""
    path = config.path
    if path is None:
        return str(POLICY_DIR)
    local = Path(os.path.expanduser(path))
    if len(local.name) > 255:
        raise UserError(f"model.path={path[:60]}... is too long to be a path")
    if local.is_dir():
        check_format(local.parent if local.name == MERGED else local)
        if not (local / "config.json").is_file() and adapter_base(local) is None:
            raise UserError(f"model.path={path} is not a model: it has no config.json")
        return str(local)
    if local.exists() or path.count("/") != 1 or path.startswith((".", "~", "/")):
        raise UserError(f"model.path={path}: no such model directory; give a directory or a hub name such as org/name")
    return path


@contextmanager
def loading_errors(config: ModelConfig) -> Iterator[None]:
    """Turn what transformers, safetensors and the hub raise into one line with a way out."""
    try:
        yield
    except Exception as error:
        module = type(error).__module__.split(".")[0]
        known = isinstance(error, LOADING)
        if not known and module not in ("safetensors", "safetensors_rust", "huggingface_hub", "httpx", "httpcore"):
            raise
        if refused := _refused(error):
            raise UserError(f"model.path={config.path} {refused}") from None
        raise UserError(f"model.path={config.path} cannot be loaded: {first_line(error)} ({_way_out(error)})") from None


def _refused(error: BaseException) -> str | None:
    """What is not loaded because it is a program; transformers and torch go on to advise options that are not ours."""
    if "trust_remote_code" in str(error):
        return (
            "needs program code of its own (auto_map), and kpo runs none that comes with a model; take one of an "
            "architecture that transformers has"
        )
    if "weights_only" in str(error):
        return "has a .bin file that holds more than tensors, and could run a program; take one in safetensors"
    return None


def _way_out(error: BaseException) -> str:
    text = str(error).lower()
    if "num_attention_heads" in text:  # Mamba and its kin
        return "it has no attention, and so no cache of keys and values to sample with: take another architecture"
    if any(word in text for word in ("gated", "401", "403", "authenticat", "access to model")):
        return "accept the model's terms on its page and set HF_TOKEN"
    if any(word in text for word in ("connect", "offline", "couldn't reach", "resolve", "cached files", "not a local")):
        return "no way to the hub: check the name and the network, or give a directory with a copy"
    if any(word in text for word in ("shard", "header", "safetensor", "incomplete", "no such file", "metadata")):
        return "its files are damaged or missing: download it again"
    if any(word in text for word in ("model_type", "model type", "architecture", "unrecognized", "unknown")):
        return "this version of transformers does not know the architecture"
    return "check that it is a causal language model for transformers"


def context_of(model: Any) -> tuple[int | None, str]:
    """The most tokens of a prompt and its response, None where none is known, and what to call them in an error.

    LongRoPE has other frequencies for a whole batch as soon as one of its rows is longer than the original context: the
    log-probabilities of a text would depend on those beside it, and not be the sampler's. So that context is the limit.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < 1:  # XLNet's is -1: there is no limit
        context = None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # the others are by type of layer
    original = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    if original and (context is None or min(original) < context):
        return min(original), f"the {min(original)} tokens behind which LongRoPE gives a batch other positions"
    return context, f"the model's context of {context} tokens"


def _stop_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's and those of the model's generation_config."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise UserError("the model has no end-of-sequence token, so no response could ever end; set eos_token")
    return tuple(sorted(ids))


def model_identity(config: ModelConfig, model: Any = None) -> dict[str, Any]:
    """Where the weights come from, and their hash or (for the hub, once loaded as `model`) their commit."""
    if config.architecture is not None:
        return {"built": asdict(config.architecture), "seed": RANDOM_WEIGHTS}
    path = model_source(config)
    if not Path(path).is_dir():
        return {"hub": path} | ({} if model is None else {"commit": getattr(model.config, "_commit_hash", None)})
    files = sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")])
    source = "built in" if Path(path) == POLICY_DIR else str(Path(path).resolve())
    identity = {"path": source, "sha256": {file.name: sha256_of(file) for file in files}}
    base = adapter_base(path)
    return identity if base is None else {**identity, "base": model_identity(replace(config, path=base))}
