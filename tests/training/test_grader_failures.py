"""A failure of the grader is no zero: no signal in training, a range in evaluation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import metrics as metrics_of
from small_runs import train

from kpo_cli.analysis.source import find_source, read_file
from kpo_cli.evaluation.heldout import evaluate_heldout
from kpo_cli.evaluation.results import summarise
from kpo_cli.policy.response import Response
from kpo_cli.rewards import Verdict
from kpo_cli.training import loop
from kpo_cli.training.loop import Group, _sampling_metrics

RESPONSE = Response([1, 2], [0.0, 0.0], True)


def test_a_failed_response_is_left_out_of_its_groups_statistics():
    prompt = SimpleNamespace(token_ids=[1])
    pool = [Group(prompt, [RESPONSE] * 3, [1.0, math.nan, 0.0]), Group(prompt, [RESPONSE] * 3, [1.0, 1.0, math.nan])]
    metrics = _sampling_metrics(pool)
    assert [group.flat for group in pool] == [False, True]
    assert metrics["reward_mean"] == 0.75
    assert metrics["reward_std"] == 0.5
    nothing = _sampling_metrics([Group(prompt, [RESPONSE] * 2, [math.nan] * 2)])
    assert math.isnan(nothing["reward_mean"])
    assert math.isnan(nothing["reward_std"])


def test_a_run_goes_on_without_the_rewards_that_nobody_knows(tmp_path, monkeypatch, capsys):
    """A quarter of the answers meets a fault of the grader, in the second step all; records of such steps are read."""
    calls = []

    def faulty(job, prompts, responses):
        calls.append(1)
        verdicts = [Verdict(i % 2 == 0, "1", "exact") for i in range(sum(map(len, responses)))]
        fault = Verdict(False, "1", "error")
        return [fault if i % 4 == 0 or len(calls) == 2 else verdict for i, verdict in enumerate(verdicts)]

    monkeypatch.setattr(loop, "_grade", faulty)
    run = train(tmp_path / "run", "trainer.steps=3")
    rows = metrics_of(run)[1:]
    assert [row["grader_failures"] for row in rows] == [4, 16, 4]
    assert [row["reward_mean"] for row in rows] == [pytest.approx(1 / 3), None, pytest.approx(1 / 3)]
    assert all(row["grad_norm"] > 0 for row in (rows[0], rows[2]))
    out = capsys.readouterr().out
    assert "reward 0.33 (4 grader failures)" in out
    assert "reward none (16 grader failures)" in out
    (record, _), *_ = read_file(find_source(run).files[0])
    assert np.isnan(record.rewards).sum() == 4
    assert not record.advantages[np.isnan(record.rewards)].any()


def row(correct: bool, failed: bool = False) -> dict:
    reason = "limit" if failed else "exact"
    return {
        "correct": correct,
        "grader_failed": failed,
        "extracted": "7",
        "finish": "stop",
        "tokens": 3,
        "reason": reason,
    }


def test_an_evaluation_with_failures_says_what_it_would_be_if_they_were_right():
    table = [[row(True), row(False)], [row(False), row(False, failed=True)]]
    results = summarise(table, 0)
    assert results["avg_at_n"]["value"] == 0.25
    assert results["if_failed_are_right"]["avg_at_n"] == 0.5
    assert results["if_failed_are_right"]["pass_at_n"] == 1.0
    assert summarise([[row(True), row(False)]] * 2, 0)["if_failed_are_right"] is None


def test_held_out_problems_have_both_ends(monkeypatch: pytest.MonkeyPatch):
    verdicts = [Verdict(True, "1", "exact"), Verdict(False, "1", "limit")]
    monkeypatch.setattr("kpo_cli.evaluation.heldout.grade_batch", lambda pairs: verdicts)
    prompts = [
        SimpleNamespace(token_ids=[1], opening="", problem=SimpleNamespace(id=i, problem="", answer="1")) for i in "ab"
    ]
    sampler = SimpleNamespace(sample=lambda *args, **kwargs: [[RESPONSE], [RESPONSE]])
    metrics = evaluate_heldout(sampler, lambda ids: "", prompts, (0,)).metrics()
    assert metrics["accuracy_greedy"] == 0.5
    assert metrics["accuracy_greedy_if_right"] == metrics["accuracy_sampled_if_right"] == 1.0
    assert metrics["eval_grader_failures"] == 2
