"""The sampler's log-probabilities serve as old ones only as long as they are the trainer's."""

import json
import os
import signal

import pytest
import torch
from small_runs import metrics, resume, train
from test_on_policy import scorer_of, still
from test_scorer import ragged_batch

from kpo_cli.core import TruncatedImportance
from kpo_cli.errors import RunInterrupted, RunStopped, SamplingFailed, UserError
from kpo_cli.rollout import HFSampler, trial


def batch_and_updater(noise, serves=True):
    """As sampled with log-probabilities that are off by `noise` to either side, from a stand-in for a sampler."""
    scorer = scorer_of("qwen3", False, True)
    batch = ragged_batch(prompts=8)
    with torch.no_grad():
        log_probs, _ = scorer(batch)
    sign = 1 - 2 * (torch.arange(log_probs.shape[1]) % 2)
    batch.rollout_log_probs.copy_(torch.where(batch.response_mask, log_probs + noise * sign, 0.0))
    updater = still(scorer, lr=1e-2)
    updater.sampler_log_probs, updater.watched = serves, True
    updater.correction = TruncatedImportance(2.0)
    return batch, updater


def weights_of(updater):
    return [parameter.detach().clone() for parameter in updater.scorer.model.parameters()]


def test_a_gap_is_seen_before_the_first_step_and_old_ones_are_computed():
    batch, updater = batch_and_updater(1e-3)
    record = updater.update(batch)
    assert not updater.trusted
    assert updater.gap.mean == pytest.approx(1e-3, rel=1e-2)
    with torch.no_grad():  # of the weights before any step, as an updater that never believed would have them
        other_batch, never = batch_and_updater(1e-3, serves=False)
        never.distrust()
    expected = never.update(other_batch)
    assert torch.equal(record.old_log_probs, expected.old_log_probs)
    assert "correction_weight" in record.means
    assert all(torch.equal(a, b) for a, b in zip(weights_of(updater), weights_of(never), strict=True))
    later = record.mini_batch_index > 0
    gap = (batch.rollout_log_probs - record.old_log_probs)[later][batch.response_mask[later]].abs()
    assert gap.min() > 5e-4


def test_rounding_changes_nothing():
    batch, updater = batch_and_updater(1e-6)
    record = updater.update(batch)
    assert updater.trusted
    later = record.mini_batch_index > 0
    assert torch.equal(record.old_log_probs[later], batch.rollout_log_probs[later])
    assert "correction_weight" not in record.means


def test_one_token_that_is_far_off_is_seen():
    batch, updater = batch_and_updater(0.0)
    batch.rollout_log_probs[0, 0] += 0.05
    updater.update(batch)
    assert not updater.trusted


@pytest.mark.parametrize("recorded", [True, False])
def test_a_later_mini_batch_is_looked_at_where_it_was_scored(recorded):
    """As in a step whose ratios are recorded: a sampler may be off in few responses, and none of them in the first."""
    batch, updater = batch_and_updater(0.0)
    batch.rollout_log_probs[-1, 0] += 0.05
    record = updater.update(batch, for_record=recorded)
    assert record.mini_batch_index[-1] > 0
    assert updater.trusted != recorded


@pytest.mark.parametrize("noise", [0.2, float("nan")])
def test_a_gross_gap_stops_with_the_weights_as_they_were(noise):
    batch, updater = batch_and_updater(noise)
    before = weights_of(updater)
    with pytest.raises(SamplingFailed, match="the sampler does not sample the policy"):
        updater.update(batch)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(updater), before, strict=True))


def off_from_step(monkeypatch, first, noise):
    """A stand-in for a sampler whose log-probabilities are off from a step on; tokens stay as they are."""
    sample = HFSampler.sample

    def perturbed(self, prompts, samples, seed, **options):
        groups = sample(self, prompts, samples, seed, **options)
        if len(seed) > 2 and seed[1] == 1 and seed[2] >= first:  # seed, ROLLOUT, step, ...
            for response in (response for group in groups for response in group):
                response.log_probs[:] = [value - noise for value in response.log_probs]
        return groups

    monkeypatch.setattr(HFSampler, "sample", perturbed)


