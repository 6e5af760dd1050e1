"""The supervised phase before RL: its loss, its demonstrations, and that a run stopped within it loses nothing."""

import copy
import json
import os
import re
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import compose
from killed import run_apart
from small_runs import metrics, resume, same_weights, train, weights
from transformers import AutoModelForCausalLM

from kpo_cli.config import Architecture, train_config
from kpo_cli.data.arithmetic import arithmetic_problems, chains
from kpo_cli.data.prompts import PromptBuilder
from kpo_cli.errors import RunInterrupted, RunPaused, RunStopped, UserError
from kpo_cli.evaluation.benchmarks import BUILTIN
from kpo_cli.policy.load import load_policy, transformers_config
from kpo_cli.policy.scorer import Scorer
from kpo_cli.training import main, supervised
from kpo_cli.training.step import Updater
from kpo_cli.training.supervised import Demonstrations

DOCS = Path(__file__).resolve().parents[2] / "docs"
CUT = [
    "experiment=long_arithmetic_cpu",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=48",
    "model.architecture.num_hidden_layers=2",
    "data.operators=3",
    "data.max_operators=5",
    "rollout.max_prompt_tokens=12",
    "rollout.max_response_tokens=40",
    "trainer.steps=2",
    "trainer.eval_every=0",
    "trainer.threads=1",
    "trainer.keep_checkpoints=0",
    "trainer.keep_optimizer=0",
    "trainer.supervised.steps=4",
    "trainer.supervised.batch_tokens=150",
    "trainer.supervised.warmup_steps=2",
    "trainer.supervised.checkpoint_every=2",
]


def supervised_rows(run):
    rows = [json.loads(line) for line in (run / "supervised.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time_step", "tokens_per_second")} for row in rows]


def same_run(one, other):
    assert same_weights(weights(one, 2), weights(other, 2))
    assert metrics(one) == metrics(other)
    assert supervised_rows(one) == supervised_rows(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("whole") / "run", *CUT)


class Assembled(Exception):
    pass


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The objects of a cut-down run, as training gets them."""

    def caught(job, run, progress, display):
        raise Assembled(job)

    monkeypatch.setattr(main, "train", caught)
    with pytest.raises(Assembled) as assembled:
        train(tmp_path / "assembled", *CUT)
    return assembled.value.args[0]


def test_a_step_is_that_of_the_cross_entropy(job):
    """Loss and gradient against torch's own cross-entropy, a response at a time, without our forward pass."""
    batch = job.demonstrations.batch(3)
    model = job.policy.model
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    total, count = torch.zeros(()), 0
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row, : batch.prompt_lengths[row]]
        response = batch.response_ids[row, batch.response_mask[row]]
        logits = plain(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, response, reduction="sum")
        count += len(response)
    (total / count).backward()
    expected = float(total.detach()) / count

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = replace(
        job.updater,
        objective=supervised.maximum_likelihood(),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        mini_batches=1,
        max_grad_norm=1e9,
        max_tokens=60,  # several micro-batches
        watched=False,
    )
    record = learner.update(batch)
    assert supervised.loss_of(batch, record) == pytest.approx(expected, rel=1e-5)
    for name, parameter in plain.named_parameters():
        moved = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved, parameter.grad, rtol=1e-3, atol=1e-6)


