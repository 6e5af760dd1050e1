"""The model that is named is the model that trains.

The truth is an untouched copy, loaded from the same files by transformers alone: eager attention, experts one by one,
in eval mode, float32, one row at a time, without a cache.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from small_runs import model_config, raw_config, resume, rewrite_state, train
from test_scorer import ragged_batch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    XLMConfig,
    XLMWithLMHeadModel,
)
from transformers.integrations import moe
from transformers.models.llama import modeling_llama

from kpo_cli.errors import UserError
from kpo_cli.policy.fidelity import TOLERANCE, Way, choose_way
from kpo_cli.policy.load import load_policy
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.policy.scorer import Scorer
from kpo_cli.runs.checkpoints import progress_of
from kpo_cli.runs.ratios import read_ratios
from kpo_cli.training.main import run

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
HEADS = SIZES | {"head_dim": 8}
FEW = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 4}
ALTERNATE = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
INPUTS = {"vocab_size_per_layer_input": 258, "hidden_size_per_layer_input": 8}
CLIPPED = {"laurel_rank": 4, "altup_coef_clip": 0.1, "num_kv_shared_layers": 0, "intermediate_size": [48, 48]}
FAMILIES = {
    "Gemma2": HEADS | WINDOW | {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "VaultGemma": HEADS | WINDOW | {"attn_logit_softcapping": 0.5},
    "Phimoe": SIZES | EXPERTS | {"sliding_window": None, "input_jitter_noise": 0.3},
    "Mixtral": HEADS | EXPERTS | {"router_jitter_noise": 0.3},
    "MiniMax": HEADS | EXPERTS | {"router_jitter_noise": 0.3, "layer_types": ["full_attention"] * 2},
    "GptOss": HEADS | EXPERTS | ALTERNATE,
    "Falcon": FEW | {"alibi": True, "attention_dropout": 0.3, "initializer_range": 0.3},
    "Bloom": FEW | {"hidden_dropout": 0.3, "initializer_range": 0.3},
    "Mpt": {"vocab_size": 258, "d_model": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.3},
    "OPT": FEW | {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.3, "layerdrop": 0.9, "init_std": 0.3},
    "BioGpt": FEW | {"intermediate_size": 48, "hidden_dropout_prob": 0.3, "layerdrop": 0.9, "initializer_range": 0.3},
    "Doge": SIZES,
    "Gemma3nText": HEADS | INPUTS | CLIPPED | ALTERNATE | {"activation_sparsity_pattern": [0.5, 0.0]},
    "Gemma4Text": HEADS | INPUTS | ALTERNATE | {"global_head_dim": 16},
    "DeepseekV3": SIZES | LATENT | ROUTED | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "Cohere2": HEADS | ALTERNATE | {"logit_scale": 0.2},
    "Granite": SIZES | {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "CpmAnt": FEW | {"dim_head": 8, "dim_ff": 48, "prompt_types": 3, "prompt_length": 2, "init_std": 0.3},
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The directory of a family's tiny model, with the built-in tokenizer."""

    @cache
    def make(family: str) -> Path:
        path = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # transformers starts sinks, biases and norms at 0 and 1
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        model.save_pretrained(path)
        load_policy(model_config()).tokenizer.save_pretrained(path)
        return path

    return make


def untouched(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    if model.config._experts_implementation is not None:
        model.config._experts_implementation = "eager"
    return model.eval()


def row_log_probs(model, prompt, response):
    logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


def true_log_probs(model, batch):
    rows = []
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row, : batch.prompt_lengths[row]].tolist()
        rows.append(row_log_probs(model, prompt, batch.response_ids[row, batch.response_mask[row]].tolist()))
    return torch.cat(rows)


def scored(scorer, batch):
    values = {}
    for rows in scorer.split(batch, torch.arange(len(batch)), 10_000):
        part = batch.rows(rows)
        log_probs, _ = scorer(part)
        values |= {row: log_probs[i][part.response_mask[i]] for i, row in enumerate(rows.tolist())}
    return torch.cat([values[row] for row in sorted(values)])


