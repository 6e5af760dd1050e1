"""`kpo eval` end to end, on the built-in policy."""

import json
import os
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from killed import run_apart
from omegaconf import OmegaConf
from small_runs import train, weights

from kpo_cli.cli.compose import conf_dir
from kpo_cli.errors import UserError
from kpo_cli.evaluation import main
from kpo_cli.evaluation.main import run
from kpo_cli.policy import fidelity
from kpo_cli.policy.fidelity import Way
from kpo_cli.rollout import HFSampler
from kpo_cli.rollout.hf import nucleus
from kpo_cli.rollout.trial import PROMPTS

SMALL = ["eval.n=2", "eval.max_tokens=24", "eval.limit=6", "eval.batch_size=4", "benchmarks=[arithmetic]"]
SHARED = Path(os.environ.get("KPO_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def evaluate(run_dir, *overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("eval", [*SMALL, *overrides, f"run_dir='{run_dir}'"])
    raw = OmegaConf.to_container(config, resolve=True)
    run({**raw, "overrides": list(overrides)})
    return json.loads((Path(run_dir) / "results.json").read_text())


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("run") / "run")


def test_results_follow_from_the_samples(tmp_path):
    results = evaluate(tmp_path / "e", "checkpoint=builtin")
    r = results["benchmarks"]["arithmetic"]["checkpoint"]
    samples = rows(tmp_path / "e")
    assert Counter((row["place"], row["sample"]) for row in samples) == {(i, j): 1 for i in range(6) for j in range(2)}
    assert r["avg_at_n"]["value"] == pytest.approx(sum(row["correct"] for row in samples) / 12)
    by_problem = [any(row["correct"] for row in samples if row["place"] == i) for i in range(6)]
    assert r["pass_at_k"]["2"]["value"] == pytest.approx(sum(by_problem) / 6)
    assert r["truncated"] == sum(row["finish"] == "length" for row in samples) / 12
    assert {"config.yaml", "manifest.json", "results.md", "pass_at_k.png"} <= {
        p.name for p in (tmp_path / "e").iterdir()
    }
    prompts = [json.loads(line) for line in (tmp_path / "e" / "prompts.jsonl").read_text().splitlines()]
    assert [(row["subject"], row["benchmark"], row["place"]) for row in prompts] == [
        ("checkpoint", "arithmetic", i) for i in range(6)
    ]
    assert len({row["prompt"] for row in prompts}) == 6
    assert {row["id"] for row in prompts} == {row["id"] for row in samples}
    settings = results["settings"]
    assert settings["checkpoint"]["weights"]["path"] == "built in"
    assert settings["sampling"]["temperature"] == 1.0
    assert (tmp_path / "e" / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_its_newest_checkpoint_and_is_compared_with_another(trained, tmp_path, capsys):
    results = evaluate(tmp_path / "e", f"checkpoint='{trained}'", "vs=builtin")
    assert results["subjects"]["checkpoint"].endswith("step-000003")
    comparison = results["benchmarks"]["arithmetic"]["comparison"]
    by_role = {
        role: [row["correct"] for row in rows(tmp_path / "e") if row["subject"] == role]
        for role in ("checkpoint", "vs")
    }
    means = {role: sum(values) / 12 for role, values in by_role.items()}
    assert comparison["difference"]["value"] == pytest.approx(means["checkpoint"] - means["vs"])
    assert 0 < comparison["p_value"] <= 1
    assert "paired by problem" in capsys.readouterr().out
    # The prompt is the one that the run was trained with: no request for a box.
    assert results["settings"]["checkpoint"]["instruction"] is None
    # And the other policy is asked in the same way, or the difference would be one of prompts.
    assert results["settings"]["vs"]["instruction"] is None
    given = evaluate(tmp_path / "f", f"checkpoint='{trained}'", "chat_template=none", "system_prompt=hello")
    assert given["settings"]["checkpoint"]["system_prompt"] == "hello"
    assert given["settings"]["checkpoint"]["chat_template"] == "none"


SLOW = {"padded": Way("sdpa"), "eager": Way("eager"), "alone": Way("eager", alone=True)}
DEMONSTRATED = [
    *("trainer.steps=1", "trainer.supervised.steps=1", "trainer.supervised.batch_tokens=200", "trainer.threads=1"),
    *("data=long_arithmetic", "data.operators=3", "data.max_operators=4", "data.limit=16", "data.heldout=2"),
    *("trainer.prompts_per_step=2", "rollout.max_prompt_tokens=16", "rollout.max_response_tokens=40"),
]


@pytest.fixture(scope="module")
def packed_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("packed") / "run", *DEMONSTRATED)


@pytest.mark.parametrize("slow", SLOW)
def test_every_way_trains_from_demonstrations_on_to_the_same_weights(slow, packed_run, tmp_path, monkeypatch, capsys):
    """And is evaluated beside the packed one."""
    monkeypatch.setattr(fidelity, "_ways", lambda model, own, before: iter([replace(SLOW[slow], experts=own.experts)]))
    train(tmp_path / "run", *DEMONSTRATED)
    assert "forward passes are padded, not packed" in capsys.readouterr().out
    found, expected = weights(tmp_path / "run", 1), weights(packed_run, 1)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)
    results = evaluate(tmp_path / "e", f"checkpoint='{tmp_path / 'run'}'", f"vs='{packed_run}'", "eval.n=1")
    assert results["benchmarks"]["arithmetic"]["comparison"]["difference"]["value"] == 0
    texts = {
        role: [row["response"] for row in rows(tmp_path / "e") if row["subject"] == role]
        for role in ("checkpoint", "vs")
    }
    assert texts["checkpoint"] == texts["vs"]


