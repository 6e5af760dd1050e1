"""Our `kpo train` against TRL's GRPOTrainer: same model, data, batch, steps and threads, interleaved in one run.

    python benchmarks/versus_trl.py [--trl-python PYTHON] [--threads 1] [--seeds 0 1 2] [--workloads builtin ragged]

PYTHON is an interpreter with `trl` installed; the running one by default. Each training run is a process of its own, in
float32 on the CPU with so many threads, and the two sides take turns. Two workloads:

- builtin: the built-in policy and task as `kpo train method=grpo` has them, 30 steps of 32 prompts x 8 responses.
- ragged: a random 0.7M-parameter Qwen3 whose distribution over 300 tokens is nearly uniform, so that a response ends
  with probability 1/300 at each token: 6% have fewer than 20 tokens, 4% are cut at 1,000. Steps of 8 prompts x 4.

The same on both sides: GRPO with ratios of tokens, clip 0.2, the mean over responses of the mean over tokens, no KL;
four optimizer steps on each rollout batch; AdamW on all parameters with weight decay 0.1, gradients clipped at 1; a
learning rate that is constant after 5% of the steps; sampling at temperature 1 from the whole distribution; advantages
divided by the standard deviation of their group; the built-in problems in the same order. What remains different: TRL
shuffles responses before it cuts mini-batches and we cut by prompt, TRL adds 1e-4 to the standard deviation and we
1e-6, and the random numbers.

Times are sums over steps: sampling, rewards and updates, from the start of the first step. Start-up, evaluation, logs
and checkpoints are switched off or not counted on either side. TRL's reward is a regular expression, ours the grader.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# What is imported inside functions is not installed on both sides: TRL's has no kpo_cli.
TARGET_REWARD, WINDOW = 0.7, 3
CURVE = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 30]
RAGGED_VOCABULARY, RAGGED_PROBLEMS = 300, 80
RECIPE = {"betas": (0.9, 0.999), "weight_decay": 0.1, "max_grad_norm": 1.0}

Rows = list[dict[str, float]]
"""Of each step: reward_mean, response_tokens, truncated_fraction, time_step, time_rollout."""


@dataclass(frozen=True)
class Workload:
    """The numbers that both sides are given."""

    name: str
    model: str
    problems: str
    """A JSONL file with `problem` and `answer`, for TRL in the order of training."""
    steps: int
    prompts: int
    group: int
    mini_batches: int
    lr: float
    max_tokens: int

    @property
    def warmup_steps(self) -> int:
        return round(0.05 * self.steps)

    @property
    def responses(self) -> int:
        return self.prompts * self.group


@dataclass(frozen=True)
class Measured:
    """One training run."""

    side: str
    workload: str
    seed: int
    rows: Rows
    peak_mb: float
    """Largest resident memory of the process."""

    def total(self, key: str) -> float:
        return sum(row[key] for row in self.rows)

    def seconds_to_target(self) -> float | None:
        """Up to the first step at which the mean reward of three steps reaches 0.7."""
        for end in range(WINDOW, len(self.rows) + 1):
            if statistics.mean(row["reward_mean"] for row in self.rows[end - WINDOW : end]) >= TARGET_REWARD:
                return sum(row["time_step"] for row in self.rows[:end])
        return None


def builtin_workload(folder: Path, seed: int, steps: int | None) -> Workload:
    """The built-in policy and task; the problems as the run of this seed takes them."""
    import numpy as np

    from kpo_cli.builtin import POLICY_DIR
    from kpo_cli.data.arithmetic import arithmetic_problems
    from kpo_cli.training.loop import SHUFFLE

    problems = arithmetic_problems("train", 8192, seed=0)
    order = np.random.default_rng([seed, SHUFFLE, 0]).permutation(len(problems))
    path = folder / f"builtin-{seed}.jsonl"
    write_problems(path, [(problems[i].problem, problems[i].answer) for i in order])
    return Workload("builtin", str(POLICY_DIR), str(path), steps or 30, 32, 8, 4, 2e-4, 96)


def ragged_workload(folder: Path, steps: int | None) -> Workload:
    """A model that ends a response at each token with the same small probability; the learning rate keeps it so."""
    model = folder / "ragged"
    if not model.exists():
        build_ragged_model(model)
    path = folder / "ragged.jsonl"
    write_problems(path, [(f"Problem {n}: " + "x" * (n % 40), "1") for n in range(RAGGED_PROBLEMS)])
    return Workload("ragged", str(model), str(path), steps or 2, 8, 4, 4, 1e-6, 1000)


def build_ragged_model(path: Path) -> None:
    """Random weights and a byte tokenizer with whole boxes among its tokens: some responses are right by chance."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    from kpo_cli.builtin.warmup import EOS, PAD, byte_symbols

    tokens = [*byte_symbols(), r"\boxed{0}", r"\boxed{1}"]
    tokens += [f"word{n}" for n in range(RAGGED_VOCABULARY - 2 - len(tokens))]
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, EOS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, padding_side="left", clean_up_tokenization_spaces=False
    )
    assert len(tokenizer) == RAGGED_VOCABULARY
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(
        vocab_size=RAGGED_VOCABULARY,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        tie_word_embeddings=False,
        initializer_range=0.005,  # logits this small leave the distribution nearly uniform
        max_position_embeddings=2048,
        dtype="float32",
        **ids,
    )
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_problems(path: Path, problems: list[tuple[str, str]]) -> None:
    lines = (json.dumps({"problem": problem, "answer": answer}) for problem, answer in problems)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure_kpo(work: Workload, seed: int, threads: int, folder: Path) -> Measured:
    """`kpo train` as a user runs it, with evaluation on as few problems as it takes; it is not counted."""
    run = folder / f"kpo-{work.name}-{seed}"
    settings: dict[str, Any] = {
        "method": "grpo",
        "seed": seed,
        "run_dir": run,
        "model.device": "cpu",
        "data.heldout": 1,
        "rollout.temperature": 1.0,
        "rollout.max_response_tokens": work.max_tokens,
        "trainer.steps": work.steps,
        "trainer.prompts_per_step": work.prompts,
        "trainer.group_size": work.group,
        "trainer.mini_batches": work.mini_batches,
        "trainer.lr": work.lr,
        "trainer.warmup_steps": work.warmup_steps,
        "trainer.threads": threads,
        **{f"trainer.{key}": list(value) if isinstance(value, tuple) else value for key, value in RECIPE.items()},
        **{f"trainer.{key}": 0 for key in ("eval_every", "checkpoint_every", "ratios_every")},
    }
    if work.name != "builtin":
        settings |= {"model.path": work.model, "data.path": work.problems, "data.instruction": "null"}
    arguments = [f"{key}={value}" for key, value in settings.items()]
    peak = run_child([sys.executable, "-m", "kpo_cli", "train", *arguments], threads, run.with_suffix(".log"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Measured("kpo", work.name, seed, [row for row in rows if row["step"] > 0], peak)


def measure_trl(work: Workload, seed: int, threads: int, folder: Path, python: str) -> Measured:
    """This script once more, by the interpreter that has TRL."""
    stem = folder / f"trl-{work.name}-{seed}"
    task, results = stem.with_suffix(".json"), stem.with_suffix(".rows.json")
    task.write_text(json.dumps({"work": asdict(work), "seed": seed, "threads": threads, "results": str(results)}))
    peak = run_child([python, __file__, "--trl-child", str(task)], threads, stem.with_suffix(".log"))
    return Measured("TRL", work.name, seed, json.loads(results.read_text()), peak)


def run_child(command: list[str], threads: int, log: Path) -> float:
    """Run a training process to its end; its peak memory in MB. Stops the benchmark if it fails."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(variables, str(threads))
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return usage.ru_maxrss / 1e3


def trl_child(task: Path) -> None:
    """Train with TRL and write the rows of its steps. Needs torch, transformers, datasets and trl alone."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    given = json.loads(task.read_text())
    work, seed = Workload(**given["work"]), given["seed"]
    torch.set_num_threads(given["threads"])
    data = load_dataset("json", data_files=work.problems, split="train", cache_dir=str(task.parent / "datasets"))
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.lr, betas=RECIPE["betas"], weight_decay=RECIPE["weight_decay"], fused=True
    )
    # Of the rollout batch, as ours: the scheduler counts optimizer steps.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1.0, (done // work.mini_batches + 1) / max(1, work.warmup_steps))
    )
    rows: Rows = []
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_function(rows, work.max_tokens),
        args=trl_config(work, seed, task.parent),
        train_dataset=data.rename_column("problem", "prompt"),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[step_clock(rows, work.mini_batches)],
        optimizers=(optimizer, schedule),
    )
    sampling = timed_generation(model)
    trainer.train()
    for row, seconds in zip(rows, sampling, strict=True):
        row["time_rollout"] = seconds
    Path(given["results"]).write_text(json.dumps(rows))


