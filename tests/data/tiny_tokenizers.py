"""Tokenizers over bytes, with the special tokens, templates and habits that a test asks for."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
PLAIN = ("<think>", "</think>", "<table>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    template: Any = CHATML,
    *,
    special: tuple[str, ...] = SPECIAL,
    plain: tuple[str, ...] = PLAIN,
    always: str | None = None,
    normalizer: normalizers.Normalizer | None = None,
    flags: dict[str, bool] | None = None,
    **names: str,
) -> PreTrainedTokenizerFast:
    """`always`: a template such as `<s> $A`, of what stands around every text; `flags` are of the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, **{"normalized": False, **(flags or {})}) for t in special]
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    if always is not None:
        marks = [(part, tokenizer.token_to_id(part)) for part in always.split() if part != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=always, special_tokens=marks)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **names}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = template
    return made


def make_words(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows these words and nothing else."""
    vocabulary = {word: i for i, word in enumerate(("<unk>", "<eos>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    """As it comes back from a directory."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