RUN = ["trainer.steps=4", "trainer.ratios_every=0"]


def test_a_run_goes_on_without_them_and_so_does_what_resumes_it(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        off_from_step(patch, 3, 1e-3)
        train(tmp_path / "run", *RUN)
    lines = [line for line in capsys.readouterr().out.splitlines() if "sampler's log-probabilities differ" in line]
    assert len(lines) == 1
    assert "step 3" in lines[0]
    rows = metrics(tmp_path / "run")
    assert [row.get("sampler_distrusted") for row in rows] == [None, None, None, 1, 1]
    assert rows[3]["rollout_log_prob_gap"] == pytest.approx(1e-3, rel=0.05)
    assert "correction_weight" in rows[4]
    assert "correction_weight" not in rows[2]
    state = tmp_path / "run/checkpoints/step-000004/trainer/state.json"
    assert json.loads(state.read_text())["distrusted"] is True
    resume(tmp_path / "run", "trainer.steps=5")  # with a sampler that is right again
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sampler's log-probabilities" in line]
    assert line.startswith("warning:")
    assert "as an earlier step saw: old ones are the trainer's" in line
    assert metrics(tmp_path / "run")[-1]["sampler_distrusted"] == 1


def ended_in_step(monkeypatch, number):
    """A stand-in for whoever sends SIGTERM while a step is sampled."""
    sample = HFSampler.sample

    def ended(self, prompts, samples, seed, **options):
        if len(seed) > 2 and tuple(seed[1:3]) == (1, number):
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, prompts, samples, seed, **options)

    monkeypatch.setattr(HFSampler, "sample", ended)


def test_a_signal_in_the_step_in_which_a_gap_appears_loses_neither(tmp_path, monkeypatch, capsys):
    off_from_step(monkeypatch, 2, 1e-3)
    ended_in_step(monkeypatch, 2)
    with pytest.raises(RunInterrupted, match="stopped after step 2; go on with"):
        train(tmp_path / "run", *RUN)
    assert "step 2: the sampler's log-probabilities differ" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[-1]["sampler_distrusted"] == 1
    resume(tmp_path / "run", "trainer.steps=3")
    assert "as an earlier step saw" in capsys.readouterr().out
    assert metrics(tmp_path / "run")[-1]["sampler_distrusted"] == 1


def test_a_signal_in_the_step_in_which_a_gross_gap_appears_saves_the_step_before(tmp_path, monkeypatch):
    off_from_step(monkeypatch, 2, 0.5)
    ended_in_step(monkeypatch, 2)
    with pytest.raises(RunStopped, match=r"step 2: the sampler does not sample the policy.*is saved, go on with"):
        train(tmp_path / "run", *RUN)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]


def test_a_run_whose_sampler_goes_astray_stops_with_the_last_whole_step(tmp_path, monkeypatch):
    off_from_step(monkeypatch, 3, 0.5)
    with pytest.raises(RunStopped, match=r"step 3: the sampler does not sample the policy.*is saved, go on with"):
        train(tmp_path / "run", *RUN)
    assert (tmp_path / "run/checkpoints/step-000002").is_dir()
    assert len(metrics(tmp_path / "run")) == 3


def test_a_model_that_cannot_be_sampled_leaves_no_directory(tmp_path, monkeypatch):
    def refused(*_):  # a stand-in for a model of which no way is right
        raise RuntimeError("no such thing")

    monkeypatch.setattr(trial._Trials, "_gap", refused)
    with pytest.raises(UserError, match="this model cannot be sampled: with a cache, RuntimeError: no such thing"):
        train(tmp_path / "run", *RUN)
    assert not (tmp_path / "run").exists()
