"""Fast sampling is sampling: shared prompts, caches that grow, rows that leave, threads; for every kind of model.

The truth is the plain forward pass, one response at a time, without a cache.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kpo_cli.policy.attention import decode_attention
from kpo_cli.policy.load import context_of, narrow
from kpo_cli.policy.response import Response
from kpo_cli.policy.sharding import local
from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import HFSampler
from kpo_cli.rollout.cache import GrowingLayer, spread
from kpo_cli.rollout.hf import invert_cdf, survivors

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}
WINDOWED = SMALL | {"sliding_window": 8}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", SMALL),
    "llama": ("Llama", SMALL),
    "mistral": ("Mistral", WINDOWED),
    "phi3": ("Phi3", WINDOWED),
    "dynamic": ("Llama", SMALL | {"rope_parameters": DYNAMIC}),
    "longrope": ("Phi3", SMALL | {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "gemma2": ("Gemma2", WINDOWED | {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("GPT2", {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "bloom": ("Bloom", {"vocab_size": 120, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "lfm2": ("Lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "Qwen3Next",
        SMALL
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 0,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}
PROMPTS = [[5, 17, 40, 8, 9], [33], [60, 61, 62], [7, 7, 9, 11, 80, 81, 82, 83, 84, 85, 86], [21, 22, 23]]
STOPS = list(range(100, 112))
"""A tenth of the vocabulary: lengths differ much."""


@cache
def model_of(name: str) -> Any:
    family, settings = SHAPES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    model = transformers.AutoModelForCausalLM.from_config(config(**settings)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def sampler_of(model: Any, **changes: Any) -> HFSampler:
    settings: dict[str, Any] = {"stop_ids": STOPS, "temperature": 0.9, "max_response_tokens": 24, "batch_size": 64}
    return HFSampler(model, **(settings | changes))


def log_softmax_behind(model: Any, prompt: list[int], response: Response) -> torch.Tensor:
    """(T, V), from one forward pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response.token_ids]]), use_cache=False).logits
    return torch.log_softmax(logits[0, len(prompt) - 1 : -1].float() / 0.9, -1)


@contextmanager
def rows_through(model: Any) -> Iterator[list[tuple[int, int]]]:
    """The shape of the input ids of every forward pass."""
    shapes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[2::2]], ids=["padded", "even"])
