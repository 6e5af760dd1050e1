"""From a problem to the token ids that the policy is asked to continue."""

from dataclasses import dataclass
from typing import Any

from kpo_cli.config import DataConfig, ModelConfig
from kpo_cli.data.problems import Problem
from kpo_cli.errors import UserError
from kpo_cli.runs.directory import first_line


@dataclass(frozen=True)
class Prompt:
    problem: Problem
    text: str
    """As the tokenizer got it, template included."""
    token_ids: list[int]


class PromptBuilder:
    """Applies the chat template (or none), the system prompt and the instruction of the configuration."""

    def __init__(self, tokenizer: Any, model: ModelConfig, data: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.kwargs = model.chat_template_kwargs
        self.data = data
        self.templated = model.chat_template != "none" and bool(tokenizer.chat_template)

    def build(self, problem: Problem) -> Prompt:
        text = problem.problem if self.data.instruction is None else f"{problem.problem}\n{self.data.instruction}"
        system = self.data.system_prompt
        if not self.templated:
            text = text if system is None else f"{system}\n\n{text}"
            return Prompt(problem, text, self.tokenizer(text)["input_ids"])
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.kwargs
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise UserError(
                f"the model's chat template fails ({first_line(error)}); check model.chat_template_kwargs and "
                f"data.system_prompt, or leave it out with model.chat_template=none"
            ) from None
        # The template writes its own special tokens.
        return Prompt(problem, text, self.tokenizer(text, add_special_tokens=False)["input_ids"])

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
