"""Finding the final answer in a response. Every scan is a single pass, so that no response can be slow."""

import re
from dataclasses import dataclass
from typing import Literal

AnswerStyle = Literal["boxed", "hash"]

# One token at a time: a box with its brace, TeX's one-token box, an escaped character, or a brace.
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s{0,8}(?:(?P<open>\{)|(?P<single>[0-9A-Za-z]))|\\.|[{}]", re.DOTALL)
# What may stand between two boxes that give one list together: "\boxed{1}, \boxed{2} \text{ and } \boxed{3}".
_JOINT = re.compile(r"(?:[\s,;$&]|\\[,;:!\[\]()]|\\q?quad|\\text\s?\{\s*(?:and|or)\s*\}|and|or|\*)*")
_JOINT_LENGTH = 80


@dataclass(frozen=True, slots=True)
class Box:
    """A complete box: where it starts and ends in the text, and what is in it."""

    start: int
    end: int
    content: str


def after_thinking(response: str) -> str:
    """The part of a response that speaks to the user: nothing if the thinking never ended."""
    head, tag, tail = response.rpartition("</think>")
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
        elif kind == "{":
            stack.append(None)
        elif kind == "}" and stack:
            opened = stack.pop()
            if opened is not None:
                start, inside = opened
                while boxes and boxes[-1].start > start:
                    boxes.pop()
                boxes.append(Box(start, token.end(), text[inside : token.start()]))
    return boxes


def extract_boxed(response: str) -> tuple[str, ...]:
    """The contents of the run of adjacent boxes that ends the response; the last one is the answer.

    Boxes are adjacent if only commas, "and", "or" and layout stand between them. The run is empty if the response has
    no complete box.
    """
    text = after_thinking(response)
    boxes = complete_boxes(text)
    run: list[str] = []
    following: Box | None = None
    for box in reversed(boxes):
        if following is not None:
            between = text[box.end : min(following.start, box.end + _JOINT_LENGTH + 1)]
            if len(between) > _JOINT_LENGTH or not _JOINT.fullmatch(between):
                break
        run.append(box.content)
        following = box
    return tuple(reversed(run))


def extract_hash(response: str) -> tuple[str, ...]:
    """The text after the last `####` on its line, as in the solutions of GSM8K."""
    _, mark, tail = after_thinking(response).rpartition("####")
    line = tail.strip().partition("\n")[0].strip() if mark else ""
    return (line,) if line else ()


def extract(response: str, style: AnswerStyle) -> tuple[str, ...]:
    """The candidate answers of a response, the last one being the answer; empty if it gives none."""
    return extract_hash(response) if style == "hash" else extract_boxed(response)