@pytest.mark.parametrize("name", SHAPES)
def test_log_probs_are_those_of_the_plain_forward_pass(name: str, prompts: list[list[int]]):
    model = model_of(name)
    groups = sampler_of(model).sample(prompts, 6, (1,))
    lengths = {len(response.token_ids) for group in groups for response in group}
    assert min(lengths) < 5
    assert len(lengths) > 4
    for prompt, group in zip(prompts, groups, strict=True):
        for response in group:
            want = log_softmax_behind(model, prompt, response)[range(len(response.token_ids)), response.token_ids]
            torch.testing.assert_close(torch.tensor(response.log_probs), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_are_those_of_the_plain_forward_pass(name: str):
    model = model_of(name)
    for prompt, (response,) in zip(PROMPTS, sampler_of(model).sample(PROMPTS, 1, (0,), greedy=True), strict=True):
        assert log_softmax_behind(model, prompt, response).argmax(-1).tolist() == response.token_ids


def test_a_prompt_goes_through_the_model_once_and_rows_that_ended_leave():
    model = model_of("qwen3")
    with rows_through(model) as shapes:
        groups = sampler_of(model).sample([PROMPTS[0], PROMPTS[2], PROMPTS[0]], 8, (3,))
    assert shapes[0] == (2, 5)
    lengths = [len(response.token_ids) for group in groups for response in group]
    assert len(shapes) == max(lengths)
    running = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    for (rows, columns), needed in zip(shapes[1:], running, strict=True):
        assert columns == 1
        assert needed <= rows <= needed / (1 - 1 / 16)
    assert min(rows for rows, _ in shapes[1:]) < 5


def test_batches_are_of_like_length_and_equal_size():
    sampler = sampler_of(model_of("qwen3"), batch_size=4)
    batches = sampler._batches(PROMPTS, 2)
    assert [len(batch) for batch in batches] == [3, 3, 4]
    assert [len(PROMPTS[i]) for batch in batches for i, _ in batch] == [1, 1, 3, 3, 3, 3, 5, 5, 11, 11]
    assert sampler_of(model_of("qwen3")).sample([], 2, (0,)) == []


@pytest.mark.parametrize("name", ["qwen3", "dynamic", "longrope"])  # of the last two, modules write in every pass
def test_results_do_not_depend_on_the_number_of_threads(name: str):
    model = model_of(name)
    prompts = PROMPTS * 3
    results = [sampler_of(model, batch_size=8, workers=Workers(n)).sample(prompts, 4, (5,)) for n in (1, 2, 2)]
    assert results[0] == results[1] == results[2]  # log-probabilities too, to the bit


@torch.no_grad()
def test_the_context_ends_where_a_text_would_depend_on_those_beside_it():
    model = model_of("longrope")
    limit, called = context_of(model)
    assert limit == 64
    assert called == "the 64 tokens behind which LongRoPE gives a batch other positions"
    alone = model(torch.tensor([PROMPTS[0]])).logits[0]

    def beside(length: int) -> torch.Tensor:
        ids = torch.ones(2, length, dtype=torch.long)
        ids[0, : len(alone)] = torch.tensor(PROMPTS[0])
        return model(ids).logits[0, : len(alone)]

    assert (beside(limit) - alone).abs().max() < 1e-5
    assert (beside(limit + 1) - alone).abs().max() > 1e-2
    assert context_of(model_of("dynamic")) == (256, "the model's context of 256 tokens")
    assert context_of(model_of("bloom"))[0] is None


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_every_response_and_token(workers: int):
    calls: list[tuple[int, int]] = []
    inside = threading.Lock()

    def progress(finished: int, tokens: int) -> None:
        assert inside.acquire(blocking=False)
        calls.append((finished, tokens))
        inside.release()

    sampler = sampler_of(model_of("qwen3"), batch_size=8, workers=Workers(workers), progress=progress, stop_ids=[100])
    for seed in (0, 1):  # each call of `sample` starts from nothing
        calls.clear()
        groups = sampler.sample(PROMPTS, 5, (seed,))
        assert calls == sorted(calls)
        assert calls[-1] == (25, sum(len(response.token_ids) for group in groups for response in group))
        assert len(calls) > 4  # more than one a batch


def test_weights_are_cast_to_bfloat16_once_a_sampling():
    """And what comes out is what the trainer's forward pass would say, which casts them each time."""

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            flat = func is torch.ops.aten._to_copy.default and args[0].dim() == 1  # as a sharded weight lies
            if flat and (kwargs or {}).get("dtype") == torch.bfloat16:
                Casts.count += 1
            return func(*args, **(kwargs or {}))

    model = transformers.Qwen3ForCausalLM(model_of("qwen3").config).eval()
    narrow(model, torch.bfloat16)
    with Casts():
        groups = sampler_of(model, stop_ids=[119], batch_size=2).sample(PROMPTS[2::2], 2, (1,))
    assert Casts.count == len(list(model.parameters()))
    for prompt, group in zip(PROMPTS[2::2], groups, strict=True):
        for response in group:
            want = log_softmax_behind(model, prompt, response)[range(len(response.token_ids)), response.token_ids]
            torch.testing.assert_close(torch.tensor(response.log_probs), want, atol=0.05, rtol=0.02)
    # Nothing of it is left behind: new weights are seen, and gradients reach them.
    with torch.no_grad():
        local(model.lm_head.weight).zero_()
    (response,) = sampler_of(model).sample([[3]], 1, (0,))[0]
    assert response.log_probs[0] == pytest.approx(-torch.tensor(120.0).log().item(), abs=1e-3)
    model(torch.tensor([[3, 4]])).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


# The parts


def test_survivors_keeps_each_running_row_once_and_moves_few():
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 7, 64):
        for _ in range(20):
            ended = torch.rand(rows, generator=generator) < 0.4
            order = survivors(ended)
            assert sorted(order.tolist()) == (~ended).nonzero().squeeze(-1).tolist()
            assert int((order != torch.arange(len(order))).sum()) == int(ended[: len(order)].sum())


