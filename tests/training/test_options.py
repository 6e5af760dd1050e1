"""What methods and filters ask of the trainer: fitted noise, dynamic sampling, overlong shaping, KL, correction."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from small_runs import metrics, raw_config, resume, rewrite_state, same_weights, train, weights
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig

from kpo_cli.config import train_config
from kpo_cli.policy.fidelity import Way, choose_way
from kpo_cli.policy.load import load_policy
from kpo_cli.policy.response import Response
from kpo_cli.training import assemble
from kpo_cli.training.loop import Group, _overlong_penalty


@pytest.mark.parametrize("name", ["kalman_adaptive", "kalman_hetero_fitted"])
def test_a_fitted_filter_goes_on_from_its_checkpoint_to_the_same_bits(name, tmp_path):
    options = [f"filter={name}", "trainer.warmup_steps=1"]
    whole = train(tmp_path / "whole", *options)
    part = train(tmp_path / "part", *options, "trainer.steps=2")
    resume(part, "trainer.steps=3")
    assert same_weights(weights(part, 3), weights(whole, 3))
    fitted = [row["filter_v"] for row in metrics(whole)[1:]]
    assert fitted == [row["filter_v"] for row in metrics(part)[1:]]
    assert fitted[0] != 1.0  # the fit has moved it from where it starts
    state = json.loads((part / "checkpoints/step-000003/trainer/state.json").read_text())
    assert len(state["filter_sums"]) > 10


def test_sums_of_an_older_filter_are_forgotten_on_resuming(tmp_path):
    """Before checkpoints had format 2, kalman_adaptive had 123 sums; the filter begins again with the next batch."""
    run = train(tmp_path / "run", "filter=kalman_adaptive", "trainer.steps=1")
    rewrite_state(run / "checkpoints/step-000001", format="kpo-checkpoint-1", filter_sums=[1.0] * 123)
    resume(run, "trainer.steps=2")
    state = json.loads((run / "checkpoints/step-000002/trainer/state.json").read_text())
    assert (state["format"], len(state["filter_sums"])) == ("kpo-checkpoint-2", 302)


def test_an_adaptive_filter_on_its_floor_says_so(tmp_path, capsys):
    train(tmp_path / "run", "filter=kalman_adaptive", "filter.floor=0.5", "trainer.steps=2")
    out = capsys.readouterr().out
    assert out.count("the adaptive filter sees no drift beyond noise; Q/v stays on its floor 0.5") == 1


def test_dynamic_sampling_looks_for_groups_with_variance(tmp_path):
    plain = train(tmp_path / "plain", "trainer.steps=1")
    run = train(tmp_path / "run", "method=dapo", "trainer.steps=2", "trainer.dynamic_sampling=3")
    before, rows = metrics(plain)[1], metrics(run)[1:]
    # Twelve tokens suffice for a guess: most groups of four have no right answer, so it has to look further.
    assert before["zero_variance_fraction"] > 0
    assert all(1 < row["rollouts"] <= 3 for row in rows)
    prompts = sum(row["rollouts"] for row in rows) * 4
    assert rows[-1]["epoch"] == prompts / 32
    # Rewards are those of everything that was sampled: the groups it kept would flatter.
    assert rows[0]["reward_mean"] < 0.25
    assert rows[0]["zero_variance_fraction"] > 0
    resumed = train(tmp_path / "part", "method=dapo", "trainer.steps=1", "trainer.dynamic_sampling=3")
    resume(resumed, "trainer.steps=2")
    assert same_weights(weights(resumed, 2), weights(run, 2))


def test_the_overlong_penalty_is_linear_in_the_last_share_of_the_limit():
    responses = [Response([0] * length, [0.0] * length, True) for length in (1, 80, 85, 90, 100)]
    config = SimpleNamespace(
        rollout=SimpleNamespace(max_response_tokens=100), trainer=SimpleNamespace(overlong_buffer=0.2)
    )
    penalty = _overlong_penalty(SimpleNamespace(config=config), [Group(None, responses, [1.0] * 5)])
    assert penalty.tolist() == pytest.approx([0, 0, 0.25, 0.5, 1.0])


def test_the_overlong_penalty_shapes_advantages_and_not_the_reported_reward(tmp_path):
    run = train(tmp_path / "run", "trainer.overlong_buffer=0.9", "trainer.steps=1")
    row = metrics(run)[1]
    assert row["shaped_reward_mean"] < row["reward_mean"]
    plain = train(tmp_path / "plain", "trainer.steps=1")
    assert metrics(plain)[1]["reward_mean"] == row["reward_mean"]
    assert not same_weights(weights(run, 1), weights(plain, 1))


def test_a_reference_kl_holds_the_policy_back(tmp_path):
    free = train(tmp_path / "free", "trainer.lr=1e-3")
    held = train(tmp_path / "held", "trainer.lr=1e-3", "trainer.kl_coefficient=10")
    assert metrics(held)[1]["ref_kl"] >= 0
    start = weights(train(tmp_path / "start", "trainer.lr=1e-12", "trainer.steps=1"), 1)

    def moved(run):
        return sum(float((value - start[name]).square().sum()) for name, value in weights(run, 3).items())

    assert moved(held) < moved(free)


def test_the_reference_of_a_resumed_run_is_its_first_policy(tmp_path):
    whole = train(tmp_path / "whole", "trainer.kl_coefficient=1", "trainer.warmup_steps=1")
    part = train(tmp_path / "part", "trainer.kl_coefficient=1", "trainer.warmup_steps=1", "trainer.steps=1")
    resume(part, "trainer.steps=3")
    assert same_weights(weights(part, 3), weights(whole, 3))


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_a_correction_is_1_where_the_engines_agree(correction, tmp_path):
    run = train(tmp_path / "run", f"rollout.correction={correction}", "trainer.steps=1")
    row = metrics(run)[1]
    assert row["correction_weight"] == pytest.approx(1, abs=1e-4)
    assert row["correction_cut_fraction"] == 0
    plain = train(tmp_path / "plain", "trainer.steps=1")
    for one, two in zip(weights(run, 1).values(), weights(plain, 1).values(), strict=True):
        assert torch.allclose(one, two, atol=1e-4)


def test_an_entropy_bonus_keeps_the_entropy_up(tmp_path):
    plain = train(tmp_path / "plain", "trainer.lr=1e-3")
    bonus = train(tmp_path / "bonus", "trainer.lr=1e-3", "trainer.entropy_bonus=1")
    assert metrics(bonus)[3]["entropy"] > metrics(plain)[3]["entropy"]


def test_advantages_without_the_standard_deviation(tmp_path):
    run = train(tmp_path / "run", "method=dr_grpo", "trainer.steps=1")
    plain = train(tmp_path / "plain", "method=dr_grpo", "trainer.advantage_std=true", "trainer.steps=1")
    assert metrics(run)[1]["grad_norm"] < metrics(plain)[1]["grad_norm"]


def test_the_reference_goes_the_way_of_the_policy():
    raw = raw_config("trainer.kl_coefficient=0.1")
    config = train_config({key: raw[key] for key in raw if key not in ("run_dir", "resume", "overrides")})
    policy = load_policy(config.model)
    for way in (policy.way, Way("sdpa", policy.way.experts), Way("eager", policy.way.experts)):
        scorer = way.scorer(policy.model, 0.8)
        reference = assemble._reference(config, dataclasses.replace(policy, way=way), scorer)
        assert (reference.packed, reference.temperature) == (way.packed, 0.8)
        assert reference.model.config._attn_implementation == way.attention
        assert reference.model is not policy.model


def test_a_model_that_pads_says_what_it_costs():
    shape = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}

    def told(config):
        model = AutoModelForCausalLM.from_config(config).eval()
        way = choose_way(model)
        return way, assemble._padding(SimpleNamespace(model=model, way=way))

    way, lines = told(LlamaConfig(**shape))
    assert way.packed
    assert lines == []
    way, (line,) = told(GraniteConfig(**shape, logits_scaling=3.0))
    assert not way.packed
    assert line.startswith("warning: this model's forward passes are padded, not packed (log-probabilities differ by ")
    assert line.endswith("1,024 tokens hold at least 0.031 GiB of logits of the vocabulary of 4,096")
