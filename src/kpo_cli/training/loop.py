"""The algorithm, from prompts to changed weights.

    prompts -> rollout -> reward -> advantages -> batch
            -> [ log-probs -> ratio filter -> surrogate -> aggregation -> optimizer ] per mini-batch  (step.py, core/)
            -> metrics, evaluation, records, checkpoint

It departs from textbook GRPO in one way only: which objective is used is a matter of configuration.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from kpo_cli.config import TrainConfig
from kpo_cli.core import group_normalised
from kpo_cli.core.filters import AdaptiveFilter
from kpo_cli.data.prompts import Prompt
from kpo_cli.evaluation import evaluate_heldout
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.load import Policy, model_source
from kpo_cli.policy.response import Response
from kpo_cli.rewards import Verdict, grade_batch
from kpo_cli.rollout import Sampler
from kpo_cli.rollout.check import SamplerCheck
from kpo_cli.runs.checkpoints import Progress
from kpo_cli.runs.directory import RunDir
from kpo_cli.training.display import Display, measured_filter, measured_rounding
from kpo_cli.training.optimizer import leave_device
from kpo_cli.training.records import record_ratios
from kpo_cli.training.saving import Saver
from kpo_cli.training.step import Updater, UpdateRecord
from kpo_cli.training.stopping import Stop
from kpo_cli.training.supervised import Demonstrations, supervise

# Purposes of random numbers: the first entry of a seed after the run's own.
SHUFFLE, ROLLOUT, EVALUATION = 0, 1, 2

EARLY_RECORDS = (1, 2, 5)
"""Steps whose ratios are recorded beside those of trainer.ratios_every, so that a short run has some.

Fixed, and not the last step of a run: a record changes the rounding of its step, and a run that goes on would differ
from one that was that long from the beginning.
"""


@dataclass(frozen=True)
class Training:
    """Everything that a run needs, made before its directory."""

    config: TrainConfig
    policy: Policy
    sampler: Sampler
    check: SamplerCheck | None
    """Of what the sampler says; None where it computes in float32 with the training weights themselves."""
    updater: Updater
    demonstrations: Demonstrations
    """For the supervised phase, where there is one."""
    train: list[Prompt]
    heldout: list[Prompt]
    benchmarks: dict[str, list[Prompt]]
    """Evaluated beside the held-out problems."""
    templated: bool
    """Prompts went through the tokenizer's chat template."""


def train(job: Training, run: RunDir, progress: Progress, display: Display) -> None:
    """Train from `progress` to the configured number of steps, writing to the run directory as it goes."""
    config = job.config.trainer
    stop = Stop(config.stop_after)
    saver = Saver(run, job.policy, job.updater.optimizer, config)
    job.sampler.release()
    with stop:
        supervise(job.demonstrations, job.updater, run, progress, display, stop, saver)
    with saver.keeping(progress, f"evaluation after step {progress.step}"):
        _begin(job, run, progress.step, display)
    with stop:
        while progress.step < config.steps:
            step, after = progress.step + 1, replace(progress)
            with saver.keeping(progress, f"step {step}"):
                metrics, batch, record = _step(job, after, display)
                run.append_metrics(metrics)  # a step without its row is not whole
            progress = after
            last, stopping = step == config.steps, bool(stop)  # looked at once: time goes on
            with saver.keeping(progress, f"evaluation after step {step}"):
                _report(job, run, metrics, batch, record, display)
            display.stepped(metrics)
            if step == 1:
                longest = job.config.rollout.max_response_tokens
                lines = measured_filter(job.config.filter, round(metrics["response_length_mean"]), longest)
                for line in [*lines, *measured_rounding(record.rounding, job.policy.dtype)]:
                    display.say(line)
            if last or stopping or _due(step, config.checkpoint_every):
                saver.save(progress)
            if stopping and not last:
                stop.leave(f"step {step}", run.path)


def _begin(job: Training, run: RunDir, step: int, display: Display) -> None:
    """Evaluate before the first step, or after the one that the run is resumed from, if that failed then."""
    clock = Clock()
    if step == 0:
        run.append_metrics({"step": 0, **_evaluate(job, run, 0, clock), **clock.times()})
    elif _evaluates(job, step) and "accuracy_greedy" not in (row := run.metrics()[-1]):
        run.replace_last_metrics(row | _evaluate(job, run, step, clock) | clock.times())
    else:
        return
    display.evaluated(step, run.metrics()[-1])


def _report(
    job: Training, run: RunDir, metrics: dict[str, Any], batch: Batch, record: UpdateRecord, display: Display
) -> None:
    """What a step leaves beside its row of metrics and a checkpoint; adds its evaluation, if due, to `metrics`."""
    step, clock = metrics["step"], Clock()
    if _recorded(step, job.config.trainer.ratios_every) and not record.uneven.any():
        tokenizer = model_source(job.config.model)
        record_ratios(run.path, step, batch, record, job.config, tokenizer, job.policy.dtype)
    if _evaluates(job, step):
        display.phase("evaluating")
        metrics |= _evaluate(job, run, step, clock)
        metrics |= clock.times()
        run.replace_last_metrics(metrics)


