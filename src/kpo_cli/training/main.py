"""`kpo train`, from configuration to summary: everything that can be wrong is found before a directory is made."""

import shlex
from pathlib import Path
from typing import Any

from kpo_cli.config import TrainConfig, as_dict, data_label, model_label, train_config
from kpo_cli.data.load import load_problems
from kpo_cli.errors import RunInterrupted, UserError
from kpo_cli.policy.fidelity import Way
from kpo_cli.policy.load import Policy, load_policy
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.runs.checkpoints import Progress, progress_of, resumable_checkpoint
from kpo_cli.runs.directory import RunDir, check_new, default_run_dir, path_of, run_of
from kpo_cli.training.assemble import assemble, complete, make_objective, with_engine
from kpo_cli.training.check import changed_config, check_first_prompt, check_fit, check_there, check_unchanged, value_at
from kpo_cli.training.describe import manifest_of
from kpo_cli.training.display import Display
from kpo_cli.training.loop import Training, train
from kpo_cli.training.stopping import resume_command
from kpo_cli.training.summarise import show_result, summarise


def run(raw: dict[str, Any]) -> None:
    """Entry point of the command; `raw` is the composed configuration. Raises UserError."""
    overrides = raw.pop("overrides")
    resume, run_dir = (path_of(key, raw.pop(key)) for key in ("resume", "run_dir"))
    if resume is not None:
        _resume(run_of(resume), raw, overrides)
    else:
        _start(train_config(raw), run_dir, overrides)


def _start(config: TrainConfig, run_dir: Path | None, overrides: list[str]) -> None:
    if run_dir is not None:
        check_new(run_dir)
    config = with_engine(config)
    objective = make_objective(config)
    problems = load_problems(config.data)
    config, policy, notes = _fitting(config, run_dir)
    config = complete(config, policy)
    display = Display(config.trainer.steps)
    job, progress, more_notes = assemble(config, objective, problems, policy, display)
    notes = more_notes + notes
    if run_dir is None:
        label = f"{config.method.name}-{model_label(config.model)}-{data_label(config.data)}-s{config.seed}"
        run_dir = default_run_dir(label)
    with RunDir.create(run_dir, as_dict(config), manifest_of(job, problems)) as run:
        _run(job, run, progress, display, notes, overrides)


def _resume(path: Path, raw: dict[str, Any], overrides: list[str]) -> None:
    with RunDir.open(path) as run:
        stored = run.config()
        before = value_at(stored, "rollout")
        config = with_engine(changed_config(stored, raw, overrides))
        objective = make_objective(config)
        checkpoint, damaged = resumable_checkpoint(path)
        check_there(path, config)
        problems = load_problems(config.data)
        check_unchanged(path, config, problems, run.manifest())
        way = (checkpoint and progress_of(checkpoint).way) or run.manifest().get("way")  # an older kpo wrote neither
        config, policy, fit = _fitting(config, path, checkpoint, way and Way.stored(way))
        config = complete(config, policy)
        display = Display(config.trainer.steps)
        job, progress, notes = assemble(config, objective, problems, policy, display, checkpoint)
        check_first_prompt(path, job.train[0], run.manifest())
        last = config.trainer.steps
        if progress.step > last:
            raise UserError(f"{path} is at step {progress.step} already; trainer.steps={last} lies behind it")
        if progress.step == last and (path / "summary.json").is_file():
            raise UserError(f"{path} is finished at step {last}; give a larger trainer.steps= to go on")
        run.write_config(as_dict(config))
        run.cut_after(progress.step or -1, progress.supervised_step)  # the evaluation at step 0 is made again
        notes += fit + [f"warning: {line}; using an older one" for line in damaged]
        if config.rollout.name != before:
            notes.append(f"note: sampling with {config.rollout.name} from here on, with {before} before")
        _run(job, run, progress, display, [*notes, f"resuming after {progress.label}"], None)


def _fitting(
    config: TrainConfig, run_dir: Path | None, checkpoint: Path | None = None, before: Way | None = None
) -> tuple[TrainConfig, Policy, list[str]]:
    """The configuration with what was left to memory decided, its policy, and lines on memory and disk.

    What cannot be packed takes more than one would think, which is known when the policy is loaded.
    """
    decided, notes = check_fit(config, run_dir)
    policy = load_policy(decided.model, checkpoint, before)
    if policy.way.packed:
        return decided, policy, notes
    again, notes = check_fit(config, run_dir, policy.way)
    if again.model.gradient_checkpointing != decided.model.gradient_checkpointing:
        recompute_layers(policy.model, int(again.model.gradient_checkpointing))
    return again, policy, notes


def _run(
    job: Training, run: RunDir, progress: Progress, display: Display, notes: list[str], overrides: list[str] | None
) -> None:
    """`overrides` are those of a new run, for the comparison that is suggested at the end."""
    for line in [f"run: {run.path}", *notes]:
        display.say(line)
    display.start(progress.step)
    try:
        train(job, run, progress, display)
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted; go on from what is saved with: {resume_command(run.path)}") from None
    finally:
        display.stop()
    summary = summarise(job, run)
    run.write_json("summary.json", summary)
    show_result(run, summary, display)
    kept = [o for o in overrides or [] if o.split("=", 1)[0] not in ("method", "seed", "run_dir")]
    more = summary["steps"] * 2
    display.say(f"next:  {resume_command(run.path, f'trainer.steps={more}')}   # go on")
    sweep = ["kpo", "train", "-m", "method=kpo,grpo_tight,grpo", "seed=0,1,2", *kept]
    if overrides is not None:
        display.say(f"       {shlex.join(sweep)}   # compare with its control")
