"""One rollout batch: rows, log-probabilities, and the invariance of the update."""

import copy

import pytest
import torch
import transformers
from small_runs import model_config

from kpo_cli.core import load_objective
from kpo_cli.policy.batch import make_batch
from kpo_cli.policy.load import load_policy
from kpo_cli.policy.scorer import Scorer, make_packable
from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import HFSampler
from kpo_cli.training.step import Updater

PROMPTS = [b"8-6-9+7?", b"1+1?", b"3*3*3-2-2?", b"9-9?"]


@pytest.fixture(scope="module")
def policy():
    torch.set_num_threads(1)
    loaded = load_policy(model_config("model.device=cpu"))
    assert make_packable(loaded.model) is None
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


@pytest.mark.parametrize("family", ["OPT", "BioGpt", "Bloom", "Mixtral"])
def test_train_mode_changes_nothing_whatever_a_model_calls_its_dropout(family, tmp_path):
    """Gradient checkpointing works in train mode alone; what it switched on would make every ratio noise."""
    tokenizer = load_policy(model_config()).tokenizer
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {
        "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48},
        "BioGpt": {"intermediate_size": 48},
        "Bloom": {"hidden_dropout": 0.1},
        "Mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.1},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes | own[family])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_policy(model_config(f"model.path='{tmp_path}'", "model.gradient_checkpointing=true")).model
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


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


def test_a_mini_batch_with_nothing_to_learn_from_changes_nothing(policy, batch):
    rows = batch.rows(batch.truncated.nonzero().squeeze(-1))
    job = updater(policy, mask_truncated=True, mini_batches=1)
    before = copy.deepcopy(job.scorer.model.state_dict())
    record = job.update(rows)
    assert record.sums.tokens == 0
    assert all(torch.equal(before[name], value) for name, value in job.scorer.model.state_dict().items())
