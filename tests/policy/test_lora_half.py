"""LoRA in bfloat16 is the merged model in bfloat16: what the sampler is given is what the trainer computes with."""

import copy
from functools import cache

import hub_twin
import peft
import pytest
import torch
from test_lora import model_config
from test_scorer import VOCABULARY, ragged_batch, tiny
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from kpo_cli.config import LoraConfig
from kpo_cli.core import load_objective
from kpo_cli.policy import lora
from kpo_cli.policy.fidelity import choose_way
from kpo_cli.policy.load import load_policy, narrow
from kpo_cli.policy.lora import adapted, add_adapters, merged_once, named_weights, without_adapters
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.sharding import full
from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import HFSampler
from kpo_cli.training.step import Updater

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
MODELS = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "qwen2 with biases": Qwen2Config(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "gpt2 of Conv1D": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
}
CONFIG = LoraConfig(4, 12.0, "all-linear", False)


@cache
def _base(name):
    """Whose weights are bfloat16 numbers, as the hub's are, with biases away from zero."""
    model = tiny(MODELS[name])
    draw = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data.normal_(0, 0.2, generator=draw)
        parameter.data = parameter.data.bfloat16().float()
    return model


def pair(name, size=0.1, packed=True):
    """Scorers in bfloat16: of adapters, and of the plain model into which peft merged the same ones."""
    model = copy.deepcopy(_base(name))
    add_adapters(model, CONFIG)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, size, generator=draw)
    wrapped = peft.get_peft_model(
        copy.deepcopy(_base(name)), peft.LoraConfig(r=4, lora_alpha=12.0, target_modules="all-linear")
    )
    wrapped.load_state_dict({f"base_model.model.{key}": value for key, value in model.state_dict().items()})
    plain = wrapped.merge_and_unload().requires_grad_(True)
    for each in (model, plain):
        assert not packed or choose_way(each).packed
        narrow(each, torch.bfloat16)
    return Scorer(model, 0.8, True, packed), Scorer(plain, 0.8, True, packed)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_merged_model_to_the_bit(name, packed):
    ours, truth = pair(name, packed=packed)
    batch = ragged_batch()
    with torch.no_grad():
        expected = truth(batch)
        for got, want in zip(ours(batch), expected, strict=True):
            assert torch.equal(got, want)
        below = Scorer(without_adapters(ours.model), 0.8, True, packed)(batch)[0]
        assert (below - expected[0]).abs().max() > 0.1  # the adapters do something
        start = Scorer(copy.deepcopy(_base(name)), 0.8, True)
        assert not packed or choose_way(start.model).packed
        narrow(start.model, torch.bfloat16)
        assert torch.equal(below, Scorer(start.model, 0.8, True, packed)(batch)[0])
    assert torch.equal(ours(batch)[0], expected[0])  # with gradients as well


def test_what_vanishes_in_the_engine_s_rounding_vanishes_here():
    ours, _ = pair("qwen3", size=1e-4)
    batch = ragged_batch()
    served = {name: tensor.bfloat16() for name, tensor in named_weights(ours.model)}
    start = dict(_base("qwen3").named_parameters())
    assert all(torch.equal(served[name], start[name].bfloat16()) for name in start)
    with torch.no_grad():
        below = Scorer(without_adapters(ours.model), 0.8, True, True)
        assert torch.equal(ours(batch)[0], below(batch)[0])
    ours(batch)[0][batch.response_mask].sum().backward()  # but it still learns
    assert all(layer.lora_B["default"].weight.grad.abs().sum() > 0 for layer in adapted(ours.model))


def objective_gradients(scorer, batch, model):
    log_probs, _ = scorer(batch)
    weight = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(5))
    torch.where(batch.response_mask, log_probs * weight.to(log_probs), 0).sum().backward()
    return {name: full(p.grad).double() for name, p in model.named_parameters() if p.grad is not None}


class Plain64(torch.nn.Module):
    """One adapted layer written out: y = x W^T + bias + s x A^T B^T."""

    def __init__(self, layer):
        super().__init__()
        base = layer.get_base_layer()
        self.weight = (base.weight.t() if layer.fan_in_fan_out else base.weight).detach().double()
        self.bias = None if base.bias is None else base.bias.detach().double()
        self.a = layer.lora_A["default"].weight.detach().double().requires_grad_()
        self.b = layer.lora_B["default"].weight.detach().double().requires_grad_()
        self.scale = 3.0

    def forward(self, x):
        out = x @ self.weight.T + self.scale * (x @ self.a.T) @ self.b.T
        return out if self.bias is None else out + self.bias


@pytest.mark.parametrize("rows", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_layer_are_those_of_the_unrounded_expression(name, rows):
    ours, _ = pair(name)
    for layer in adapted(ours.model)[:4]:
        truth = Plain64(layer)
        draw = torch.Generator().manual_seed(2)
        x = torch.randn(*rows, truth.weight.shape[1], generator=draw).bfloat16().float().requires_grad_()
        other = x.detach().double().requires_grad_()
        weight = torch.randn(*rows, truth.weight.shape[0], generator=draw).bfloat16()
        out, expected = layer(x), truth(other)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02 * float(expected.detach().abs().max()))
        (out * weight).sum().backward()
        (expected * weight.double()).sum().backward()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for got, want in ((x.grad, other.grad), (a.grad, truth.a.grad), (b.grad, truth.b.grad)):
            assert got.dtype == torch.float32
            error = (got.double() - want).norm() / want.norm()
            assert error < 2**-6, (name, error)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_model_are_those_of_the_merged_one(name):
    """dB = s G A^T and dA = s B^T G with G what the merged weight gets, to bfloat16's rounding."""
    ours, truth = pair(name)
    batch = ragged_batch()
    got = objective_gradients(ours, batch, ours.model)
    full = objective_gradients(truth, batch, truth.model)
    for key, layer in ((key, m) for key, m in ours.model.named_modules() if hasattr(m, "lora_A")):
        g = full[f"{key}.weight"]
        g = g.T if layer.fan_in_fan_out else g
        a, b = (w["default"].weight.detach().double() for w in (layer.lora_A, layer.lora_B))
        for kind, want in (("A", 3 * b.T @ g), ("B", 3 * g @ a.T)):
            error = (got[f"{key}.lora_{kind}.default.weight"] - want).norm() / want.norm()
            assert error < 0.03, (key, kind, error)


