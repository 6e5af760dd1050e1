"""The supervised phase before RL, for a policy that knows nothing yet: next-token training on worked examples.

It is the policy gradient of a batch of demonstrations with advantage 1, taken on-policy: then the ratio is 1 and the
gradient that of the mean negative log-probability of a token. So the update is RL's own (step.py), in one mini-batch.
Everything that a step draws depends on (seed, step) alone, so that a stopped run goes on to the same bits.
"""

import random
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from kpo_cli.config import TrainConfig
from kpo_cli.core import Objective, build_objective
from kpo_cli.data.arithmetic import DEFAULT_OPERATORS, demonstration, draw_chain
from kpo_cli.data.problems import Problem
from kpo_cli.data.prompts import PromptBuilder
from kpo_cli.errors import RunStopped, UserError
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.load import Policy
from kpo_cli.policy.response import Response
from kpo_cli.runs.checkpoints import Progress
from kpo_cli.runs.directory import SUPERVISED, RunDir
from kpo_cli.training.display import Display
from kpo_cli.training.saving import Saver
from kpo_cli.training.step import Updater, UpdateRecord
from kpo_cli.training.stopping import Stop

RAMP = 0.5
"""The share of the steps in which the longest demonstration grows from first_operators to the task's longest."""


@dataclass(frozen=True)
class Demonstrations:
    """Worked examples of the built-in task, fresh ones each step, from the training split."""

    config: TrainConfig
    builder: PromptBuilder
    policy: Policy

    def batch(self, step: int) -> Batch:
        """Step `step` (from 1): all chains have one length, so that nothing is padded."""
        supervised = self.config.trainer.supervised
        rng = random.Random(f"supervised/{self.config.seed}/{step}")
        operators = rng.randint(*self.operators(step))
        prompts, responses = [], []
        # In bytes, which are the built-in policy's tokens: 2 n + 2 of the prompt, 6 n + 10 of the worked answer.
        count = max(1, supervised.batch_tokens // (8 * operators + 12))
        for number in range(count):
            chain = draw_chain(rng, "train", operators)
            problem = Problem(f"demonstration-{step}-{number}", chain.problem, chain.answer)
            shown = demonstration(rng, chain, supervised.guess_fraction, supervised.step_noise)
            prompts.append(self.builder.build(problem).token_ids)
            responses.append([self._response(shown)])
        ones = torch.ones(count)
        return make_batch(prompts, responses, rewards=ones, advantages=ones)

    def operators(self, step: int) -> tuple[int, int]:
        """The shortest and the longest chain of a step.

        Long chains are hard to begin with: what the policy must find first, where in the prompt the next operator
        stands, it finds on short ones.
        """
        config = self.config
        low = config.data.operators or DEFAULT_OPERATORS
        high = config.data.max_operators or low
        first = config.trainer.supervised.first_operators
        if first is None or first >= low:
            return low, high
        grown = first + (high - first) * step / max(1.0, RAMP * config.trainer.supervised.steps)
        return (low if grown >= high else first), min(high, int(grown))

    def check(self) -> None:
        """Raise UserError if the longest worked answer could not be sampled in full."""
        data, limit = self.config.data, self.config.rollout.max_response_tokens
        operators = data.max_operators or data.operators or DEFAULT_OPERATORS
        needed = len(self._response(draw_chain(random.Random(0), "train", operators).worked()).token_ids)
        if needed > limit:
            raise UserError(
                f"the worked answer to a chain of {operators} operators takes {needed} tokens, but "
                f"rollout.max_response_tokens={limit}; raise it or make chains shorter"
            )

    def _response(self, text: str) -> Response:
        end = self.policy.tokenizer.eos_token_id
        ids = self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, self.policy.stop_ids[0] if end is None else end]
        return Response(ids, [0.0] * len(ids), finished=True)


def supervise(
    demonstrations: Demonstrations,
    updater: Updater,
    run: RunDir,
    progress: Progress,
    display: Display,
    stop: Stop,
    saver: Saver,
) -> None:
    """Train from `progress`, which it advances, to the end of the phase. Nothing if the phase is over."""
    config = demonstrations.config.trainer.supervised
    learner = replace(updater, objective=maximum_likelihood(), mini_batches=1, mask_truncated=False, reference=None)
    learner.watched = False  # nothing was sampled
    display.phase("supervised phase")
    while progress.supervised_step is not None:
        step = progress.supervised_step + 1
        with saver.keeping(progress, f"supervised step {step}"):
            metrics = _step(demonstrations, learner, step)
            run.append_metrics(metrics, SUPERVISED)
        progress.supervised_step = step
        if learner.max_tokens < updater.max_tokens:  # out of memory once, found out for good
            updater.max_tokens = progress.max_tokens = learner.max_tokens
        display.supervised(metrics, config.steps)
        every = config.checkpoint_every
        due, stopping = every > 0 and step % every == 0, bool(stop)  # looked at once: time goes on
        if step == config.steps:
            progress.supervised_step = None
            updater.optimizer.state.clear()  # RL has moments of its own
        if stopping or due or progress.supervised_step is None:
            saver.save(progress)
        if stopping:
            stop.leave(f"supervised step {step}", run.path)


def maximum_likelihood() -> Objective:
    """The objective whose gradient, on-policy and with advantage 1, is that of the mean negative log-probability."""
    return build_objective(
        filter={"name": "identity"},
        surrogate={"name": "clip", "eps_low": 0.2, "eps_high": 0.2},
        aggregation={"name": "token_mean"},
    )


def _step(demonstrations: Demonstrations, learner: Updater, step: int) -> dict[str, Any]:
    config = demonstrations.config.trainer.supervised
    started = time.perf_counter()
    batch = demonstrations.batch(step)
    lr = config.lr * min(1.0, step / max(1, config.warmup_steps), (config.steps - step + 1) / config.steps)
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = lr
    try:
        record = learner.update(batch)
    except RunStopped as error:
        hint = str(error).replace("trainer.lr", "trainer.supervised.lr")
        raise RunStopped(hint) from None
    tokens, seconds = int(batch.response_mask.sum()), time.perf_counter() - started
    return {
        "step": step,
        "loss": loss_of(batch, record),
        "grad_norm": record.grad_norms[0],
        "lr": lr,
        "response_length_mean": tokens / len(batch),
        "response_tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "time_step": seconds,
    }


def loss_of(batch: Batch, record: UpdateRecord) -> float:
    """Mean negative log-probability of a token, nats, before the update."""
    return -float(record.old_log_probs[batch.response_mask].double().mean())
