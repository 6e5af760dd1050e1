"""From a row of a file to a problem: which of its fields, and what they hold."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kpo_cli.config import RowsConfig
from kpo_cli.data.problems import Problem
from kpo_cli.data.rows import shown
from kpo_cli.errors import UserError
from kpo_cli.rewards.extraction import extract

ROLES = {"human": "user", "developer": "system", "gpt": "assistant", "model": "assistant"}
"""Of messages, as some data sets write them; the others stay as they are."""


@dataclass(frozen=True)
class Source:
    """Where problems lie, how their rows are read, and by which names the user knows both."""

    path: str
    rows: RowsConfig
    called: str = "data.path"
    """The key that `path` was given by."""
    keys: str = "data"
    """Before the names of the keys of `rows`."""
    subset: str | None = None
    split: str = "train"
    duplicates: str = "exact"

    def key(self, name: str) -> str:
        """The key of `rows` that is called so, or the field's."""
        of_field = name in ("id", "problem", "answer") and not self.keys.startswith("known.")
        return f"{self.keys}.fields.{name}" if of_field else f"{self.keys}.{name}"


def problem_of(where: str, row: dict[str, Any], source: Source, made_up_id: str) -> tuple[Problem, bool]:
    """The problem of a row, and whether its answer was a worked solution that was reduced to its end.

    `where` names the row in errors. Raises UserError."""
    rows = source.rows
    context, text = _question(where, row, source)
    if rows.problem_pattern is not None:
        text = _matched(where, text, source)
    answer = _text(_field(where, row, "answer", source))
    if answer is None or not answer.strip():
        found = shown(_field(where, row, "answer", source))
        raise UserError(f"{where}: {rows.fields.answer} must be a text or a number, found {found}")
    answer, reduced = _final_answer(where, answer, source)
    own_id = _lookup(row, rows.fields.id)
    problem = Problem(made_up_id if own_id in (None, _MISSING) else str(own_id), text, answer, context)
    try:
        f"{problem.id}{text}{answer}{context}".encode()
    except UnicodeEncodeError:  # JSON can write half a surrogate pair; no tokenizer takes it
        raise UserError(f"{where}: holds half a character (a lone \\ud800 to \\udfff); mend the line") from None
    return problem, reduced


def _question(where: str, row: dict[str, Any], source: Source) -> tuple[tuple[tuple[str, str], ...], str]:
    """The problem's text, and the messages before it."""
    name = source.rows.fields.problem
    value = _field(where, row, "problem", source)
    value = [value] if isinstance(value, dict) else value
    context: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    if isinstance(value, list) and value and all(isinstance(item, dict) and _role(item) for item in value):
        turns = [(_role(item), _said(where, name, item)) for item in value]
        last = max((place for place, (role, _) in enumerate(turns) if role == "user"), default=None)
        if last is None:
            raise UserError(f"{where}: {name} has no message of a user, only of {', '.join(r for r, _ in turns)}")
        context, text = tuple(turns[:last]), turns[last][1]
    elif isinstance(value, str | bytes):
        _refuse_other_roles(where, row, name, source)
        text = _text(value)
    if text is None or not text.strip():
        raise UserError(
            f"{where}: {name} must be a text that is not empty, or a list of messages, found {shown(value)}"
        )
    return context, text


def _refuse_other_roles(where: str, row: dict[str, Any], name: str, source: Source) -> None:
    """`prompt.0.content` is the user's in one row and the system's in the next."""
    chat, _, place = name.rpartition(".")[0].rpartition(".")
    message = _lookup(row, f"{chat}.{place}") if chat else None
    if isinstance(message, dict) and _role(message) not in ("", "user"):
        raise UserError(
            f"{where}: {name} is a message of the {_role(message)}, not of the user; set "
            f"{source.key('problem')}={chat}, which takes the last user turn"
        )


def _role(message: dict[str, Any]) -> str:
    role = message.get("role", message.get("from"))
    return ROLES.get(role, role) if isinstance(role, str) else ""


def _said(where: str, name: str, message: dict[str, Any]) -> str:
    """The text of a message, which may come in parts."""
    content = message.get("content", message.get("value"))
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: a message of {name} must be a text, found {shown(content)}")
    return "".join(map(str, texts))


def _text(value: Any) -> str | None:
    """A text or a number as text; None for anything else."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return value if isinstance(value, str) else None


def _matched(where: str, text: str, source: Source) -> str:
    match = re.search(source.rows.problem_pattern or "", text)
    if match is None or not (match["problem"] or "").strip():
        key = source.key("problem_pattern")
        raise UserError(f"{where}: {key} finds no problem in {shown(text)}; mend it or set it to null")
    return match["problem"]


def _final_answer(where: str, text: str, source: Source) -> tuple[str, bool]:
    """The answer at the end of a worked solution, and whether the configuration said nothing of one."""
    style = source.rows.answer_style
    if style == "plain":
        found = extract(text, "hash") or extract(text, "boxed")
        return (text, False) if found is None or not found.strip() else (found, True)
    found = extract(text, "hash" if style == "hash" else "boxed")
    if found is None:
        mark = "####" if style == "hash" else "\\boxed{}"
        key = source.key("answer_style")
        raise UserError(f"{where}: no {mark} in {shown(text[-40:])}; set {key} or mend the line")
    return found, False


_MISSING = object()


def _field(where: str, row: dict[str, Any], key: str, source: Source) -> Any:
    name = getattr(source.rows.fields, key)
    value = _lookup(row, name)
    if value is _MISSING:
        has = ", ".join(row) or "no fields"
        raise UserError(f"{where}: no field {name!r}; it has {has}; set {source.key(key)}=NAME")
    return value


def _lookup(row: dict[str, Any], name: str) -> Any:
    """The value of a field, or _MISSING; dots lead into nested fields and lists (`prompt.0.content`, `prompt.-1`)."""
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and re.fullmatch("-?[0-9]+", part) and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING
        if hasattr(value, "tolist"):  # numpy's arrays and numbers
            value = value.tolist()
    return value
