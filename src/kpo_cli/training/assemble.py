"""The live objects of a run, made from its configuration."""

import dataclasses
import os
from pathlib import Path

import torch

from kpo_cli.config import PeriodicEvalConfig, TrainConfig
from kpo_cli.core import MaskedImportance, Objective, ReferenceKL, TruncatedImportance, build_objective
from kpo_cli.data.load import ProblemSets
from kpo_cli.data.overlap import shared_problems
from kpo_cli.data.prompt_checks import check_prompts
from kpo_cli.data.prompts import Prompt, PromptBuilder
from kpo_cli.errors import UserError
from kpo_cli.evaluation.benchmarks import Files, load_benchmarks
from kpo_cli.policy.load import Policy, choose_device, load_policy, share_threads
from kpo_cli.policy.lora import without_adapters
from kpo_cli.policy.memory import max_tokens
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.unrounded import Unrounded
from kpo_cli.rollout.engine import choose_engine
from kpo_cli.rollout.ways import Ways
from kpo_cli.runs.checkpoints import Progress, progress_of, restore
from kpo_cli.training.check import check_context
from kpo_cli.training.describe import notes_of
from kpo_cli.training.display import Display
from kpo_cli.training.loop import Training
from kpo_cli.training.optimizer import make_optimizer
from kpo_cli.training.sampler import make_sampler, reserved_bytes, resolve_offload, try_ways
from kpo_cli.training.step import Updater
from kpo_cli.training.supervised import Demonstrations


def assemble(
    config: TrainConfig,
    objective: Objective,
    problems: ProblemSets,
    policy: Policy,
    display: Display,
    checkpoint: Path | None = None,
) -> tuple[Training, Progress, list[str]]:
    """All live objects of a run, where it stands, and what the user should know about them.

    The state of a `checkpoint` is restored before a sampling engine starts, which takes what memory is left.
    """
    trainer, rollout = config.trainer, config.rollout
    workers = share_threads(trainer.threads, policy)
    check_context(config, policy)
    builder = PromptBuilder(policy.tokenizer, config.model, config.data)
    train_prompts, dropped = builder.build_all(problems.train, rollout.max_prompt_tokens, "training")
    heldout, heldout_dropped = builder.build_all(problems.heldout, rollout.max_prompt_tokens, "held-out")
    benchmarks, benchmark_notes = _benchmarks(config, problems, builder)
    asked = [*train_prompts, *heldout, *(prompt for prompts in benchmarks.values() for prompt in prompts)]
    prompt_notes = check_prompts(builder, asked, policy.stop_ids)
    if len(train_prompts) < trainer.prompts_per_step:
        raise UserError(
            f"trainer.prompts_per_step={trainer.prompts_per_step} but there are only {len(train_prompts)} training "
            f"problems; lower it"
        )
    ids = [prompt.token_ids for prompt in train_prompts]
    scorer = policy.way.scorer(policy.model, rollout.temperature, policy.half)
    progress = _beginning(config) if checkpoint is None else progress_of(checkpoint)
    trial = try_ways(config, policy, scorer, ids, None if progress.ways is None else Ways(**progress.ways))
    unrounded = Unrounded.of(policy, rollout.temperature) if policy.half else None
    policy.narrow()  # before anything holds its weights
    reference = _reference(config, policy, scorer)
    config, offload_notes = resolve_offload(config, policy)
    updater = Updater(
        scorer=scorer,
        optimizer=make_optimizer(policy.model, config.trainer),
        objective=objective,
        mini_batches=trainer.mini_batches,
        max_tokens=trainer.max_tokens_per_micro_batch or max_tokens(policy.parameters, policy.model.device),
        max_grad_norm=trainer.max_grad_norm,
        mask_truncated=trainer.mask_truncated,
        correction=TruncatedImportance(rollout.correction_cap) if rollout.correction == "auto" else None,
        reference=reference,
        unrounded=unrounded,
        workers=workers,
    )
    demonstrations = Demonstrations(config, builder, policy)
    if trainer.supervised.steps:
        demonstrations.check()
    if checkpoint is not None:
        _restore(checkpoint, progress, updater)
    # Last: on a GPU the engine takes its share of what everything else has left.
    reserved = reserved_bytes(config, policy.model, updater.optimizer)
    made = make_sampler(config, policy, scorer, ids, workers, display.sampled, reserved, trial)
    progress.ways = None if trial is None else dataclasses.asdict(trial.ways)
    progress.way = policy.way.facts()
    updater.watched = made.check is None
    updater.sampler_log_probs = updater.watched and trainer.old_log_probs == "auto"
    if updater.watched and not made.serves:
        progress.distrusted = True
    if progress.distrusted:
        updater.distrust()
    job = Training(
        *(config, policy, made.sampler, made.check, updater, demonstrations),
        *(train_prompts, heldout, benchmarks, builder.templated),
    )
    notes = [*policy.way.notes, *_padding(policy), *offload_notes, *made.notes, *_distrust(updater, made.serves)]
    notes += notes_of(job, problems, dropped + heldout_dropped)
    return job, progress, [*notes, *prompt_notes, *benchmark_notes]