def _evaluates(job: Training, step: int) -> bool:
    return step == job.config.trainer.steps or _due(step, job.config.trainer.eval_every)


def _step(job: Training, progress: Progress, display: Display) -> tuple[dict[str, Any], Batch, UpdateRecord]:
    """One rollout batch: sample, grade, learn. Advances `progress`."""
    config, clock = job.config.trainer, Clock()
    step = progress.step + 1
    groups, sampling_metrics = _sample(job, progress, clock, display)
    rewards = torch.tensor([reward for group in groups for reward in group.rewards])
    shaped = rewards - _overlong_penalty(job, groups)
    advantages, _ = group_normalised(shaped, config.group_size, config.advantage_epsilon, config.advantage_std)
    ids = [group.prompt.token_ids for group in groups]
    batch = make_batch(ids, [group.responses for group in groups], rewards, advantages)
    display.phase("learning")
    with clock("update"):
        lr = learning_rate(step, config.lr, config.warmup_steps)
        for parameters in job.updater.optimizer.param_groups:
            parameters["lr"] = lr
        before, trusted = job.updater.max_tokens, job.updater.trusted
        recorded = _recorded(step, config.ratios_every)
        measured = recorded or step == 1
        record = job.updater.update(batch, recorded, measured)
        filter_metrics = _refit(job, progress, batch, record, display)
    if job.updater.max_tokens < before:
        progress.max_tokens = job.updater.max_tokens
        display.say(f"out of memory: micro-batches have at most {progress.max_tokens} tokens from here on")
    if trusted and not job.updater.trusted:
        progress.distrusted = True
        display.say(
            f"warning: step {step}: the sampler's log-probabilities differ from the trainer's by {job.updater.gap}; "
            f"from here on old ones are computed by the trainer"
        )
    if rows := int(record.uneven.sum()):
        display.say(
            f"warning: step {step}: it was so after an optimizer step already, and the log-ratios of {rows} of "
            f"{len(batch)} responses hold the rounding of bfloat16; metrics count them, but no record and no fit does"
        )
    progress.step = step
    metrics = {"step": step, "epoch": progress.data_cursor / len(job.train), "lr": lr}
    metrics |= {**_metrics(batch, record), **sampling_metrics, **filter_metrics}
    if job.updater.watched and not job.updater.trusted:
        metrics["sampler_distrusted"] = 1
    if config.overlong_buffer:
        metrics["shaped_reward_mean"] = float(shaped.nanmean())
    times = clock.times()
    return metrics | {"tokens_per_second": metrics["response_tokens"] / times["time_step"], **times}, batch, record


class Group(NamedTuple):
    """One prompt's responses."""

    prompt: Prompt
    responses: list[Response]
    rewards: list[float]
    """NaN where the grader failed: such a response teaches nothing."""

    @property
    def flat(self) -> bool:
        """All known rewards equal: the group's advantages are 0."""
        return len({reward for reward in self.rewards if not math.isnan(reward)}) < 2


def _sample(job: Training, progress: Progress, clock: "Clock", display: Display) -> tuple[list[Group], dict[str, Any]]:
    """The step's groups, sampled and graded, and metrics of how they came about.

    With dynamic sampling (DAPO, 2503.14476) more prompts are sampled, up to the configured number of rollouts, until
    enough groups have both right and wrong answers; if too few are found, groups without variance fill the step.
    """
    config, step = job.config.trainer, progress.step + 1
    pool: list[Group] = []
    gaps: list[dict[str, float]] = []
    failures, rollouts = 0, 0
    while rollouts < max(1, config.dynamic_sampling):
        prompts = [job.train[i] for i in _next_prompts(job, progress)]
        display.phase("sampling")
        with clock("rollout"):
            ids = [prompt.token_ids for prompt in prompts]
            seed = (job.config.seed, ROLLOUT, step, rollouts)
            with _sampling(job):
                responses = job.sampler.sample(ids, config.group_size, seed)
            if job.check is not None:
                gaps.append(job.check(ids, responses))
        display.phase("grading")
        with clock("reward"):
            verdicts = _grade(job, prompts, responses)
        rewards = np.array([verdict.reward for verdict in verdicts]).reshape(len(prompts), -1).tolist()
        pool += map(Group, prompts, responses, rewards)
        failures += sum(verdict.failed for verdict in verdicts)
        rollouts += 1
        if sum(not group.flat for group in pool) >= config.prompts_per_step:
            break
    metrics = _sampling_metrics(pool) | {"grader_failures": failures, "rollouts": rollouts}
    metrics |= {name: max(gap[name] for gap in gaps) for gap in gaps[:1] for name in gap}
    if rollouts > 1:  # the sort is stable: within each kind the order of sampling stays
        pool = sorted(pool, key=lambda group: group.flat)[: config.prompts_per_step]
    return pool, metrics


@contextmanager
def _sampling(job: Training) -> Iterator[None]:
    """Within the block the sampler has the present weights and the device's memory."""
    leave_device(job.updater.optimizer)
    job.sampler.refresh()
    try:
        yield
    finally:  # after a failure too
        job.sampler.release()


