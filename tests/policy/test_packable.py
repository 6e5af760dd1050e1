"""Whether a model can be packed is found out in spite of rounding: a deep one is, one that differs by little is not."""

import copy
from dataclasses import replace

import pytest
import torch
from test_scorer import PACKED, SHAPE, VOCABULARY, tiny
from transformers import GPT2Config, GraniteConfig, LlamaConfig, MixtralConfig, Qwen2MoeConfig, Qwen3Config

from kpo_cli.config import LoraConfig
from kpo_cli.policy import attention, scorer
from kpo_cli.policy.attention import NAME
from kpo_cli.policy.fidelity import TOLERANCE, Way, WideSoftmax, _probe, _Trial, choose_way, in_float64
from kpo_cli.policy.lora import add_adapters
from kpo_cli.policy.scorer import Scorer

DEEP = SHAPE | {"num_hidden_layers": 36, "initializer_range": 1.0}
MODELS = {
    "llama": LlamaConfig(**DEEP),
    "llama, tied": LlamaConfig(**DEEP, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**(DEEP | {"num_hidden_layers": 72}), head_dim=8),
    "mixture": MixtralConfig(**DEEP, num_local_experts=4, num_experts_per_tok=2),
}


def gaps(model):
    """Of packed rows to eager attention, row by row: in float32, and of a copy of the whole model in float64."""
    return packed_gap(copy.deepcopy(model)), packed_gap(doubled(model))


@torch.no_grad()
def packed_gap(model):
    with WideSoftmax():
        trial = _Trial(model)
        return trial._gap(Way(NAME, model.config._experts_implementation, packed=True), trial.truth)


def doubled(model):
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # a grouped product has no float64
    return wide


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_a_deep_model_that_rounds_by_more_than_the_tolerance_is_packed(name):
    model = tiny(MODELS[name])
    rounding, truth = gaps(model)
    assert rounding > TOLERANCE > 10 * truth
    before = {key: (p.data_ptr(), p.detach().clone()) for key, p in model.named_parameters()}
    assert choose_way(model).packed
    assert model.config._attn_implementation == "kpo"
    for key, parameter in model.named_parameters():  # the same tensors with the same bits
        assert parameter.data_ptr() == before[key][0]
        assert torch.equal(parameter, before[key][1])
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_a_deep_mixture_is_packed_and_keeps_its_kernels():
    model = tiny(MODELS["mixture"])
    experts = model.config._experts_implementation
    assert experts != "eager"
    rounding, truth = gaps(model)
    assert rounding > TOLERANCE > 10 * truth
    assert choose_way(model).packed
    assert model.config._experts_implementation == experts


@pytest.mark.parametrize("name", MODELS)
def test_float64_layer_by_layer_is_float64(name):
    """Against the whole model in float64. Logits are rounded to float32 in both."""
    model = tiny(MODELS[name])
    batch = _probe(VOCABULARY)
    with torch.no_grad():
        expected, _ = Scorer(doubled(model), 1.0)(batch)
        with in_float64(model):
            values, _ = Scorer(model, 1.0)(batch)
    assert torch.equal(values, expected)


def test_one_layer_is_in_float64_at_a_time():
    model = tiny(MODELS["llama, tied"])
    whole = sum(p.numel() for p in model.parameters())
    wide = []

    def count(*_):
        wide.append(sum(p.numel() for p in model.parameters() if p.dtype == torch.float64))

    with in_float64(model), torch.no_grad():
        handles = [layer.mlp.register_forward_hook(count) for layer in model.model.layers]
        Scorer(model, 1.0)(_probe(VOCABULARY))
    assert len(handles) == len(wide) == 36
    assert len(set(wide)) == 1
    head = model.lm_head.weight.numel()
    assert wide[0] - head == pytest.approx((whole - head) / 36, rel=0.01)


