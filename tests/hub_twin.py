"""Hub twins: model directories and data files that look to our code like the real ones, with nothing downloaded.

    python tests/hub_twin.py OUT_DIR [--shape qwen3|qwen2|llama|all] [--pad other|eos|none] [--no-template]

A twin is tiny and its weights are random, but everything around the weights is as on the hub: bf16 in several
safetensors shards with an index, config files in the layout of transformers 4, a byte-level BPE tokenizer of 12,000
tokens with its chat template inside tokenizer_config.json, more rows in the embedding than there are tokens, and a
generation_config.json that would bias whoever obeys it. What is dangerous on the hub is dangerous here:

- `generation_config.json` asks for top-k, top-p, a temperature and a repetition penalty, and names two EOS ids;
- the Qwen twins pad with `<|endoftext|>`, which is not the tokenizer's EOS but is the second of the EOS ids, so a mask
  by `!= pad` loses the stop token; the Llama twin pads with a token of its own;
- the Llama tokenizer writes a BOS and so does its template, so tokenizing a templated text naively gives two;
- the Qwen2 template makes up a system prompt where there is none, Qwen3's has a thinking switch;
- `<think>` is an added token but not a special one: it must survive decoding.

Weights, tokenizer and files depend on the seed and the Python version alone.
"""

import argparse
import json
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

PADS = ("other", "eos", "none")
EOS_VARIANTS = ("two", "foreign", "missing")

VOCABULARY = 12_000
"""Tokens before the special ones."""
TOKEN_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
EMBEDDING_MULTIPLE = 128
TRAINING_CHARACTERS = 2_500_000
SHARD_BYTES = 200_000
CONTEXT = 2048

PROBLEM_PREFIX = (
    "Work through this mathematics problem one step at a time. Let the final line of your reply have the form "
    "Answer: $Answer (no quotes), with the result of the problem in place of $Answer.\n\n"
)
PROBLEM_SUFFIX = '\n\nDo not forget: the result stands on a line of its own, after "Answer:".'
"""What the parquet file writes around every problem, as DAPO-Math-17k does (in other words)."""

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)

