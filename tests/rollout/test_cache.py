"""What is kept while sampling: in whole blocks for a GPU, in bfloat16 for a bfloat16 policy, and nothing afterwards.

The truth is the plain forward pass, or the same sampler as it is on a CPU in float32.
"""

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
import transformers
from small_runs import model_config
from test_sampler_models import PROMPTS, SHAPES, SMALL, log_softmax_behind, model_of, sampler_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from kpo_cli.policy.attention import NAME
from kpo_cli.policy.load import load_policy, narrow
from kpo_cli.rollout import HFSampler, cache
from kpo_cli.rollout.cache import GrowingLayer, rounded_up, spread


def blocked(model, block, **changes):
    """A sampler as it would be on a GPU."""
    sampler = sampler_of(model, **changes)
    sampler.cache_block = block
    return sampler


# Blocks


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[2::2]], ids=["padded", "even"])
@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_change_no_number(name, block, prompts):
    model = model_of(name)
    for shared in (False, True):  # transformers' own attention, and ours for one new token
        own = model.config._attn_implementation
        if shared and (own != "sdpa" or block != 5 or name == "gemma2"):  # whose soft cap ours refuses
            continue
        model.set_attn_implementation(NAME if shared else own)
        try:
            groups = blocked(model, block).sample(prompts, 4, (1,))
        finally:
            model.set_attn_implementation(own)
        for prompt, group in zip(prompts, groups, strict=True):
            for response in group:
                want = log_softmax_behind(model, prompt, response)[range(len(response.token_ids)), response.token_ids]
                torch.testing.assert_close(torch.tensor(response.log_probs), want, atol=2e-5, rtol=1e-4)
        plain = sampler_of(model).sample(prompts, 4, (1,))
        assert [[r.token_ids for r in g] for g in groups] == [[r.token_ids for r in g] for g in plain]


def block_on_a_gpu(model, monkeypatch):
    """Of a sampler for a copy of `model` that says that it is there."""
    model, kind, tensor = copy.deepcopy(model), type(model), torch.tensor
    model.__class__ = type(kind.__name__, (kind,), {"device": property(lambda self: torch.device("cuda"))})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", lambda data, device: tensor(data))
        return sampler_of(model).cache_block


def test_on_a_cpu_there_are_no_blocks_and_a_gpu_has_some(monkeypatch):
    assert sampler_of(model_of("qwen3")).cache_block is None
    assert block_on_a_gpu(model_of("qwen3"), monkeypatch) == 128


