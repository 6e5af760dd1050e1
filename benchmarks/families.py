"""Which families of causal language models train, and with the log-probabilities of the untouched model.

    python benchmarks/families.py [--only NAME,NAME] [--jobs 2] [--fresh] [--write docs/models.md]

Of every family that transformers lists for AutoModelForCausalLM a tiny random model is built and trained for two steps
with `kpo train`, as a user would. Then an untouched copy (eager attention, float32, one row at a time, no cache) scores
what was recorded. Each family is trained, refused, wrong, or not built; docs/models.md says what these words mean.

Every step is a process of its own with a time limit. Results are kept in outputs/families/ as they come, and a family
that has one is not run again without --fresh; --write puts the table of all results between the marks of a page.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hydra  # noqa: F401  # this and the next: what every fork would import for itself
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from families_parts.build import CannotBuild, build, write_problems  # noqa: E402
from families_parts.judge import SPREAD, Gap, gap_of  # noqa: E402
from families_parts.table import written  # noqa: E402

SECONDS = 180
"""Of a step of a family."""
STEPS = 2
OVERRIDES = (
    *("model.chat_template=none", "data.instruction=null", "data.heldout=2", "seed=0", "trainer.threads=1"),
    *(f"trainer.steps={STEPS}", "trainer.prompts_per_step=6", "trainer.group_size=3", "trainer.mini_batches=3"),
    *("trainer.lr=1e-3", "trainer.warmup_steps=0", "trainer.entropy_bonus=0.01", "trainer.eval_every=0"),
    *("trainer.ratios_every=1", "trainer.checkpoint_every=1", "trainer.keep_checkpoints=0"),
    *("rollout=hf", "rollout.max_prompt_tokens=64", "rollout.max_response_tokens=40"),
)
"""Several mini-batches, weights that move, and all that the judge reads."""
UNNAMED = re.compile(r"check that it is a causal language model|^rollout\.")
"""Refusals that name nothing, or a setting of the run that is no reason."""
TELLING = re.compile(r"padded|sampl|attention|micro-batch|experts")
"""Notes of a run that say how it computes."""
TOLD = re.compile(r"^warning: .*sampl.* (other log-probabilities|log-probabilities differ)")
"""The one that says that the sampler's log-probabilities are not the trainer's."""


def families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examine(family: str, folder: Path) -> dict[str, Any]:
    """Build, train and judge a family in an empty `folder`: its line of the results."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    line = {"family": family, **outcome_of(family, folder)}
    return line | {"seconds": round(time.monotonic() - start, 1)}


def outcome_of(family: str, folder: Path) -> dict[str, Any]:
    model, run = folder / "model", folder / "run"
    code, _, _ = forked(lambda: built(family, folder), folder / "build")
    if code:
        return {"outcome": "not built", "reason": text_of(folder / "reason") or f"it ended with {code}"}
    about = json.loads(text_of(folder / "about.json"))
    problems = write_problems(folder / "problems.jsonl")
    code, out, err = forked(lambda: trained(model, problems, run), folder / "train")
    about["notes"] = [line for line in out.splitlines() if re.match("note|warning", line) and TELLING.search(line)]
    if code:
        return about | refusal(code, out, err, left=run.exists())
    code, _, err = forked(lambda: judged(model, run, folder), folder / "judge")
    if code:
        return about | {"outcome": "wrong", "reason": f"its checkpoint or record does not open: {last_line(err)}"}
    return about | verdict([Gap(**gap) for gap in json.loads(text_of(folder / "gaps.json"))], about["notes"])


def refusal(code: int, out: str, err: str, left: bool) -> dict[str, Any]:
    """What to call a run that did not end well: refused, if one line says what is missing and nothing is left."""
    lines = err.strip().splitlines()
    if code == 2 and len(lines) == 1 and lines[0].startswith("kpo: ") and not left:
        reason = re.sub(r"model\.path=\S+", "model.path", lines[0].removeprefix("kpo: "))
        return {"outcome": "wrong" if UNNAMED.search(reason) else "refused", "reason": reason}
    what = f"exit code {code}" + (", a run directory left" if left else "")
    return {"outcome": "wrong", "reason": f"{what}: {last_line(err) or last_line(out)}"}