def test_a_checkpoint_directory_and_its_run_are_the_same(trained, tmp_path):
    one = evaluate(tmp_path / "a", f"checkpoint='{trained}'")
    two = evaluate(tmp_path / "b", f"checkpoint='{trained}/checkpoints/step-000003'")
    assert one["benchmarks"] == two["benchmarks"]


def test_an_engine_that_does_not_start_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise UserError("no room")

    monkeypatch.setattr(main, "usable_vllm", lambda policy: None)
    monkeypatch.setattr(main, "VLLMEngine", refuse)
    with pytest.raises(UserError, match="no room"):
        evaluate(tmp_path / "e", "checkpoint=builtin", "eval.rollout=vllm")
    assert not (tmp_path / "e").exists()


def _evaluate_until(moment, out):
    """Evaluate, with a torn line and a SIGKILL at a call of the sampler."""
    original, calls = HFSampler.sample, 0

    def sample(self, *arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls > len(PROMPTS) + moment:
            with (out / "samples.jsonl").open("a") as file:
                file.write('{"subject": "checkpoint", "benchm')
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **keywords)

    HFSampler.sample = sample
    evaluate(out, "checkpoint=builtin")


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_killed_anywhere_the_same_command_makes_every_sample_once(moment, tmp_path):
    whole = evaluate(tmp_path / "whole", "checkpoint=builtin")
    out = tmp_path / "killed"
    assert run_apart(_evaluate_until, moment, out) == -signal.SIGKILL
    results = evaluate(out, "checkpoint=builtin")
    assert results["benchmarks"] == whole["benchmarks"]
    assert Counter((row["place"], row["sample"]) for row in rows(out)) == {
        (i, j): 1 for i in range(6) for j in range(2)
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_it_keeps_what_it_sampled(number, tmp_path, kpo, monkeypatch):
    """As a command, whose own handlers make one thing of all three."""
    real = HFSampler.sample
    calls = []

    def sample(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == len(PROMPTS) + 3:
            os.kill(os.getpid(), number)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(HFSampler, "sample", sample)
    result = kpo("eval", "builtin", *SMALL, "run_dir=a=b")
    assert result.code == 130
    assert result.err == "kpo: interrupted; the samples made are in a=b, the same command goes on\n"
    kept = rows(tmp_path / "a=b")
    assert len(kept) == 2 * 4
    again = kpo("eval", "builtin", *SMALL, "run_dir=a=b")
    assert (again.code, again.err) == (0, "")
    assert rows(tmp_path / "a=b")[: len(kept)] == kept
    assert len(calls) == 2 * len(PROMPTS) + 4  # it is tried again before it goes on


def test_checkpoints_of_one_name_are_told_apart(trained, tmp_path, capsys):
    """Two copies of a model, and one beside itself; a run's checkpoints/ are its newest."""
    newest = sorted((trained / "checkpoints").iterdir())[-1]
    for place in ("one", "two"):
        shutil.copytree(newest, tmp_path / place / "model")
    labels = [
        evaluate(tmp_path / f"e{i}", f"checkpoint='{first}'", f"vs='{second}'", "eval.limit=1")["subjects"]
        for i, (first, second) in enumerate(
            [
                (tmp_path / "one/model", tmp_path / "two/model"),
                (tmp_path / "one/model", tmp_path / "one/model"),
                (trained / "checkpoints", tmp_path / "one/model"),
            ]
        )
    ]
    assert labels[0] == {"checkpoint": "one-model", "vs": "two-model"}
    assert labels[1] == {"checkpoint": "model", "vs": "model (vs)"}
    assert labels[2]["checkpoint"].endswith(newest.name)
    assert "one-model minus two-model" in capsys.readouterr().out


def test_the_same_command_again_samples_nothing(tmp_path, monkeypatch):
    first = evaluate(tmp_path / "e", "checkpoint=builtin")
    monkeypatch.setattr(HFSampler, "sample", None)
    assert evaluate(tmp_path / "e", "checkpoint=builtin") == first


def test_samples_do_not_depend_on_the_batch_or_on_other_benchmarks(tmp_path):
    other = tmp_path / "mine.jsonl"
    other.write_text("".join(json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(6)))
    one = evaluate(tmp_path / "a", "checkpoint=builtin")
    two = evaluate(tmp_path / "b", "checkpoint=builtin", "eval.batch_size=64", f"benchmarks=['{other}',arithmetic]")
    assert one["benchmarks"]["arithmetic"] == two["benchmarks"]["arithmetic"]
    assert two["benchmarks"]["mine"]["checkpoint"]["problems"] == 6


def test_regrade_needs_no_model_and_finds_changed_verdicts(tmp_path, capsys):
    first = evaluate(tmp_path / "e", "checkpoint=builtin")
    samples = rows(tmp_path / "e")
    for row in samples:
        row["correct"] = not row["correct"]  # as a worse grader would have it
    (tmp_path / "e" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    again = evaluate(tmp_path / "again", f"regrade='{tmp_path / 'e'}'")
    assert again["benchmarks"] == first["benchmarks"]
    assert "12 of 12 verdicts changed" in capsys.readouterr().out


def test_greedy_and_nucleus(tmp_path):
    evaluate(tmp_path / "e", "checkpoint=builtin", "eval.temperature=0", "eval.n=1", "seed=1")
    evaluate(tmp_path / "f", "checkpoint=builtin", "eval.temperature=0", "eval.n=1", "seed=2")
    assert [row["response"] for row in rows(tmp_path / "e")] == [row["response"] for row in rows(tmp_path / "f")]
    kept = nucleus(torch.tensor([[0.1, 0.5, 0.15, 0.25]]), 0.7)
    assert kept.tolist() == [pytest.approx([0.0, 0.5, 0.0, 0.25])]
    assert nucleus(torch.tensor([[0.1, 0.9]]), 0.05).tolist() == [pytest.approx([0.0, 0.9])]  # never empty


def test_published_rows_are_marked_as_such(tmp_path):
    (tmp_path / "d").mkdir()
    lines = [json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) for i in range(30)]
    (tmp_path / "d" / "aime24.jsonl").write_text("\n".join(lines))
    evaluate(tmp_path / "e", "checkpoint=builtin", "benchmarks=[aime24]", f"data_dir='{tmp_path}/d'", "published=true")
    text = (tmp_path / "e" / "results.md").read_text()
    assert re.search(
        r"\| aime24 \| KPO-clipped, Qwen3-4B: published with n = 16, not measured here \| 37.91 \| 63.33 \|", text
    )


def bad_benchmark(tmp_path, name, lines):
    (tmp_path / "d").mkdir(exist_ok=True)
    (tmp_path / "d" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [f"benchmarks=[{name}]", f"data_dir='{tmp_path}/d'"]


def two_of_one_name(tmp_path):
    paths = [tmp_path / folder / "same.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps({"problem": f"{path.parent.name}?", "answer": "1"}))
    return [f"benchmarks=['{paths[0]}','{paths[1]}']"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (lambda t: ["benchmarks=[aime42]"], "aime42 does not exist; there are arithmetic, long_arithmetic, aime24"),
        (lambda t: ["benchmarks=[]"], "names nothing to evaluate on"),
        (lambda t: ["benchmarks=[arithmetic,arithmetic]"], "names one of them twice"),
        (lambda t: two_of_one_name(t), "two benchmarks are called same"),
        (lambda t: ["checkpoint=null"], "give checkpoint=RUN"),
        (lambda t: ["checkpoint=./nowhere"], "no such model directory"),
        (lambda t: ["eval.temperature=0"], "set eval.n=1"),
        (lambda t: ["eval.top_p=0"], "eval.top_p=0.0 must be above 0"),
        (lambda t: ["eval.max_tokens=100000"], "lower eval.max_tokens to"),
        (lambda t: ["eval.max_prompt_tokens=3"], "no problem may be left out; raise it"),
        (lambda t: ["benchmarks=[math500]", f"data_dir='{t}'"], "has no math500.jsonl"),
        (lambda t: bad_benchmark(t, "aime24", [{"problem": "1?", "answer": "1"}]), "has 1 problems but should have 30"),
        (lambda t: bad_benchmark(t, "aime24", [{"question": "1?", "answer": "1"}]), "no field 'problem'"),
        (lambda t: bad_benchmark(t, "aime24", [{"problem": "1?", "answer": "1"}] * 30), "repeats 29 problems"),
        (
            lambda t: bad_benchmark(t, "aime24", [{"id": 7, "problem": f"{i}?", "answer": "1"} for i in range(30)]),
            "the id '7' is used twice",
        ),
        (lambda t: [f"regrade='{t}'"], "is not a finished evaluation"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(overrides, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        evaluate(tmp_path / "e", "checkpoint=builtin", *overrides(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "e").exists()


def test_other_prompts_are_not_mixed_in(tmp_path, monkeypatch):
    """The settings may be the same and the tokenizer's template another. What is stored is what was sent."""
    sent = []
    real = HFSampler.sample
    monkeypatch.setattr(HFSampler, "sample", lambda self, ids, *a, **k: sent.extend(ids) or real(self, ids, *a, **k))
    evaluate(tmp_path / "e", "checkpoint=builtin")
    path = tmp_path / "e" / "prompts.jsonl"
    tried = sum(map(len, PROMPTS))
    assert [json.loads(line)["token_ids"] for line in path.read_text().splitlines()] == sent[tried:]
    path.write_text(path.read_text().replace('"prompt": "', '"prompt": "Now: '))
    with pytest.raises(UserError, match="begun with other prompts"):
        evaluate(tmp_path / "e", "checkpoint=builtin")


def test_another_evaluation_is_not_mixed_in(tmp_path):
    evaluate(tmp_path / "e", "checkpoint=builtin")
    with pytest.raises(UserError, match="holds another evaluation"):
        evaluate(tmp_path / "e", "checkpoint=builtin", "seed=1")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no benchmark files at {SHARED}; set KPO_SHARED_DATA")
def test_the_real_benchmarks_run_with_exact_counts(tmp_path):
    results = evaluate(
        tmp_path / "e",
        "checkpoint=builtin",
        f"data_dir='{SHARED / 'benchmarks'}'",
        "benchmarks=[aime24,aime25,math500]",
        "eval.limit=null",
        "eval.n=1",
        "eval.max_tokens=8",
        "eval.max_prompt_tokens=4000",
        "eval.batch_size=64",
    )
    counts = {name: by_role["checkpoint"]["problems"] for name, by_role in results["benchmarks"].items()}
    assert counts == {"aime24": 30, "aime25": 30, "math500": 500}
    assert len(rows(tmp_path / "e")) == 560


@pytest.mark.parametrize("preset", ["paper", "paper_script"])
def test_presets_name_themselves_in_the_results(preset, tmp_path):
    results = evaluate(tmp_path / "e", f"eval={preset}", "checkpoint=builtin", "eval.limit=1", "eval.n=16")
    sampling = results["settings"]["sampling"]
    assert (sampling["name"], sampling["top_p"]) == (preset, {"paper": 1.0, "paper_script": 0.7}[preset])


def test_training_and_evaluation_agree_on_what_is_right(trained):
    """The held-out evaluation of a run goes through the same grader."""
    lines = (trained / "evals" / "step-000003.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert row["greedy"]["correct"] == (row["greedy"]["extracted"] == row["answer"])