QWEN3_TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' and not loop.last -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""
QWEN2_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nBe of help to whoever asks.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
LLAMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{{- message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Shape:
    """What sets one family apart."""

    architecture: str
    special: tuple[str, ...]
    """Special tokens, in the order of their ids."""
    plain: tuple[str, ...]
    """Added tokens that are not special, behind them."""
    eos: str
    """The tokenizer's: the end of a turn."""
    end_of_text: str
    """The other EOS."""
    bos: str | None
    """What the tokenizer puts before every text."""
    pad: str
    split: str
    template: str
    tokenizer_class: str
    config: dict[str, Any]


QWEN_TOKENS = {
    "special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "eos": "<|im_end|>",
    "end_of_text": "<|endoftext|>",
    "bos": None,
    "pad": "<|endoftext|>",
    "split": QWEN_SPLIT,
    "tokenizer_class": "Qwen2Tokenizer",
}
QWEN_CONFIG = {"rope_theta": 1_000_000, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 2}

SHAPES = {
    "qwen3": Shape(
        **QWEN_TOKENS,
        architecture="Qwen3ForCausalLM",
        plain=("<think>", "</think>"),
        template=QWEN3_TEMPLATE,
        config=QWEN_CONFIG | {"head_dim": 32, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "qwen2": Shape(
        **QWEN_TOKENS,
        architecture="Qwen2ForCausalLM",
        plain=(),
        template=QWEN2_TEMPLATE,
        config=QWEN_CONFIG | {"tie_word_embeddings": True},
    ),
    "llama": Shape(
        architecture="LlamaForCausalLM",
        special=(
            *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
            *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
        plain=(),
        eos="<|eot_id|>",
        end_of_text="<|end_of_text|>",
        bos="<|begin_of_text|>",
        pad="<|finetune_right_pad_id|>",
        split=LLAMA_SPLIT,
        template=LLAMA_TEMPLATE,
        tokenizer_class="PreTrainedTokenizerFast",
        config={
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            "tie_word_embeddings": False,
        },
    ),
}


# Model directories


def make_model(
    shape: str,
    directory: Path,
    *,
    pad: str = "other",
    eos: str = "two",
    template: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a twin into `directory` (made if need be) and return it.

    `pad`: "other" is a token that is not the tokenizer's EOS, "eos" is that token, "none" leaves every file without.
    `eos`: "two" names the end of a turn and the end of a text in generation_config, "foreign" only the one that is not
    the tokenizer's, as a plain number; "missing" leaves generation_config.json out.
    """
    if shape not in SHAPES or pad not in PADS or eos not in EOS_VARIANTS:
        raise ValueError(f"unknown twin: shape={shape!r}, pad={pad!r}, eos={eos!r}")
    family = SHAPES[shape]
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(family)
    pad_token = {"other": family.pad, "eos": family.eos, "none": None}[pad]
    config = _model_config(shape, tokenizer, pad_token, dtype)
    _write_json(directory / "config.json", config)
    _save_weights(directory, dtype, seed)
    _write_json(directory / "config.json", config)  # as it was: saving writes the layout of transformers 5
    if eos == "missing":
        (directory / "generation_config.json").unlink(missing_ok=True)
    else:
        _write_json(directory / "generation_config.json", _generation_config(family, tokenizer, pad_token, eos))
    tokenizer.save(str(directory / "tokenizer.json"))
    if family.tokenizer_class == "Qwen2Tokenizer":
        tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(family, tokenizer, pad_token, template))
    return directory


@cache
def shared_model(shape: str, *, pad: str = "other", eos: str = "two", template: bool = True) -> Path:
    """A twin that lives as long as the process, made once. For readers only: damage a copy."""
    return make_model(
        shape, Path(_scratch().name) / f"{shape}-{pad}-{eos}-{template}", pad=pad, eos=eos, template=template
    )


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hub-twin-")


def _model_config(shape: str, tokenizer: Tokenizer, pad: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """config.json in the layout of transformers 4, which is what the hub has."""
    family = SHAPES[shape]
    tokens = tokenizer.get_vocab_size()
    config = {
        "architectures": [family.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id(family.bos or family.end_of_text),
        "eos_token_id": tokenizer.token_to_id(family.eos),
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 160,
        "max_position_embeddings": CONTEXT,
        "model_type": shape,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.51.0",
        "use_cache": True,
        "vocab_size": (tokens // EMBEDDING_MULTIPLE + 1) * EMBEDDING_MULTIPLE,
        **family.config,
    }
    return config if pad is None else config | {"pad_token_id": tokenizer.token_to_id(pad)}


def _generation_config(family: Shape, tokenizer: Tokenizer, pad: str | None, eos: str) -> dict[str, Any]:
    end_of_turn, end_of_text = map(tokenizer.token_to_id, (family.eos, family.end_of_text))
    config = {
        "bos_token_id": tokenizer.token_to_id(family.bos or family.end_of_text),
        "do_sample": True,
        "eos_token_id": [end_of_turn, end_of_text] if eos == "two" else end_of_text,
        "repetition_penalty": 1.05,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.8,
        "transformers_version": "4.51.0",
    }
    return config if pad is None else config | {"pad_token_id": tokenizer.token_to_id(pad)}


def _save_weights(directory: Path, dtype: torch.dtype, seed: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _initialise(name, parameter, generator)
    for old in directory.glob("*.safetensors*"):
        old.unlink()
    model.to(dtype).save_pretrained(directory, max_shard_size=SHARD_BYTES)


def _initialise(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Every kind of parameter away from its neutral value, so that leaving one out shows; logits of spread 2 or so."""
    if "norm" in name:
        parameter.uniform_(0.7, 1.3, generator=generator)
    elif name.endswith("bias"):
        parameter.normal_(0, 0.3, generator=generator)
    elif "embed_tokens" in name or "lm_head" in name:
        parameter.normal_(0, 0.25, generator=generator)
    else:
        parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)


# Tokenizers


@cache
def trained_bpe() -> str:
    """A byte-level BPE model of `VOCABULARY` tokens, as JSON, trained on Python's own library in a few seconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(QWEN_SPLIT)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_library_texts(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"only {tokenizer.get_vocab_size()} tokens: this Python has too little of its library")
    return tokenizer.to_str()


def _library_texts() -> list[str]:
    """Modules of the standard library, in order of their names."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        if sum(map(len, texts)) > TRAINING_CHARACTERS:
            break
    return texts


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(Regex(split), "isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _tokenizer(family: Shape) -> Tokenizer:
    tokenizer = Tokenizer.from_str(trained_bpe())
    tokenizer.pre_tokenizer = _pre_tokenizer(family.split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    if family.bos is not None:
        tokenizer.normalizer = None
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A {family.bos}:1 $B:1", special_tokens=[bos]
        )
    return tokenizer


def _tokenizer_config(family: Shape, tokenizer: Tokenizer, pad: str | None, template: bool) -> dict[str, Any]:
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, **TOKEN_FLAGS, "special": token in family.special}
        for token in family.special + family.plain
    }
    config = {
        "added_tokens_decoder": added,
        "bos_token": family.bos,
        "clean_up_tokenization_spaces": family.bos is not None,
        "eos_token": family.eos,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "tokenizer_class": family.tokenizer_class,
    }
    if family.tokenizer_class == "Qwen2Tokenizer":
        config |= {"add_bos_token": False, "add_prefix_space": False, "errors": "replace", "unk_token": None}
        config |= {"additional_special_tokens": list(family.special), "split_special_tokens": False}
    if pad is not None:
        config["pad_token"] = pad
    elif family.tokenizer_class == "Qwen2Tokenizer":
        config["pad_token"] = None  # left out, the class would supply one of its own
    return config | ({"chat_template": family.template} if template else {})


# Data files


def make_problems(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different problems, in LaTeX and with characters outside ASCII, and their answers."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        a, b = (int(x) for x in torch.randint(2, 98, (2,), generator=generator))
        rows.append(
            (f"№{number}: Let $x = \\frac{{{a}}}{{1}}$ and $y = x + {b}$. What is $2y$\u2009?", str(2 * (a + b)))
        )
    return rows


def make_dapo_parquet(path: Path, problems: Sequence[tuple[str, str]], repeat: int = 100) -> Path:
    """(problem, answer) pairs in the schema of DAPO-Math-17k: the set's own text around each, all of them repeated."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": f"{PROBLEM_PREFIX}{problem}{PROBLEM_SUFFIX}", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{number:08x}-0000-4000-8000-000000000000"},
        }
        for number, (problem, answer) in enumerate(problems)
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(pyarrow.concat_tables([table] * repeat), path, row_group_size=1000)
    return Path(path)


def make_jsonl(
    path: Path, problems: Sequence[tuple[str, str]], fields: tuple[str, str] = ("problem", "answer")
) -> Path:
    """(problem, answer) pairs, one JSON object a line, under the given names."""
    lines = [json.dumps(dict(zip(fields, pair, strict=True)), ensure_ascii=False) for pair in problems]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)


# Damage: each changes a model directory in place


def truncate_shard(directory: Path) -> None:
    """A download that broke off: the last shard ends in the middle."""
    shard = sorted(directory.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def remove_shard(directory: Path) -> None:
    """The index names a shard that is not there."""
    sorted(directory.glob("*.safetensors"))[-1].unlink()


def drop_tensor(directory: Path) -> None:
    """A conversion that lost a weight: neither the index nor a shard has it, and transformers would make one up."""
    index_path = directory / "model.safetensors.index.json"
    name = "model.layers.1.mlp.down_proj.weight"
    shard = directory / json.loads(index_path.read_text(encoding="utf-8"))["weight_map"][name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    _edit_json(index_path, lambda index: index["weight_map"].pop(name))


def remove_template(directory: Path) -> None:
    """A base model: no chat template."""
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    _edit_json(directory / "tokenizer_config.json", lambda config: config.pop("chat_template"))


def grow_tokenizer(directory: Path) -> None:
    """A tokenizer of another model: more tokens than the embedding has rows."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    extra = [f"<|extra_{i}|>" for i in range(2 * EMBEDDING_MULTIPLE)]
    tokenizer.add_special_tokens(extra)
    tokenizer.save(str(directory / "tokenizer.json"))
    # Qwen2Tokenizer takes only the base vocabulary from tokenizer.json, and the added tokens from here.
    added = {str(tokenizer.token_to_id(token)): {"content": token, **TOKEN_FLAGS, "special": True} for token in extra}
    _edit_json(directory / "tokenizer_config.json", lambda config: config["added_tokens_decoder"].update(added))


def rename_architecture(directory: Path) -> None:
    """A model of a family that transformers does not know."""
    unknown = {"model_type": "qwen99", "architectures": ["Qwen99ForCausalLM"]}
    _edit_json(directory / "config.json", lambda config: config.update(unknown))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated_shard": truncate_shard,
    "missing_shard": remove_shard,
    "dropped_tensor": drop_tensor,
    "missing_template": remove_template,
    "large_tokenizer": grow_tokenizer,
    "unknown_architecture": rename_architecture,
}


def _edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    _write_json(path, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write OUT_DIR/SHAPE for each shape, and OUT_DIR/dapo.parquet and OUT_DIR/problems.jsonl."""
    parser = argparse.ArgumentParser(description="Write model directories and data files that look like the hub's.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--shape", choices=(*SHAPES, "all"), default="all")
    parser.add_argument("--pad", choices=PADS, default="other", help="the pad token (default: other than the EOS)")
    parser.add_argument("--no-template", action="store_true", help="no chat template")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    for shape in SHAPES if given.shape == "all" else [given.shape]:
        print(make_model(shape, given.out / shape, pad=given.pad, template=not given.no_template, seed=given.seed))
    problems = make_problems(given.problems, given.seed)
    print(make_dapo_parquet(given.out / "dapo.parquet", problems))
    print(make_jsonl(given.out / "problems.jsonl", problems))


if __name__ == "__main__":
    main()