def trl_config(work: Workload, seed: int, folder: Path) -> Any:
    """The workload in TRL's words: a mini-batch is one optimizer step, its responses one forward and backward pass."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(folder / "trl"),
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        max_steps=work.steps * work.mini_batches,
        per_device_train_batch_size=work.responses // work.mini_batches,
        gradient_accumulation_steps=1,
        steps_per_generation=work.mini_batches,
        num_iterations=1,
        num_generations=work.group,
        max_completion_length=work.max_tokens,
        shuffle_dataset=False,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="grpo",
        importance_sampling_level="token",
        epsilon=0.2,
        beta=0.0,
        scale_rewards="group",
        mask_truncated_completions=False,
        max_grad_norm=RECIPE["max_grad_norm"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def reward_function(rows: Rows, max_tokens: int) -> Any:
    """1 for a response whose last box holds the answer. Adds a row for each rollout batch."""

    def right(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        boxes = [re.findall(r"\\boxed\{([^{}]*)\}", text) for text in completions]
        rewards = [float(found[-1:] == [gold]) for found, gold in zip(boxes, answer, strict=True)]
        lengths = [len(ids) for ids in completion_ids]
        rows.append(
            {
                "reward_mean": statistics.mean(rewards),
                "response_tokens": sum(lengths),
                # One that ends at the very last token counts as cut.
                "truncated_fraction": sum(length == max_tokens for length in lengths) / len(lengths),
            }
        )
        return rewards

    return right


def step_clock(rows: Rows, mini_batches: int) -> Any:
    """A callback that notes the seconds of each rollout batch: sampling and `mini_batches` optimizer steps."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % mini_batches == 0:
                self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % mini_batches == 0:
                rows[-1]["time_step"] = time.perf_counter() - self.started

    return StepClock()


