"""How each kind of model is sampled: the way that is chosen gives the model's own log-probabilities.

The truth is the untouched model with eager attention, one row at a time and without a cache.
"""

from functools import cache

import pytest
import torch
import transformers
from test_sampler_models import PROMPTS, SMALL, STOPS

from kpo_cli.errors import UserError
from kpo_cli.policy.fidelity import short_windows
from kpo_cli.rollout import HFSampler
from kpo_cli.rollout.check import Gap
from kpo_cli.rollout.trial import choose_ways
from kpo_cli.rollout.ways import REREADING, Ways

PLAIN = {key: value for key, value in SMALL.items() if key != "head_dim"}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16}
SIZES = {"vocab_size": 120, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STATES = SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
GEMMA = {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "llama": ("Llama", SMALL),
    "gemma3": ("Gemma3Text", SMALL | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "bamba": ("Bamba", PLAIN | SSM | {"attn_layer_indices": [1], "mamba_chunk_size": 16}),
    "falcon_h1": ("FalconH1", PLAIN | SSM | {"mamba_d_ssm": 64, "mamba_chunk_size": 16}),
    "nemotron_h": (
        "NemotronH",
        PLAIN
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 16}
        | {"layers_block_type": ["mamba", "attention"]},
    ),
    "lfm2": ("Lfm2", PLAIN | {"layer_types": ["conv", "full_attention"]}),
    "minimax": ("MiniMax", SMALL | LINEAR | {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {k: v for k, v in PLAIN.items() if k != "max_position_embeddings"}
        | GEMMA
        | {"block_types": ["recurrent", "recurrent", "attention"]},
    ),
    "doge": ("Doge", PLAIN),
    "mamba": ("Mamba", STATES),
    "mamba2": ("Mamba2", STATES | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}),
    "gpt1": ("OpenAIGPT", {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
}
SAMPLED = {
    "llama": Ways(),
    "gemma3": Ways(),
    "bamba": Ways(shortcuts=False, mask=True),
    "falcon_h1": Ways(),
    "lfm2": Ways(),
    "minimax": Ways(shortcuts=False, mask=True, padding=False, reorder=False),
    "recurrent_gemma": REREADING,
    "doge": Ways(),
    "mamba": Ways(shortcuts=False, padding=False),
    "mamba2": Ways(),
    "gpt1": REREADING,
}
"""bamba: wrong before, all others that are not `Ways()`: an exception in the middle of a run."""


@cache
def models(name):
    """The model as it is loaded, and its eager twin."""
    family, settings = FAMILIES[name]
    made = []
    for attention in ({}, {"attn_implementation": "eager"}):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**settings)
        try:
            model = transformers.AutoModelForCausalLM.from_config(config, **attention)
        except ValueError:  # without attention there is no other one
            model = transformers.AutoModelForCausalLM.from_config(config)
        made.append(model.eval())
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return made


def truth_of(name):
    twin = models(name)[1]

    @torch.no_grad()
    def score(prompt, token_ids):
        logits = twin(torch.tensor([[*prompt, *token_ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.float() / 0.9, -1)[range(len(token_ids)), token_ids]

    return score


def tried(name, tokens=range(3, 119)):
    settings = {"stop_ids": STOPS, "temperature": 0.9, "max_response_tokens": 20, "batch_size": 64}
    sampler = HFSampler(models(name)[0], **settings)
    with short_windows(models(name)[1]):  # as those of the model within the trial
        return sampler, choose_ways(sampler, truth_of(name), [list(tokens)])


def gap_of(name, sampler, batches=(PROMPTS, PROMPTS[2::2], [[33], [34]])):
    """Over other prompts and longer responses than those of the trial."""
    said, own, score = [], [], truth_of(name)
    for prompts in batches:
        for prompt, group in zip(prompts, sampler.sample(prompts, 4, (1,)), strict=True):
            for response in group:
                said += response.log_probs
                own.append(score(prompt, response.token_ids))
    return Gap.of(torch.tensor(said), torch.cat(own))


@pytest.mark.parametrize("name", SAMPLED)
def test_the_fastest_way_that_is_right_is_chosen(name):
    sampler, found = tried(name)
    assert (found.ways, found.exact, found.serves) == (SAMPLED[name], True, True)
    assert gap_of(name, sampler.changed(ways=found.ways)).largest < 2e-5
    assert len(found.notes()) == (found.ways != Ways())
    if name in ("bamba", "mamba"):
        assert gap_of(name, sampler).mean > 0.02  # what it is tried for


def test_the_note_names_what_is_missing():
    notes = {name: tried(name)[1].notes()[0] for name in ("minimax", "gpt1", "bamba")}
    assert "its cache cannot be reordered" in notes["minimax"]
    assert "without a cache" in notes["gpt1"]
    assert "it returns no cache of keys and values" in notes["gpt1"]
    assert "sampled with a mask throughout: log-probabilities differ" in notes["bamba"]


def test_a_hybrid_that_decodes_a_little_differently_is_sampled_and_not_believed():
    """NemotronH limits its time steps in a whole text and not token by token, float64 or not."""
    sampler, found = tried("nemotron_h")
    assert (found.ways, found.exact, found.serves) == (Ways(), False, False)
    assert "warning: sampled token by token this model says other log-probabilities" in found.notes()[-1]
    gap = gap_of("nemotron_h", sampler)
    assert gap.largest > 1e-4
    assert gap.mean < 1e-2


ROBERTA = SMALL | {"is_decoder": True, "pad_token_id": 5, "initializer_range": 0.2}


@pytest.mark.parametrize("family", ["Roberta", "Data2VecText"])
def test_positions_that_leave_out_padding_are_seen_though_no_prompt_holds_any(family, monkeypatch):
    """RoBERTa and its kin count a text without its padding tokens, and behind a cache with them: a policy that samples
    one is another model from there on. Its prompts, here of tokens from 20 on, show nothing of that."""
    name = f"{family} with padding"
    monkeypatch.setitem(FAMILIES, name, (family, ROBERTA))
    sampler, found = tried(name, range(20, 119))
    padded = [[33, 5, 34], [35, 36, 37, 5, 5]]
    assert gap_of(name, sampler.changed(ways=Ways(shortcuts=False, padding=False)), [padded]).mean > 0.01
    assert not found.serves or gap_of(name, sampler.changed(ways=found.ways), [padded]).largest < 2e-5


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_model_that_looks_ahead_is_refused(scale, monkeypatch):
    """However little it shows with small weights, as those of a fresh model."""
    monkeypatch.setitem(FAMILIES, f"bert {scale}", ("BertGeneration", SMALL | {"initializer_range": 0.2 * scale}))
    with pytest.raises(UserError, match=r"this model cannot be sampled: with a cache, .*; without one, log-prob"):
        tried(f"bert {scale}")


def test_rounding_of_a_deep_model_is_told_from_a_difference():
    """Weights so large that float32 rounds by more than the tolerance: float64 says that it is the same model."""
    name = "llama"
    model = models(name)[0]
    sampler = HFSampler(model, stop_ids=STOPS, temperature=0.9, max_response_tokens=20, batch_size=64)

    def rounded(prompt, token_ids):  # a stand-in for a trainer in float32: as rough as a deep model's
        values = truth(prompt, token_ids)
        wide = next(model.model.layers[0].parameters()).dtype == torch.float64
        return values if wide or model.lm_head.weight.dtype == torch.float64 else values + 2e-4 * (-1) ** len(prompt)

    truth = truth_of(name)
    found = choose_ways(sampler, rounded, [list(range(3, 119))])
    assert (found.ways, found.exact, found.serves) == (Ways(), True, False)


def test_with_blocks_and_threads_as_it_will_be_used():
    """The trial is of the sampler itself: a cache in blocks that it cannot have is not used either."""
    name = "llama"
    sampler, _ = tried(name)
    found = choose_ways(sampler.changed(cache_block=5), truth_of(name), [list(range(3, 119))])
    assert found.ways == Ways()
    broken = sampler.changed(cache_block="a stand-in for a block that fails")
    found = choose_ways(broken, truth_of(name), [list(range(3, 119))])
    assert found.ways == Ways(shortcuts=False)
    assert gap_of(name, broken.changed(ways=found.ways)).largest < 2e-5


def test_a_run_that_goes_on_is_sampled_as_before():
    """While that is close; else numbers would change in the middle of a run, as at the edge of the tolerance."""
    sampler, found = tried("llama")
    assert found.ways == Ways()
    prompts = [list(range(3, 119))]
    slower = Ways(shortcuts=False, mask=True)
    again = choose_ways(sampler, truth_of("llama"), prompts, slower)
    assert (again.ways, again.exact) == (slower, True)
    assert again.notes() == ["note: this model is sampled with a mask throughout: as before"]
    near = choose_ways(sampler, lambda *row: truth_of("llama")(*row) + 1e-3, prompts, slower)
    assert (near.ways, near.exact) == (slower, False)
