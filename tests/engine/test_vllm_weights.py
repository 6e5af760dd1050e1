"""What vLLM serves is the trainer's weights: before and after updates, and the check sees where it is not so."""

import pytest
import torch
from vllm_policies import check_of, gaps, policy_of, prompts_of, sampler_of, started, update

from kpo_cli.errors import SamplingFailed
from kpo_cli.policy.lora import named_weights
from kpo_cli.policy.sharding import local
from kpo_cli.rollout.engine import installed

if not installed():
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)


@pytest.mark.parametrize(("shape", "tied"), [("builtin", True), ("qwen3", True), ("qwen2", True), ("llama", False)])
def test_log_probs_are_the_trainers_before_and_after_updates(shape, tied, tmp_path):
    policy = policy_of(shape, tmp_path)
    assert policy.model.config.tie_word_embeddings is tied
    prompts = prompts_of(policy)
    with started(policy) as engine:
        sampler = sampler_of(engine, policy.stop_ids)
        before = sampler.sample(prompts, 3, (1,))
        assert gaps(policy, prompts, before).max() < 1e-3
        for number in range(3):
            update(policy, number)
            stale = sampler.sample(prompts, 3, (1,))
            assert gaps(policy, prompts, stale).max() > 0.1  # the test has teeth: this is what no push looks like
            sampler.refresh()
            fresh = sampler.sample(prompts, 3, (1,))
            assert gaps(policy, prompts, fresh).max() < 1e-3
            found = check_of(policy)(prompts, fresh)
            assert found["sampler_gap_mean"] <= found["sampler_gap_max"] < 1e-3
        assert fresh != before


@pytest.mark.parametrize("shape", ["builtin", "qwen3"])
def test_in_bfloat16_the_difference_is_rounding(shape, tmp_path):
    policy = policy_of(shape, tmp_path, "model.dtype=bfloat16")
    prompts = prompts_of(policy)
    with started(policy) as engine:
        sampler = sampler_of(engine, policy.stop_ids)
        update(policy, 0)
        with pytest.raises(SamplingFailed, match="does not serve the policy"):
            check_of(policy)(prompts, sampler.sample(prompts, 2, (1,)))
        sampler.refresh()
        groups = sampler.sample(prompts, 2, (1,))
        assert 1e-4 < gaps(policy, prompts, groups).mean() < 0.05
        assert check_of(policy)(prompts, groups)["sampler_gap_mean"] < 0.05


def test_adapters_are_merged_into_what_is_pushed(tmp_path):
    pytest.importorskip("peft")
    policy = policy_of("builtin", tmp_path, "model.lora.rank=4")
    prompts = prompts_of(policy)
    with started(policy) as engine:
        sampler = sampler_of(engine, policy.stop_ids)
        before = sampler.sample(prompts, 2, (1,))
        update(policy, 3)  # of the adapters alone: the rest is frozen
        sampler.refresh()
        after = sampler.sample(prompts, 2, (1,))
        assert after != before
        assert gaps(policy, prompts, after).max() < 1e-3


def test_a_push_makes_no_second_copy_of_the_model(tmp_path):
    """Storage of the engine's weights stays where it is, and no tensor of a model's size is left behind."""
    policy = policy_of("builtin", tmp_path)
    with started(policy) as engine:
        places = engine.llm.apply_model(lambda model: {n: p.data_ptr() for n, p in model.named_parameters()})
        update(policy, 0)
        engine.push()
        assert engine.llm.apply_model(lambda model: {n: p.data_ptr() for n, p in model.named_parameters()}) == places


def test_the_check_sees_a_stale_prefix_cache(tmp_path, monkeypatch):
    policy = policy_of("builtin", tmp_path)
    prompts = prompts_of(policy)
    with started(policy) as engine:
        sampler = sampler_of(engine, policy.stop_ids)
        check_of(policy)(prompts, sampler.sample(prompts, 3, (1,)))
        update(policy, 0)
        with monkeypatch.context() as patch:
            patch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
            sampler.refresh()
            with pytest.raises(SamplingFailed, match="does not serve the policy"):
                check_of(policy)(prompts, sampler.sample(prompts, 3, (2,)))
        sampler.refresh()
        check_of(policy)(prompts, sampler.sample(prompts, 3, (2,)))


def test_a_cache_that_is_not_reset_is_an_error(tmp_path, monkeypatch):
    policy = policy_of("builtin", tmp_path)
    with started(policy) as engine:
        monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(SamplingFailed, match="taking over the weights with vLLM failed twice: the prefix cache"):
            sampler_of(engine, policy.stop_ids).refresh()


def test_a_stale_head_is_seen_number_by_number_and_by_the_check(tmp_path, monkeypatch):
    """The trap of tied embeddings: pushed under one name alone, the weight leaves the head's packed copy as it was."""
    policy = policy_of("builtin", tmp_path)
    prompts = prompts_of(policy)
    with started(policy) as engine:
        sampler = sampler_of(engine, policy.stop_ids)
        update(policy, 0)
        load_instead(engine, monkeypatch, lambda: policy.model.named_parameters())
        with pytest.raises(SamplingFailed, match=r"than what was pushed in 1 of 27 tensors \(lm_head.weight\)"):
            sampler.refresh()
        with pytest.raises(SamplingFailed, match="does not serve the policy"):
            check_of(policy)(prompts, sampler.sample(prompts, 3, (1,)))