def timed_generation(model: Any) -> list[float]:
    """A list that gets the seconds of each call of `model.generate`."""
    seconds: list[float] = []
    generate = model.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        before = time.perf_counter()
        out = generate(*args, **kwargs)
        seconds.append(time.perf_counter() - before)
        return out

    model.generate = timed
    return seconds


def check_trl(python: str) -> str:
    """TRL's version and torch's; stops with one line if there is none."""
    code = "import torch, trl; trl.GRPOTrainer, trl.GRPOConfig; print('VERSIONS', trl.__version__, torch.__version__)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"--trl-python {python} cannot be run ({error.strerror}); give another interpreter") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        raise SystemExit(
            f"{python} has no working TRL ({''.join(reason)}); pip install trl, or give --trl-python PYTHON"
        )
    trl, torch = done.stdout.partition("VERSIONS")[2].split()
    return f"TRL {trl} with torch {torch}"


def spread(values: list[float | None], digits: int = 1) -> str:
    """Median and range over the runs."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"reached in {len(known)} of {len(values)} runs"
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(known), min(known), max(known)))
    return middle if len(known) == 1 else f"{middle} ({low}-{high})"


def times_table(work: Workload, runs: dict[str, list[Measured]]) -> None:
    """Medians and ranges over the seeds, and of what a run costs TRL's median over ours."""
    target = {f"seconds to reward {TARGET_REWARD}": Measured.seconds_to_target} if work.name == "builtin" else {}
    costs: dict[str, Any] = target | {
        f"seconds to step {work.steps}": lambda run: run.total("time_step"),
        "of these sampling": lambda run: run.total("time_rollout"),
        "of these the rest": lambda run: run.total("time_step") - run.total("time_rollout"),
        "seconds a step, median of the steps": lambda run: statistics.median(row["time_step"] for row in run.rows),
        "peak memory, MB": lambda run: run.peak_mb,
    }
    facts: dict[str, Any] = {
        "response tokens per second": lambda run: run.total("response_tokens") / run.total("time_step"),
        "tokens in a response": lambda run: run.total("response_tokens") / len(run.rows) / work.responses,
        "responses cut, %": lambda run: 100 * run.total("truncated_fraction") / len(run.rows),
    }
    print(f"\n| {work.name} | {' | '.join(runs)} | TRL / kpo |")
    print("|---" * (2 + len(runs)) + "|")
    for name, quantity in (costs | facts).items():
        values = {side: [quantity(run) for run in measured] for side, measured in runs.items()}
        ratio = ratio_of_medians(values) if name in costs else ""
        print(f"| {name} | {' | '.join(spread(one_side) for one_side in values.values())} | {ratio} |")


