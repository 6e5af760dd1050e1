"""Was a policy trained on what it is evaluated by?"""

import os
from pathlib import Path

from kpo_cli.config import RowsConfig, convert
from kpo_cli.data.fields import Source
from kpo_cli.data.load import read_problems
from kpo_cli.data.overlap import shared_problems
from kpo_cli.errors import UserError
from kpo_cli.evaluation.benchmarks import BUILTIN, Benchmark
from kpo_cli.evaluation.config import EvalConfig
from kpo_cli.evaluation.subject import run_behind
from kpo_cli.runs.directory import RunDir


def trained_on(config: EvalConfig, benchmarks: list[Benchmark]) -> list[str]:
    """A warning for each benchmark that shares problems with what a run among the policies was trained on.

    What a run recorded of the known benchmarks is believed; others are compared with its file, where that is there.
    """
    warnings = []
    for name in filter(None, (config.checkpoint, config.vs)):
        run = run_behind(name)
        if run is None:
            continue
        trained = _trained(run)
        recorded = run.manifest()["data"].get("benchmark_overlap", {}) if (run.path / "manifest.json").exists() else {}
        for benchmark in benchmarks:
            held = [problem.problem for problem in benchmark.problems]
            shared = recorded.get(benchmark.name) or shared_problems(held, trained)
            if shared and benchmark.name not in BUILTIN:
                warnings.append(f"warning: {name} was trained on {shared} problems of {benchmark.name}")
    return warnings


def _trained(run: RunDir) -> list[str]:
    """The problems in the training file of a run; [] where it is not a file, or gone."""
    data = run.config()["data"]
    path = Path(os.path.expanduser(data["path"] or ""))
    if not path.is_file():
        return []
    rows = convert(RowsConfig, {key: data[key] for key in ("fields", "problem_pattern", "answer_style")}, "data")
    try:
        return [problem.problem for problem in read_problems(Source(str(path), rows)).problems]
    except UserError:
        return []
