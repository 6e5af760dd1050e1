"""A model directory of a family, tiny and random, and the problems that it is trained on."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from families_parts.shrink import BEGIN, END, PAD, VOCABULARY, tiny_config

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests/data"))

STOPS = [END, *range(64, 76)]
"""So many that responses end at every length: one token in twenty."""
LARGEST = 12_000_000
"""Parameters; what is larger was not shrunk."""
PROMPTS = [
    "7",
    "a-b",
    "12+5?",
    "How many?",
    "What is 3*4, and why is it?",
    "x",
    "Is this prompt one of the longer ones?",
]


class CannotBuild(Exception):
    """Why there is no tiny model of a family."""


def build(family: str, directory: Path) -> dict[str, Any]:
    """Write the model of `family` and say what it is. Raises CannotBuild."""
    try:
        model = tiny_model(family)
        model.save_pretrained(directory)
        tiny_config(family).save_pretrained(directory)  # as on the hub: images and all, if that is what it has
        opened, loading = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        with torch.no_grad():
            logits = opened.eval()(torch.arange(24)[None], use_cache=False).logits
    except Exception as error:  # a model's code may raise anything
        raise CannotBuild(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    if logits.shape != (1, 24, VOCABULARY) or not logits.isfinite().all() or loading["missing_keys"]:
        raise CannotBuild(f"saved and opened again it gives logits {tuple(logits.shape)}, or none that are finite")
    save_tokenizer(directory)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return {"layers": list(dict.fromkeys(kinds)), "parameters": sum(p.numel() for p in model.parameters())}


def tiny_model(family: str) -> Any:
    """In float32, eval mode, with eager attention, the same weights each time."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(family))
    if (parameters := sum(p.numel() for p in empty.parameters())) > LARGEST:
        raise CannotBuild(f"{parameters:,} parameters after shrinking")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32, attn_implementation="eager")
    stir(model)
    model.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=STOPS, pad_token_id=PAD)
    return model.eval()


@torch.no_grad()
def stir(model: Any) -> None:
    """Add noise to all weights, so that nothing is neutral: zeros and ones of norms, biases, sinks and routers too.

    Matrices get logits and attention scores of a spread of one or more; the rest, vectors, a tenth.
    """
    draw = torch.Generator().manual_seed(1)
    kept = set(model.state_dict())
    buffers = [buffer for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point()]
    for tensor in [*model.parameters(), *buffers]:
        table = VOCABULARY in tensor.shape
        spread = 0.1 if tensor.dim() < 2 else (2 if table else 1) / max(1, min(tensor.shape[-2:])) ** 0.5
        tensor += spread * torch.randn(tensor.shape, generator=draw)


def save_tokenizer(directory: Path) -> None:
    from tiny_tokenizers import make_tokenizer

    make_tokenizer(template=None).save_pretrained(directory)


def write_problems(path: Path) -> Path:
    """Prompts of one token and of many, each with digits in front but for the very short ones."""
    texts = [PROMPTS[0], PROMPTS[5], *(f"{i}{PROMPTS[i % len(PROMPTS)]}" for i in range(10, 28))]
    path.write_text("".join(json.dumps({"problem": text, "answer": str(i)}) + "\n" for i, text in enumerate(texts)))
    return path