def test_no_weight_is_kept_for_the_backward_pass():
    """Beside those of the model itself."""
    ours, _ = pair("qwen3")
    own = {p.untyped_storage().data_ptr() for p in ours.model.parameters()}
    shapes = {tuple(layer.get_base_layer().weight.shape) for layer in adapted(ours.model)}
    saved = []
    batch = ragged_batch()
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        log_probs, _ = ours(batch)
    kept = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert kept
    assert not [t for t in kept if tuple(t.shape) in shapes or tuple(t.t().shape if t.dim() == 2 else ()) in shapes]
    log_probs[batch.response_mask].sum().backward()


def test_checkpointing_and_threads_change_no_bit():
    batch = ragged_batch(prompts=4)
    results = []
    for checkpointing, workers in ((False, 1), (True, 1), (False, 2), (True, 2)):
        scorer, _ = pair("qwen3")
        if checkpointing:
            assert recompute_layers(scorer.model)
        job = updater(scorer, 0.05, workers)
        record = job.update(batch, for_record=True)
        results.append([record.log_ratio, *(p for p in scorer.model.parameters() if p.requires_grad)])
    assert results[0][0].abs().max() > 1e-3
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def updater(scorer, lr, workers=1, **changes):
    trained = [p for p in scorer.model.parameters() if p.requires_grad]
    settings = {
        "scorer": scorer,
        "optimizer": torch.optim.AdamW(trained, lr=lr, weight_decay=0.0),
        "objective": load_objective("token_clip"),
        "mini_batches": 4,
        "max_tokens": 60,
        "max_grad_norm": 1.0,
        "mask_truncated": False,
        "workers": Workers(workers),
    }
    return Updater(**(settings | changes))


# Sampling


@pytest.fixture
def policy():
    """As a run makes it."""
    made = load_policy(model_config(hub_twin.shared_model("qwen3"), rank=4, dtype="bfloat16"))
    draw = torch.Generator().manual_seed(1)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=draw)
    assert made.way.packed
    made.narrow()
    return made


def sampled(model, **changes):
    settings = {"stop_ids": [1], "temperature": 0.9, "max_response_tokens": 12, "batch_size": 4} | changes
    return HFSampler(model, **settings).sample([[5, 6, 7], [9, 8]], 4, (0,))


def test_the_sampler_merges_once_and_sees_new_weights(policy, monkeypatch):
    calls = []
    merge = lora._merged
    monkeypatch.setattr(lora, "_merged", lambda layer: calls.append(layer) or merge(layer))
    layers = len(adapted(policy.model))
    first = sampled(policy.model)
    assert len(calls) == layers  # for four batches of twelve tokens
    assert all(layer.kept is None for layer in adapted(policy.model))
    layer = adapted(policy.model)[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(-3)
    assert sampled(policy.model) != first
    with torch.no_grad():
        layer.lora_B["default"].weight.div_(-3)
    assert sampled(policy.model, workers=Workers(2)) == first


def test_the_sampler_samples_from_the_merged_model(policy):
    """peft's own merge of the same adapters, as a policy without any."""
    plain = load_policy(model_config(hub_twin.shared_model("qwen3"), dtype="bfloat16"))
    wrapped = peft.get_peft_model(plain.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    state = {f"base_model.model.{key}": value for key, value in policy.model.state_dict().items()}
    wrapped.load_state_dict({key: value.float() for key, value in state.items()})
    merged = wrapped.merge_and_unload()
    assert choose_way(merged.requires_grad_(True)).packed
    narrow(merged.requires_grad_(False), torch.bfloat16)
    assert sampled(policy.model) == sampled(merged)


def test_within_a_sampling_gradients_still_reach_the_adapters(policy):
    with merged_once(policy.model):
        policy.model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert all(layer.lora_B["default"].weight.grad.any() for layer in adapted(policy.model))


def test_saved_and_loaded_it_is_the_same(policy, tmp_path):
    policy.save(tmp_path / "saved")
    again = load_policy(model_config(hub_twin.shared_model("qwen3"), rank=4, dtype="bfloat16"), tmp_path / "saved")
    assert again.way.packed
    again.narrow()
    assert sampled(again.model) == sampled(policy.model)
    lora.save_merged(policy.model, tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in named_weights(policy.model):
        assert torch.equal(whole[name].float(), tensor.float()), name


def test_an_adapted_head_that_is_the_embedding_is_one_tensor_with_it():
    """In 16 bits as well, and in what is saved."""
    model, plain = (copy.deepcopy(_base("qwen3")) for _ in range(2))
    add_adapters(model, LoraConfig(4, 12.0, ["lm_head", "q_proj"], False))
    narrow(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model.lm_head.get_base_layer().weight is model.get_input_embeddings().weight
    narrow(plain.requires_grad_(False), torch.bfloat16)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)  # B is 0