def _sampling_metrics(pool: list[Group]) -> dict[str, Any]:
    """Of everything that was sampled, before dynamic sampling chooses: else its rewards would flatter."""
    rewards = np.array([reward for group in pool for reward in group.rewards])
    rewards = rewards[~np.isnan(rewards)]
    responses = [response for group in pool for response in group.responses]
    lengths = np.array([len(response.token_ids) for response in responses])
    return {
        "reward_mean": float(rewards.mean()) if rewards.size else math.nan,
        "reward_std": float(rewards.std(ddof=1)) if rewards.size > 1 else math.nan,
        "zero_variance_fraction": sum(group.flat for group in pool) / len(pool),
        "response_length_mean": float(lengths.mean()),
        "truncated_fraction": sum(not response.finished for response in responses) / len(responses),
        "prompt_tokens": sum(len(group.prompt.token_ids) * len(group.responses) for group in pool),
        "response_tokens": int(lengths.sum()),
    }


def _overlong_penalty(job: Training, groups: list[Group]) -> torch.Tensor:
    """DAPO's soft overlong punishment (2503.14476, eq. 13): 0 up to L - C tokens, then linear to 1 at L. (N,)"""
    lengths = torch.tensor([float(len(r.token_ids)) for group in groups for r in group.responses])
    limit = job.config.rollout.max_response_tokens
    buffer = job.config.trainer.overlong_buffer * limit
    return ((lengths - (limit - buffer)) / buffer).clamp(0, 1) if buffer else torch.zeros_like(lengths)


def _refit(job: Training, progress: Progress, batch: Batch, record: UpdateRecord, display: Display) -> dict[str, Any]:
    """Let an adaptive filter learn from the step's off-policy tokens (on-policy z is 0 by construction)."""
    ratio_filter = job.updater.objective.ratio_filter
    if not isinstance(ratio_filter, AdaptiveFilter):
        return {}
    rows = (record.mini_batch_index > 0) & ~record.uneven
    if rows.any():
        new = ratio_filter.sums(record.log_ratio[rows], batch.response_mask[rows], record.old_log_probs[rows])
        old = progress.filter_sums
        sums = new if old is None else ratio_filter.memory * torch.tensor(old, dtype=torch.float64) + new
        progress.filter_sums = sums.tolist()
        if note := job.updater.refit(sums):
            display.warn_once(note)
    fitted = job.updater.objective.ratio_filter
    return {
        f"filter_{name}": getattr(fitted, name) for name in ("q", "v", "gamma", "constant") if hasattr(fitted, name)
    }


def _next_prompts(job: Training, progress: Progress) -> list[int]:
    """Indices of the next prompts; every epoch is a permutation of its own. Advances the data cursor."""
    count, chosen = len(job.train), []
    orders: dict[int, np.ndarray] = {}
    for _ in range(job.config.trainer.prompts_per_step):
        epoch, place = divmod(progress.data_cursor, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([job.config.seed, SHUFFLE, epoch]).permutation(count)
        chosen.append(int(orders[epoch][place]))
        progress.data_cursor += 1
    return chosen


def _grade(job: Training, prompts: list[Prompt], responses: list[list[Response]]) -> list[Verdict]:
    pairs = [
        (prompt.opening + job.policy.decode(response.token_ids), prompt.problem.answer)
        for prompt, group in zip(prompts, responses, strict=True)
        for response in group
    ]
    return grade_batch(pairs)


def _evaluate(job: Training, run: RunDir, step: int, clock: "Clock") -> dict[str, float]:
    """Held-out problems, and the benchmarks of trainer.eval with their name behind each metric."""
    seed = (job.config.seed, EVALUATION)
    with clock("eval"), _sampling(job):
        heldout = evaluate_heldout(job.sampler, job.policy.decode, job.heldout, seed)
        run.write_rows(f"evals/step-{step:06d}.jsonl", heldout.samples)
        metrics = heldout.metrics()
        for name, prompts in job.benchmarks.items():
            result = evaluate_heldout(job.sampler, job.policy.decode, prompts, seed)
            run.write_rows(f"evals/{name}-step-{step:06d}.jsonl", result.samples)
            metrics |= {f"{key}/{name}": value for key, value in result.metrics().items()}
    if job.check is not None:  # these weights were pushed as well
        job.check([prompt.token_ids for prompt in job.heldout], [[response] for response in heldout.sampled])
    return metrics


def _metrics(batch: Batch, record: UpdateRecord) -> dict[str, Any]:
    return {
        **record.sums.metrics(),
        **{name: mean.value for name, mean in record.means.items()},
        **({} if record.rounding is None else record.rounding.metrics()),
        "entropy": float(record.entropy.double().sum() / batch.response_mask.sum()),
        "rollout_log_prob_gap": _mismatch(batch, record),
        "grad_norm": float(np.mean(record.grad_norms)),
        "grad_norm_max": max(record.grad_norms),
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


def _recorded(step: int, every: int) -> bool:
    return _due(step, every) or (every > 0 and step in EARLY_RECORDS)


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
