"""Finding the final answer in a response. Every scan is a single pass, so that no response can be slow."""

import re
from dataclasses import dataclass
from typing import Literal

AnswerStyle = Literal["boxed", "hash"]

# One token at a time: a box with its brace, TeX's one-token box, an escaped character, or a run of braces.
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s{0,8}(?:(?P<open>\{)|(?P<single>[0-9A-Za-z]))|\\.|\{+|\}+", re.DOTALL)
# What stands between two boxes of one list: a comma, "and" or "or" amid layout, and the name of the second ("or x =").
_LAYOUT = r"(?:[\s$*&]|\\[,;:!\[\]()]|\\q?quad)*"
_JOINT = re.compile(
    rf"{_LAYOUT}(?:[,;]|\\text\s?\{{\s*(?:and|or)\s*\}}|and|or|,\s*and|,\s*or){_LAYOUT}(?:[A-Za-z](?:_[0-9])?{_LAYOUT}={_LAYOUT})?"
)
_JOINT_LENGTH = 80
# What ends a turn in the templates of common models: nothing behind it was said to the user.
_END = re.compile(
    r"<\|(?:im_end|endoftext|end_of_text|eot_id|eom_id|end|return|end_of_turn|eos)\|>|</s>|<eos>|<end_of_turn>"
    r"|<｜end▁of▁sentence｜>"
)


@dataclass(frozen=True, slots=True)
class Box:
    """A complete box: where it starts and ends in the text, and what is in it."""

    start: int
    end: int
    content: str


def after_thinking(response: str) -> str:
    """The part of a response that speaks to the user, up to the end of its turn: nothing in unended thinking."""
    end = _END.search(response)
    response = response[: end.start()] if end else response
    _, tag, tail = response.rpartition("</think>")
    if tag:
        return tail
    return "" if "<think>" in response else response


def complete_boxes(text: str) -> list[Box]:
    """All outermost complete boxes, in order, in one pass over the braces.

    A box that is never closed does not hide the complete boxes inside it.
    """
    boxes: list[Box] = []
    stack: list[tuple[int, int] | None] = []
    for token in _TOKEN.finditer(text):
        kind = token.group()
        if token.group("single"):
            boxes.append(Box(token.start(), token.end(), token.group("single")))
        elif token.group("open"):
            stack.append((token.start(), token.end()))
        elif kind[0] == "{":
            stack.extend([None] * len(kind))
        elif kind[0] == "}":
            for position in range(token.start(), token.start() + min(len(kind), len(stack))):
                opened = stack.pop()
                if opened is not None:
                    start, inside = opened
                    while boxes and boxes[-1].start > start:
                        boxes.pop()
                    boxes.append(Box(start, position + 1, text[inside:position]))
    return boxes


def extract_boxed(response: str) -> str | None:
    """The content of the last complete box; None if there is no box.

    Boxes joined by a comma, "and" or "or" are one answer, the list of their contents: `\\boxed{1} and \\boxed{2}` gives
    two roots, and is a hedge where one number is asked for.
    """
    text = after_thinking(response)
    boxes = complete_boxes(text)
    run: list[str] = []
    following: Box | None = None
    for box in reversed(boxes):
        if following is not None and not _joined(text, box.end, following.start):
            break
        run.append(box.content)
        following = box
    contents = list(dict.fromkeys(reversed(run)))
    if len(contents) > 1 and all(content.strip() for content in contents):
        return ", ".join(contents)
    return run[0] if run else None


def _joined(text: str, end: int, start: int) -> bool:
    """True if the text between two boxes is one joint of a list."""
    return start - end <= _JOINT_LENGTH and _JOINT.fullmatch(text, end, start) is not None


def extract_hash(response: str) -> str | None:
    """The text after the last `####`, on its line, as in the solutions of GSM8K; None if there is none."""
    _, mark, tail = after_thinking(response).rpartition("####")
    return tail.strip().partition("\n")[0].strip() or None if mark else None


def extract(response: str, style: AnswerStyle) -> str | None:
    """The final answer of a response as it is written; None if it gives none."""
    return extract_hash(response) if style == "hash" else extract_boxed(response)
