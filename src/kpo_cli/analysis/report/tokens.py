"""Token ids as text, with the run's own tokenizer where it is on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Decoder:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def token(self, index: int) -> str:
        return self.text([index]) or f"<{index}>"

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=False))


def find_decoder(name: Any) -> Decoder | None:
    """The tokenizer that a record names: a directory, or a hub name that is in the local cache. None if it is neither.

    Only tokenizer.json is read, and nothing is downloaded.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from tokenizers import Tokenizer

    if not isinstance(name, str):
        return None
    path: Any = Path(name) / "tokenizer.json"
    if not path.is_file():
        try:
            path = try_to_load_from_cache(name, "tokenizer.json")
        except HFValidationError:
            return None
    if not isinstance(path, str | Path):
        return None
    try:
        return Decoder(Tokenizer.from_file(str(path)))
    except Exception:  # tokenizers raises nothing narrower for a file that it cannot read
        return None
