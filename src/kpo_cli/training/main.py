"""`kpo train`, from configuration to summary: everything that can be wrong is found before a directory is made."""

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from kpo_cli.checkpoints import newest_checkpoint
from kpo_cli.config import (
    PeriodicEvalConfig,
    RolloutConfig,
    TrainConfig,
    as_dict,
    data_label,
    model_label,
    train_config,
)
from kpo_cli.core import MaskedImportance, Objective, ReferenceKL, TruncatedImportance, build_objective
from kpo_cli.data.load import ProblemSets, load_problems
from kpo_cli.data.prompts import PromptBuilder
from kpo_cli.errors import UserError
from kpo_cli.evaluation.benchmarks import load_benchmarks
from kpo_cli.lora import halve_frozen_layers, without_adapters
from kpo_cli.policy import (
    Policy,
    choose_device,
    context_of,
    load_policy,
    loading_errors,
    model_identity,
    share_threads,
    transformers_config,
)
from kpo_cli.rollout.engine import choose_engine
from kpo_cli.runs import RunDir, check_new, default_run_dir, make_manifest, path_of
from kpo_cli.training.display import Display, describe_filter, result_table
from kpo_cli.training.forward import Scorer, make_packable
from kpo_cli.training.loop import Training, train
from kpo_cli.training.memory import check_memory, max_tokens, plan_memory
from kpo_cli.training.optimizer import make_optimizer
from kpo_cli.training.sampler import make_sampler
from kpo_cli.training.state import Progress, restore
from kpo_cli.training.step import Updater
from kpo_cli.training.supervised import Demonstrations

MAY_CHANGE = (
    "trainer.steps",
    "trainer.eval_every",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.ratios_every",
    "trainer.stop_after",
    "trainer.offload_optimizer",
    "trainer.max_tokens_per_micro_batch",
    "model.gradient_checkpointing",
    "rollout.batch_size",
    "rollout.name",
    "rollout.engine",
)
"""What a resumed run may change, since it does not touch the weights of a step, but for rounding.

A run that is out of memory needs some of it; and an engine that fails, has no room, or is not there any more must not
hold a run captive.
"""


def run(raw: dict[str, Any]) -> None:
    """Entry point of the command; `raw` is the composed configuration. Raises UserError."""
    overrides = raw.pop("overrides")
    resume, run_dir = (path_of(key, raw.pop(key)) for key in ("resume", "run_dir"))
    if resume is not None:
        _resume(resume, raw, overrides)
    else:
        _start(train_config(raw), run_dir, overrides)


def _start(config: TrainConfig, run_dir: Path | None, overrides: list[str]) -> None:
    if run_dir is not None:
        check_new(run_dir)
    config = _with_engine(config)
    objective = make_objective(config)
    problems = load_problems(config.data)
    notes = _check_fit(config)
    policy = load_policy(config.model)
    config = _complete(config, policy)
    display = Display(config.trainer.steps)
    job, more_notes = _assemble(config, objective, problems, policy, display)
    notes = more_notes + notes
    if run_dir is None:
        label = f"{config.method.name}-{model_label(config.model)}-{data_label(config.data)}-s{config.seed}"
        run_dir = default_run_dir(label)
    with RunDir.create(run_dir, as_dict(config), _manifest(job, problems)) as run:
        _run(job, run, _beginning(config), display, notes, overrides)


def _resume(path: Path, raw: dict[str, Any], overrides: list[str]) -> None:
    with RunDir.open(path) as run:
        stored = run.config()
        before = _value(stored, "rollout")
        config = _with_engine(_changed_config(stored, raw, overrides))
        objective = make_objective(config)
        checkpoint, damaged = newest_checkpoint(path)
        problems = load_problems(config.data)
        manifest = run.manifest()
        for what, same in (
            (config.data.path, problems.sha256 == manifest["data"]["sha256"]),
            (config.model.path, manifest["model"].items() >= model_identity(config.model).items()),
        ):
            if not same:
                raise UserError(f"{what} has changed since {path} began; put it back or start a new run")
        policy = load_policy(config.model, checkpoint)
        display = Display(config.trainer.steps)
        job, notes = _assemble(config, objective, problems, policy, display)
        progress = _beginning(config) if checkpoint is None else restore(checkpoint, job.updater.optimizer)
        if progress.filter_sums is not None:
            job.updater.refit(torch.tensor(progress.filter_sums, dtype=torch.float64))
        if progress.max_tokens is not None:
            job.updater.max_tokens = min(job.updater.max_tokens, progress.max_tokens)
        last = config.trainer.steps
        if progress.step > last:
            raise UserError(f"{path} is at step {progress.step} already; trainer.steps={last} lies behind it")
        if progress.step == last and (path / "summary.json").is_file():
            raise UserError(f"{path} is finished at step {last}; give a larger trainer.steps= to go on")
        run.write_config(as_dict(config))
        run.cut_after(progress.step or -1, progress.supervised_step)  # the evaluation at step 0 is made again
        notes += [f"warning: {line}; using an older one" for line in damaged]
        if config.rollout.name != before:
            notes.append(f"note: sampling with {config.rollout.name} from here on, with {before} before")
        _run(job, run, progress, display, [*notes, f"resuming after {progress.label}"], None)


