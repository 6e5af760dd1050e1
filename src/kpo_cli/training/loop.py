"""The algorithm, from prompts to changed weights.

    prompts -> rollout -> reward -> advantages -> batch
            -> [ log-probs -> ratio filter -> surrogate -> aggregation -> optimizer ] per mini-batch  (step.py, core/)
            -> metrics, evaluation, records, checkpoint

It departs from textbook GRPO in one way only: which objective is used is a matter of configuration.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch

from kpo_cli.config import TrainConfig
from kpo_cli.core import group_normalised
from kpo_cli.data.prompts import Prompt
from kpo_cli.errors import RunInterrupted, RunStopped
from kpo_cli.evaluation import evaluate_heldout
from kpo_cli.rewards import Verdict, grade_batch
from kpo_cli.rollout import Response, Sampler
from kpo_cli.runs import RunDir
from kpo_cli.training.batch import Batch, make_batch
from kpo_cli.training.display import Display
from kpo_cli.training.policy import Policy
from kpo_cli.training.records import write_ratios
from kpo_cli.training.state import Progress, save_checkpoint
from kpo_cli.training.step import Updater, UpdateRecord

# Purposes of random numbers: the first entry of a seed after the run's own.
SHUFFLE, ROLLOUT, EVALUATION = 0, 1, 2


@dataclass(frozen=True)
class Training:
    """Everything that a run needs, made before its directory."""

    config: TrainConfig
    policy: Policy
    sampler: Sampler
    updater: Updater
    train: list[Prompt]
    heldout: list[Prompt]


def train(job: Training, run: RunDir, progress: Progress, display: Display) -> None:
    """Train from `progress` to the configured number of steps, writing to the run directory as it goes."""
    config = job.config.trainer
    if progress.step == 0:
        clock = Clock()
        run.append_metrics({"step": 0, **_evaluate(job, run, 0, clock), **clock.times()})
        display.evaluated(0, run.metrics()[-1])
    with _stop_signals() as stop:
        while progress.step < config.steps:
            metrics, batch, record = _step(job, progress, display)
            step = progress.step
            last = step == config.steps
            clock = Clock()
            if last or _due(step, config.eval_every):
                metrics |= _evaluate(job, run, step, clock)
                metrics |= clock.times()
            run.append_metrics(metrics)
            display.stepped(metrics)
            if _due(step, config.ratios_every):
                write_ratios(run.path, step, batch, record, job.config, job.policy.tokenizer.name_or_path)
            if last or stop or _due(step, config.checkpoint_every):
                schedule = {"lr": config.lr, "warmup_steps": config.warmup_steps}
                optimizer = job.updater.optimizer
                save_checkpoint(run.path, job.policy, optimizer, progress, schedule, config.keep_checkpoints)
            if stop and not last:
                raise RunInterrupted(f"stopped after step {step}; go on with: kpo train resume={run.path}")


def _step(job: Training, progress: Progress, display: Display) -> tuple[dict[str, Any], Batch, UpdateRecord]:
    """One rollout batch: sample, grade, learn. Advances `progress`."""
    config, clock = job.config.trainer, Clock()
    step = progress.step + 1
    prompts = [job.train[i] for i in _next_prompts(job, progress)]
    display.phase("sampling")
    with clock("rollout"):
        ids = [prompt.token_ids for prompt in prompts]
        groups = job.sampler.sample(ids, config.group_size, (job.config.seed, ROLLOUT, step))
    display.phase("grading")
    with clock("reward"):
        verdicts = _grade(job, prompts, groups)
    rewards = torch.tensor([float(verdict.correct) for verdict in verdicts])
    advantages, zero_variance = group_normalised(rewards, config.group_size, config.advantage_epsilon)
    batch = make_batch(ids, groups, rewards, advantages)
    display.phase("learning")
    with clock("update"):
        lr = learning_rate(step, config.lr, config.warmup_steps)
        for group in job.updater.optimizer.param_groups:
            group["lr"] = lr
        try:
            record = job.updater.update(batch)
        except RunStopped as error:
            raise RunStopped(f"step {step}: {error}") from None
    progress.step, progress.data_cursor = step, progress.data_cursor + len(prompts)
    metrics = {"step": step, **_metrics(batch, record), "lr": lr}
    metrics["zero_variance_fraction"] = float(zero_variance.float().mean())
    metrics["grader_failures"] = sum(verdict.failed for verdict in verdicts)
    metrics["epoch"] = progress.data_cursor / len(job.train)
    times = clock.times()
    return metrics | {"tokens_per_second": metrics["response_tokens"] / times["time_step"], **times}, batch, record


def _next_prompts(job: Training, progress: Progress) -> list[int]:
    """Indices of the next prompts: every epoch is a permutation of its own."""
    count, chosen = len(job.train), []
    cursors = range(progress.data_cursor, progress.data_cursor + job.config.trainer.prompts_per_step)
    orders: dict[int, np.ndarray] = {}
    for epoch, place in (divmod(cursor, count) for cursor in cursors):
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([job.config.seed, SHUFFLE, epoch]).permutation(count)
        chosen.append(int(orders[epoch][place]))
    return chosen


def _grade(job: Training, prompts: list[Prompt], groups: list[list[Response]]) -> list[Verdict]:
    pairs = [
        (job.policy.decode(response.token_ids), prompt.problem.answer)
        for prompt, group in zip(prompts, groups, strict=True)
        for response in group
    ]
    return grade_batch(pairs)


def _evaluate(job: Training, run: RunDir, step: int, clock: "Clock") -> dict[str, float]:
    with clock("eval"):
        result = evaluate_heldout(job.sampler, job.policy.decode, job.heldout, (job.config.seed, EVALUATION))
        run.write_rows(f"evals/step-{step:06d}.jsonl", result.samples)
    return result.metrics()


def _metrics(batch: Batch, record: UpdateRecord) -> dict[str, Any]:
    lengths = batch.response_mask.sum(-1).double()
    return {
        "reward_mean": float(batch.rewards.mean()),
        "reward_std": float(batch.rewards.std()),
        **record.sums.metrics(),
        "entropy": float(record.entropy.double().sum() / lengths.sum()),
        "rollout_log_prob_gap": _mismatch(batch, record),
        "grad_norm": float(np.mean(record.grad_norms)),
        "grad_norm_max": max(record.grad_norms),
        "response_length_mean": float(lengths.mean()),
        "truncated_fraction": float(batch.truncated.float().mean()),
        "prompt_tokens": int(batch.prompt_lengths.sum()),
        "response_tokens": int(lengths.sum()),
    }


def _mismatch(batch: Batch, record: UpdateRecord) -> float:
    """Largest |rollout - old log-prob| of a token: what separates the sampler's numbers from the trainer's."""
    gap = (batch.rollout_log_probs - record.old_log_probs).abs()
    return float(gap[batch.response_mask].max())


def learning_rate(step: int, lr: float, warmup_steps: int) -> float:
    """Linear warm-up over the first `warmup_steps` rollout batches (counted from 1), then constant."""
    return lr * min(1.0, step / max(1, warmup_steps))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@dataclass
class Clock:
    """Seconds spent in each phase, and since it was made."""

    started: float = field(default_factory=time.perf_counter)
    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.spent[phase] = self.spent.get(phase, 0.0) + time.perf_counter() - before

    def times(self) -> dict[str, float]:
        times = {f"time_{phase}": seconds for phase, seconds in self.spent.items()}
        return times if "eval" in self.spent else {**times, "time_step": time.perf_counter() - self.started}


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is filled by the first Ctrl-C or SIGTERM, so that the step can end well; the second one is final."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