def test_a_growing_cache_holds_what_the_concatenated_one_holds():
    torch.manual_seed(0)
    plain, grown = DynamicCache(), DynamicCache()
    prompt = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    for cache_ in (plain, grown):
        cache_.update(*prompt, 0)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    spread(grown, rows, limit=150)
    plain.reorder_cache(rows)
    assert type(grown.layers[0]) is GrowingLayer
    addresses = set()
    for step in range(145):
        count = plain.layers[0].keys.shape[0]
        new = torch.randn(count, 3, 1, 4), torch.randn(count, 3, 1, 6)
        for ours, theirs in zip(grown.update(*new, 0), plain.update(*new, 0), strict=True):
            assert torch.equal(ours, theirs)
        assert grown.get_seq_length() == plain.get_seq_length() == step + 6
        assert grown.get_mask_sizes(1, 0) == plain.get_mask_sizes(1, 0)
        addresses.add(grown.layers[0].keys.data_ptr())
        if step in (20, 60):
            keep = torch.tensor([3, 1, 2, 0] if step == 20 else [2, 1])
            plain.reorder_cache(keep)
            grown.reorder_cache(keep)
    assert len(addresses) < 6  # copied a few times, not at every token
    assert grown.layers[0]._key_store.shape[-2] == 150


def test_layers_of_another_kind_stay_as_they_are():
    model = model_of("lfm2")
    with torch.no_grad():
        held = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    kinds = [type(layer) for layer in held.layers]
    spread(held, torch.tensor([0, 0]), limit=10)
    assert kinds[0] not in (DynamicLayer, DynamicSlidingWindowLayer)
    assert [type(layer) for layer in held.layers] == [kinds[0], GrowingLayer]


@pytest.mark.parametrize("make", [torch.rand, lambda *shape: torch.rand(*shape) ** 40])
@pytest.mark.parametrize("vocabulary", [3, 512, 513, 640, 12_032, 12_100])
def test_inverse_of_a_large_distribution(vocabulary: int, make: Callable[..., torch.Tensor]):
    """Against the plain cumulative sum, with half of the tokens impossible, whole blocks among them."""
    torch.manual_seed(1)
    p = make(64, vocabulary)
    p[:, torch.rand(vocabulary) < 0.4] = 0
    p[:, vocabulary // 3 : vocabulary // 2] = 0
    p[:, -vocabulary // 5 :] = 0
    p[:, 1] += 1e-3
    u = torch.rand(64, dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2**-53
    token = invert_cdf(p, u)
    assert (p.gather(1, token[:, None]) > 0).all()
    cumulative = p.double().cumsum(-1) / p.double().sum(-1, keepdim=True)
    reached = cumulative.gather(1, token[:, None]).squeeze(1)
    before = reached - p.double().gather(1, token[:, None]).squeeze(1) / p.double().sum(-1)
    assert (before <= u + 1e-12).all()
    assert (u < reached + 1e-12).all()
    assert invert_cdf(torch.full((2, vocabulary), torch.nan), u[:2]).max() < vocabulary


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_decode_attention_is_attention(mask: str):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 40, 8)[:, :, :11], torch.randn(3, 2, 11, 5)
    keep = torch.ones(3, 1, 1, 11, dtype=torch.bool)
    keep[0, ..., :4] = False
    given = {"none": None, "boolean": keep, "additive": torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)}[mask]
    scores = query @ key.repeat_interleave(3, 1).transpose(2, 3) * 0.3
    scores = scores if mask == "none" else scores.masked_fill(~keep, -torch.inf)
    want = (functional.softmax(scores, -1) @ value.repeat_interleave(3, 1)).transpose(1, 2)
    torch.testing.assert_close(decode_attention(query, key, value, given, 0.3), want)