def _beginning(config: TrainConfig) -> Progress:
    return Progress(supervised_step=0 if config.trainer.supervised.steps else None)


def _changed_config(stored: dict[str, Any], raw: dict[str, Any], overrides: list[str]) -> TrainConfig:
    """The stored configuration with the changes that a resumed run may make."""
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key == "resume":
            continue
        if key == "run_dir":
            raise UserError("run_dir= and resume= exclude each other; a resumed run stays where it is")
        group, name = [*("rollout.name" if key == "rollout" else key).split("."), ""][:2]
        if f"{group}.{name}" in MAY_CHANGE:
            stored[group][name] = raw[group][name]
            if stored["rollout"]["name"] == "hf":
                stored["rollout"]["engine"] = raw["rollout"]["engine"]  # arguments of vLLM go with it
        elif _value(raw, key) != _value(stored, key):
            raise UserError(
                f"{override} differs from the run's own {_value(stored, key)}; a resumed run may change only "
                f"{', '.join(MAY_CHANGE)}"
            )
    return train_config(stored)


def _value(config: dict[str, Any], key: str) -> Any:
    value = OmegaConf.select(OmegaConf.create(config), key)
    return value["name"] if OmegaConf.is_dict(value) and "name" in value else value


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
            correction=_correction(config.rollout),
            reference_kl=ReferenceKL(trainer.kl_coefficient, trainer.kl_estimator) if trainer.kl_coefficient else None,
            entropy_bonus=trainer.entropy_bonus,
        )
    except ValueError as error:
        raise UserError(f"method={config.method.name}: {error}") from None


def _correction(rollout: RolloutConfig) -> TruncatedImportance | MaskedImportance | None:
    cap, kind = rollout.correction_cap, rollout.correction
    if kind == "auto":
        kind = "truncate" if rollout.name == "vllm" else "none"
    made = {"none": None, "truncate": TruncatedImportance(cap), "mask": MaskedImportance(1 / cap, cap)}
    return made[kind]


def _with_engine(config: TrainConfig) -> TrainConfig:
    """The configuration with rollout=auto resolved, so that the stored one names the engine."""
    device, _ = choose_device(config.model)
    name = choose_engine(config.rollout.name, device)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, name=name))


def _check_fit(config: TrainConfig) -> list[str]:
    """Compare what the run needs with what there is, before the weights are loaded."""
    device, half = choose_device(config.model)
    with loading_errors(config.model):
        plan = plan_memory(config, transformers_config(config.model), device, half)
    warning = check_memory(plan)
    beside = "; what vLLM takes comes on top" if config.rollout.name == "vllm" else ""
    return [plan.describe() + beside, *([f"warning: {warning}"] if warning else [])]


def _check_context(config: TrainConfig, policy: Policy) -> None:
    context, called = context_of(policy.model)
    prompt, response = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
    if context is not None and prompt + response > context:
        raise UserError(
            f"rollout.max_prompt_tokens={prompt} and rollout.max_response_tokens={response} exceed {called}; "
            f"lower one of them"
        )