def verdict(gaps: Sequence[Gap], notes: Sequence[str]) -> dict[str, Any]:
    """Trained, if every recorded step has the untouched model's log-probabilities, or the trainer's are and the run
    said that the sampler's are not."""
    numbers = {
        "sampler_gap": largest(gap.sampler for gap in gaps),
        "trainer_gap": largest(gap.trainer for gap in gaps),
        "spread": min(gap.spread for gap in gaps),
        "lengths": [min(gap.lengths[0] for gap in gaps), max(gap.lengths[1] for gap in gaps)],
        "rounding": max(gap.rounding for gap in gaps),
    }
    told = any(TOLD.search(note) for note in notes)
    trainer, sampler = (all(getattr(g, who) <= g.allowed for g in gaps) for who in ("trainer", "sampler"))
    reason = ""
    if not trainer:
        reason = f"the trainer's log-probabilities are off by {numbers['trainer_gap']:.2g}"
    elif not sampler and not told:
        reason = f"the sampler's log-probabilities are off by {numbers['sampler_gap']:.2g}"
    elif numbers["spread"] < SPREAD:
        reason = f"too uniform to tell, spread {numbers['spread']:.2g}"
    return numbers | {"outcome": "wrong" if reason else "trained", "reason": reason, "used": sampler}


def largest(values: Any) -> float:
    """Not a number, if one is."""
    found = list(values)
    return next((value for value in found if value != value), max(found))


# Steps, each in a process of its own


def built(family: str, folder: Path) -> None:
    try:
        about = build(family, folder / "model")
    except CannotBuild as error:
        (folder / "reason").write_text(str(error))
        sys.exit(1)
    (folder / "about.json").write_text(json.dumps(about))


def trained(model: Path, problems: Path, run: Path) -> None:
    from kpo_cli.cli.main import main

    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = ["kpo", "train", f"model.path={model}", f"data.path={problems}", f"run_dir={run}", *OVERRIDES]
    main()


def judged(model: Path, run: Path, folder: Path) -> None:
    began = [model, *(run / "checkpoints" / f"step-{step:06d}" for step in range(1, STEPS))]
    gaps = [asdict(gap_of(run, step, weights)) for step, weights in enumerate(began, start=1)]
    (folder / "gaps.json").write_text(json.dumps(gaps))


def forked(work: Callable[[], None], folder: Path) -> tuple[int, str, str]:
    """Exit code (that of a signal negative), stdout and stderr of `work` in a fork of this process, which has
    transformers imported and computed nothing. What outlives its time limit is killed with all that it started."""
    folder.mkdir()
    process = get_context("fork").Process(target=begin, args=(work, folder))
    process.start()
    process.join(SECONDS)
    late = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started, if not itself
    process.join()
    out, err = text_of(folder / "stdout"), text_of(folder / "stderr")
    return (process.exitcode, out, err) if not late else (124, out, f"{err}\nit took more than {SECONDS} s")


def begin(work: Callable[[], None], folder: Path) -> None:
    os.setpgid(0, 0)
    torch.set_num_threads(1)  # several fight over the cores, and take many times as long
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    code: Any = 0
    try:
        work()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # not what Python does at its end: the threads that it would wait for are the parent's


def text_of(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else ""


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    kept = options.out / "results"
    kept.mkdir(parents=True, exist_ok=True)
    todo = [name for name in options.only or families() if options.fresh or not (kept / f"{name}.json").exists()]

    def one(family: str) -> None:
        line = examine(family, options.out / "work" / family)
        (kept / f"{family}.json").write_text(json.dumps(line) + "\n")
        if line["outcome"] == "trained":
            shutil.rmtree(options.out / "work" / family)
        print(shown(line), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, todo))
    lines = sorted((json.loads(path.read_text()) for path in kept.glob("*.json")), key=lambda line: line["family"])
    (options.out / "families.json").write_text(json.dumps(lines, indent=1) + "\n")
    counts = {name: sum(line["outcome"] == name for line in lines) for name in OUTCOMES}
    print(", ".join(f"{count} {name}" for name, count in counts.items()), f"of {len(lines)}; {options.out}")
    if options.write:
        options.write.write_text(written(options.write.read_text(), lines))
    return counts["wrong"]


OUTCOMES = ("trained", "refused", "wrong", "not built")


def shown(line: dict[str, Any]) -> str:
    gap = f"{line['sampler_gap']:.1e} {line['trainer_gap']:.1e}" if "trainer_gap" in line else ""
    return f"{line['family']:24} {line['outcome']:9} {line['seconds']:5.1f} s  {gap:16} {line['reason']}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,NAME")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--fresh", action="store_true", help="run those again that have a result")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs/families")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of a page")
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - set(families()):
        parser.error(f"transformers has no causal language model {', '.join(sorted(unknown))}")
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    sys.exit(min(1, main()))