def test_a_model_that_counts_from_the_end_of_the_keys_gets_no_blocks(monkeypatch):
    """GPT-Neo's local layers see the last keys that there are, and those of a block may be empty."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.2}
    layers = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
    config = transformers.GPTNeoConfig(**sizes, **layers, embed_dropout=0.0, resid_dropout=0.0, attention_dropout=0.0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    sampler = blocked(model, block_on_a_gpu(model, monkeypatch), stop_ids=[])
    for prompt, group in zip(PROMPTS, sampler.sample(PROMPTS, 2, (1,)), strict=True):
        for response in group:
            want = log_softmax_behind(model, prompt, response)[range(24), response.token_ids]
            torch.testing.assert_close(torch.tensor(response.log_probs), want, atol=2e-5, rtol=1e-4)


@contextmanager
def shapes_of_decoding(monkeypatch):
    """(keys, mask) of every attention over one new token."""
    shapes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **others):
        mask = None if attn_mask is None else tuple(attn_mask.shape)
        if query.shape[2] * query.shape[1] <= 4:  # heads in all, however they are grouped
            shapes.append((tuple(query.shape), tuple(key.shape), tuple(value.shape), mask))
        return attend(query, key, value, attn_mask=attn_mask, **others)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        yield shapes


LONG = SMALL | {"max_position_embeddings": 512}
WINDOW = {"sliding_window": 200, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("attention", "prompts"),
    [("sdpa", [[5, 6, 7]]), (NAME, [[5, 6, 7], [8]]), (NAME, [[5, 6, 7]])],
    ids=["theirs", "ours, padded", "ours"],
)
@pytest.mark.parametrize(
    ("family", "settings", "most"),
    [("Qwen3", {}, 3), ("Mistral", {"sliding_window": 8}, 1), ("Gemma3Text", WINDOW, 2 + 3)],
    ids=["full", "short window", "long window and full"],
)
def test_over_300_tokens_attention_sees_few_shapes(family, settings, most, attention, prompts, monkeypatch):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(LONG | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    counts = []
    for block in (None, 128):
        sampler = blocked(model, block, stop_ids=[], max_response_tokens=300)
        sampler.lean = False
        with shapes_of_decoding(monkeypatch) as shapes:
            sampler.sample(prompts, 2, (1,))
        assert len(shapes) == 299 * 2  # layers
        counts.append(len(set(shapes)))
    assert counts[1] <= most
    assert counts[0] >= (8 - 3 if family == "Mistral" else 299)


def test_what_is_not_filled_may_hold_anything():
    """Fresh memory does: here it is NaN, which a weight of 0 does not hide."""
    for name in ("qwen3", "gemma3", "bloom"):
        model = model_of(name)
        expected = blocked(model, 16).sample(PROMPTS, 2, (1,))
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            assert blocked(model, 16).sample(PROMPTS, 2, (1,)) == expected
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("block", [None, 4, 16])
@pytest.mark.parametrize("window", [2, 5, 16, 33])
@pytest.mark.parametrize("prompt", [1, 5, 40])
def test_a_window_holds_what_transformers_holds(prompt, window, block):
    torch.manual_seed(0)
    plain, grown = DynamicCache(), DynamicCache()
    first = torch.randn(2, 3, prompt, 4), torch.randn(2, 3, prompt, 6)
    for cache_ in (plain, grown):
        cache_.layers.append(DynamicSlidingWindowLayer(window))
        cache_.update(*first, 0)
    rows = torch.tensor([0, 0, 1, 1])
    spread(grown, rows, limit=150, block=block)
    plain.reorder_cache(rows)
    layer = grown.layers[0]
    assert type(layer) is GrowingLayer
    lengths = set()
    for step in range(100):
        count = plain.layers[0].keys.shape[0]
        new = torch.randn(count, 3, 1, 4), torch.randn(count, 3, 1, 6)
        (told, offset), (their_length, their_offset) = grown.get_mask_sizes(1, 0), plain.get_mask_sizes(1, 0)
        assert offset == their_offset
        for ours, theirs in zip(grown.update(*new, 0), plain.update(*new, 0), strict=True):
            assert theirs.shape[-2] == their_length
            assert (
                ours.shape[-2]
                == told
                == (their_length if block is None else min(window, rounded_up(their_length, block)))
            )
            assert torch.equal(ours[:, :, :their_length], theirs)
            assert not ours[:, :, their_length:].any()
        lengths.add(told)
        assert grown.get_seq_length() == plain.get_seq_length()
        assert layer._key_store.shape[-2] <= max(2 * window + cache.MIN_ROOM, prompt) + (block or 0)
        if step in (20, 60):
            keep = torch.tensor([3, 1] if step == 20 else [1])
            plain.reorder_cache(keep)
            grown.reorder_cache(keep)
    assert block is None or len(lengths) <= -(-window // block) + 1


# bfloat16


def half_model(name):
    """As `kpo eval` makes one."""
    model = copy.deepcopy(model_of(name)).requires_grad_(False)
    narrow(model, torch.bfloat16)
    return model


def held(model, monkeypatch, **changes):
    """What is sampled, and the layers of its cache."""
    caches = []
    original = spread

    def watched(cache_, *args, **kwargs):
        original(cache_, *args, **kwargs)
        caches.append(cache_)

    with monkeypatch.context() as patch:
        patch.setattr("kpo_cli.rollout.running.spread", watched)
        sampler = sampler_of(model, stop_ids=[], **changes)
        groups = sampler.sample(PROMPTS, 3, (1,))
    layers = [layer for layer in caches[0].layers if isinstance(layer, GrowingLayer)]
    assert layers
    return groups, layers


@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral", "phi3", "gemma2", "gemma3", "gpt2", "bloom", "lfm2"])
def test_a_bfloat16_policy_keeps_bfloat16(name, monkeypatch):
    _, layers = held(half_model(name), monkeypatch)
    assert {t.dtype for layer in layers for t in (layer._key_store, layer._value_store)} == {torch.bfloat16}


def test_with_blocks_too(monkeypatch):
    model = half_model("qwen3")
    sampler = blocked(model, 16)
    for prompt, group in zip(PROMPTS, sampler.sample(PROMPTS, 4, (1,)), strict=True):
        for response in group:
            want = log_softmax_behind(model, prompt, response)[range(len(response.token_ids)), response.token_ids]
            torch.testing.assert_close(torch.tensor(response.log_probs), want, atol=0.05, rtol=0.02)


def test_a_float32_policy_keeps_float32(monkeypatch):
    _, layers = held(model_of("gpt2"), monkeypatch)
    assert {layer._key_store.dtype for layer in layers} == {torch.float32}


def test_nothing_in_bfloat16_outlives_the_sampling():
    """The gathered weights among it: they would take a third of the trainer's memory for weights."""
    policy = load_policy(model_config("model.device=cpu", "model.dtype=bfloat16"))
    policy.narrow()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16:
                made.append((tuple(out.shape), weakref.ref(out.untyped_storage())))
            return out

    settings = {"stop_ids": policy.stop_ids, "temperature": 1.0, "max_response_tokens": 8, "batch_size": 3}
    sampler = HFSampler(policy.model, **settings)
    with Watch():
        sampler.refresh()
        sampler.sample([[5, 6, 7], [8, 9]], 4, (1,))
        sampler.release()
    weights = {tuple(p.shape) for p in policy.model.parameters() if p.dim() == 2}
    assert {shape for shape, _ in made} & weights  # they were there
    gc.collect()
    held = [storage() for _, storage in made]
    assert not [storage for storage in held if storage is not None and storage.nbytes()]
