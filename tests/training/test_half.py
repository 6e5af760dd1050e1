"""A policy in bfloat16: its sampler is checked and corrected as an engine is; one in float32 needs neither."""

import dataclasses

import pytest
from small_runs import metrics, raw_config, resume, same_weights, train, weights

from kpo_cli.config import train_config
from kpo_cli.core import MaskedImportance, TruncatedImportance
from kpo_cli.errors import SamplingFailed
from kpo_cli.policy.load import load_policy
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.threads import Workers
from kpo_cli.training.assemble import _correction
from kpo_cli.training.sampler import make_sampler, try_ways


def config_of(*overrides):
    raw = raw_config("model.device=cpu", *overrides)
    return train_config({key: raw[key] for key in raw if key not in ("run_dir", "resume", "overrides")})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout=hf"], None),
        (["rollout=hf", "model.dtype=float32"], None),
        (["rollout=hf", "model.dtype=bfloat16"], TruncatedImportance(2.0)),
        (["rollout=hf", "model.dtype=bfloat16", "rollout.correction_cap=3"], TruncatedImportance(3.0)),
        (["rollout=hf", "model.dtype=bfloat16", "rollout.correction=none"], None),
        (["rollout=hf", "rollout.correction=mask"], MaskedImportance(0.5, 2.0)),
        (["rollout=vllm"], TruncatedImportance(2.0)),
        (["rollout=vllm", "model.dtype=bfloat16"], TruncatedImportance(2.0)),
    ],
)
def test_the_correction_is_on_where_the_sampler_is_not_exact(overrides, expected):
    assert _correction(config_of(*overrides)) == expected


def test_a_run_in_bfloat16_says_how_far_its_sampler_is_off(tmp_path):
    whole = train(tmp_path / "whole", "model.device=cpu", "model.dtype=bfloat16", "rollout=hf")
    rows = metrics(whole)[1:]
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["sampler_gap_mean"] < 0.1
        assert row["sampler_gap_mean"] <= row["sampler_gap_max"]
        assert row["correction_weight"] == pytest.approx(1, abs=0.05)
    part = train(tmp_path / "part", "model.device=cpu", "model.dtype=bfloat16", "rollout=hf", "trainer.steps=1")
    resume(part, "trainer.steps=3")
    assert same_weights(weights(part, 3), weights(whole, 3))


def test_a_run_in_float32_has_neither(tmp_path):
    (_, row) = metrics(train(tmp_path / "run", "model.device=cpu", "rollout=hf", "trainer.steps=1"))
    assert not {"sampler_gap_mean", "sampler_gap_max", "correction_weight"} & set(row)


def test_a_sampler_that_samples_another_policy_is_found_out():
    config = config_of("rollout=hf", "model.dtype=bfloat16")
    policy = load_policy(config.model)
    scorer = Scorer(policy.model, 1.0, True, packed=True)
    prompts = [[5, 6, 7], [8, 9]]
    trial = try_ways(config, policy, scorer, prompts)
    policy.narrow()
    made = make_sampler(config, policy, scorer, prompts, Workers(), lambda *_: None, 0, trial)
    sampler, check = made.sampler, made.check
    assert made.notes == []
    groups = sampler.sample(prompts, 2, (0,))
    assert check(prompts, groups)["sampler_gap_mean"] < 0.05
    stale = [
        [dataclasses.replace(response, log_probs=[value - 0.3 for value in response.log_probs]) for response in group]
        for group in groups
    ]
    with pytest.raises(SamplingFailed):
        check(prompts, stale)
