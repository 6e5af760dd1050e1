"""What vLLM serves is the trainer's weights: before and after updates, and the check sees where it is not so."""

import pytest
import torch
from vllm_policies import check_of, gaps, policy_of, prompts_of, sampler_of, started, update

from kpo_cli.errors import SamplingFailed
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


def test_the_check_sees_a_stale_head(tmp_path, monkeypatch):
    """The trap of tied embeddings: pushed under one name alone, the weight leaves the head's packed copy as it was."""
    policy = policy_of("builtin", tmp_path)
    prompts = prompts_of(policy)
    with started(policy) as engine:
        monkeypatch.setattr("kpo_cli.rollout.engine.named_weights", lambda model: model.named_parameters())
        sampler = sampler_of(engine, policy.stop_ids)
        update(policy, 0)
        sampler.refresh()
        with pytest.raises(SamplingFailed, match="does not serve the policy"):
            check_of(policy)(prompts, sampler.sample(prompts, 3, (1,)))


def test_torch_keeps_its_threads(tmp_path):
    policy = policy_of("builtin", tmp_path)
    with started(policy):
        torch.set_num_threads(2)
        assert torch.get_num_threads() == 2
    assert not torch._dynamo.config.disable
