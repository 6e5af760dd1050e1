"""Whole runs and evaluations with the real engine, in this process."""

import json
import re

import hub_twin
import pytest
import torch
from small_runs import metrics, raw_config, resume, train, weights

from kpo_cli.errors import RunStopped, UserError
from kpo_cli.rollout.engine import VLLMEngine, installed
from kpo_cli.training.main import run

if not installed():
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

LEARNING = ["trainer.steps=5", "trainer.eval_every=5", "trainer.checkpoint_every=2", "trainer.ratios_every=5"]
SIZE = [
    *("trainer.prompts_per_step=32", "trainer.group_size=8", "trainer.mini_batches=4"),
    *("rollout.max_response_tokens=96", "data.limit=512", "data.heldout=100"),
]
ENGINE_KEYS = {"sampler_gap_mean", "sampler_gap_max", "sampler_gap_k3", "correction_weight", "correction_cut_fraction"}


@pytest.fixture(autouse=True)
def closed_engines(monkeypatch):
    """A command starts one engine and ends; several in one process have to be closed."""
    engines, start = [], VLLMEngine.__init__

    def noted(self, *arguments, **options):
        start(self, *arguments, **options)
        engines.append(self)

    monkeypatch.setattr(VLLMEngine, "__init__", noted)
    yield
    for engine in engines:
        if hasattr(engine, "llm"):
            engine.close()


@pytest.fixture(scope="module")
def with_hf(tmp_path_factory):
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("hf") / "run", "rollout=hf", *LEARNING, *SIZE)


def test_a_run_learns_as_with_transformers_and_resumes(with_hf, tmp_path, capsys):
    done = train(tmp_path / "run", "rollout=vllm", *LEARNING, *SIZE)
    out = capsys.readouterr().out
    assert re.search(r"vLLM: its log-probabilities differ from the trainer's by \S+e-0[5-9] at most", out)
    rows, others = metrics(done, timings=True), metrics(with_hf, timings=True)
    assert [set(row) - ENGINE_KEYS for row in rows] == [set(row) for row in others]
    assert all(set(row) >= ENGINE_KEYS for row in rows[1:])
    assert all(row["sampler_gap_max"] < 1e-3 and row["rollout_log_prob_gap"] < 1e-3 for row in rows[1:])
    assert all(row["correction_weight"] == pytest.approx(1, abs=1e-3) for row in rows[1:])
    assert all(row["correction_cut_fraction"] == 0 for row in rows[1:])
    # The same prompts and weights at first, other random numbers: 256 responses agree within their noise.
    assert rows[0]["accuracy_greedy"] == pytest.approx(others[0]["accuracy_greedy"], abs=0.03)
    assert rows[1]["reward_mean"] == pytest.approx(others[1]["reward_mean"], abs=0.12)
    assert rows[5]["reward_mean"] > rows[1]["reward_mean"] + 0.3
    assert rows[5]["reward_mean"] == pytest.approx(others[5]["reward_mean"], abs=0.15)
    assert rows[5]["accuracy_greedy"] > 0.9
    config = json.dumps(raw_config("rollout=vllm")["rollout"])
    assert '"name": "vllm"' in config
    resume(done, "trainer.steps=6")
    last = metrics(done)[6]
    assert last["reward_mean"] > 0.6
    assert last["sampler_gap_max"] < 1e-3


def test_a_skipped_push_stops_the_run_and_loses_nothing(tmp_path, monkeypatch):
    push, pushes = VLLMEngine.push, []

    def skipping(self):
        pushes.append(1)
        if len(pushes) < 5:  # at the start, the first evaluation, two steps
            push(self)

    monkeypatch.setattr(VLLMEngine, "push", skipping)
    path = tmp_path / "run"
    small = [
        *("rollout=vllm", "trainer.steps=4", "trainer.checkpoint_every=0", "trainer.eval_every=0"),
        *("trainer.prompts_per_step=8", "trainer.group_size=8", "rollout.max_response_tokens=24"),
    ]
    with pytest.raises(RunStopped, match=r"step 3: the sampling engine does not serve the policy.*resume=") as stopped:
        train(path, *small, "trainer.lr=1e-3", "trainer.warmup_steps=0")
    assert "\n" not in str(stopped.value)
    assert [row["step"] for row in metrics(path)] == [0, 1, 2]
    monkeypatch.undo()
    resume(path)
    assert [row["step"] for row in metrics(path)] == [0, 1, 2, 3, 4]
    whole = train(tmp_path / "whole", *small, "trainer.lr=1e-3", "trainer.warmup_steps=0")
    for name, value in weights(whole, 4).items():  # the engine's numbers round differently, so not to the bit
        assert torch.allclose(value, weights(path, 4)[name], atol=1e-3)


