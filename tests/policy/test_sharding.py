"""A model sharded over one process is that model: in float32 to the bit, in bfloat16 with masters in float32."""

import copy
import json

import hub_twin
import pytest
import torch
from safetensors.torch import load_file
from test_lora import model_config
from test_scorer import PACKED, ragged_batch, tiny
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from kpo_cli.config import LoraConfig
from kpo_cli.core import load_objective
from kpo_cli.policy.fidelity import WideSoftmax, choose_way
from kpo_cli.policy.load import load_policy, narrow
from kpo_cli.policy.lora import add_adapters, named_weights
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.sharding import full, gathered, mesh_of_one, shard, trained_weights
from kpo_cli.rollout import HFSampler
from kpo_cli.training.optimizer import HostAdamW, SamplingAdamW, give_gradients
from kpo_cli.training.step import Updater

CPU = torch.device("cpu")
HALF = torch.bfloat16


def model_of(name, *, packed=True, lora=False, recompute=False):
    model = tiny(PACKED[name])
    if lora:
        add_adapters(model, LoraConfig(4, None, "all-linear", False))
        draw = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.1, generator=draw)
    assert not recompute or recompute_layers(model)
    assert not packed or choose_way(model).packed
    return model


def learn(scorer, batch, entropy_gradient=False):
    """Log-probs and entropies; the gradients add to those that there are."""
    log_probs, entropy = scorer(batch, entropy_gradient)
    weight = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(5)).to(log_probs)
    (torch.where(batch.response_mask, log_probs + 0.3 * entropy, 0) * weight).sum().backward()
    return log_probs.detach(), entropy.detach()