def test_demonstrations_are_worked_chains_of_the_training_split(job):
    config = job.config
    clean = replace(config.trainer.supervised, step_noise=0.0, first_operators=None)
    trainer = replace(config.trainer, supervised=clean)
    demonstrations = Demonstrations(replace(config, trainer=trainer), job.demonstrations.builder, job.policy)
    heldout = {p.problem for p in arithmetic_problems("heldout", 500, seed=0, operators=3, max_operators=5)}
    lengths = set()
    for step in range(1, 20):
        batch = demonstrations.batch(step)
        assert (batch.rewards == 1).all()
        assert (batch.advantages == 1).all()
        of_batch = set()
        for row in range(len(batch)):
            problem = bytes(batch.prompt_ids[row, : batch.prompt_lengths[row]].tolist()).decode()
            *response, end = batch.response_ids[row, batch.response_mask[row]].tolist()
            assert end == job.policy.tokenizer.eos_token_id
            value, expected = int(problem[0]), ""
            for operator, digit in re.findall(r"([-+*])(\d)", problem):
                result = eval(f"{value}{operator}{digit}") % 10
                expected += f"{value}{operator}{digit}={result};"
                value = result
            assert bytes(response).decode() == expected + rf"\boxed{{{value}}}"
            assert problem not in heldout
            of_batch.add(len(expected) // 6)
        assert len(of_batch) == 1
        lengths |= of_batch
    assert lengths == {3, 4, 5}


def test_demonstrations_depend_on_seed_and_step_alone(job):
    again = Demonstrations(
        job.config, PromptBuilder(job.policy.tokenizer, job.config.model, job.config.data), job.policy
    )
    one, other = job.demonstrations.batch(2), again.batch(2)
    assert torch.equal(one.response_ids, other.response_ids)
    assert torch.equal(one.prompt_ids, other.prompt_ids)
    assert not torch.equal(one.prompt_ids, again.batch(3).prompt_ids[:, : one.prompt_ids.shape[1]])
    elsewhere = Demonstrations(replace(job.config, seed=1), again.builder, job.policy).batch(2)
    assert one.prompt_ids.tolist() != elsewhere.prompt_ids.tolist()


def test_chains_grow_to_the_lengths_of_the_task(job):
    config = job.config

    def lengths(first, steps=100):
        new = replace(config.trainer.supervised, steps=steps, first_operators=first)
        made = Demonstrations(
            replace(
                config,
                data=replace(config.data, operators=20, max_operators=60),
                trainer=replace(config.trainer, supervised=new),
            ),
            job.demonstrations.builder,
            job.policy,
        )
        return [made.operators(step) for step in range(1, steps + 1)]

    grown = lengths(2)
    assert grown[0] == (2, 3)
    assert grown[24] == (2, 31)
    assert all(range_ == (20, 60) for range_ in grown[49:])
    assert all(low == 2 and high <= 60 for low, high in grown[:49])
    assert sorted(high for _, high in grown) == [high for _, high in grown]
    assert set(lengths(None)) == set(lengths(20)) == {(20, 60)}
    assert lengths(2, steps=1) == [(20, 60)]


def test_chains_of_several_lengths():
    train_split, heldout = (
        [chain.problem for chain in islice(chains(split, seed=0, operators=60, max_operators=200), 600)]
        for split in ("train", "heldout")
    )
    assert set(train_split).isdisjoint(heldout)
    lengths = {(len(problem) - 2) // 2 for problem in train_split}
    assert min(lengths) >= 60
    assert max(lengths) <= 200
    assert len(lengths) > 120
    for chain in islice(chains("heldout", seed=1, operators=60, max_operators=200), 50):
        assert len(chain.worked()) + 1 == 6 * len(chain.moves) + 10
        assert 370 <= len(chain.worked()) + 1 <= 1210
        assert chain.worked().endswith(rf"\boxed{{{chain.answer}}}")
    data = compose("data=long_arithmetic")["data"]
    assert {key: data[key] for key in ("operators", "max_operators")} == BUILTIN["long_arithmetic"]


def test_a_run_from_random_weights_leaves_everything_behind(whole):
    assert [row["step"] for row in metrics(whole)] == [0, 1, 2]
    rows = supervised_rows(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = [path.name for path in sorted((whole / "checkpoints").iterdir())]
    assert names == ["step-000000", "step-000001", "step-000002", "supervised-000002"]
    state = json.loads((whole / "checkpoints/step-000000/trainer/state.json").read_text())
    assert (state["step"], state["supervised_step"]) == (0, None)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["model"]["built"]["hidden_size"] == 32
    model = AutoModelForCausalLM.from_pretrained(whole / "checkpoints/step-000002")
    assert manifest["model"]["parameters"] == model.num_parameters()
    assert (whole / "ratios/step-000002.safetensors").exists()


def test_every_metric_of_the_phase_is_in_the_docs(whole):
    part = (DOCS / "metrics.md").read_text().split("`supervised.jsonl`")[1]
    rows = [json.loads(line) for line in (whole / "supervised.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row} == set(re.findall(r"^- `(\w+)`", part, re.MULTILINE))


def test_rl_starts_with_moments_of_its_own(whole):
    """Adam counts its steps: after step 1 as many as the mini-batches, none of the supervised phase's."""
    from safetensors.torch import load_file

    assert load_file(whole / "checkpoints/step-000000/trainer/optimizer.safetensors") == {}
    after = load_file(whole / "checkpoints/step-000001/trainer/optimizer.safetensors")
    assert {int(value) for name, value in after.items() if name.endswith(".step")} == {2}


def test_the_loss_falls(tmp_path):
    run = train(
        tmp_path / "run",
        *CUT,
        "trainer.steps=1",
        "trainer.supervised.steps=50",
        "trainer.supervised.batch_tokens=600",
        "trainer.supervised.lr=1e-2",
        "trainer.supervised.checkpoint_every=0",
    )
    losses = [row["loss"] for row in supervised_rows(run)]
    assert losses[0] > 5
    assert sum(losses[-5:]) / 5 < 2
    assert [row["lr"] for row in supervised_rows(run)][-1] == pytest.approx(1e-2 / 50)


def test_weights_that_explode_name_the_fix(tmp_path):
    with pytest.raises(RunStopped, match=r"supervised step \d: .*; lower trainer.supervised.lr"):
        train(tmp_path / "run", *CUT, "trainer.supervised.lr=1e38", "trainer.supervised.warmup_steps=0")


def test_less_memory_found_within_the_phase_is_remembered(tmp_path, monkeypatch):
    """A micro-batch that does not fit is halved (step.py); RL and a resumed run begin with what fits."""
    real = Scorer.__call__

    def limited(self, batch, **options):
        if batch.prompt_lengths.sum() + batch.response_mask.sum() > 60:  # one response fits, two do not
            raise torch.OutOfMemoryError
        return real(self, batch, **options)

    monkeypatch.setattr(Scorer, "__call__", limited)
    run = train(tmp_path / "run", *CUT, "trainer.max_tokens_per_micro_batch=100")
    for name in ("supervised-000002", "step-000002"):
        assert json.loads((run / f"checkpoints/{name}/trainer/state.json").read_text())["max_tokens"] == 50


def _train_until(update, run_dir):
    """Train, with a SIGKILL at the beginning of the n-th update."""
    done, real = 0, Updater.update

    def counted(self, batch, *more):
        nonlocal done
        done += 1
        if done == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batch, *more)

    Updater.update = counted
    train(run_dir, *CUT)


@pytest.mark.parametrize("update", [1, 2, 3, 4, 5, 6])  # four of the supervised phase, two of RL
def test_killed_at_any_step_a_run_resumes_to_the_same_bits(update, whole, tmp_path):
    assert run_apart(_train_until, update, tmp_path / "run") == -signal.SIGKILL
    resume(tmp_path / "run")
    same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("update", [1, 4])
def test_a_signal_ends_the_step_and_saves(update, whole, tmp_path, monkeypatch):
    real, done = Updater.update, []

    def signalled(self, batch, *more):
        done.append(1)
        if len(done) == update:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, *more)

    monkeypatch.setattr(Updater, "update", signalled)
    with pytest.raises(RunInterrupted, match=rf"stopped after supervised step {update}; go on with: kpo train resume="):
        train(tmp_path / "run", *CUT)
    resume(tmp_path / "run")
    same_run(tmp_path / "run", whole)


def test_in_slices_a_run_comes_to_the_same_bits(whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RunPaused, match=r"stopped after supervised step 1, trainer.stop_after=0.001 seconds are over"):
        train(run, *CUT, "trainer.stop_after=0.001")
    slices = 1
    while not (run / "summary.json").exists():
        try:
            resume(run)
        except RunPaused:
            slices += 1
    assert slices == 5  # every step but the last ends one
    same_run(run, whole)


def test_slices_are_no_failures(kpo, tmp_path):
    slow = [*CUT, "data.limit=16", "data.heldout=2", "trainer.prompts_per_step=2", "trainer.group_size=2"]
    slow += ["trainer.mini_batches=2", "run_dir=run"]
    result = kpo("train", *slow, "trainer.stop_after=0.001")
    assert result.code == 0, result.err
    assert "stopped after supervised step 1" in result.err
    assert "kpo train resume=run" in result.err
    result = kpo("train", "resume=run", "trainer.stop_after=null")
    assert result.code == 0, result.err
    assert Path("run/summary.json").exists()
    result = kpo("eval", "checkpoint=run", "benchmarks=[arithmetic]", "eval.n=1", "eval.max_tokens=8", "eval.limit=3")
    assert result.code == 0, result.err
    assert "run-step-000002" in result.out


def test_resuming_with_other_weights_is_refused(whole, tmp_path):
    with pytest.raises(UserError, match=r"supervised.steps=9 differs from the run's own 4"):
        resume(whole, "trainer.supervised.steps=9")
    with pytest.raises(UserError, match=r"hidden_size=64 differs from the run's own 32"):
        resume(whole, "experiment=long_arithmetic_cpu", "model.architecture.hidden_size=64")


def test_random_weights_are_the_same_each_time():
    config = train_config(compose(*(o for o in CUT if not o.startswith("trainer.")))).model
    torch.manual_seed(5)
    one = load_policy(config).model.state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))  # building took nothing from the generator
    other = load_policy(config).model.state_dict()
    assert same_weights(one, other)
    assert not any(parameter.isnan().any() for parameter in one.values())


def test_the_experiment_is_the_papers_filter_on_a_small_model():
    for method in ("kpo", "grpo_tight", "grpo"):
        config = train_config(compose("experiment=long_arithmetic", f"method={method}"))
        assert config.filter == (
            {"name": "kalman", "q": 1e-6, "v": 1.0, "time_constant": None, "p0": 0.0}
            if method == "kpo"
            else {"name": "identity"}
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(config.model))
    assert 2e7 < model.num_parameters() < 5e7
    longest = 6 * config.data.max_operators + 10
    assert longest <= config.rollout.max_response_tokens == 2048
    assert config.rollout.max_prompt_tokens == 2 * config.data.max_operators + 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=x.jsonl", "trainer.supervised.steps=3"], r"data.path=x.jsonl has none; take data=arithmetic"),
        (["trainer.kl_coefficient=0.1"], r"trainer.kl_coefficient=0.1 exclude each other"),
        (["model.path=DIR"], r"model.path=DIR has weights of its own, but model=small"),
        (["model.architecture.num_key_value_heads=3"], r"num_attention_heads=4 must be a multiple of"),
        (["model.architecture.head_dim=7"], r"head_dim=7 must be even"),
        (["model.architecture.hidden_size=0"], r"hidden_size=0 must be a finite number above 0"),
        (["data.max_operators=1"], r"data.max_operators=1 must be at least data.operators=3"),
        (["trainer.supervised.step_noise=1.5"], r"step_noise=1.5 must be from 0 to 1, a probability"),
        (["trainer.supervised.batch_tokens=0"], r"supervised.batch_tokens=0 must be at least 1"),
        (["trainer.stop_after=0"], r"trainer.stop_after=0.0 must be a finite number above 0"),
        (
            ["rollout.max_response_tokens=20"],
            r"chain of 5 operators takes 40 tokens, but rollout.max_response_tokens=20",
        ),
    ],
)
def test_errors_name_the_fix_and_leave_nothing_behind(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        train(tmp_path / "run", *CUT, *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_part_of_the_architecture_is_named():
    raw = compose("model=small")
    raw["model"]["architecture"]["hiden_size"] = 3
    with pytest.raises(UserError, match=r"unknown key model.architecture.hiden_size; did you mean hidden_size"):
        train_config(raw)
    assert isinstance(train_config(compose("model=small")).model.architecture, Architecture)
