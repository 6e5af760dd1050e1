"""From a problem to the token ids that the policy is asked to continue."""

import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from kpo_cli.config import ModelConfig
from kpo_cli.data.problems import Problem
from kpo_cli.errors import UserError, in_time
from kpo_cli.runs.directory import first_line

TODAY = datetime(2024, 7, 26)
"""The date of every prompt whose template asks for today's: Llama 3's own, where no clock is given to it."""
TEMPLATE_SECONDS = 10.0
THINK = "<think>"


@dataclass(frozen=True)
class Prompt:
    problem: Problem
    text: str
    """As the tokenizer got it, template included."""
    token_ids: list[int]
    opening: str = ""
    """The tag of a thought that the prompt opens and does not close: it belongs to what is graded."""


class Asking(Protocol):
    """What is said beside the problem."""

    @property
    def system_prompt(self) -> str | None: ...
    @property
    def instruction(self) -> str | None: ...


class PromptBuilder:
    """Applies the chat template (or none), the system prompt and the instruction of the configuration.

    `prefixes` stand before the names of the keys of `model` and `asking` on the command line.
    """

    def __init__(
        self, tokenizer: Any, model: ModelConfig, asking: Asking, prefixes: tuple[str, str] = ("model.", "data.")
    ) -> None:
        self.tokenizer = tokenizer
        self.kwargs = model.chat_template_kwargs
        self.asking = asking
        self.model_keys, self.data_keys = prefixes
        self.templated = model.chat_template != "none" and bool(tokenizer.chat_template)
        self.dated = self.templated and "strftime_now" in str(tokenizer.chat_template)
        self.controls = _controls(tokenizer)
        self._control = re.compile("|".join(map(re.escape, sorted(self.controls, key=len, reverse=True))) or r"(?!)")

    def build(self, problem: Problem) -> Prompt:
        asked, mark = self._guarded(problem)
        messages = self.messages(asked)
        if self.templated:
            text = self.render(messages, self.kwargs)
        else:
            text = "\n\n".join(message["content"] for message in messages)
        pieces = text.split(mark)
        text = "".join(pieces)
        place = text.rfind(problem.problem.strip())
        rest = text[place + len(problem.problem.strip()) :] if place >= 0 else ""
        return Prompt(problem, text, self._token_ids(pieces), THINK if self._opens_thought(rest) else "")

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The chat: a configured system prompt in place of the row's own, then what else the row has."""
        instruction, system = self.asking.instruction, self.asking.system_prompt
        text = problem.problem if instruction is None else f"{problem.problem}\n{instruction}"
        turns = [*problem.context, ("user", text)]
        if system is not None:
            turns = [("system", system), *(turn for turn in turns if turn[0] != "system")]
        return [{"role": role, "content": said} for role, said in turns]

    def render(self, messages: list[dict[str, str]], switches: dict[str, Any], reply: bool = True) -> str:
        """What the template makes of a chat, up to the beginning of a `reply`. Raises UserError if it fails."""
        clock = {"strftime_now": TODAY.strftime} if self.dated else {}
        try:
            with in_time(TEMPLATE_SECONDS, "it does not come to an end"):
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=reply, **clock, **switches
                )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise UserError(
                f"the model's chat template fails ({first_line(error)}); check {self.model_keys}chat_template_kwargs "
                f"and {self.data_keys}system_prompt, or leave it out with {self.model_keys}chat_template=none"
            ) from None
        assert isinstance(text, str)
        return text

    def spells_control(self, problem: Problem) -> bool:
        """Whether a problem's text spells tokens that would steer the chat if they were taken for them."""
        return any(self._control.search(text) for text in (problem.problem, *(said for _, said in problem.context)))

    def _guarded(self, problem: Problem) -> tuple[Problem, str]:
        """The problem with a mark within every control token that its row spells, and the mark.

        Tokenized in pieces, cut at the marks, such a text is text and nothing else, whatever the template does to it.
        """
        said = [problem.problem, *(text for _, text in problem.context)]
        mark = next(chr(i) for i in range(0xE000, 0xF900) if not any(chr(i) in text for text in said))
        if not self.spells_control(problem):
            return problem, mark
        context = tuple((role, self._with_marks(text, mark)) for role, text in problem.context)
        return replace(problem, problem=self._with_marks(problem.problem, mark), context=context), mark

    def _with_marks(self, text: str, mark: str) -> str:
        found = self._control.search(text)
        while found:  # what is left of one may begin another
            place = found.start() + 1
            text = f"{text[:place]}{mark}{text[place:]}"
            found = self._control.search(text, place + 1)
        return text

    def _token_ids(self, pieces: list[str]) -> list[int]:
        whole = "".join(pieces)
        # A template writes its own special tokens.
        ids: list[int] = self.tokenizer(whole, add_special_tokens=not self.templated)["input_ids"]
        if len(pieces) > 1:
            bare, apart = self._bare_ids([whole]), self._bare_ids(pieces)
            start = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), 0)
            ids = [*ids[:start], *apart, *ids[start + len(bare) :]]
        end = getattr(self.tokenizer, "eos_token_id", None)
        while not self.templated and ids and ids[-1] == end:  # some put one behind every text
            ids = ids[:-1]
        return ids

    def _bare_ids(self, pieces: list[str]) -> list[int]:
        return [i for piece in pieces for i in self.tokenizer(piece, add_special_tokens=False)["input_ids"]]

    def _opens_thought(self, rest: str) -> bool:
        """Whether what stands behind the problem ends within a thought.

        A template's words do; those of an instruction, which may speak of the tags, only if they end in one."""
        if self.templated:
            said = self.asking.instruction or ""
            rest = rest.rpartition(said.strip())[2] if said.strip() else rest
            return rest.rfind(THINK) > rest.rfind("</think>")
        return rest.rstrip().endswith(THINK)

    def build_all(self, problems: list[Problem], max_tokens: int, what: str) -> tuple[list[Prompt], int]:
        """Prompts of at most `max_tokens` tokens, and how many were longer and left out."""
        prompts = [self.build(problem) for problem in problems]
        kept = [prompt for prompt in prompts if 0 < len(prompt.token_ids) <= max_tokens]
        if not any(prompt.token_ids for prompt in prompts):
            raise UserError(f"the model's tokenizer makes no tokens of the {what} prompts; is it whole?")
        if not kept:
            shortest = min(len(prompt.token_ids) for prompt in prompts)
            raise UserError(
                f"all {len(prompts)} {what} prompts are longer than rollout.max_prompt_tokens={max_tokens} "
                f"(the shortest has {shortest}); raise it"
            )
        return kept, len(prompts) - len(kept)


def _controls(tokenizer: Any) -> dict[str, int]:
    """Tokens that steer and do not say anything, by their spelling: the special ones, and those of the template.

    Added tokens of other kinds are words like any other, as tags and runs of spaces are to some tokenizers.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    template = str(tokenizer.chat_template or "")
    return {
        str(token.content): number
        for number, token in added.items()
        if len(token.content) > 1
        and (token.special or token.content in template or token.content in (THINK, "</think>"))
    }
