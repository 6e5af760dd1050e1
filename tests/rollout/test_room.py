"""Who gets how much of a GPU: Qwen3-4B and 0.6B by hand, and what must hold for any numbers."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, compose
from transformers import AutoModelForCausalLM, LlamaConfig

from kpo_cli.config import train_config
from kpo_cli.policy.load import load_policy
from kpo_cli.rollout import engine as engines
from kpo_cli.rollout.check import FIRST_TOKENS, model_score
from kpo_cli.rollout.room import (
    GIB,
    LOGITS_CHECKED,
    MOMENTS,
    Needs,
    cache_tokens,
    check_bytes,
    choose_offload,
    needs_of,
    token_bytes,
)
from kpo_cli.training import sampler as samplers
from kpo_cli.training.sampler import resolve_offload

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from memory import Peak  # benchmarks/memory.py

QWEN3_4B = SimpleNamespace(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)
PARAMETERS = 4_022_468_096
TOTAL = int(79.1 * GIB)  # an H100 as CUDA reports it
FREE = TOTAL - GIB // 2 - 4 * PARAMETERS  # the context and the float32 weights
NEEDS = needs_of(QWEN3_4B, PARAMETERS, 256, 8192, 2)
WANTED = 256 * 2048


def test_a_token_of_cache():
    assert token_bytes(QWEN3_4B, 2) == 2 * 36 * 8 * 128 * 2 == 147_456
    no_heads = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
    assert token_bytes(no_heads, 4) == 2 * 2 * 4 * 8 * 4


@pytest.mark.parametrize(("bytes_each", "tokens"), [(12, 38_000), (8, 147_000), (0, 365_000)])
def test_qwen3_4b_on_80_gb(bytes_each, tokens):
    """Counted by hand before: weights, gradients and moments reserved; moments alone; nothing."""
    assert cache_tokens(FREE, TOTAL, bytes_each * PARAMETERS, NEEDS) == pytest.approx(tokens, abs=3_000)


def test_moments_leave_where_the_cache_would_not_hold_the_responses():
    choice, why = choose_offload(FREE, TOTAL, MOMENTS * PARAMETERS, NEEDS, WANTED)
    assert choice == "sampling"
    beside = cache_tokens(FREE, TOTAL, MOMENTS * PARAMETERS, NEEDS)
    assert f"about {beside:,} tokens beside AdamW's moments (30.0 GiB)" in why
    assert f"about {cache_tokens(FREE, TOTAL, 0, NEEDS):,} with them in host memory" in why
    assert "524,288 would be used" in why
    assert choose_offload(FREE, TOTAL, MOMENTS * PARAMETERS, NEEDS, beside + 1)[0] == "sampling"
    choice, why = choose_offload(FREE, TOTAL, MOMENTS * PARAMETERS, NEEDS, beside)
    assert choice == "none"
    assert f"about {beside:,} tokens" in why
    # 141 GB: the same responses fit beside the moments.
    assert choose_offload(FREE + 60 * GIB, TOTAL + 60 * GIB, MOMENTS * PARAMETERS, NEEDS, WANTED)[0] == "none"


def test_what_the_user_gives_the_engine_counts():
    moments = 8 * GIB
    for given, choice in ((60 * GIB, "none"), (70 * GIB, "sampling")):
        assert choose_offload(75 * GIB, 80 * GIB, moments, NEEDS, 1, given)[0] == choice
    # To the byte: free - given - spare = moments.
    assert choose_offload(75 * GIB, 80 * GIB, moments, NEEDS, 1, 63 * GIB)[0] == "none"
    assert choose_offload(75 * GIB, 80 * GIB, moments, NEEDS, 1, 63 * GIB + 1)[0] == "sampling"
    assert engines.given_bytes({}, 80, NEEDS) is None
    assert engines.given_bytes({"gpu_memory_utilization": 0.25}, 80, NEEDS) == 20
    assert engines.given_bytes({"kv_cache_memory_bytes": 5}, 80, Needs(1, 2, 3)) == 8


def test_no_room_is_no_tokens():
    assert cache_tokens(GIB, TOTAL, 0, NEEDS) == 0
    assert choose_offload(GIB, TOTAL, 8 * GIB, NEEDS, 1)[0] == "sampling"


@pytest.mark.parametrize(
    ("device", "overrides", "choice"),
    [
        ("cpu", ["rollout=vllm"], "none"),
        ("cuda", ["rollout=hf"], "none"),
        ("cuda", ["rollout=vllm"], "none"),  # the built-in policy is small
        ("cuda", ["rollout=vllm", "trainer.offload_optimizer=always"], "always"),
        ("cuda", ["rollout=vllm", "rollout.engine={gpu_memory_utilization: 0.99}"], "sampling"),
    ],
)
def test_auto_is_resolved_for_the_device(device, overrides, choice, monkeypatch):
    config = train_config(compose(*overrides))
    if "always" not in str(overrides):
        assert config.trainer.offload_optimizer == "auto"
    policy = load_policy(train_config(compose()).model)
    on_device = SimpleNamespace(
        device=torch.device(device), config=policy.model.config, parameters=policy.model.parameters
    )
    monkeypatch.setattr(samplers, "free_memory", lambda: (79 * GIB, 80 * GIB))
    resolved, notes = resolve_offload(config, dataclasses.replace(policy, model=on_device))
    assert resolved.trainer.offload_optimizer == choice
    assert resolved.rollout == config.rollout
    chosen = device == "cuda" and config.rollout.name == "vllm" and choice != "always"
    assert bool(notes) == chosen
    assert all(f"trainer.offload_optimizer={choice}, since" in note for note in notes)


def test_a_check_of_4b_needs_little():
    assert 12 * LOGITS_CHECKED * 151936 < check_bytes(QWEN3_4B, 1024 + FIRST_TOKENS, eager=False) < 1.5 * GIB
    assert check_bytes(QWEN3_4B, 100_000, False) < check_bytes(QWEN3_4B, 1024, False) + 100_000 * 4 * 60_000


def test_a_check_with_eager_attention_has_its_scores():
    """Two of the three tensors of scores are there at once in a plain softmax; a soft cap or a scale has one more."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
    peaks = []
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        with torch.no_grad(), Peak() as peak:
            model(torch.ones(1, 512, dtype=torch.long), use_cache=False)
        peaks.append(peak.most)
    need = check_bytes(config, 512, True) - check_bytes(config, 512, False)
    assert 0.6 * need < peaks[1] - peaks[0] < need


def test_a_check_keeps_few_logits():
    policy = load_policy(train_config(compose("model.dtype=bfloat16")).model)
    policy.model.requires_grad_(False)
    policy.narrow()
    config = policy.model.config
    draw = torch.Generator().manual_seed(0)
    prompt, response = (torch.randint(32, 120, (n,), generator=draw).tolist() for n in (7, 2 * LOGITS_CHECKED + 3))
    rows = []
    hook = policy.model.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    found = model_score(policy, 0.7)(prompt, response)
    hook.remove()
    assert max(rows) == LOGITS_CHECKED + 1
    assert len(rows) == 3
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    want = torch.log_softmax(logits.float() / 0.7, -1)[range(len(response)), response]
    assert found.shape == want.shape
    assert (found - want).abs().mean() < 0.02  # bfloat16: other shapes round in another way
    assert config.vocab_size < 1000