def load_instead(engine, patch, weights):
    """What the engine loads is `weights()`, whatever it is given."""
    load = engine.llm.collective_rpc
    patch.setattr(
        engine.llm, "collective_rpc", lambda method, kwargs: load(method, kwargs={"weights_iterator": iter(weights())})
    )


@pytest.mark.parametrize(("shape", "overrides"), [("builtin", []), ("qwen2", ["model.dtype=bfloat16"]), ("llama", [])])
def test_any_tensor_that_stays_behind_is_seen(shape, overrides, tmp_path, monkeypatch):
    """Each one by itself: the others are pushed, this one is pushed as it was before the last optimizer step."""
    policy = policy_of(shape, tmp_path, *overrides)
    with started(policy) as engine:
        assert engine.notes == []
        old = {name: tensor.clone() for name, tensor in named_weights(policy.model)}
        with torch.no_grad():  # what Adam does: the learning rate, up or down
            for parameter in map(local, policy.model.parameters()):
                parameter += 1e-4 * torch.randn_like(parameter).sign() * parameter.abs().clamp(min=1)
        weights = dict(named_weights(policy.model))
        for name, tensor in weights.items():
            late = {other: old[other] for other, t in weights.items() if t.data_ptr() == tensor.data_ptr()}  # tied ones
            with monkeypatch.context() as patch:
                load_instead(engine, patch, lambda late=late: {**weights, **late}.items())
                if policy.dtype == "bfloat16" and torch.equal(old[name].bfloat16(), tensor.bfloat16()):
                    engine.push()  # to the engine they are the same numbers
                    continue
                with pytest.raises(RuntimeError, match=f"holds something else than what was pushed in {len(late)} of"):
                    engine.push()
        engine.push()


def test_a_tensor_that_was_never_pushed_is_missed(tmp_path, monkeypatch):
    policy = policy_of("builtin", tmp_path)
    with started(policy) as engine:
        update(policy, 0)
        left_out = {n: t for n, t in policy.model.state_dict().items() if "layers.1.mlp.up_proj" not in n}
        monkeypatch.setattr("kpo_cli.rollout.engine.named_weights", lambda model: iter(left_out.items()))
        with pytest.raises(SamplingFailed, match=r"failed twice: .* in 1 of 27 tensors \(model.layers.1.mlp.gate_up"):
            sampler_of(engine, policy.stop_ids).refresh()


def test_one_step_that_was_not_pushed_is_seen_by_the_check_alone(tmp_path):
    """In float32 rounding is so far below that the log-probabilities tell; docs/vllm.md has the distances."""
    policy = policy_of("builtin", tmp_path)
    prompts = prompts_of(policy)
    with started(policy) as engine:
        sampler = sampler_of(engine, policy.stop_ids)
        groups = sampler.sample(prompts, 3, (1,))
        ids = torch.tensor([[*prompts[0], *groups[0][0].token_ids]])
        policy.model(ids, labels=ids).loss.backward()
        with torch.no_grad():  # four steps of Adam, at a hundredth of the built-in policy's learning rate
            for parameter in policy.model.parameters():
                parameter -= 4 * 2e-6 * parameter.grad.sign()
        with pytest.raises(SamplingFailed, match="does not serve the policy"):
            check_of(policy)(prompts, groups)
        sampler.refresh()
        check_of(policy)(prompts, sampler.sample(prompts, 3, (1,)))


def test_a_float32_head_makes_the_logits_of_the_trainer(tmp_path):
    """On a GPU those are float32 sums of bfloat16 products; the engine's own would be rounded to bfloat16."""
    policy = policy_of("builtin", tmp_path, "model.dtype=bfloat16")
    weight = local(policy.model.lm_head.weight.detach()).bfloat16().float()
    hidden = 4 * torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    errors = {}
    for head, overrides in ((torch.float32, {}), (torch.bfloat16, {"head_dtype": "model"})):
        with started(policy, float32_logits=True, hf_overrides=overrides) as engine:  # the user's own come last
            assert engine.llm.llm_engine.model_config.head_dtype == head
            logits = engine.llm.apply_model(lambda model: model.compute_logits(hidden))[0]
        assert logits.dtype == head
        errors[head] = float((logits.float() - hidden.float() @ weight.T).abs().max())
    assert errors[torch.float32] < 1e-4
    assert errors[torch.bfloat16] > 1e-2


def test_torch_keeps_its_threads(tmp_path):
    policy = policy_of("builtin", tmp_path)
    with started(policy):
        torch.set_num_threads(2)
        assert torch.get_num_threads() == 2
    assert not torch._dynamo.config.disable
