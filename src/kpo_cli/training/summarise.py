"""What came of a run, for summary.json and the terminal."""

from typing import Any

from kpo_cli.runs.directory import RunDir
from kpo_cli.terminal import counted
from kpo_cli.training.display import Display, result_table
from kpo_cli.training.loop import Training


def summarise(job: Training, run: RunDir) -> dict[str, Any]:
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
        "benchmarks": {
            name: {
                f"{kind}_{when}": row[f"accuracy_{kind}/{name}"]
                for kind in ("greedy", "sampled")
                for when, row in (("before", first), ("after", last))
            }
            | {"problems": len(prompts)}
            for name, prompts in job.benchmarks.items()
        },
        "response_tokens": sum(row.get("response_tokens", 0) for row in rows),
        "wall_time": sum(row.get("time_step", 0.0) + row.get("time_eval", 0.0) for row in rows),
    }


def show_result(run: RunDir, summary: dict[str, Any], display: Display) -> None:
    display.say("")
    display.show(result_table(summary))
    for when, step in (("before", 0), ("after", summary["steps"])):
        row = run.rows(f"evals/step-{step:06d}.jsonl")[0]
        sample = row["sampled"]
        mark = "right" if sample["correct"] else "wrong"
        if when == "before":
            display.say(f"one held-out problem: {_short(row['problem'])} (answer {row['answer']})")
        display.say(f"  sampled {when}: {_short(sample['response'])}  [{mark}]")
    display.say(f"\n{counted(summary['steps'], 'step')} in {summary['wall_time']:.0f} s; everything is in {run.path}")


def _short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"
