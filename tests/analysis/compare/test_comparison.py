"""Several runs side by side."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from ratio_config import config
from ratio_files import write_run
from rich.console import Console
from scipy import stats

from kpo_cli.analysis.compare.comparison import compare, comparison, draw, in_words, tables
from kpo_cli.analysis.compare.curves import METRICS, curves, flat, group, load_run, without_repeats
from kpo_cli.analysis.source import find_source
from kpo_cli.errors import UserError
from kpo_cli.intervals.means import mean_interval


def make_run(path, method="kpo", seed=0, steps=4, accuracy=0.5, spread=0.01, lr=1e-3, evaluated=(), **trainer):
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
        if step == steps or step in evaluated:
            row |= {"accuracy_greedy": accuracy + 0.1, "accuracy_sampled": accuracy}
        rows.append(row)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "manifest.json").write_text(json.dumps({"data": {"heldout": 200}}))
    return path


def runs_of(tmp_path, *specifications):
    paths = [make_run(tmp_path / str(i), **specification) for i, specification in enumerate(specifications)]
    return [load_run(path.name, path) for path in paths]


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
    error = np.sqrt(
        (np.var([0.1, 0.08, 0.11], ddof=1) + 2 / 200**2 / 12) / 3
    )  # the differences are of two rounded shares
    assert line["ci"] == pytest.approx(stats.t.interval(0.95, 2, 0.0966667, error), rel=1e-3)
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
    said = in_words(found, group(runs))
    assert "ended at different steps (kpo 4, 2): compared is the last evaluation that both share" in said


def test_runs_of_different_length_are_compared_where_both_were_evaluated(tmp_path):
    """Not the end of one with the middle of the other."""
    runs = runs_of(
        tmp_path,
        *({"method": "kpo", "seed": s, "steps": 6, "evaluated": (3,), "accuracy": 0.6 + s / 100} for s in range(3)),
        *({"method": "grpo", "seed": s, "steps": 3, "accuracy": 0.5 - s / 100} for s in range(3)),
    )
    found = {"notes": [], "runs": {}, **comparison(group(runs))}
    assert found["differences"][0]["accuracy_sampled"]["step"] == 3
    assert [entry["final"]["accuracy_greedy"]["step"] for entry in found["groups"].values()] == [6, 3]
    said = in_words(found, group(runs))
    assert "ended at different steps (kpo 6, 6, 6; grpo 3, 3, 3)" in said
    assert "3 seeds, paired, at step 3" in said


@pytest.mark.parametrize(
    ("other", "reason"),
    [({"seed": 5}, "no seed is in both"), ({"seed": 0, "steps": 2}, "no evaluation after step 0")],
)
def test_what_has_nothing_in_common_is_refused(tmp_path, other, reason):
    runs = runs_of(tmp_path, {"method": "kpo", "seed": 0, "steps": 4}, {"method": "grpo", **other})
    (difference,) = comparison(group(runs))["differences"]
    assert reason in difference["refused"]


def test_equal_differences_of_two_seeds_are_no_certainty(tmp_path):
    """.005 is one problem of 200."""
    runs = runs_of(
        tmp_path,
        *({"method": m, "seed": s, "accuracy": a} for m, a in (("kpo", 0.505), ("grpo", 0.5)) for s in (0, 1)),
    )
    found = {"notes": [], "runs": {}, **comparison(group(runs))}
    low, high = found["differences"][0]["accuracy_sampled"]["ci"]
    assert low < 0 < high
    assert "No difference of final sampled accuracy is beyond what seeds do" in in_words(found, group(runs))
    assert mean_interval([0.3, 0.3, 0.3]) == {"n": 3, "mean": pytest.approx(0.3), "ci": None}  # in unknown steps


@pytest.mark.parametrize("level", [0.5, 0.85, 0.99])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_false_claims_are_no_more_than_one_in_twenty(level, seeds):
    rng, claims, trials = np.random.default_rng(0), 0, 2000
    for _ in range(trials):
        first, second = rng.binomial(200, level, (2, seeds)) / 200
        low, high = mean_interval(first - second, (-1.0, 1.0), np.sqrt(2) / 200)["ci"]
        claims += not low <= 0 <= high
    assert claims / trials < 0.05 + 2.3 * np.sqrt(0.05 * 0.95 / trials)


def test_a_repeated_seed_is_left_out_everywhere(tmp_path):
    runs = runs_of(tmp_path, {"seed": 0, "accuracy": 0.5}, {"seed": 1, "accuracy": 0.6}, {"seed": 0, "accuracy": 0.9})
    groups, notes = without_repeats(group(runs))
    assert notes == ["2 has the seed and the settings of 0; it is left out of the comparison"]
    entry = comparison(groups)["groups"]["kpo"]
    assert entry["final"]["accuracy_sampled"]["by_seed"] == {"0": 0.5, "1": 0.6}
    counts = {
        len(entry["runs"]),
        entry["final"]["accuracy_sampled"]["n"],
        entry["curves"]["reward_mean"]["by_step"][0]["n"],
    }
    assert counts == {2}


@pytest.mark.parametrize("by", ["by_step", "by_tokens"])
def test_no_axis_shows_what_cannot_be(tmp_path, by):
    """Student's t of two seeds is 12.7: a reward of 1.5."""
    runs = runs_of(tmp_path, *({"seed": s, "steps": 9, "accuracy": 0.3 + 0.3 * s} for s in (0, 1, 2)))
    runs[0].rows[-1]["reward_mean"] = 0.2
    figure = draw({"groups": comparison(group(runs))["groups"]}, by)
    for axis, (_, (low, high)) in zip(figure.axes, METRICS.values(), strict=True):
        assert low <= axis.get_ylim()[0] < axis.get_ylim()[1] <= high
    two = comparison(group(runs[:2]))["groups"]["kpo"]["curves"]["reward_mean"]["by_step"][-1]
    assert 0 <= two["ci"][0] < two["ci"][1] <= 1


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