def _benchmarks(
    config: TrainConfig, problems: ProblemSets, builder: PromptBuilder
) -> tuple[dict[str, list[Prompt]], list[str]]:
    """The prompts of trainer.eval.benchmarks, and what the user should know of them."""
    evaluation, longest = config.trainer.eval, config.rollout.max_prompt_tokens
    benchmarks, notes = {}, []
    files = Files(evaluation.data, evaluation.data_dir, "trainer.eval.")
    for benchmark in load_benchmarks(evaluation.benchmarks, config.known, files):
        prompts, too_long = builder.build_all(benchmark.problems, longest, benchmark.name)
        if too_long:
            raise UserError(
                f"{benchmark.name}: {too_long} prompts are longer than rollout.max_prompt_tokens={longest}, and no "
                f"problem of a benchmark may be left out; raise it"
            )
        benchmarks[benchmark.name] = prompts
        notes += benchmark.notes
        held = [problem.problem for problem in benchmark.problems]
        if shared := shared_problems((problem.problem for problem in problems.train), held):
            notes.append(f"warning: {shared} training problems stand in the benchmark {benchmark.name} of trainer.eval")
    return benchmarks, notes


def _distrust(updater: Updater, serves: bool) -> list[str]:
    """A line where a sampler of the training weights is not believed, though it may serve for all that is seen now."""
    if updater.trusted or not updater.watched:
        return []
    seen = ", as an earlier step saw" if serves else ""
    return [f"warning: the sampler's log-probabilities differ from the trainer's{seen}: old ones are the trainer's"]


def _beginning(config: TrainConfig) -> Progress:
    return Progress(supervised_step=0 if config.trainer.supervised.steps else None)


def _restore(checkpoint: Path, progress: Progress, updater: Updater) -> None:
    """Put what a checkpoint knows beside the weights in its place."""
    restore(checkpoint, updater.optimizer)
    if progress.filter_sums is not None:
        sums = torch.tensor(progress.filter_sums, dtype=torch.float64)
        if updater.takes(sums):
            updater.refit(sums)
        else:  # those of an older kpo, whose filter fitted less: it begins again with the next batch
            progress.filter_sums = None
    if progress.max_tokens is not None:
        updater.max_tokens = min(updater.max_tokens, progress.max_tokens)


def make_objective(config: TrainConfig) -> Objective:
    """The objective of a configuration; a bad parameter becomes a UserError."""
    trainer = config.trainer
    # `time_constant` has become q by now (config.resolve_filter).
    ratio_filter = {name: value for name, value in config.filter.items() if name != "time_constant"}
    try:
        return build_objective(
            filter=ratio_filter,
            surrogate=config.method.surrogate,
            aggregation=config.method.aggregation,
            correction=_correction(config),
            reference_kl=ReferenceKL(trainer.kl_coefficient, trainer.kl_estimator) if trainer.kl_coefficient else None,
            entropy_bonus=trainer.entropy_bonus,
        )
    except ValueError as error:
        raise UserError(f"method={config.method.name}: {error}") from None


def _correction(config: TrainConfig) -> TruncatedImportance | MaskedImportance | None:
    """`auto`: wherever the sampler's log-probabilities are not the trainer's but for float32 rounding."""
    cap, kind = config.rollout.correction_cap, config.rollout.correction
    if kind == "auto":
        _, dtype = choose_device(config.model)
        kind = "truncate" if dtype != "float32" or config.rollout.name == "vllm" else "none"
    made = {"none": None, "truncate": TruncatedImportance(cap), "mask": MaskedImportance(1 / cap, cap)}
    return made[kind]


def with_engine(config: TrainConfig) -> TrainConfig:
    """The configuration with rollout=auto resolved, so that the stored one names the engine."""
    device, _ = choose_device(config.model)
    name = choose_engine(config.rollout.name, device)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, name=name))


def complete(config: TrainConfig, policy: Policy) -> TrainConfig:
    """What a resumed run needs to find again: the number of threads, and local paths from any working directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or not os.path.exists(os.path.expanduser(path)) else str(_expanded(path))

    threads = config.trainer.threads or len(os.sched_getaffinity(0))
    evaluation = PeriodicEvalConfig(
        [absolute(name) or name for name in config.trainer.eval.benchmarks],
        absolute(config.trainer.eval.data_dir),
        config.trainer.eval.data,
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=absolute(config.model.path)),
        data=dataclasses.replace(config.data, path=absolute(config.data.path)),
        trainer=dataclasses.replace(config.trainer, threads=threads, eval=evaluation),
    )


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(path)).resolve()


def _padding(policy: Policy) -> list[str]:
    """What it costs that a model cannot be packed, if it cannot."""
    if policy.way.packed:
        return []
    vocabulary = policy.model.config.get_text_config().vocab_size
    held = 1024 * vocabulary * 8 / 2**30  # in float32, and their logarithms of probabilities for the backward pass
    return [
        f"warning: this model's forward passes are padded, not packed ({policy.way.unpacked_because}): each row of a "
        f"micro-batch takes as long as its longest, each response computes its prompt again, and 1,024 tokens hold at "
        f"least {held:.2g} GiB of logits of the vocabulary of {vocabulary:,}"
    ]


def _reference(config: TrainConfig, policy: Policy, scorer: Scorer) -> Scorer | None:
    """The policy at the start of the run, whatever checkpoint this one goes on from; None without a KL to it."""
    if not config.trainer.kl_coefficient:
        return None
    if config.model.lora.rank:
        return dataclasses.replace(scorer, model=without_adapters(scorer.model))
    start = load_policy(config.model, before=policy.way)
    start.model.requires_grad_(False)
    start.narrow()
    return start.way.scorer(start.model, scorer.temperature, scorer.half)