def gradients(model):
    return {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def steps(model, packed):
    """All that five steps of two micro-batches say, and the weights and moments that they leave."""
    scorer, batch, values = Scorer(model, 0.7, packed=packed), ragged_batch(), []
    optimizer = torch.optim.AdamW(trained_weights(model), lr=1e-2, fused=True)
    for _ in range(5):
        for rows in torch.arange(12).split(6):
            values += learn(scorer, batch.rows(rows), entropy_gradient=True)
        values += gradients(model).values()
        values.append(full(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        give_gradients(model, optimizer)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    moments = [t for state in optimizer.state.values() for t in state.values()]
    return [*values, *(full(p.detach()) for p in model.parameters()), *moments]


@pytest.mark.parametrize(
    ("name", "packed", "lora", "recompute"),
    [
        ("qwen3", True, False, False),  # its head is the embedding
        ("qwen3", True, False, True),
        ("qwen3", False, False, True),
        ("qwen3", True, True, False),
        ("qwen2", True, False, True),
        ("qwen2", False, True, True),
        ("mixtral", True, False, False),
        ("gpt2", False, False, True),
    ],
)
def test_in_float32_nothing_changes_to_the_bit(name, packed, lora, recompute):
    plain = model_of(name, packed=packed, lora=lora, recompute=recompute)
    sharded = copy.deepcopy(plain)
    shard(sharded, mesh_of_one(CPU), None)
    assert sum(isinstance(module, FSDPModule) for module in sharded.modules()) == 3  # two layers and what is around
    for one, two in zip(steps(plain, packed), steps(sharded, packed), strict=True):
        assert torch.equal(one, two)


def test_layers_that_share_a_weight_are_left_to_what_is_around_them():
    plain = model_of("qwen3")
    plain.model.layers[1].mlp.up_proj = plain.model.layers[0].mlp.up_proj
    sharded = copy.deepcopy(plain)
    shard(sharded, mesh_of_one(CPU), None)
    assert [module for module in sharded.modules() if isinstance(module, FSDPModule)] == [sharded]
    for one, two in zip(steps(plain, True), steps(sharded, True), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "gemma3 with a window", "mixtral", "gpt2"])
def test_in_bfloat16_it_is_the_model_with_rounded_weights(name, packed):
    """One that knows nothing of sharding; of float64 with the masters it is off by what bfloat16 rounds."""
    masters, batch = model_of(name, packed=packed), ragged_batch()
    plain, exact, sharded = (copy.deepcopy(masters) for _ in range(3))
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(HALF)
    narrow(sharded, HALF)
    found, rounded = (learn(Scorer(model, 0.7, True, packed), batch) for model in (sharded, plain))
    assert torch.equal(found[0], rounded[0])
    assert found[0].dtype == torch.float32
    own, theirs = gradients(sharded), gradients(plain)
    assert {name: g.dtype for name, g in own.items()} == dict.fromkeys(own, torch.float32)
    assert all(torch.equal(own[name], theirs[name].float()) for name in theirs)
    exact.set_attn_implementation("eager")
    if exact.config._experts_implementation is not None:
        exact.set_experts_implementation("eager")  # a grouped product has no float64
    with WideSoftmax():
        truth, _ = learn(Scorer(exact.double(), 0.7), batch)
    assert (found[0] - truth)[batch.response_mask].abs().mean() < 0.06
    total = sum(float(g.square().sum()) for g in gradients(exact).values())
    apart = sum(float((own[name] - g).square().sum()) for name, g in gradients(exact).items())
    assert 1e-4 < (apart / total) ** 0.5 < 0.15


def test_gradients_of_micro_batches_are_added_in_float32():
    batch, sums = ragged_batch(), {}
    model = model_of("qwen3")
    narrow(model, HALF)
    scorer = Scorer(model, 0.7, True, True)
    for rows in torch.arange(12).split(4):
        learn(scorer, batch.rows(rows))
        for name, gradient in gradients(model).items():
            sums[name] = sums[name] + gradient if name in sums else gradient
        model.zero_grad()
    for rows in torch.arange(12).split(4):
        learn(scorer, batch.rows(rows))
    assert all(torch.equal(sums[name], gradient) for name, gradient in gradients(model).items())


def updater(model, kind=torch.optim.AdamW, **changes):
    settings = {
        "scorer": Scorer(model, 0.7, True, True),
        "optimizer": kind(trained_weights(model), lr=1e-3, fused=True),
        "objective": load_objective("token_clip"),
        "mini_batches": 3,
        "max_tokens": 60,
        "max_grad_norm": 1.0,
        "mask_truncated": False,
    }
    return Updater(**(settings | changes))


def updated(kind=torch.optim.AdamW, recompute=False, **changes):
    """An updater behind two updates in bfloat16, and their log-ratios."""
    model = model_of("qwen3", recompute=recompute)
    narrow(model, HALF)
    job = updater(model, kind, **changes)
    return job, [job.update(ragged_batch()).log_ratio for _ in range(2)]


def outcome(job, ratios):
    moments = [t for state in job.optimizer.state.values() for t in state.values()]
    return [*ratios, *(full(p.detach()) for p in job.scorer.model.parameters()), *moments]


def test_what_an_update_keeps_is_float32():
    start = dict(model_of("qwen3").named_parameters())
    job, _ = updated()
    named = dict(job.scorer.model.named_parameters())
    assert list(named) == list(start)
    assert all(p.dtype == torch.float32 for p in named.values())
    assert all(t.dtype == torch.float32 for state in job.optimizer.state.values() for t in state.values())
    assert all(0 < (full(named[name]) - start[name]).abs().max() < 0.1 for name in start)
    assert all(p.grad is None for p in [*named.values(), *job.optimizer.param_groups[0]["params"]])
    assert not any(torch.equal(full(p), full(p).to(HALF).float()) for p in named.values())  # they are not rounded


@pytest.mark.parametrize("kind", [HostAdamW, SamplingAdamW])
def test_moments_elsewhere_change_no_bit(kind):
    for one, two in zip(outcome(*updated()), outcome(*updated(kind)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("by_hand", [False, True], ids=["by torch", "by hand"])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_pass_that_fails_on_the_way_leaves_no_trace(when, by_hand, monkeypatch):
    """Out of memory in the middle of it; then everything is computed again in smaller micro-batches."""
    if by_hand:
        monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
    model = model_of("qwen3", recompute=when == "backward")
    narrow(model, HALF)
    job, calls = updater(model), []

    def fail(*_):
        calls.append("forward" if torch._C._current_graph_task_id() == -1 else "backward")
        if calls[-1] == when and calls.count(when) == 2:  # after the rehearsal, and before the first step
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[0].self_attn.register_forward_hook(fail)
    ratios = [job.update(ragged_batch()).log_ratio for _ in range(2)]
    assert job.max_tokens == 30
    for one, two in zip(outcome(job, ratios), outcome(*updated(max_tokens=30)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", ["qwen3", "llama"])
def test_a_checkpoint_holds_the_masters_and_opens_anywhere(shape, tmp_path):
    policy = load_policy(model_config(hub_twin.shared_model(shape), rank=0, dtype="bfloat16"))
    policy.narrow()
    for weight in trained_weights(policy.model):
        weight += 1e-5
    policy.save(tmp_path)
    masters = {name: full(parameter.detach()) for name, parameter in policy.model.named_parameters()}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)  # in the type that it names
    named = dict(opened.named_parameters())
    assert list(named) == list(masters)
    assert all(torch.equal(named[name], masters[name]) for name in masters)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(opened).__name__]
    assert set(load_file(tmp_path / "model.safetensors")) == set(named)  # a tied head once
    served = dict(named_weights(policy.model))
    assert list(served) == list(opened.state_dict())
    assert all(torch.equal(served[name], tensor) for name, tensor in opened.state_dict().items())


def test_what_is_sampled_is_what_rounded_weights_sample():
    model = model_of("qwen3")
    plain = copy.deepcopy(model).requires_grad_(False)
    for each in (model, plain):
        narrow(each, HALF)
    assert not isinstance(plain, FSDPModule)
    settings = {"stop_ids": [1], "temperature": 0.9, "max_response_tokens": 12, "batch_size": 4}
    own, theirs = (HFSampler(each, **settings).sample([[5, 6, 7], [9, 8]], 4, (0,)) for each in (model, plain))
    assert own == theirs  # log-probabilities too
    with gathered(model), torch.no_grad():
        assert {p.dtype for p in model.parameters()} == {HALF}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
