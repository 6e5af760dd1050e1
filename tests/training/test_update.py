"""One rollout batch: rows, log-probabilities, and the invariance of the update."""

import copy
import dataclasses

import pytest
import torch
from small_runs import model_config

from kpo_cli.core import load_objective
from kpo_cli.policy.batch import make_batch
from kpo_cli.policy.load import load_policy
from kpo_cli.policy.scorer import Scorer, pack
from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import HFSampler
from kpo_cli.training.step import Updater

PROMPTS = [b"8-6-9+7?", b"1+1?", b"3*3*3-2-2?", b"9-9?"]


@pytest.fixture(scope="module")
def policy():
    torch.set_num_threads(1)
    loaded = load_policy(model_config("model.device=cpu"))
    assert loaded.way.packed
    return loaded


@pytest.fixture(scope="module")
def batch(policy):
    prompts = [policy.tokenizer(p.decode())["input_ids"] for p in PROMPTS]
    sampler = HFSampler(policy.model, stop_ids=policy.stop_ids, temperature=0.8, max_response_tokens=24, batch_size=64)
    groups = sampler.sample(prompts, 4, (11,))
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(0))
    return make_batch(prompts, groups, torch.zeros(16), advantages)


def updater(policy, method="kpo", packed=True, **changes):
    model = copy.deepcopy(policy.model)
    settings = {
        "scorer": Scorer(model, 0.8, packed=packed),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
        "objective": load_objective(method, **({"time_constant": 5} if method.startswith("kpo") else {})),
        "mini_batches": 2,
        "max_tokens": 10_000,
        "max_grad_norm": 1e9,
        "mask_truncated": False,
    }
    return Updater(**(settings | changes))


def parameters(job):
    return list(job.scorer.model.parameters())


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
    log_probs, entropy = Scorer(policy.model, 0.8, packed=True)(batch)
    gap = (log_probs - batch.rollout_log_probs).abs()[batch.response_mask]
    assert gap.max() < 1e-4
    assert (entropy[batch.response_mask] >= 0).all()
    assert torch.isfinite(log_probs).all()


@pytest.mark.parametrize("method", ["kpo", "gspo", "token_clip"])
def test_the_update_does_not_depend_on_micro_batches_packing_or_workers(policy, batch, method):
    whole = updater(policy, method)
    record = whole.update(batch)
    assert len(whole.scorer.split(batch, torch.arange(len(batch)), whole.max_tokens)) == 1
    for changes in (
        {"max_tokens": 1},
        {"max_tokens": 100},
        {"max_tokens": 100, "workers": Workers(2)},
        {"max_tokens": 100, "packed": False},
    ):
        parts = updater(policy, method, **changes)
        other = parts.update(batch)
        for one, two in zip(parameters(whole), parameters(parts), strict=True):
            assert torch.allclose(one, two, atol=2e-6)
        assert torch.allclose(record.log_ratio, other.log_ratio, atol=1e-5)
        assert record.grad_norms == pytest.approx(other.grad_norms, rel=1e-3)
        assert record.sums.tokens == other.sums.tokens == int(batch.response_mask.sum())


def test_the_number_of_workers_changes_no_bit(policy, batch):
    alone, shared = (updater(policy, max_tokens=100, workers=Workers(count)) for count in (1, 3))
    records = alone.update(batch), shared.update(batch)
    assert all(torch.equal(one, two) for one, two in zip(parameters(alone), parameters(shared), strict=True))
    assert torch.equal(records[0].log_ratio, records[1].log_ratio)
    assert records[0].grad_norms == records[1].grad_norms
    assert records[0].sums == records[1].sums


@pytest.mark.parametrize("workers", [1, 2])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(policy, batch, workers, monkeypatch):
    expected = updater(policy)
    expected.update(batch)
    real = Scorer.__call__

    def short_of_memory(self, part, *arguments, **keywords):
        if int(part.response_mask.sum()) > 90:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, part, *arguments, **keywords)

    monkeypatch.setattr(Scorer, "__call__", short_of_memory)
    job = updater(policy, max_tokens=800, workers=Workers(workers))
    record = job.update(batch)
    assert job.max_tokens in (50, 100)
    assert record.sums.tokens == int(batch.response_mask.sum())
    for one, two in zip(parameters(expected), parameters(job), strict=True):
        assert torch.allclose(one, two, atol=2e-6)