def ratio_of_medians(values: dict[str, list[float | None]]) -> str:
    """Nothing if one side was not run, or one of its runs did not get there."""
    if len(values) < 2 or any(None in one_side for one_side in values.values()):
        return ""
    return f"{statistics.median(values['TRL']) / statistics.median(values['kpo']):.2f}"


def curve_table(work: Workload, runs: dict[str, list[Measured]]) -> None:
    print(f"\n| {work.name}, mean reward at step | {' | '.join(runs)} |")
    print("|---" * (1 + len(runs)) + "|")
    for step in [step for step in CURVE if step <= work.steps]:
        rewards = ([run.rows[step - 1]["reward_mean"] for run in side] for side in runs.values())
        cells = (f"{statistics.mean(side):.2f} ({min(side):.2f}-{max(side):.2f})" for side in rewards)
        print(f"| {step} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workloads", nargs="+", choices=["builtin", "ragged"], default=["builtin", "ragged"])
    parser.add_argument("--sides", nargs="+", choices=["TRL", "kpo"], default=["TRL", "kpo"])
    parser.add_argument("--steps", type=int, help="default: 30 of builtin, 2 of ragged")
    parser.add_argument("--out", type=Path, help="a JSON file for every run's numbers, step by step")
    parser.add_argument("--trl-child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl_child:
        trl_child(options.trl_child)
        return
    other = check_trl(options.trl_python) if "TRL" in options.sides else "without TRL"
    import torch

    print(f"kpo with torch {torch.__version__}, {other}; CPU, {options.threads} thread(s), seeds {options.seeds}")
    measured = []
    for name in options.workloads:
        runs: dict[str, list[Measured]] = {side: [] for side in options.sides}
        with tempfile.TemporaryDirectory() as temporary:
            work = measure_all(name, options, Path(temporary), runs)
        times_table(work, runs)
        curve_table(work, runs)
        measured += [asdict(run) for side in runs.values() for run in side]
    if options.out:
        options.out.write_text(json.dumps({"threads": options.threads, "runs": measured}) + "\n")


def measure_all(name: str, options: argparse.Namespace, folder: Path, runs: dict[str, list[Measured]]) -> Workload:
    """The sides in turns, seed after seed; which one begins alternates."""
    for turn, seed in enumerate(options.seeds):
        ragged = name == "ragged"
        work = ragged_workload(folder, options.steps) if ragged else builtin_workload(folder, seed, options.steps)
        for side in options.sides if turn % 2 == 0 else reversed(options.sides):
            if side == "TRL":
                run = measure_trl(work, seed, options.threads, folder, options.trl_python)
            else:
                run = measure_kpo(work, seed, options.threads, folder)
            runs[side].append(run)
            print(f"{name}, seed {seed}: {side} {run.total('time_step'):.1f} s", file=sys.stderr, flush=True)
    return work


if __name__ == "__main__":
    main()
