"""Is a prompt what it seems? Looked at before a run begins: a template is a program, and a tokenizer has habits."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from kpo_cli.data.prompts import Prompt, PromptBuilder
from kpo_cli.errors import UserError

REPLY = "Forty-two."
"""Said by the model, to see how the template ends a turn."""
DRAWS = 8
"""Renderings of one prompt; a template that draws lots gives two of them the same words, but not all."""


def check_prompts(builder: PromptBuilder, prompts: Sequence[Prompt], stop_ids: Sequence[int]) -> list[str]:
    """Notes and warnings. Raises UserError if the problems do not stand in their prompts, or a prompt is a lottery."""
    notes = [*_check_text(builder, prompts), *_token_notes(builder, prompts, stop_ids)]
    if builder.templated:
        first = prompts[0]
        if any(builder.build(first.problem).text != first.text for _ in range(DRAWS)):
            raise UserError(
                f"the model's chat template makes another prompt each time; "
                f"leave it out with {builder.model_keys}chat_template=none"
            )
        notes += [*_switch_notes(builder, first), *_turn_notes(builder, first, stop_ids)]
        if builder.dated:
            notes.append("note: the chat template asks for today's date; it is given 26 July 2024, in every prompt")
    if prompts[0].opening:
        notes.append("note: the prompt opens a thought (<think>); a response is graded by what follows its </think>")
    return notes


def _check_text(builder: PromptBuilder, prompts: Sequence[Prompt]) -> list[str]:
    lost = [prompt for prompt in prompts if not _stands(prompt.problem.problem, prompt.text)]
    none = f"leave it out with {builder.model_keys}chat_template=none"
    if len(lost) == len(prompts):
        raise UserError(f"the model's chat template drops the problem: its prompt is {lost[0].text[:80]!r}; {none}")
    notes = []
    if lost:
        notes.append(
            f"warning: {len(lost)} problems are changed or cut by the chat template "
            f"(first {lost[0].problem.id}); {none}"
        )
    asking, text = builder.asking, prompts[0].text
    said = [(f"{role} messages of the rows", part) for role, part in prompts[0].problem.context]
    said = said if asking.system_prompt is None else [(f"{builder.data_keys}system_prompt", asking.system_prompt)]
    if asking.instruction is not None and not lost:
        said.append((f"{builder.data_keys}instruction", asking.instruction))
    notes += [f"warning: {name}: the chat template drops it; {none}" for name, part in said if not _stands(part, text)]
    replaced = sum(any(role == "system" for role, _ in prompt.problem.context) for prompt in prompts)
    if replaced and builder.asking.system_prompt is not None:
        notes.append(f"note: {builder.data_keys}system_prompt takes the place of {replaced} rows' own system messages")
    return notes


def _token_notes(builder: PromptBuilder, prompts: Sequence[Prompt], stop_ids: Sequence[int]) -> list[str]:
    tokenizer, first = builder.tokenizer, prompts[0].token_ids
    notes = []
    spelled = [prompt.problem for prompt in prompts if builder.spells_control(prompt.problem)]
    if spelled:
        notes.append(
            f"note: {len(spelled)} problems spell control tokens of the model (first {spelled[0].id}); "
            f"they are read as text"
        )
    misread = [prompt.problem for prompt in prompts if not _reads(tokenizer, prompt)]
    if misread:
        notes.append(
            f"warning: {len(misread)} problems are not read as they are written (first {misread[0].id}): the model's "
            f"tokenizer changes the text, or has no tokens for some of it"
        )
    start = tokenizer.bos_token_id
    if start is not None and first[:2] == [start, start]:
        notes.append(f"warning: prompts begin with {tokenizer.bos_token} twice")
    if start is not None and builder.templated and start not in first[:1] and start in _plain(tokenizer)[:1]:
        notes.append(
            f"warning: prompts begin without {tokenizer.bos_token}, which the tokenizer puts before every text: "
            f"the chat template does not"
        )
    last = next((i for i in reversed(first) if tokenizer.decode([i]).strip()), None)
    if last in stop_ids:
        notes.append(
            f"warning: prompts end in {tokenizer.decode([last])}, which ends a response: the chat template does not "
            f"open the model's turn"
        )
    return notes


def _switch_notes(builder: PromptBuilder, first: Prompt) -> list[str]:
    """Switches that the template does not know, or that change nothing."""
    notes = []
    for name, value in builder.kwargs.items():
        rest = {key: other for key, other in builder.kwargs.items() if key != name}
        others = [rest, {**rest, name: not value}, {**rest, name: f"{value}-not"}]
        if all(_rendered(builder, first, other) == first.text for other in others):
            notes.append(
                f"warning: {builder.model_keys}chat_template_kwargs.{name}={value} has no effect on the prompts"
            )
    return notes


def _rendered(builder: PromptBuilder, first: Prompt, switches: dict[str, Any]) -> str | None:
    try:
        return builder.render(builder.messages(first.problem), switches)
    except UserError:  # it looks at the switch, then
        return None


def _turn_notes(builder: PromptBuilder, first: Prompt, stop_ids: Sequence[int]) -> list[str]:
    """How the template ends a turn of the model: a model that was trained with it ends its responses so."""
    chat = [*builder.messages(first.problem), {"role": "assistant", "content": REPLY}]
    try:
        _, said, rest = builder.render(chat, builder.kwargs, reply=False).rpartition(REPLY)
    except UserError:  # it takes no answers, and says nothing of how they end
        return []
    ids = builder.tokenizer(rest, add_special_tokens=False)["input_ids"] if said else []
    control = set(builder.controls.values())
    end = next((i for i in ids if i in control or i in stop_ids), None)
    if end is None or end in stop_ids:
        return []
    turn, stops = builder.tokenizer.decode([end]), ", ".join(builder.tokenizer.decode([i]) for i in stop_ids)
    return [
        f"warning: responses end with {stops} only, and the chat template ends a turn with {turn}; name that as "
        f"eos_token_id in the model's generation_config.json"
    ]


def _stands(part: str, text: str) -> bool:
    """Whether a text stands in another, however either is spaced."""
    return " ".join(part.split()) in " ".join(text.split())


def _plain(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer("x")["input_ids"]
    return ids


def _reads(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether the problem can be read off the tokens, but for spaces and how characters are composed."""
    read = tokenizer.decode(prompt.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    parts = (prompt.problem.problem, prompt.text, read)
    problem, written, read = ("".join(unicodedata.normalize("NFC", part).split()) for part in parts)
    return problem in read or problem not in written