def test_a_response_that_does_not_fit_by_itself_is_an_error(policy, batch, monkeypatch):
    def no_memory(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Scorer, "__call__", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        updater(policy).update(batch)


def test_the_samplers_log_probs_can_be_the_old_ones(policy, batch):
    job = updater(policy, sampler_log_probs=True)
    record = job.update(batch)
    assert (record.log_ratio[:8] == 0).all()
    assert torch.equal(record.old_log_probs[8:], torch.where(batch.response_mask, batch.rollout_log_probs, 0)[8:])
    other = updater(policy).update(batch)
    assert torch.allclose(other.log_ratio, record.log_ratio, atol=1e-4)
    recorded = updater(policy, sampler_log_probs=True).update(batch, for_record=True)
    assert torch.equal(other.log_ratio, recorded.log_ratio)


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
    log_probs, _ = Scorer(policy.model, 0.8, packed=True)(batch)
    assert torch.allclose(record.old_log_probs, torch.where(batch.response_mask, log_probs, 0), atol=1e-5)


def test_truncated_responses_can_be_left_out(policy, batch):
    masked = updater(policy, mask_truncated=True, mini_batches=1)
    record = masked.update(batch)
    kept = batch.rows((~batch.truncated).nonzero().squeeze(-1))
    other = updater(policy, mini_batches=1)
    other.update(kept)
    for one, two in zip(masked.scorer.model.parameters(), other.scorer.model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=2e-6)
    assert record.sums.tokens == int(kept.response_mask.sum())


@pytest.mark.parametrize("method", ["kpo", "gspo"])
def test_truncated_responses_have_their_ratios_all_the_same(policy, batch, method):
    """z of the second mini-batch is that of the policy after the first, for what is learned from and what is not."""
    batch = dataclasses.replace(batch, truncated=torch.arange(16) % 3 == 0)
    record = updater(policy, method, mask_truncated=True).update(batch)
    first = updater(policy, method, mask_truncated=True, mini_batches=1)
    first.update(batch.rows(torch.arange(8)))
    before, after = (Scorer(model, 0.8, packed=True)(batch)[0] for model in (policy.model, first.scorer.model))
    z = torch.where(batch.response_mask, after - before, 0.0).detach()
    left_out = batch.truncated & (record.mini_batch_index == 1)
    assert torch.allclose(record.log_ratio[8:], z[8:], atol=1e-5)
    assert record.log_ratio[left_out].abs().max() > 1e-4
    x = first.objective.ratio_filter(record.log_ratio, batch.response_mask, record.old_log_probs)
    assert torch.allclose(record.filtered_log_ratio, x, atol=1e-7)


def test_a_mini_batch_with_nothing_to_learn_from_changes_nothing(policy, batch):
    rows = batch.rows(batch.truncated.nonzero().squeeze(-1))
    job = updater(policy, mask_truncated=True, mini_batches=1)
    before = copy.deepcopy(job.scorer.model.state_dict())
    record = job.update(rows)
    assert record.sums.tokens == 0
    assert all(torch.equal(before[name], value) for name, value in job.scorer.model.state_dict().items())


def tokens_of(part):
    return pack(part, torch.device("cpu")).input_ids.shape[1]


def short_of_memory(monkeypatch, tokens, calls=0, learning=False):
    """From the given call on no pass of more tokens fits; `learning`: of those with a gradient.

    And in bfloat16 a log-prob depends on what else is in its pass: on a GPU by the kernel that is chosen, on a CPU not
    for models as small as this one, so that a number made of the pass's size stands for it.
    """
    real, seen = Scorer.__call__, []

    def score(self, part, *arguments, **keywords):
        seen.append(1)
        size = tokens_of(part)
        if len(seen) > calls and size > tokens and (torch.is_grad_enabled() or not learning):
            raise torch.OutOfMemoryError("CUDA out of memory")
        log_probs, entropy = real(self, part, *arguments, **keywords)
        return log_probs + (1e-3 * size % 7 if self.half else 0.0), entropy

    monkeypatch.setattr(Scorer, "__call__", score)
    return seen


def halving(policy, **changes):
    """An updater in bfloat16 whose steps change nothing, so that any z but 0 is rounding."""
    job = updater(policy, **({"mini_batches": 4, "max_tokens": 400} | changes))
    job.scorer = dataclasses.replace(job.scorer, half=True)
    job.optimizer.param_groups[0]["lr"] = 0.0
    return job


# One rehearsal, old log-probs of three mini-batches, then the first one: five calls before the first optimizer step.
@pytest.mark.parametrize("calls", range(5))
def test_micro_batches_made_smaller_before_the_first_step_leave_no_trace(policy, batch, calls, monkeypatch):
    seen = short_of_memory(monkeypatch, 40, calls)
    job = halving(policy)
    record = job.update(batch)
    assert job.max_tokens < 400
    assert len(seen) > 8
    assert (record.log_ratio == 0).all()
    assert not record.uneven.any()
    expected = halving(policy, max_tokens=job.max_tokens).update(batch)  # as if it had been known
    assert torch.equal(record.old_log_probs, expected.old_log_probs)
    assert record.grad_norms == expected.grad_norms


def test_what_fits_is_found_out_on_the_largest_micro_batch_before_the_first_step(policy, batch, monkeypatch):
    sizes = [tokens_of(batch.rows(torch.arange(4 * i, 4 * i + 4))) for i in range(4)]
    assert max(sizes[1:]) > sizes[0]  # the first mini-batch would fit where another one does not
    short_of_memory(monkeypatch, sizes[0], learning=True)
    job = halving(policy)
    record = job.update(batch)
    assert job.max_tokens < 400
    assert (record.log_ratio == 0).all()
    assert not record.uneven.any()


def test_it_is_rehearsed_once(policy, batch, monkeypatch):
    seen = short_of_memory(monkeypatch, 10_000)
    job = halving(policy)
    calls = [job.update(batch) and len(seen) for _ in range(2)]
    assert calls == [8, 8 + 7]  # three old log-probs and four mini-batches, and once the rehearsal
    seen.clear()
    updater(policy, mini_batches=4).update(batch)
    assert len(seen) == 7  # in float32 the micro-batches do not matter


def test_micro_batches_made_smaller_after_a_step_are_marked(policy, batch, monkeypatch):
    """Then the weights of the old log-probs are gone."""
    short_of_memory(monkeypatch, 40, calls=6)  # from the third mini-batch on
    record = halving(policy).update(batch)
    assert record.uneven.tolist() == [False] * 8 + [True] * 8
    assert (record.log_ratio[:8] == 0).all()
    assert (record.log_ratio[8:] != 0).any()
    monkeypatch.undo()
    short_of_memory(monkeypatch, 40, calls=5)
    plain = updater(policy, mini_batches=4, max_tokens=400)
    record = plain.update(batch)
    assert plain.max_tokens < 400
    assert not record.uneven.any()  # float32


def test_memory_that_the_moments_will_take_is_held_from_the_start(policy, batch, monkeypatch):
    """AdamW takes 8 bytes a weight in its first step, so that what fits before it may not fit behind it."""
    job = halving(policy)
    job.optimizer = torch.optim.AdamW(job.scorer.model.parameters(), lr=0.0)
    made, empty_like = [], torch.empty_like

    def counted(tensor, *arguments, **keywords):
        made.append(tensor.numel() * 4 if isinstance(tensor, torch.nn.Parameter) else 0)
        return empty_like(tensor, *arguments, **keywords)

    monkeypatch.setattr(torch, "empty_like", counted)
    job.update(batch)
    assert sum(made) == 8 * policy.parameters
    made.clear()
    job.update(batch)
    assert not sum(made)
    for state in job.optimizer.state.values():  # as in host memory while the policy samples: the step wants them back
        state |= {name: torch.empty(moment.shape, device="meta") for name, moment in state.items() if moment.dim()}
    with job._room_for_moments():
        assert sum(made) == 8 * policy.parameters
