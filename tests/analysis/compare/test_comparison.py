"""Several runs side by side."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from ratio_config import config
from ratio_files import write_run
from rich.console import Console
from scipy import stats

from kpo_cli.analysis.compare.comparison import compare, comparison, in_words, tables
from kpo_cli.analysis.compare.curves import curves, flat, group, load_run
from kpo_cli.analysis.source import find_source
from kpo_cli.errors import UserError
from kpo_cli.intervals.means import mean_interval, t_quantile


def make_run(path, method="kpo", seed=0, steps=4, accuracy=0.5, spread=0.01, lr=1e-3, **trainer):
    """A run directory with a configuration and metrics."""
    path.mkdir(parents=True)
    settings = {
        "method": {"name": method, "filter_defaults": {"q": {"kpo": 1e-6}.get(method)}},
        "filter": {"name": "kalman" if method == "kpo" else "identity"},
        "trainer": {"lr": lr, "mini_batches": 4 if spread else 1, **trainer},
        "seed": seed,
    }
    OmegaConf.save(OmegaConf.create(settings), path / "config.yaml")
    rows = [{"step": 0, "accuracy_greedy": 0.1, "accuracy_sampled": 0.1}]
    for step in range(1, steps + 1):
        row = {"step": step, "reward_mean": step / 10 + seed / 100, "entropy": 0.5, "kl_k3": 1e-4}
        row |= {"clip_fraction_active": 0.1, "log_ratio_std": spread, "response_tokens": 100 * (1 + seed)}
        if step == steps:
            row |= {"accuracy_greedy": accuracy + 0.1, "accuracy_sampled": accuracy}
        rows.append(row)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def runs_of(tmp_path, *specifications):
    paths = [make_run(tmp_path / str(i), **specification) for i, specification in enumerate(specifications)]
    return [load_run(path.name, path) for path in paths]


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 7, 10, 30, 300])
def test_the_quantile_of_students_t(df):
    assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=2e-4)


def test_an_interval_is_students():
    values = [0.5, 0.7, 0.6]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert mean_interval(values)["ci"] == pytest.approx(expected, rel=1e-4)
    assert mean_interval([0.5]) == {"n": 1, "mean": 0.5, "ci": None}


def test_runs_are_grouped_by_what_differs_but_the_seed(tmp_path):
    runs = runs_of(
        tmp_path,
        {"seed": 0},
        {"seed": 1, "eval_every": 3},
        {"method": "grpo"},
        {"method": "grpo", "lr": 1e-2},
    )
    groups = group(runs)
    assert {name: [run.name for run in members] for name, members in groups.items()} == {
        "kpo, trainer.lr=0.001": ["0", "1"],
        "grpo, trainer.lr=0.001": ["2"],
        "grpo, trainer.lr=0.01": ["3"],
    }
    assert list(group(runs[:2])) == ["kpo"]
    assert list(group(runs[1:3])) == ["kpo", "grpo"]  # the filter differs too, and tells nothing more


def test_curves_are_means_over_seeds_by_step_and_by_tokens(tmp_path):
    runs = runs_of(tmp_path, {"seed": 0}, {"seed": 1})
    found = curves(runs, "reward_mean")
    assert [(point["step"], point["n"]) for point in found["by_step"]] == [(1, 2), (2, 2), (3, 2), (4, 2)]
    assert found["by_step"][0]["mean"] == pytest.approx(0.105)
    tokens = [point["tokens"] for point in found["by_tokens"]]
    assert (tokens[0], tokens[-1]) == (200, 400)  # where both have values
    # At 200 tokens: seed 0 has done two steps, seed 1 one.
    assert found["by_tokens"][0]["mean"] == pytest.approx((0.2 + 0.11) / 2)


def test_differences_are_paired_by_seed(tmp_path):
    accuracies = {"kpo": (0.5, 0.6, 0.8), "grpo": (0.4, 0.52, 0.69)}
    runs = runs_of(
        tmp_path,
        *({"method": m, "seed": s, "accuracy": a[s]} for m, a in accuracies.items() for s in range(3)),
    )
    found = {"notes": [], "runs": {}, **comparison(group(runs))}
    (difference,) = found["differences"]
    line = difference["accuracy_sampled"]
    assert (line["n"], line["mean"]) == (3, pytest.approx(0.0966667))
    assert line["ci"] == pytest.approx(stats.t.interval(0.95, 2, 0.0966667, stats.sem([0.1, 0.08, 0.11])), rel=1e-3)
    assert "kpo ends 0.097 above grpo in sampled accuracy" in in_words(found, group(runs))
    assert found["groups"]["kpo"]["final"]["accuracy_sampled"]["by_seed"] == {"0": 0.5, "1": 0.6, "2": 0.8}


def test_one_seed_tells_nothing_from_chance(tmp_path):
    runs = runs_of(tmp_path, {"method": "kpo", "accuracy": 0.9}, {"method": "grpo", "accuracy": 0.1})
    found = {"notes": [], "runs": {}, **comparison(group(runs))}
    assert "a difference cannot be told from chance" in in_words(found, group(runs))
    assert "above" not in in_words(found, group(runs))


def test_a_comparison_of_ratios_that_were_all_one_is_refused(tmp_path):
    runs = runs_of(
        tmp_path,
        *(
            {"method": m, "seed": s, "spread": 0.0, "accuracy": a}
            for m, a in (("kpo", 0.9), ("grpo", 0.1))
            for s in (0, 1)
        ),
    )
    found = {"notes": [], "runs": {}, **comparison(group(runs))}
    (difference,) = found["differences"]
    assert "accuracy_sampled" not in difference
    assert "kpo and grpo are not compared: their ratios were exactly 1" in in_words(found, group(runs))
    shown = tables(found)[1].rows
    assert shown == [["kpo - grpo", "0", "refused", "refused"]]


def test_runs_that_ended_apart_are_named(tmp_path):
    runs = runs_of(tmp_path, {"seed": 0, "steps": 4}, {"seed": 1, "steps": 2})
    found = {"notes": [], "runs": {}, **comparison(group(runs))}
    assert "ended at different steps (4, 2)" in in_words(found, group(runs))


def test_what_cannot_be_read_is_one_line(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"config.yaml cannot be read"):
        load_run("empty", empty)
    broken = make_run(tmp_path / "broken")
    (broken / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cannot be read"):
        load_run("broken", broken)
    silent = make_run(tmp_path / "silent")
    (silent / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no metrics yet"):
        load_run("silent", silent)


def test_flat_keys_are_dotted():
    assert flat({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}


def test_exports_alone_are_no_runs(tmp_path, capsys):
    """Nothing is said of groups and accuracies that are not there."""
    for name in ("a", "b"):
        row = {"log_probs": [-1.0, -2.0, -1.5], "old_log_probs": [-1.1, -1.9, -1.5], "mini_batch_index": 1}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "log_probs": [-1.0] * 3}))
    sources = [find_source(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    compare(sources, tmp_path / "out", config("filters=[kalman]", "report=false"), Console(width=100))
    out = capsys.readouterr().out
    assert "2 sources without metrics of training: only ratios are compared." in out
    assert "0 runs" not in out
    assert "Final held-out accuracy" not in out
    assert "Ratios" in out


def test_a_comparison_is_written_whole(tmp_path, capsys):
    """Runs with ratios, one without, and one of the same name."""
    paths = [
        make_run(tmp_path / "a" / "run"),
        make_run(tmp_path / "b" / "run", seed=1),
        make_run(tmp_path / "grpo", "grpo"),
    ]
    for path in paths[:2]:
        write_run(path, steps=(1, 2))
    sources = [find_source(path) for path in paths]
    compare(sources, tmp_path / "out", config("filters=[kalman]"), Console(quiet=True))
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert {"comparison.json", "report.html", "run-1/analysis.json", "run-2/report.html"} <= names
    assert {"figures/learning_curves.svg", "figures/learning_curves_by_tokens.png"} <= names
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["schema"] == "kpo-comparison-1"
    assert list(found["runs"]) == ["run-1", "run-2"]
    assert list(found["groups"]) == ["kpo", "grpo"]
    assert capsys.readouterr().err == f"kpo: {paths[2]} has no ratio records; train with trainer.ratios_every=1\n"
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
