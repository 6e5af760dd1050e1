"""One rollout batch: rows, log-probabilities, and the invariance of the update."""

import copy

import pytest
import torch

from kpo_cli.config import ModelConfig
from kpo_cli.core import load_objective
from kpo_cli.policy import load_policy
from kpo_cli.rollout import HFSampler
from kpo_cli.training.batch import make_batch
from kpo_cli.training.step import Updater, response_log_probs

PROMPTS = [b"8-6-9+7?", b"1+1?", b"3*3*3-2-2?", b"9-9?"]


@pytest.fixture(scope="module")
def policy():
    torch.set_num_threads(1)
    return load_policy(ModelConfig("tiny", None, "auto", {}, "auto", "cpu", False))


@pytest.fixture(scope="module")
def batch(policy):
    prompts = [policy.tokenizer(p.decode())["input_ids"] for p in PROMPTS]
    sampler = HFSampler(policy.model, stop_ids=policy.stop_ids, temperature=0.8, max_response_tokens=24, batch_size=64)
    groups = sampler.sample(prompts, 4, (11,))
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(0))
    return make_batch(prompts, groups, torch.zeros(16), advantages)


def updater(policy, method="kpo", **changes):
    model = copy.deepcopy(policy.model)
    settings = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
        "objective": load_objective(method, **({"time_constant": 5} if method.startswith("kpo") else {})),
        "temperature": 0.8,
        "mini_batches": 2,
        "micro_batch": 16,
        "max_grad_norm": 1e9,
        "mask_truncated": False,
    }
    return Updater(**(settings | changes))


def test_rows_hold_what_was_sampled(policy, batch):
    assert len(batch) == 16
    assert batch.prompt_index.tolist() == [i for i in range(4) for _ in range(4)]
    assert batch.truncated.any()  # 24 tokens cut some
    assert not batch.truncated.all()
    ends = batch.response_ids[torch.arange(16), batch.response_mask.sum(-1) - 1]
    assert torch.equal(torch.isin(ends, torch.tensor(policy.stop_ids)), ~batch.truncated)
    part = batch.rows(torch.tensor([3, 9]))
    assert part.response_ids.shape[1] == int(part.response_mask.sum(-1).max())
    assert part.prompt_index.tolist() == [0, 2]


def test_training_log_probs_are_the_samplers(policy, batch):
    log_probs, entropy = response_log_probs(policy.model, batch, 0.8)
    gap = (log_probs - batch.rollout_log_probs).abs()[batch.response_mask]
    assert gap.max() < 1e-4
    assert (entropy[batch.response_mask] >= 0).all()
    assert torch.isfinite(log_probs).all()


@pytest.mark.parametrize("method", ["kpo", "gspo", "token_clip"])
def test_the_update_does_not_depend_on_the_micro_batch(policy, batch, method):
    whole = updater(policy, method)
    record = whole.update(batch)
    for size in (1, 3, 5):
        parts = updater(policy, method, micro_batch=size)
        other = parts.update(batch)
        for one, two in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
            assert torch.allclose(one, two, atol=2e-6)
        assert torch.allclose(record.log_ratio, other.log_ratio, atol=1e-5)
        assert record.grad_norms == pytest.approx(other.grad_norms, rel=1e-3)
        assert record.sums.tokens == other.sums.tokens == int(batch.response_mask.sum())


def test_the_first_mini_batch_is_exactly_on_policy_and_the_second_is_not(policy, batch):
    record = updater(policy).update(batch)
    assert record.mini_batch_index.tolist() == [0] * 8 + [1] * 8
    first, second = record.log_ratio[:8], record.log_ratio[8:]
    assert (first == 0).all()
    assert second[batch.response_mask[8:]].abs().max() > 1e-4
    assert (record.filtered_log_ratio[:8] == 0).all()
    assert len(record.grad_norms) == 2


def test_old_log_probs_are_those_before_the_first_update(policy, batch):
    record = updater(policy).update(batch)
    log_probs, _ = response_log_probs(policy.model, batch, 0.8)
    assert torch.allclose(record.old_log_probs, torch.where(batch.response_mask, log_probs, 0), atol=1e-5)


def test_truncated_responses_can_be_left_out(policy, batch):
    masked = updater(policy, mask_truncated=True, mini_batches=1)
    record = masked.update(batch)
    kept = batch.rows((~batch.truncated).nonzero().squeeze(-1))
    other = updater(policy, mini_batches=1)
    other.update(kept)
    for one, two in zip(masked.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=2e-6)
    assert record.sums.tokens == int(kept.response_mask.sum())


def test_a_mini_batch_with_nothing_to_learn_from_changes_nothing(policy, batch):
    rows = batch.rows(batch.truncated.nonzero().squeeze(-1))
    job = updater(policy, mask_truncated=True, mini_batches=1)
    before = copy.deepcopy(job.model.state_dict())
    record = job.update(rows)
    assert record.sums.tokens == 0
    assert all(torch.equal(before[name], value) for name, value in job.model.state_dict().items())
