"""Whole runs: what they leave behind, and that a stopped run goes on to the same bits."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from killed import run_apart
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import metrics, resume, same_weights, train, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from kpo_cli.core import list_methods
from kpo_cli.errors import RunStopped, SamplingFailed, UserError
from kpo_cli.training import loop, main

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("whole") / "run")


def test_a_run_leaves_everything_behind(whole):
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "summary.json",
        "ratios/step-000002.safetensors",
        "checkpoints/step-000003/trainer/state.json",
        "evals/step-000000.jsonl",
        "evals/step-000002.jsonl",
        "evals/step-000003.jsonl",
    } <= names
    assert not [name for name in names if "/." in name]  # no drafts
    assert [row["step"] for row in metrics(whole)] == [0, 1, 2, 3]
    assert ["accuracy_greedy" in row for row in metrics(whole)] == [True, False, True, True]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["accuracy_before"] == metrics(whole)[0]["accuracy_greedy"]
    assert summary["sampled_after"] == metrics(whole)[3]["accuracy_sampled"]
    manifest = json.loads((whole / "manifest.json").read_text())
    assert {"command", "versions", "git", "machine", "model", "data", "first_prompt", "threads"} <= manifest.keys()


def test_every_metric_is_defined_in_the_docs(whole, tmp_path):
    always, options = (
        set(re.findall(r"^\| `(\w+)`", part, re.MULTILINE))
        for part in (DOCS / "metrics.md").read_text().split("**With options**")
    )
    assert {key for row in metrics(whole, timings=True) for key in row} == always
    everything = train(
        tmp_path / "run",
        "trainer.steps=1",
        "trainer.kl_coefficient=0.01",
        "trainer.overlong_buffer=0.5",
        "rollout.correction=truncate",
        "filter=kalman_hetero_fitted",
    )
    rounding = {"log_ratio_rounding", "filtered_log_ratio_rounding", "clip_fraction_rounding"}
    elsewhere = {"sampler_distrusted", "filter_constant", *rounding}  # test_watch.py, test_options.py, test_exact.py
    assert {key for row in metrics(everything, timings=True) for key in row} - always == options - elsewhere


def test_ratio_records_hold_together(whole):
    with safe_open(whole / "ratios/step-000002.safetensors", "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        r = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert metadata["method"] == "kpo"
    assert metadata["filter"]["name"] == "kalman"
    assert metadata["eps_low"] == 3e-4
    mask = r["response_mask"]
    assert r["log_ratio"].shape == mask.shape == (16, mask.shape[1])
    assert (r["log_ratio"][~mask] == 0).all()
    on_policy = r["mini_batch_index"] == 0
    assert (r["log_ratio"][on_policy] == 0).all()
    assert (r["log_ratio"][~on_policy][mask[~on_policy]] != 0).any()
    assert (r["old_log_probs"] - r["rollout_log_probs"])[mask].abs().max() < 1e-4
    assert r["rewards"].tolist() == [float(x) for x in r["rewards"].bool()]
    row = metrics(whole)[2]
    assert row["log_ratio_std"] == pytest.approx(float(r["log_ratio"][mask].double().std(correction=0)), rel=1e-5)


def test_a_short_run_has_records_and_they_do_not_depend_on_where_it_ends(tmp_path):
    """The steps that docs/run-directory.md names; a record recomputes its step, so that one more would show in it."""
    short = ["trainer.prompts_per_step=2", "trainer.group_size=2", "trainer.eval_every=0", "trainer.ratios_every=4"]
    whole = train(tmp_path / "whole", *short, "trainer.steps=6")
    assert records(whole) == [1, 2, 4, 5]
    parts = train(tmp_path / "parts", *short, "trainer.steps=1")
    assert records(parts) == [1]
    for steps in (3, 6):
        resume(parts, f"trainer.steps={steps}")
    assert records(parts) == records(whole)
    for path in (whole / "ratios").iterdir():
        assert same_weights(load_file(path), load_file(parts / "ratios" / path.name))
    assert same_weights(weights(parts, 6), weights(whole, 6))
    assert not records(train(tmp_path / "none", *short, "trainer.steps=2", "trainer.ratios_every=0"))


def records(run):
    return sorted(int(path.stem.removeprefix("step-")) for path in run.glob("ratios/*"))


def test_checkpoints_are_plain_transformers_models(whole):
    path = whole / "checkpoints/step-000003"
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer("1+2-3?")["input_ids"]])
    assert model(ids).logits.shape == (1, 6, model.config.vocab_size)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert not list(path.rglob("*.bin")) + list(path.rglob("*.pt"))  # nothing that unpickles


def test_a_run_repeats_bit_for_bit(whole, tmp_path):
    again = train(tmp_path / "again")
    assert same_weights(weights(again, 3), weights(whole, 3))
    assert metrics(again) == metrics(whole)
    other = train(tmp_path / "other", "seed=1")
    assert not same_weights(weights(other, 3), weights(whole, 3))


@pytest.mark.parametrize("method", list_methods())
def test_every_method_trains(method, tmp_path):
    run = train(tmp_path / "run", f"method={method}", "trainer.steps=1")
    first, last = weights(run, 1), AutoModelForCausalLM.from_pretrained(run / "checkpoints/step-000001")
    assert all(torch.isfinite(value).all() for value in first.values())
    assert metrics(run)[1]["grad_norm"] > 0
    assert last.num_parameters() > 100_000


def test_resume_goes_on_to_the_same_bits(whole, tmp_path):
    short = train(tmp_path / "run", "trainer.steps=2", "trainer.warmup_steps=1")
    resume(short, "trainer.steps=3")
    assert same_weights(weights(short, 3), weights(whole, 3))
    # The short run evaluated at its own end, which the long one did as well (eval_every=2).
    assert metrics(short) == metrics(whole)


def test_a_run_that_lacked_memory_resumes_with_settings_that_need_less(whole, tmp_path):
    short = train(tmp_path / "run", "trainer.steps=2", "trainer.warmup_steps=1")
    resume(short, "trainer.steps=3", "model.gradient_checkpointing=true", "rollout.batch_size=4")
    stored = OmegaConf.load(short / "config.yaml")
    assert (stored.model.gradient_checkpointing, stored.rollout.batch_size) == (True, 4)
    first, second = weights(short, 3), weights(whole, 3)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in second)


def _train_until(events, run_dir):
    """Train, with a SIGKILL at the n-th touch of the run directory."""
    seen = 0

    def count(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and "victim" in str(arguments[0]):
            seen += 1
            if seen > events:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    train(run_dir)


def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(whole, tmp_path):
    """From the draft of the run directory to the last summary, a kill at one file operation in five."""
    kills, events = 0, 0
    while True:
        run = tmp_path / f"victim-{events}"
        status = run_apart(_train_until, events, run)
        events += 5 if events > 12 else 2
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        if not run.exists():  # killed before the directory appeared: nothing half-made under its name
            train(run)
        elif not (run / "summary.json").exists():
            resume(run)
        assert same_weights(weights(run, 3), weights(whole, 3)), f"killed after {events} events"
        assert metrics(run) == metrics(whole)
        assert (run / "summary.json").exists()
    assert kills > 15


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys):
    run = train(tmp_path / "run")
    path = run / "checkpoints/step-000003/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    resume(run)
    assert "step-000003 is damaged (model.safetensors has changed)" in capsys.readouterr().out
    assert same_weights(weights(run, 3), weights(whole, 3))
    assert metrics(run) == metrics(whole)


def test_benchmarks_are_evaluated_beside_the_held_out_problems(whole, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(7)))
    run = train(tmp_path / "run", f"trainer.eval.benchmarks=['{mine}']")
    assert same_weights(weights(run, 3), weights(whole, 3))  # evaluation draws no random number of training's
    rows = metrics(run)
    assert [row["step"] for row in rows if "accuracy_greedy/mine" in row] == [0, 2, 3]
    samples = [json.loads(line) for line in (run / "evals/mine-step-000003.jsonl").read_text().splitlines()]
    assert len(samples) == 7
    assert rows[3]["accuracy_sampled/mine"] == sum(row["sampled"]["correct"] for row in samples) / 7
    with pytest.raises(UserError, match="aime42 does not exist"):
        train(tmp_path / "other", "trainer.eval.benchmarks=[aime42]")


def test_old_checkpoints_are_removed(tmp_path):
    run = train(tmp_path / "run", "trainer.keep_checkpoints=2")
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000003"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.lr=1e-3"], "trainer.lr=1e-3 differs from the run's own 0.0002"),
        (["method=grpo"], "method=grpo differs from the run's own kpo"),
        (["seed=5"], "seed=5 differs"),
        (["trainer.steps=2"], "is at step 3 already"),
        ([], "is finished at step 3; give a larger trainer.steps="),
        (["run_dir=elsewhere"], "exclude each other"),
    ],
)
def test_what_a_resumed_run_may_not_change(whole, overrides, message):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    with pytest.raises(UserError, match=re.escape(message)):
        resume(whole, *overrides)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"} == before


def test_a_run_is_never_shared(whole):
    with pytest.raises(UserError, match="exists already"):
        train(whole)


def test_two_processes_cannot_resume_one_run(whole):
    from kpo_cli.runs.directory import RunDir

    with RunDir.open(whole), pytest.raises(UserError, match="in use by another process"):
        resume(whole, "trainer.steps=4")


def test_one_optimizer_step_a_batch_is_said_to_compare_nothing(tmp_path, capsys):
    run = train(tmp_path / "run", "trainer.mini_batches=1", "trainer.steps=1")
    assert "all methods coincide" in capsys.readouterr().out
    row = metrics(run)[1]
    assert row["log_ratio_std"] == 0
    assert row["kl_k3"] == 0


def test_a_filter_that_passes_nothing_is_warned_about(tmp_path, capsys):
    train(tmp_path / "run", "filter.q=1e-6", "trainer.steps=1")
    out = capsys.readouterr().out
    assert "time constant 1,000 tokens" in out
    assert "the filter passes next to nothing in 12 tokens" in out


def test_an_exploding_run_stops_with_one_line(tmp_path):
    with pytest.raises(RunStopped, match=r"step \d: .* the weights have exploded; lower trainer.lr"):
        train(tmp_path / "run", "trainer.lr=1e30", "trainer.warmup_steps=0", "method=kpo_unclipped")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0]


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    original = main.train

    def interrupted(job, *arguments):
        step = job.updater.update

        def update(*batch):
            os.kill(os.getpid(), signal.SIGINT)
            return step(*batch)

        object.__setattr__(job.updater, "update", update)
        original(job, *arguments)

    monkeypatch.setattr(main, "train", interrupted)
    with pytest.raises(RunStopped, match=f"stopped after step 1; go on with: kpo train resume={run}"):
        train(run, "trainer.checkpoint_every=0")
    monkeypatch.undo()
    resume(run)
    assert same_weights(weights(run, 3), weights(whole, 3))


@pytest.mark.parametrize("step", [2, 3])
def test_an_evaluation_that_failed_is_made_by_the_resumed_run(whole, tmp_path, monkeypatch, step):
    real = loop.evaluate_heldout

    def failing(sampler, *arguments):
        if (tmp_path / f"run/evals/step-{step - 2 if step == 2 else 2:06d}.jsonl").exists():
            raise SamplingFailed("the engine is gone")
        return real(sampler, *arguments)

    monkeypatch.setattr(loop, "evaluate_heldout", failing)
    with pytest.raises(RunStopped, match=f"evaluation after step {step}: the engine is gone; what there is is saved"):
        train(tmp_path / "run")
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert same_weights(weights(tmp_path / "run", 3), weights(whole, 3))
    resumed, expected = metrics(tmp_path / "run"), metrics(whole)
    assert resumed[3] == expected[3]
    assert (tmp_path / "run/ratios/step-000002.safetensors").exists()
    assert json.loads((tmp_path / "run/summary.json").read_text())["sampled_after"] == expected[3]["accuracy_sampled"]
