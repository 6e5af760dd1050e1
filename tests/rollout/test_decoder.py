"""The decode step of our own gives what transformers' forward pass gives; where it might not, it is not used."""

import copy
from typing import Any

import pytest
import torch
import transformers
from test_fidelity import capped
from test_sampler_models import PROMPTS, SMALL, STOPS, log_softmax_behind, model_of
from transformers.models.llama import modeling_llama

from kpo_cli.config import LoraConfig
from kpo_cli.policy.lora import add_adapters
from kpo_cli.policy.response import Response
from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import HFSampler, decoder, hf
from kpo_cli.rollout.decoder import Decoder

LONG = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1_000.0}
YARN = LONG | {"rope_type": "yarn", "original_max_position_embeddings": 64}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", SMALL),
    "qwen3 untied, odd epsilon": ("Qwen3", SMALL | {"tie_word_embeddings": False, "rms_norm_eps": 1e-2}),
    "qwen3 tied, one key head": ("Qwen3", SMALL | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", SMALL),
    "llama": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "llama, a key head each": ("Llama", SMALL | {"num_key_value_heads": 4}),
    "llama, biases": ("Llama", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama, gelu": ("Llama", SMALL | {"hidden_act": "gelu"}),
    "llama, linear rotary": ("Llama", SMALL | {"rope_parameters": LONG}),
    "llama, yarn": ("Llama", SMALL | {"rope_parameters": YARN}),
    "mistral": ("Mistral", SMALL | {"sliding_window": None}),
}
OTHERS: dict[str, dict[str, Any]] = {
    "Gemma2": {"num_attention_heads": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "Mistral": {"sliding_window": 64},  # wider than what is tried
    "Qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    "Phi3": {},  # joins its weights itself
    "Granite": {"residual_multiplier": 0.9},  # Llama's very modules, with factors between them
    "Cohere": {},  # rotates otherwise
    "Olmo2": {},  # norms elsewhere
    "Phi": {"partial_rotary_factor": 0.5},
    "Mixtral": {"num_local_experts": 2},
}


def built(family: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # transformers starts them all at 1 and 0
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def sampler_of(model: Any, **changes: Any) -> HFSampler:
    settings: dict[str, Any] = {"stop_ids": STOPS, "temperature": 0.9, "max_response_tokens": 24, "batch_size": 64}
    return HFSampler(model, **(settings | changes))


def plain_sampler_of(model: Any, **changes: Any) -> HFSampler:
    sampler = sampler_of(model, **changes)
    sampler.lean = False
    return sampler


def assert_alike(groups: list[list[Response]], others: list[list[Response]]) -> None:
    for group, other in zip(groups, others, strict=True):
        for ours, theirs in zip(group, other, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each of our steps had."""
    rows: list[int] = []
    step = Decoder.step

    def counted(self: Decoder, token: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(len(token))
        return step(self, token, *others)

    monkeypatch.setattr(Decoder, "step", counted)
    return rows


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[2::2]], ids=["padded", "even"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_samples_what_transformers_forward_pass_does(name: str, prompts: list[list[int]], steps: list[int]):
    model = built(*SHAPES[name])
    sampler, plain = sampler_of(model), plain_sampler_of(model)
    assert sampler.lean
    steps.clear()
    groups = sampler.sample(prompts, 6, (1,))
    assert len(steps) == max(len(response.token_ids) for group in groups for response in group) - 1
    assert min(steps) < max(steps)  # rows that ended left
    assert_alike(groups, plain.sample(prompts, 6, (1,)))
    for prompt, group in zip(prompts, groups, strict=True):  # and without any cache
        for response in group:
            want = log_softmax_behind(model, prompt, response)[range(len(response.token_ids)), response.token_ids]
            assert response.log_probs == pytest.approx(want.tolist(), abs=1e-5)


def test_weights_that_changed_in_place_are_seen(steps: list[int]):
    model = built(*SHAPES["qwen3"])
    sampler, plain = sampler_of(model), plain_sampler_of(model)
    before = sampler.sample(PROMPTS, 4, (1,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model(torch.tensor([[5, 6, 7]])).logits.square().mean().backward()
    optimizer.step()
    steps.clear()
    after = sampler.sample(PROMPTS, 4, (1,))
    assert steps
    assert_alike(after, plain.sample(PROMPTS, 4, (1,)))
    assert after != before
    assert all(parameter.grad is not None for parameter in model.parameters())  # nothing of it is in the way of those


def test_bits_do_not_depend_on_the_number_of_threads():
    model = built(*SHAPES["qwen3"])
    results = [sampler_of(model, batch_size=8, workers=Workers(n)).sample(PROMPTS * 3, 4, (5,)) for n in (1, 2, 2)]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("family", OTHERS)
def test_models_of_another_shape_stay_with_transformers(family: str, steps: list[int]):
    sizes = SMALL if family != "GPT2" else {"vocab_size": 120}
    sampler = sampler_of(built(family, sizes | OTHERS[family]))
    assert not sampler.lean
    steps.clear()
    assert len(sampler.sample(PROMPTS[:2], 2, (1,))) == 2
    assert steps == []


def test_what_a_forward_pass_may_be_wrapped_in_is_respected(steps: list[int]):
    """When the sampler is made, and when it comes later."""
    plain = model_of("qwen3")
    hooked, cast, adapted = (copy.deepcopy(plain) for _ in range(3))
    samplers = [sampler_of(model) for model in (hooked, cast, adapted)]
    assert all(sampler.lean for sampler in samplers)
    hooked.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    cast.forward = torch.autocast("cpu", dtype=torch.bfloat16)(cast.forward)
    pytest.importorskip("peft")
    add_adapters(adapted, LoraConfig(rank=2, alpha=None, targets="all-linear", merge_checkpoints=False))
    for layer in (module for module in adapted.modules() if hasattr(module, "lora_B")):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    for sampler in samplers:
        steps.clear()
        assert not sampler_of(sampler.model).lean
        groups = sampler.sample(PROMPTS[:2], 3, (1,))
        assert steps == []
        assert_alike(groups, plain_sampler_of(sampler.model).sample(PROMPTS[:2], 3, (1,)))


def test_it_is_for_small_models_in_float32(monkeypatch: pytest.MonkeyPatch):
    model = built(*SHAPES["llama"])
    assert sampler_of(model).lean
    assert sampler_of(model, batch_size=300).batch_size == hf.LEAN_BATCH
    assert not sampler_of(copy.deepcopy(model).double()).lean
    monkeypatch.setattr(hf, "SMALL_MODEL", model.num_parameters())
    assert not sampler_of(model).lean
    assert sampler_of(model, batch_size=300).batch_size == 300


def test_trying_shows_a_difference_that_the_weights_hide():
    """A model whose attention and MLP write nothing yet, as some are initialised."""
    model = built("Granite", SMALL | {"residual_multiplier": 0.9})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    state = torch.get_rng_state()
    assert Decoder.of(model, 8) is not None  # its modules are Llama's
    assert not decoder.fits(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_our_step_is_held_to_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to the sdpa that it is made of."""
    assert decoder.fits(model_of("llama"))
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", capped(1.0))
    assert not decoder.fits(model_of("llama"))
