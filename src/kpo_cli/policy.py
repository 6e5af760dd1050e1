"""Loading a policy: weights, tokenizer, and the ids that end a response."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kpo_cli.builtin import POLICY_DIR
from kpo_cli.config import ModelConfig
from kpo_cli.errors import UserError
from kpo_cli.runs import first_line, sha256_of

SMALL_MODEL = 5_000_000
"""Parameters below which one CPU thread is the safe choice: the matrices are too small to share."""


@dataclass(frozen=True)
class Policy:
    model: Any
    """A transformers causal language model with float32 weights, without dropout: it would make every ratio noise."""
    tokenizer: Any
    stop_ids: tuple[int, ...]
    parameters: int
    dtype: str
    """Of the forward pass."""
    identity: dict[str, Any]
    """Where the weights came from and their hash, for the manifest."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of a response, without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_policy(config: ModelConfig, weights: Path | None = None) -> Policy:
    """The policy of a configuration; `weights` is a checkpoint to take the weights from in its place.

    Raises UserError if it is not a model, or its tokenizer does not fit.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every load and save would tear ours apart
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # an unreachable hub is one line of ours, not one for each retry
    path = model_source(config)
    source = path if weights is None else str(weights)
    with loading_errors(config):
        AutoConfig.from_pretrained(source)  # first: AutoTokenizer stumbles over a model type that it does not know
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers makes them up and goes on
        raise UserError(
            f"model.path={config.path}: {len(missing)} weights are in no file ({missing[0]}, ...); download it again"
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
    stop_ids = _stop_ids(tokenizer, model)
    device, half = choose_device(config)
    _prepare(model, tokenizer, stop_ids, config, device, half)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = "bfloat16" if half else "float32"
    return Policy(model, tokenizer, stop_ids, parameters, dtype, model_identity(config, model))


def _prepare(
    model: Any, tokenizer: Any, stop_ids: tuple[int, ...], config: ModelConfig, device: torch.device, half: bool
) -> None:
    from transformers import GenerationConfig

    # Whatever the model's own file says of top-k, temperature or penalties must not travel on with checkpoints.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(stop_ids), pad_token_id=tokenizer.pad_token_id
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.eval().to(device)
    if half:  # one place for sampling and training alike, so that both see the same numbers
        model.forward = torch.autocast(device.type, dtype=torch.bfloat16)(model.forward)


def choose_device(config: ModelConfig) -> tuple[torch.device, bool]:
    """The device, and whether the forward pass runs in bfloat16."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError(
            "model.device=cuda but torch sees no GPU; set model.device=cpu or install a CUDA build of torch"
        )
    device = torch.device("cuda" if cuda and config.device != "cpu" else "cpu")
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    return device, half


def choose_threads(configured: int | None, parameters: int) -> int:
    """CPU threads: as configured, else 1 for a small model and all that this process may use for a larger one."""
    if configured is not None:
        return configured
    return 1 if parameters < SMALL_MODEL else len(os.sched_getaffinity(0))


def model_source(config: ModelConfig) -> str:
    """A local directory, or a hub name as it stands."""
    path = config.path
    if path is None:
        return str(POLICY_DIR)
    local = Path(os.path.expanduser(path))
    if len(local.name) > 255:
        raise UserError(f"model.path={path[:60]}... is too long to be a path")
    if local.is_dir():
        if not (local / "config.json").is_file():
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
        known = isinstance(error, OSError | ValueError | KeyError | RuntimeError | ImportError | AttributeError)
        if not known and module not in ("safetensors", "safetensors_rust", "huggingface_hub", "httpx", "httpcore"):
            raise
        raise UserError(f"model.path={config.path} cannot be loaded: {first_line(error)} ({_way_out(error)})") from None


def _way_out(error: BaseException) -> str:
    text = str(error).lower()
    if any(word in text for word in ("gated", "401", "403", "authenticat", "access to model")):
        return "accept the model's terms on its page and set HF_TOKEN"
    if any(word in text for word in ("connect", "offline", "couldn't reach", "resolve", "cached files", "not a local")):
        return "no way to the hub: check the name and the network, or give a directory with a copy"
    if any(word in text for word in ("shard", "header", "safetensor", "incomplete", "no such file", "metadata")):
        return "its files are damaged or missing: download it again"
    if any(word in text for word in ("model_type", "model type", "architecture", "unrecognized", "unknown")):
        return "this version of transformers does not know the architecture"
    return "check that it is a causal language model for transformers"


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
    path = model_source(config)
    if not Path(path).is_dir():
        return {"hub": path} | ({} if model is None else {"commit": getattr(model.config, "_commit_hash", None)})
    files = sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")])
    source = "built in" if Path(path) == POLICY_DIR else str(Path(path).resolve())
    return {"path": source, "sha256": {file.name: sha256_of(file) for file in files}}