def gradients(model, values):
    weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(5))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((values * weight).sum(), parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def same_gradients(found, truth):
    scale = max(float(g.abs().max()) for g in truth.values() if g is not None)
    assert scale > 1e-3
    for name, gradient in truth.items():
        other = torch.zeros(()) if found[name] is None else found[name]
        gradient = torch.zeros(()) if gradient is None else gradient
        assert (other - gradient).abs().max() < 1e-3 * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_is_the_model_in_its_directory(family, saved, tmp_path):
    policy = load_policy(model_config(f"model.path='{saved(family)}'", "model.chat_template=none"))
    model, batch = untouched(saved(family)), ragged_batch(prompts=2, samples=3)
    truth = true_log_probs(model, batch)
    true_gradients = gradients(model, truth)
    for recompute in (False, True):
        if recompute and not recompute_layers(policy.model):
            assert family == "CpmAnt"
            continue
        values = scored(policy.way.scorer(policy.model, 1.0), batch)
        torch.testing.assert_close(values, truth, atol=TOLERANCE, rtol=0)
        same_gradients(gradients(policy.model, values), true_gradients)
    after = policy.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    policy.save(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours == theirs


def test_layers_that_cannot_be_recomputed_are_refused(saved):
    model = (f"model.path='{saved('CpmAnt')}'", "model.chat_template=none", "model.gradient_checkpointing=true")
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing=false"):
        load_policy(model_config(*model))


@pytest.mark.parametrize(
    ("family", "line"), [("Gemma2", "attention is eager, not sdpa (sdpa has no soft cap)"), ("Phimoe", None)]
)
def test_a_run_trains_the_model_that_is_named(family, line, saved, tmp_path, capsys):
    path = saved(family)
    options = ["model=hub", f"model.path='{path}'", "model.chat_template=none", "rollout.max_prompt_tokens=128"]
    train(tmp_path, *options, "trainer.steps=1", "trainer.ratios_every=1")
    lines = [text for text in capsys.readouterr().out.split("\n") if "attention is" in text]
    assert [line in text for text in lines] == ([True] if line else [])
    model, gaps = untouched(path), []
    ((found, _),) = read_ratios(tmp_path / "ratios/step-000001.safetensors")
    for row, mask in enumerate(found.mask):
        prompt = found.prompt_ids[row, : found.prompt_lengths[row]].tolist()
        with torch.no_grad():
            truth = row_log_probs(model, prompt, found.response_ids[row, mask].tolist())
        recorded = (found.old_log_probs, found.rollout_log_probs)
        gaps += [(torch.tensor(values[row, mask]) - truth).abs().max() for values in recorded]
    assert len(gaps) == 2 * 16
    assert max(gaps) < TOLERANCE


# What nobody named: whatever the fast way leaves out


def llama(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | changes), dtype=torch.float32).eval()


def capped(cap):
    """Llama's eager attention with a soft cap that nobody tells sdpa of."""

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **others):
        key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
        scores = cap * torch.tanh(query @ key.transpose(2, 3) * scaling / cap)
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        padding = 0 if attention_mask is None else attention_mask
        weights = (scores + padding).masked_fill(~causal, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return attention


def test_what_sdpa_leaves_out_is_found_without_a_name(monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", capped(0.5))
    model, batch = llama(), ragged_batch()
    truth = true_log_probs(untouched_copy(model), batch)
    assert (scored(Scorer(model, 1.0), batch) - truth).abs().max() > 0.1
    way = choose_way(model)
    assert (way.attention, way.packed) == ("eager", False)
    assert "differ by" in way.unpacked_because
    (note,) = way.notes
    assert note.startswith("warning: attention is eager, not sdpa (log-probabilities differ by ")
    torch.testing.assert_close(scored(way.scorer(model, 1.0), batch), truth, atol=TOLERANCE, rtol=0)


def untouched_copy(model):
    other = type(model)(model.config.__class__(**model.config.to_dict(), attn_implementation="eager"))
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_what_fresh_weights_hide_is_found(monkeypatch):
    """With scores near 0 a soft cap does nothing; it begins to act as the model learns."""
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", capped(1.0))
    model, batch = llama(initializer_range=1e-3), ragged_batch()
    with torch.no_grad():
        gap = scored(Scorer(model, 1.0), batch) - true_log_probs(untouched_copy(model), batch)
    assert gap.abs().max() < TOLERANCE / 10
    assert choose_way(model).attention == "eager"


def mixture():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**HEADS | EXPERTS), dtype=torch.float32).eval()