def _complete(config: TrainConfig, policy: Policy) -> TrainConfig:
    """What a resumed run needs to find again: the number of threads, and local paths from any working directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or not os.path.exists(os.path.expanduser(path)) else str(_expanded(path))

    threads = config.trainer.threads or len(os.sched_getaffinity(0))
    evaluation = PeriodicEvalConfig(
        [absolute(name) or name for name in config.trainer.eval.benchmarks], absolute(config.trainer.eval.data_dir)
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=absolute(config.model.path)),
        data=dataclasses.replace(config.data, path=absolute(config.data.path)),
        trainer=dataclasses.replace(config.trainer, threads=threads, eval=evaluation),
    )


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(path)).resolve()


def _assemble(
    config: TrainConfig, objective: Objective, problems: ProblemSets, policy: Policy, display: Display
) -> tuple[Training, list[str]]:
    """All live objects of a run, and what the user should know about them."""
    trainer, rollout = config.trainer, config.rollout
    workers = share_threads(trainer.threads, policy.parameters, policy.model.device)
    _check_context(config, policy)
    builder = PromptBuilder(policy.tokenizer, config.model, config.data)
    train_prompts, dropped = builder.build_all(problems.train, rollout.max_prompt_tokens, "training")
    heldout, heldout_dropped = builder.build_all(problems.heldout, rollout.max_prompt_tokens, "held-out")
    benchmarks = {}
    for benchmark in load_benchmarks(trainer.eval.benchmarks, config.known, trainer.eval.data_dir):
        prompts, too_long = builder.build_all(benchmark.problems, rollout.max_prompt_tokens, benchmark.name)
        if too_long:
            raise UserError(
                f"{benchmark.name}: {too_long} prompts are longer than rollout.max_prompt_tokens="
                f"{rollout.max_prompt_tokens}, and no problem of a benchmark may be left out; raise it"
            )
        benchmarks[benchmark.name] = prompts
    if len(train_prompts) < trainer.prompts_per_step:
        raise UserError(
            f"trainer.prompts_per_step={trainer.prompts_per_step} but there are only {len(train_prompts)} training "
            f"problems; lower it"
        )
    scorer, note = _scorer(policy, rollout.temperature)
    updater = Updater(
        scorer=scorer,
        optimizer=make_optimizer(policy.model, trainer),
        objective=objective,
        mini_batches=trainer.mini_batches,
        max_tokens=trainer.max_tokens_per_micro_batch or max_tokens(policy.parameters, policy.model.device),
        max_grad_norm=trainer.max_grad_norm,
        mask_truncated=trainer.mask_truncated,
        sampler_log_probs=trainer.old_log_probs == "auto" and rollout.name == "hf" and policy.dtype == "float32",
        reference=_reference(config, scorer),
        workers=workers,
    )
    demonstrations = Demonstrations(config, builder, policy)
    if trainer.supervised.steps:
        demonstrations.check()
    # Last: on a GPU the engine takes its share of what everything else has left.
    ids = [prompt.token_ids for prompt in train_prompts]
    sampler, check, engine_notes = make_sampler(config, policy, scorer, ids, workers, display.sampled)
    job = Training(
        config, policy, sampler, check, updater, demonstrations, train_prompts, heldout, benchmarks, builder.templated
    )
    notes = _notes(job, problems.overlap, problems.duplicates, dropped + heldout_dropped)
    return job, [*note, *engine_notes, *notes]


def _scorer(policy: Policy, temperature: float) -> tuple[Scorer, list[str]]:
    """What computes log-probabilities, and a note if it has to pad."""
    reason = make_packable(policy.model)
    if policy.dtype == "bfloat16":
        halve_frozen_layers(policy.model)
    note = [] if reason is None else [f"note: this model's forward passes are padded, not packed: {reason}"]
    return Scorer(policy.model, temperature, policy.dtype == "bfloat16", packed=reason is None), note


def _reference(config: TrainConfig, scorer: Scorer) -> Scorer | None:
    """The policy at the start of the run, whatever checkpoint this one goes on from; None without a KL to it."""
    if not config.trainer.kl_coefficient:
        return None
    if config.model.lora.rank:
        return dataclasses.replace(scorer, model=without_adapters(scorer.model))
    model = load_policy(config.model).model.requires_grad_(False)
    return dataclasses.replace(scorer, model=model, packed=scorer.packed and make_packable(model) is None)


def _notes(job: Training, overlap: dict[str, int], duplicates: int, dropped: int) -> list[str]:
    config = job.config
    notes = [
        f"method: {config.method.name} = {config.filter['name']} filter, {_stage(config.method.surrogate)} surrogate, "
        f"{_stage(config.method.aggregation)}",
        *describe_filter(config.filter, config.rollout.max_response_tokens),
        f"model: {model_label(config.model)}, {job.policy.parameters:,} parameters, {job.policy.dtype} on "
        f"{job.policy.model.device}, {config.trainer.threads} CPU thread{'s' * (config.trainer.threads != 1)}, "
        f"{'its chat template' if job.templated else 'plain text'}",
        f"data: {data_label(config.data)}, {len(job.train)} problems to train on, {len(job.heldout)} held out",
    ]
    supervised = config.trainer.supervised
    if supervised.steps:
        notes.append(
            f"supervised: {supervised.steps} steps of {supervised.batch_tokens:,} tokens of worked examples before RL, "
            f"in which {supervised.step_noise:.2%} of the results are wrong"
        )
    elif config.model.architecture is not None:
        notes.append("warning: random weights earn no reward to learn from; set trainer.supervised.steps")
    if lora := config.model.lora.rank:
        trained = sum(p.numel() for p in job.policy.model.parameters() if p.requires_grad)
        scale = config.model.lora.scaled_alpha / lora
        notes.insert(-1, f"lora: rank {lora}, scale {scale:g}, {trained:,} trained parameters beside frozen weights")
    if overlap:
        found = ", ".join(f"{count} in {name}" for name, count in overlap.items())
        notes.append(f"warning: training problems that stand in benchmarks: {found}")
    if duplicates or dropped:
        notes.append(
            f"left out: {duplicates} duplicate problems, {dropped} prompts of more than "
            f"{config.rollout.max_prompt_tokens} tokens"
        )
    notes.append(f"first prompt: {job.train[0].text!r}")
    if config.trainer.mini_batches == 1:
        notes.append(
            "note: with one optimizer step a rollout batch every ratio is exactly 1, so all methods coincide; "
            "a comparison made here says nothing"
        )
    return notes


def _stage(stage: dict[str, Any]) -> str:
    parameters = ", ".join(f"{key} {value}" for key, value in stage.items() if key != "name")
    return f"{stage['name']} ({parameters})" if parameters else str(stage["name"])


def _manifest(job: Training, problems: ProblemSets) -> dict[str, Any]:
    return make_manifest(
        model={**job.policy.identity, "parameters": job.policy.parameters, "stop_ids": list(job.policy.stop_ids)},
        data={
            "path": job.config.data.path,
            "sha256": problems.sha256,
            "train": len(job.train),
            "heldout": len(job.heldout),
            "duplicates": problems.duplicates,
            "benchmark_overlap": problems.overlap,
        },
        first_prompt=job.train[0].text,
        dtype=job.policy.dtype,
        threads=torch.get_num_threads(),
        device=str(job.policy.model.device),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def _run(
    job: Training, run: RunDir, progress: Progress, display: Display, notes: list[str], overrides: list[str] | None
) -> None:
    """`overrides` are those of a new run, for the comparison that is suggested at the end."""
    for line in [f"run: {run.path}", *notes]:
        display.say(line)
    display.start(progress.step)
    try:
        train(job, run, progress, display)
    finally:
        display.stop()
    summary = _summarise(job, run)
    run.write_json("summary.json", summary)
    _show_result(run, summary, display)
    kept = [o for o in overrides or [] if o.split("=", 1)[0] not in ("method", "seed", "run_dir")]
    more = summary["steps"] * 2
    display.say(f"next:  {shlex.join(['kpo', 'train', f'resume={run.path}', f'trainer.steps={more}'])}   # go on")
    sweep = ["kpo", "train", "-m", "method=kpo,grpo_tight,grpo", "seed=0,1,2", *kept]
    if overrides is not None:
        display.say(f"       {shlex.join(sweep)}   # compare with its control")


def _summarise(job: Training, run: RunDir) -> dict[str, Any]:
    rows = run.metrics()
    evaluations = [row for row in rows if "accuracy_greedy" in row]
    first, last = evaluations[0], evaluations[-1]
    return {
        "method": job.config.method.name,
        "seed": job.config.seed,
        "steps": rows[-1]["step"],
        "heldout_problems": len(job.heldout),
        "accuracy_before": first["accuracy_greedy"],
        "accuracy_after": last["accuracy_greedy"],
        "sampled_before": first["accuracy_sampled"],
        "sampled_after": last["accuracy_sampled"],
        "response_length_before": first["response_length_greedy"],
        "response_length_after": last["response_length_greedy"],
        "response_tokens": sum(row.get("response_tokens", 0) for row in rows),
        "wall_time": sum(row.get("time_step", 0.0) + row.get("time_eval", 0.0) for row in rows),
    }


def _show_result(run: RunDir, summary: dict[str, Any], display: Display) -> None:
    display.say("")
    display.console.print(result_table(summary))
    for when, step in (("before", 0), ("after", summary["steps"])):
        row = json.loads((run.path / f"evals/step-{step:06d}.jsonl").read_text().splitlines()[0])
        sample = row["sampled"]
        mark = "right" if sample["correct"] else "wrong"
        if when == "before":
            display.say(f"one held-out problem: {_short(row['problem'])} (answer {row['answer']})")
        display.say(f"  sampled {when}: {_short(sample['response'])}  [{mark}]")
    display.say(f"\n{summary['steps']} steps in {summary['wall_time']:.0f} s; everything is in {run.path}")


def _short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"
