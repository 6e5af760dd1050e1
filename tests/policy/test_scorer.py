"""Packed and padded forward passes are two ways to one result, whatever the architecture."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from kpo_cli.policy.batch import make_batch
from kpo_cli.policy.fidelity import choose_way
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import Scorer, pack

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
PACKED = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE, attention_bias=True),
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=4),
    "phi3": Phi3Config(**SHAPE, pad_token_id=0),
    "gemma3 with a window": Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
}
PADDED = {
    "granite with scaled logits": GraniteConfig(**SHAPE, logits_scaling=3.0),
    "falcon mamba": FalconMambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def tiny(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def ragged_batch(prompts=3, samples=4, longest=23, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(1, VOCABULARY, (count,), generator=draw).tolist()

    lengths = torch.randint(1, longest, (prompts, samples), generator=draw)
    lengths[0, 0] = 1
    groups = [[Response(tokens(n), [0.0] * n, True) for n in row] for row in lengths.tolist()]
    advantages = torch.randn(prompts * samples, generator=draw)
    return make_batch([tokens(3 + 2 * i) for i in range(prompts)], groups, torch.zeros(prompts * samples), advantages)


def values_and_gradients(scorer, batch, entropy_gradient=True):
    scorer.model.zero_grad()
    log_probs, entropy = scorer(batch, entropy_gradient)
    weight = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(5))
    (torch.where(batch.response_mask, log_probs + 0.3 * entropy, 0) * weight).sum().backward()
    gradients = [p.grad.clone() for p in scorer.model.parameters() if p.grad is not None]
    return log_probs[batch.response_mask].detach(), entropy[batch.response_mask].detach(), gradients


@pytest.mark.parametrize("name", PACKED)
def test_packed_is_padded_in_value_and_gradient(name):
    model, batch = tiny(PACKED[name]), ragged_batch()
    expected = values_and_gradients(Scorer(model, 0.7), batch)
    assert choose_way(model).packed
    got = values_and_gradients(Scorer(model, 0.7, packed=True), batch)
    for one, two in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    for one, two in zip(got[2], expected[2], strict=True):
        assert (one - two).abs().max() < 1e-5 * max(1, two.abs().max())


@pytest.mark.parametrize("name", PADDED)
def test_what_cannot_be_packed_says_why_and_stays_as_it_was(name):
    model, batch = tiny(PADDED[name]), ragged_batch()
    expected = values_and_gradients(Scorer(model, 0.7), batch)
    own = model.config._attn_implementation
    assert not choose_way(model).packed
    assert model.config._attn_implementation == own
    got = values_and_gradients(Scorer(model, 0.7), batch)
    assert torch.equal(got[0], expected[0])


def test_log_probs_are_those_of_each_response_by_itself():
    model, batch = tiny(PACKED["qwen3"]), ragged_batch()
    assert choose_way(model).packed
    log_probs, entropy = Scorer(model, 0.7, packed=True)(batch)
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row, : batch.prompt_lengths[row]]
        response = batch.response_ids[row, batch.response_mask[row]]
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        distribution = torch.log_softmax(logits.double() / 0.7, -1)
        count = len(response)
        torch.testing.assert_close(
            log_probs[row, :count].double(), distribution[torch.arange(count), response], atol=1e-5, rtol=1e-5
        )
        expected = -(distribution.exp() * distribution).sum(-1)
        torch.testing.assert_close(entropy[row, :count].double(), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_padded_and_each_prompt_is_there_once():
    batch = ragged_batch()
    inputs = pack(batch, torch.device("cpu"))
    responses = int(batch.response_mask.sum()) - len(batch)  # without their last tokens
    prompts = int(batch.prompt_lengths[::4].sum())
    assert inputs.input_ids.shape == (1, responses + prompts)
    assert len(inputs.targets) == int(batch.response_mask.sum())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 30, 64, 10_000])
def test_micro_batches_hold_every_row_once_and_at_most_so_many_tokens(packed, max_tokens):
    model = tiny(PACKED["qwen3"])
    batch, rows = ragged_batch(prompts=5), torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15])
    parts = Scorer(model, 1.0, packed=packed).split(batch, rows, max_tokens)
    assert sorted(torch.cat(parts).tolist()) == sorted(rows.tolist())
    for part in parts:
        piece = batch.rows(part)
        lengths = piece.prompt_lengths + piece.response_mask.sum(-1)
        tokens = pack(piece, torch.device("cpu")).input_ids.numel() if packed else len(part) * int(lengths.max())
        assert len(part) == 1 or tokens <= max_tokens
    if max_tokens == 10_000:
        assert len(parts) == 1


def test_micro_batches_are_of_nearly_equal_size():
    batch = ragged_batch(prompts=16, samples=8, longest=40)
    scorer = Scorer(None, 1.0, packed=True)
    total = pack(batch, torch.device("cpu")).input_ids.numel()
    parts = scorer.split(batch, torch.arange(len(batch)), total // 3)
    sizes = [pack(batch.rows(part), torch.device("cpu")).input_ids.numel() for part in parts]
    assert max(sizes) <= total // 3
    assert min(sizes) > 0.7 * max(sizes)


@pytest.mark.parametrize("longest_of_all", [None, 3_000])
def test_there_are_few_micro_batches_however_ragged_the_responses(longest_of_all):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 1000, (64, 8), generator=draw)
    lengths[0, 0] = longest_of_all or 20
    groups = [[Response([1] * n, [0.0] * n, True) for n in row] for row in lengths.tolist()]
    batch = make_batch([[1] * 100] * 64, groups, torch.zeros(512), torch.zeros(512))
    tokens = pack(batch, torch.device("cpu")).input_ids.numel()
    parts = Scorer(None, 1.0, packed=True).split(batch, torch.arange(512), 2_048)
    assert torch.equal(torch.cat(parts), torch.arange(512))
    assert len(parts) < 1.5 * tokens / 2_048


def test_a_window_that_only_the_mask_knows_is_not_packed():
    """It acts beyond the rows that the two ways are compared on."""
    window = {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = tiny(Qwen2MoeConfig(**SHAPE, **experts, use_sliding_window=True, max_window_layers=0, **window))
    assert "differ" in choose_way(model).unpacked_because
    assert model.config.sliding_window == 4096
    mistral = tiny(MistralConfig(**SHAPE, sliding_window=4096))
    assert choose_way(mistral).packed
    assert {layer.self_attn.config.sliding_window for layer in mistral.model.layers} == {4096}


def test_the_name_of_the_attention_stays_out_of_checkpoints(tmp_path):
    model = tiny(PACKED["qwen3"])
    assert choose_way(model).packed
    model.save_pretrained(tmp_path)
    assert "kpo" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