def test_experts_that_are_grouped_into_others_are_computed_one_by_one(monkeypatch):
    model, batch = mixture(), ragged_batch()
    truth = true_log_probs(untouched_copy(model), batch)
    grouped = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", lambda *given: 1.1 * grouped(*given))
    way = choose_way(model)
    assert (way.packed, way.experts, model.config._experts_implementation) == (True, "eager", "eager")
    (note,) = way.notes
    assert note.startswith("warning: experts are computed one by one, not as grouped_mm (log-probabilities differ by ")
    torch.testing.assert_close(scored(way.scorer(model, 1.0), batch), truth, atol=TOLERANCE, rtol=0)


class Noisy(torch.nn.Module):
    def forward(self, hidden):
        return hidden + 0.01 * torch.randn_like(hidden)


def test_a_model_that_is_never_itself_is_refused():
    model = llama()
    model.model.norm = Noisy()
    with pytest.raises(
        UserError, match=r"has no way .* \(sdpa attention, packed: log-prob.*; eager attention, one row"
    ) as raised:
        choose_way(model)
    assert "\n" not in str(raised.value)


class CountsAhead(LlamaForCausalLM):
    """A stand-in for a model that asks a text how many of its tokens are padding, where it is told no mask."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is None:
            padding = (input_ids == self.config.pad_index).sum(-1)
            for row, count in enumerate(padding.tolist()):
                out.logits[row, out.logits.shape[1] - count :] = 0.0
        return out


@pytest.mark.parametrize("kind", [XLMWithLMHeadModel, CountsAhead])
def test_a_model_that_counts_its_padding_ahead_is_refused(kind):
    """The last tokens of a text are another's as soon as it holds some padding: no log-probability is its own."""
    torch.manual_seed(0)
    if kind is CountsAhead:
        model = CountsAhead(LlamaConfig(**HEADS))
        model.config.pad_index = 77
    else:
        model = kind(XLMConfig(vocab_size=258, emb_dim=32, n_layers=2, n_heads=4, causal=True, pad_index=77))
    with pytest.raises(UserError, match=r"has no way .* eager attention, one row at a time: log-prob"):
        choose_way(model.eval())


def test_a_frozen_model_has_a_way_too():
    assert choose_way(llama().requires_grad_(False)).packed


def test_weights_that_are_no_numbers_are_refused():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="log-probabilities are NaN"):
        choose_way(model)


def test_a_model_that_fails_is_refused_in_a_line():
    model = llama()
    model.model.norm.register_forward_hook(lambda *_: {}["a"])
    with pytest.raises(UserError, match="its forward pass fails on a plain row of tokens \\(KeyError: 'a'\\)"):
        choose_way(model)


# Recomputation


def test_layers_are_recomputed_in_eval_mode_where_gradients_are_wanted():
    model, batch, calls = llama(), ragged_batch(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, *_: calls.append(module.training))
    assert recompute_layers(model)
    assert recompute_layers(model)  # once is enough
    with torch.no_grad():
        Scorer(model, 1.0)(batch)
    assert calls == [False] * 2
    log_probs, _ = Scorer(model, 1.0)(batch)
    log_probs.sum().backward()
    assert calls == [False] * 6
    assert recompute_layers(model, 1) == 2  # the first one alone
    Scorer(model, 1.0)(batch)[0].sum().backward()
    assert calls == [False] * 9
    assert recompute_layers(model, 0) == 2
    Scorer(model, 1.0)(batch)[0].sum().backward()
    assert calls == [False] * 11