def test_adapters_are_probed_too():
    model = tiny(MODELS["llama"])
    add_adapters(model, LoraConfig(4, None, "all-linear", False))
    assert gaps(model)[0] > TOLERANCE
    assert choose_way(model).packed


def test_weights_come_back_after_an_error():
    model = tiny(MODELS["llama"])
    before = copy.deepcopy(model.state_dict())
    model.model.layers[3].mlp.register_forward_hook(lambda *_: 1 / 0)

    def probe():
        with in_float64(model):
            Scorer(model, 1.0)(_probe(VOCABULARY))

    with pytest.raises(ZeroDivisionError):
        probe()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


# Differences that are none of rounding, on models whose rounding is above the tolerance


def shifted(batch, *where):
    """The responses of every prompt one place too far to the right."""
    inputs = pack(batch, *where)
    prompts = int(batch.prompt_lengths[0])
    positions = inputs.position_ids.clone()
    positions[:, prompts:] += 1
    return replace(inputs, position_ids=positions)


pack = scorer.pack


def narrower(query, key, value, packing, window, scaling):
    return packed_attention(query, key, value, packing, 6, scaling)


def cooler(query, key, value, packing, window, scaling):
    return packed_attention(query, key, value, packing, window, 0.999 * (scaling or query.shape[-1] ** -0.5))


packed_attention = attention.packed_attention


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (scorer, "pack", shifted),
        (attention, "packed_attention", narrower),
        (attention, "packed_attention", cooler),
    ],
    ids=["positions shifted by one", "a window where there is none", "a scale off by a thousandth"],
)
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_what_is_computed_otherwise_is_seen(model, where, name, wrong, monkeypatch):
    made = tiny(MODELS[model])
    monkeypatch.setattr(where, name, wrong)
    assert "differ by" in choose_way(made).unpacked_because
    assert made.config._attn_implementation == "sdpa"


def test_positions_that_are_learned_shifted_by_one(monkeypatch):
    deep = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=36, n_head=4, n_positions=64, initializer_range=0.5)
    assert choose_way(tiny(deep)).packed
    monkeypatch.setattr(
        scorer, "pack", lambda *given: replace(pack(*given), position_ids=pack(*given).position_ids + 1)
    )
    assert "differ by" in choose_way(tiny(deep)).unpacked_because


@pytest.mark.parametrize("scale", [3.0, 1.001])
def test_a_deep_model_whose_head_scales(scale):
    assert "differ by" in choose_way(tiny(GraniteConfig(**DEEP, logits_scaling=scale))).unpacked_because


def test_a_deep_model_with_a_window_in_the_mask_alone():
    window = {"sliding_window": 4096, "layer_types": ["sliding_attention"] + ["full_attention"] * 35}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = tiny(Qwen2MoeConfig(**DEEP, **experts, use_sliding_window=True, max_window_layers=0, **window))
    assert "differ by" in choose_way(model).unpacked_because


def test_a_head_that_a_hook_shifts():
    model = tiny(MODELS["llama"])
    model.lm_head.register_forward_hook(lambda module, args, out: out + torch.arange(VOCABULARY) / 1000)
    assert "not a plain linear layer" in choose_way(model).unpacked_because


def test_a_layer_behind_the_decoder_is_seen():
    """A head's own bias is packed; a shift of the logits outside of it is not."""
    model = tiny(MODELS["llama"])
    model.lm_head.bias = torch.nn.Parameter(torch.arange(VOCABULARY) / 10)
    assert choose_way(model).packed

    class Shifting(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.arange(VOCABULARY) / 1000
            return out

    other = tiny(MODELS["llama"])
    other.__class__ = Shifting
    assert "differ by" in choose_way(other).unpacked_because


@pytest.mark.parametrize("name", PACKED)
def test_packed_and_padded_agree_in_float64(name):
    """What the probe asks, on other rows than its own: the whole model in float64, so that nothing is rounding."""
    assert packed_gap(doubled(tiny(PACKED[name]))) < 2e-6
