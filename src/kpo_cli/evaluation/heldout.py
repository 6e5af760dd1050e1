"""The periodic evaluation of a training run: held-out problems, one greedy and one sampled response to each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kpo_cli.data.prompts import Prompt
from kpo_cli.policy.response import Response
from kpo_cli.rewards import grade_batch
from kpo_cli.rollout import Sampler


@dataclass(frozen=True)
class HeldoutResult:
    accuracy_greedy: float
    accuracy_sampled: float
    response_length_greedy: float
    """Mean tokens of the greedy responses."""
    grader_failures: int
    """Responses that the grader failed on; they count as wrong."""
    failed_greedy: float
    """Their share among the greedy responses."""
    failed_sampled: float
    samples: list[dict[str, Any]]
    """One row a problem: both responses, what was extracted, and the verdicts."""
    sampled: list[Response]
    """The sampled response to each problem."""

    def metrics(self) -> dict[str, float]:
        metrics = {
            "accuracy_greedy": self.accuracy_greedy,
            "accuracy_sampled": self.accuracy_sampled,
            "response_length_greedy": self.response_length_greedy,
            "eval_grader_failures": self.grader_failures,
        }
        if self.grader_failures:
            metrics["accuracy_greedy_if_right"] = self.accuracy_greedy + self.failed_greedy
            metrics["accuracy_sampled_if_right"] = self.accuracy_sampled + self.failed_sampled
        return metrics


def evaluate_heldout(
    sampler: Sampler, decode: Callable[[list[int]], str], prompts: Sequence[Prompt], seed: Sequence[int]
) -> HeldoutResult:
    """Evaluate on every prompt. The same seed gives every evaluation the same random numbers."""
    ids = [prompt.token_ids for prompt in prompts]
    greedy = [group[0] for group in sampler.sample(ids, 1, seed, greedy=True)]
    sampled = [group[0] for group in sampler.sample(ids, 1, seed)]
    rows: list[dict[str, Any]] = [
        {"id": p.problem.id, "problem": p.problem.problem, "answer": p.problem.answer} for p in prompts
    ]
    accuracy = {}
    for kind, responses in (("greedy", greedy), ("sampled", sampled)):
        graded = _graded(responses, decode, prompts)
        accuracy[kind] = sum(item["correct"] for item in graded) / len(graded)
        for row, item in zip(rows, graded, strict=True):
            row[kind] = item
    length = sum(len(response.token_ids) for response in greedy) / len(greedy)
    failed = [sum(row[kind]["grader_failed"] for row in rows) for kind in ("greedy", "sampled")]
    shares = [count / len(rows) for count in failed]
    return HeldoutResult(
        accuracy["greedy"], accuracy["sampled"], length, sum(failed), shares[0], shares[1], rows, sampled
    )


def _graded(
    responses: Sequence[Response], decode: Callable[[list[int]], str], prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    texts = [p.opening + decode(response.token_ids) for p, response in zip(prompts, responses, strict=True)]
    verdicts = grade_batch([(text, p.problem.answer) for text, p in zip(texts, prompts, strict=True)])
    return [
        {
            "response": text,
            "correct": verdict.correct,
            "extracted": verdict.extracted,
            "reason": verdict.reason,
            "grader_failed": verdict.failed,
            "tokens": len(response.token_ids),
            "finished": response.finished,
        }
        for text, verdict, response in zip(texts, verdicts, responses, strict=True)
    ]