@pytest.mark.parametrize("count", [1, 2, None])
def test_recomputed_layers_give_the_same_bits(count):
    model, batch = llama(), ragged_batch()
    way = choose_way(model)

    def found():
        model.zero_grad()
        log_probs, _ = way.scorer(model, 1.0)(batch)
        log_probs[batch.response_mask].sum().backward()
        return [log_probs[batch.response_mask].detach(), *(p.grad.clone() for p in model.parameters())]

    wanted = found()
    recompute_layers(model, count)
    assert all(torch.equal(one, other) for one, other in zip(found(), wanted, strict=True))


# A run that goes on


def slanted(model, size):
    """Packed and padded log-probabilities differ: the head's hook does not run where rows are packed."""
    kind = type(model)

    class Slanted(kind):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + size * torch.arange(258) / 258
            return out

    model.__class__ = Slanted
    return model


@pytest.mark.parametrize(("size", "packed"), [(2e-5, (True, True)), (5e-4, (False, True)), (5e-2, (False, False))])
def test_a_run_that_goes_on_keeps_its_way_near_the_tolerance(size, packed):
    first = choose_way(slanted(llama(), size))
    again = choose_way(slanted(llama(), size), Way("kpo", "eager", packed=True))
    assert (first.packed, again.packed) == packed
    said = "are computed by sdpa attention, padded from here on, by sdpa attention, packed before"
    assert [said in note for note in again.notes] == [True] * (not again.packed)
    padded = choose_way(llama(), Way("sdpa", "eager"))
    assert not padded.packed
    assert padded.unpacked_because == "as before"


def test_a_resumed_run_goes_the_way_of_its_last_step(tmp_path, capsys):
    run_dir = train(tmp_path / "run", "trainer.steps=1")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert Way.stored(manifest["way"]).packed
    assert "padded" not in capsys.readouterr().out
    slower = manifest["way"] | {"attention": "eager", "packed": False}
    rewrite_state(run_dir / "checkpoints/step-000001", way=slower)  # as if it had to be taken on the way
    for last in (2, 3):
        resume(run_dir, f"trainer.steps={last}")
        out = capsys.readouterr().out
        assert "attention is eager, not sdpa (as before)" in out
        assert "padded, not packed (as before)" in out
        assert progress_of(run_dir / f"checkpoints/step-00000{last}").way == slower


@pytest.mark.parametrize("told", [True, False])
def test_a_run_of_an_older_kpo_goes_the_way_of_its_manifest_if_that_tells(told, tmp_path, capsys):
    run_dir = train(tmp_path / "run", "trainer.steps=1")
    rewrite_state(run_dir / "checkpoints/step-000001", way=None)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    way = manifest.pop("way") | {"attention": "eager", "packed": False}
    (run_dir / "manifest.json").write_text(json.dumps(manifest | ({"way": way} if told else {})))
    resume(run_dir, "trainer.steps=2")
    assert ("padded, not packed (as before)" in capsys.readouterr().out) == told


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_nothing_is_made_for_a_model_that_is_refused(saved, damage, tmp_path):
    path = tmp_path / "model"
    model = untouched(saved("Phimoe"))
    model.model.embed_tokens.weight.data[5] = damage  # a token that is hardly ever there
    model.save_pretrained(path)
    load_policy(model_config()).tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match=r"1 of its weights hold NaN or infinity \(model.embed_tokens.weight"):
        run(
            raw_config(f"run_dir='{tmp_path / 'run'}'", "model=hub", f"model.path='{path}'", "model.chat_template=none")
        )
    assert not (tmp_path / "run").exists()
