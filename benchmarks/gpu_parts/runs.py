"""Whole runs, through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from gpu_parts import Numbers, Setting, largest, require

STEPS = 6
TIMES = ("time_", "tokens_per_second")
"""How the names of metrics begin that no two runs share."""


def resume(setting: Setting) -> Numbers:
    """A run with its optimizer in host memory, killed behind a checkpoint and resumed, against one left alone."""
    options = [f"trainer.steps={STEPS}", "trainer.checkpoint_every=2", "trainer.eval_every=0", "trainer.ratios_every=0"]
    options += ["trainer.offload_optimizer=always", "trainer.prompts_per_step=8", "data.heldout=8", "rollout=hf"]
    options += [f"model.device={setting.device}", "rollout.max_response_tokens=48"]
    whole, again, killed = (setting.folder / name for name in ("whole", "again", "killed"))
    # Side by side: most of their seconds are imports. The second of two that nobody disturbs says what a GPU's order
    # of sums makes of one run; on a CPU there is nothing to say.
    alone = [launch(f"run_dir={run}", *options) for run in ([whole, again] if setting.cuda else [whole])]
    step = kill_behind_checkpoint(launch(f"run_dir={killed}", *options), killed)
    yield {"killed after step": step}
    finish(launch(f"resume={killed}"), *alone)
    if setting.cuda:
        yield {"two runs, largest difference of a metric, relative": difference(whole, again)}
    metrics, weights = difference(whole, killed), weight_difference(whole, killed)
    yield {"resumed, largest difference of a metric, relative": metrics}
    yield {"resumed, largest difference of a weight": weights}
    steps = [row["step"] for row in rows_of(killed)]
    wrong = [] if steps == list(range(STEPS + 1)) else [f"the resumed run has steps {steps}"]
    if not setting.cuda and largest((metrics, weights)) != 0:
        wrong.append("on a CPU a resumed run has the same bits")
    require(wrong)


def launch(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.Popen([sys.executable, "-m", "kpo_cli", "train", *arguments], env=environment)


def finish(*processes: subprocess.Popen[bytes]) -> None:
    if any(codes := [process.wait() for process in processes]):
        raise RuntimeError(f"kpo train ended with {codes}; see log.txt")


def kill_behind_checkpoint(process: subprocess.Popen[bytes], run: Path) -> int:
    """SIGKILL within the step after the first checkpoint; the last step whose metrics were written."""
    while process.poll() is None:
        if list((run / "checkpoints").glob("step-*")) and len(rows_of(run)) > 3:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return int(rows_of(run)[-1]["step"])
        time.sleep(0.005)
    raise RuntimeError(f"the run ended with {process.returncode} before it could be killed")


def rows_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a file of metrics."""
    path = run / name
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def difference(one: Path, other: Path) -> float:
    """Of all metrics but times, the largest |a - b| / max(|a|, |b|); 1 where one of them is missing."""
    largest = 0.0
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        for name in a.keys() | b.keys():
            x, y = a.get(name), b.get(name)
            if x == y or name.startswith(TIMES):
                continue
            known = isinstance(x, int | float) and isinstance(y, int | float)
            largest = max(largest, abs(x - y) / max(abs(x), abs(y)) if known else 1.0)  # type: ignore[operator]
    return largest


def weight_difference(one: Path, other: Path) -> float:
    first, second = (load_file(run / f"checkpoints/step-{STEPS:06d}/model.safetensors") for run in (one, other))
    return largest(float((first[name] - second[name]).abs().max()) for name in first)


def long(setting: Setting) -> Numbers:
    """experiment=long_arithmetic for the seconds there are; its numbers come while it runs."""
    run, seconds = setting.folder / "run", min(setting.seconds - 25, 600)
    options = [f"run_dir={run}", f"model.device={setting.device}", "trainer.ratios_every=0", "rollout=hf"]
    if setting.small:
        options += ["experiment=long_arithmetic_cpu", "trainer.supervised.steps=3", "trainer.steps=2"]
        options += ["trainer.prompts_per_step=4", "data.heldout=4", "trainer.eval_every=0"]
    else:
        options += ["experiment=long_arithmetic", "data.heldout=16"]
    if not setting.small and seconds < WHOLE:
        cut = [f"trainer.supervised.steps={max(10, int(2 * seconds))}", "data.operators=20", "data.max_operators=60"]
        cut += ["rollout.max_prompt_tokens=122", "rollout.max_response_tokens=512"]
        options += cut
        yield {"cut down to the time there is": " ".join(cut)}
    process = launch(*options, f"trainer.stop_after={max(5, seconds):.0f}")
    while process.poll() is None:
        time.sleep(1)
        yield progress_of(run)
    finish(process)
    yield progress_of(run)


WHOLE = 240
"""Seconds from which on the experiment is run as it is."""


def progress_of(run: Path) -> dict[str, float | int | str]:
    """What a run has written so far: the supervised phase's last step, and every RL step."""
    learned, trained = rows_of(run, "supervised.jsonl"), rows_of(run)
    found: dict[str, float | int | str] = {"supervised steps": len(learned), "RL steps": max(0, len(trained) - 1)}
    if learned:
        found |= {f"supervised, last: {name}": learned[-1][name] for name in ("loss", "tokens_per_second", "time_step")}
    names = ("reward_mean", "accuracy_greedy", "response_length_mean", "time_rollout", "time_update", "time_step")
    return found | {f"step {row['step']}: {name}": row[name] for row in trained for name in names if name in row}
