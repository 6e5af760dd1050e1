"""How far a sampling engine's log-probabilities are from the trainer's: by rounding, and by one push that was left out.

    make test-vllm && .venv-vllm/bin/python benchmarks/sampler_gap.py [--steps 12]

The built-in policy learns with vLLM. Of every step's responses the trainer scores those that `SamplerCheck` would
choose, twice: before the update, where the difference is rounding, and after it, where the engine's weights are one
step old.
A line has, for a type and a learning rate, the largest value of the fresh ones over all steps and the smallest and the
median of the stale ones: a limit between the two rings for every stale push, and for no other.
"""

import argparse
import statistics

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kpo_cli.cli.compose import conf_dir
from kpo_cli.config import train_config
from kpo_cli.core import group_normalised
from kpo_cli.data.load import load_problems
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.load import load_policy
from kpo_cli.training.assemble import assemble, complete, make_objective
from kpo_cli.training.display import Display
from kpo_cli.training.loop import ROLLOUT, Training, _grade, _next_prompts

CASES = [("float32", 2e-4), ("float32", 2e-6), ("bfloat16", 2e-4), ("bfloat16", 2e-5)]
NAMES = ("sampler_gap_mean", "sampler_gap_max", "sampler_gap_k3")


def job_of(dtype: str, lr: float) -> tuple[Training, object]:
    overrides = [
        *("experiment=tiny_arithmetic", "rollout=vllm", f"model.dtype={dtype}", f"trainer.lr={lr}"),
        *("trainer.warmup_steps=0", "data.heldout=8", "data.limit=1024"),
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw = OmegaConf.to_container(compose("train", overrides), resolve=True)
    config = train_config({key: value for key, value in raw.items() if key not in ("run_dir", "resume")})
    policy = load_policy(config.model)
    config = complete(config, policy)
    job, progress, _ = assemble(config, make_objective(config), load_problems(config.data), policy, Display(1))
    return job, progress


def gaps_of(dtype: str, lr: float, steps: int) -> tuple[list[dict], list[dict]]:
    """Of the same responses before and after each update."""
    job, progress = job_of(dtype, lr)
    size, fresh, stale = job.config.trainer.group_size, [], []
    for parameters in job.updater.optimizer.param_groups:
        parameters["lr"] = lr
    for step in range(steps):
        prompts = [job.train[i] for i in _next_prompts(job, progress)]
        ids = [prompt.token_ids for prompt in prompts]
        job.sampler.refresh()
        groups = job.sampler.sample(ids, size, (0, ROLLOUT, step))
        rewards = [float(verdict.correct) for verdict in _grade(job, prompts, groups)]
        fresh.append(job.check.measure(ids, groups))
        job.updater.update(batch_of(ids, groups, rewards, size))
        stale.append(job.check.measure(ids, groups))
    job.sampler.engine.close()
    return fresh, stale


def batch_of(ids: list[list[int]], groups: list, rewards: list[float], size: int) -> Batch:
    values = torch.tensor(rewards)
    advantages, _ = group_normalised(values, size, 1e-6, True)
    return make_batch(ids, groups, values, advantages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    print("| type, lr | number | fresh: largest | stale: smallest | stale: median |\n|---|---|---|---|---|", flush=True)
    for dtype, lr in CASES:
        fresh, stale = gaps_of(dtype, lr, arguments.steps)
        for name in NAMES:
            old = [gap[name] for gap in stale]
            largest = max(gap[name] for gap in fresh)
            low, median = min(old), statistics.median(old)
            print(f"| {dtype}, {lr:g} | {name} | {largest:.2g} | {low:.2g} | {median:.2g} |", flush=True)


if __name__ == "__main__":
    main()