def test_a_batch_that_fails_is_tried_once_more_then_the_run_stops(tmp_path, monkeypatch):
    generate, calls = VLLMEngine.generate, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 4 or len(calls) >= 6:  # the check and the evaluation are three; one retry, then two failures
            raise RuntimeError("the device was lost\nin detail")
        return generate(self, *arguments)

    monkeypatch.setattr(VLLMEngine, "generate", failing)
    path = tmp_path / "run"
    with pytest.raises(RunStopped, match="step 2: sampling with vLLM failed twice: the device was lost in detail"):
        train(path, "rollout=vllm", "trainer.checkpoint_every=0", "trainer.eval_every=0")
    assert len(calls) == 7
    monkeypatch.undo()
    assert weights(path, 1)
    resume(path)
    assert [row["step"] for row in metrics(path)] == [0, 1, 2, 3]


def test_an_evaluation_that_fails_keeps_the_step(tmp_path, monkeypatch):
    generate, calls = VLLMEngine.generate, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) >= 6:  # the check, two of the first evaluation, two steps
            raise RuntimeError("the device was lost")
        return generate(self, *arguments)

    monkeypatch.setattr(VLLMEngine, "generate", failing)
    path = tmp_path / "run"
    with pytest.raises(RunStopped, match="evaluation after step 2: sampling with vLLM failed twice"):
        train(path, "rollout=vllm", "trainer.checkpoint_every=0", "trainer.eval_every=2")
    monkeypatch.undo()
    assert [row["step"] for row in metrics(path)] == [0, 1, 2]
    resume(path)
    assert [row["step"] for row in metrics(path)] == [0, 1, 2, 3]
    assert (path / "summary.json").exists()


def test_a_twin_trains_and_is_evaluated(tmp_path, kpo):
    model = hub_twin.shared_model("qwen3")
    data = hub_twin.make_jsonl(tmp_path / "problems.jsonl", hub_twin.make_problems(12))
    settings = [
        *("rollout=vllm", f"model.path='{model}'", f"data.path='{data}'", "data.heldout=2", "run_dir=run"),
        *("trainer.steps=2", "trainer.prompts_per_step=2", "trainer.group_size=2", "trainer.mini_batches=2"),
        *("trainer.lr=1e-3", "rollout.max_prompt_tokens=200", "rollout.max_response_tokens=8"),
    ]
    done = kpo("train", *settings)
    assert done.code == 0, done.err
    assert all(row["sampler_gap_max"] < 1e-3 for row in metrics(tmp_path / "run")[1:])
    evaluate = ["eval", "checkpoint=run", f"benchmarks=['{data}']", "eval.n=2", "eval.max_tokens=8"]
    done = kpo(*evaluate, "eval.rollout=vllm", f"vs='{model}'", "run_dir=eval")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "eval/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 12 * 2
    again = kpo(*evaluate, "eval.rollout=vllm", f"vs='{model}'", "run_dir=eval")  # nothing is missing: no engine starts
    assert again.code == 0
    other = kpo(*evaluate, "eval.rollout=hf", f"vs='{model}'", "run_dir=eval")
    assert other.code == 2
    assert "holds another evaluation" in other.err


def test_evaluation_agrees_with_the_other_sampler(tmp_path, kpo):
    means = {}
    for name in ("hf", "vllm"):
        done = kpo(
            *("eval", "checkpoint=builtin", "benchmarks=[arithmetic]", "eval.n=4", "eval.max_tokens=96"),
            *("eval.limit=100", f"eval.rollout={name}", f"run_dir={name}"),
        )
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        means[name] = sum(row["correct"] for row in rows) / len(rows)
    assert means["vllm"] == pytest.approx(means["hf"], abs=0.09)  # 400 samples each: three standard errors


def test_a_model_whose_heads_the_engine_lacks_is_refused_before_anything_is_made(tmp_path):
    model = hub_twin.shared_model("llama")  # heads of 16
    data = hub_twin.make_jsonl(tmp_path / "problems.jsonl", hub_twin.make_problems(12))
    config = raw_config("rollout=vllm", "model=hub", f"model.path='{model}'", "data=file", f"data.path='{data}'")
    with pytest.raises(UserError, match=r"no attention for heads of 16, only 32, 64.*set rollout=hf"):
        run({**config, "run_dir": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_what_vllm_refuses_is_one_line(tmp_path):
    for engine, hint in (
        ("{no_such_argument: 1}", "rollout.engine (kpo eval: eval.engine) takes arguments of vllm.LLM"),
        ("{kv_cache_memory_bytes: 1000}", "kv_cache_memory_bytes on a CPU"),
    ):
        with pytest.raises(UserError, match="vLLM cannot run this model") as caught:
            train(tmp_path / "run", "rollout=vllm", f"rollout.engine={engine}")
        assert hint in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_without_lscpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs the program lscpu on PATH to run on a CPU; install util-linux"):
        train(tmp_path / "run", "rollout=vllm")
