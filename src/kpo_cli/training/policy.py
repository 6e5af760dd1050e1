"""Loading a policy: weights, tokenizer, and the ids that end a response."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kpo_cli.builtin import POLICY_DIR
from kpo_cli.config import ModelConfig
from kpo_cli.errors import UserError
from kpo_cli.runs import first_line, sha256_of

SMALL_MODEL = 5_000_000
"""Parameters below which one CPU thread beats several: the matrices are too small to share."""


@dataclass(frozen=True)
class Policy:
    model: Any
    """A transformers causal language model, float32, in eval mode: dropout would make every ratio noise."""
    tokenizer: Any
    stop_ids: tuple[int, ...]
    parameters: int
    identity: dict[str, Any]
    """Where the weights came from and their hash, for the manifest."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of a response, without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_policy(config: ModelConfig, weights: Path | None = None) -> Policy:
    """The policy of a configuration; `weights` is a checkpoint to take the weights from in its place.

    Raises UserError if it is not a model, or its tokenizer does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every load and save would tear ours apart
    path = _resolve(config.path)
    source = path if weights is None else weights
    try:
        AutoConfig.from_pretrained(source)  # first: AutoTokenizer stumbles over a model type that it does not know
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        model, loading = loaded
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"model.path={config.path} cannot be loaded: {first_line(error)}") from None
    except Exception as error:  # safetensors' own error class derives from Exception alone
        if type(error).__module__.split(".")[0] not in ("safetensors", "safetensors_rust", "huggingface_hub"):
            raise
        raise UserError(f"model.path={config.path} cannot be loaded: {first_line(error)}") from None
    if missing := sorted(loading["missing_keys"]):  # transformers makes them up and goes on
        raise UserError(
            f"model.path={config.path}: {len(missing)} weights are in no file ({missing[0]}, ...); download it again"
        )
    stop_ids = _stop_ids(tokenizer, model)
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"model.path={config.path}: the tokenizer has {len(tokenizer)} tokens but the model only {vocabulary}; "
            f"they do not belong together"
        )
    # Whatever the model's own file says of top-k, temperature or penalties must not travel on with checkpoints.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(stop_ids), pad_token_id=tokenizer.pad_token_id
    )
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(p.numel() for p in model.parameters())
    return Policy(model, tokenizer, stop_ids, parameters, _identity(path, model))


def choose_threads(configured: int | None, parameters: int) -> int:
    """CPU threads: as configured, else 1 for a small model and all that this process may use for a larger one."""
    if configured is not None:
        return configured
    return 1 if parameters < SMALL_MODEL else len(os.sched_getaffinity(0))


def _resolve(path: str | None) -> str:
    """A local directory, or a hub name as it stands."""
    if path is None:
        return str(POLICY_DIR)
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"model.path={path} is not a model: it has no config.json")
        return str(local)
    if local.exists() or path.count("/") != 1 or path.startswith((".", "~", "/")):
        raise UserError(f"model.path={path}: no such model directory; give a directory or a hub name such as org/name")
    return path


def _stop_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's and those of the model's generation_config."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise UserError("the model has no end-of-sequence token, so no response could ever end; set eos_token")
    return tuple(sorted(ids))


def _identity(path: str, model: Any) -> dict[str, Any]:
    if not Path(path).is_dir():
        return {"hub": path, "commit": getattr(model.config, "_commit_hash", None)}
    files = sorted(Path(path).glob("*.safetensors"))
    source = "built in" if Path(path) == POLICY_DIR else str(Path(path).resolve())
    return {"path": source, "sha256": {file.name: sha256_of(file) for file in files}}
