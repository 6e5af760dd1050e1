"""Policies and engines for the tests of the real vLLM."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import hub_twin
import pytest
import torch
from conftest import compose

from kpo_cli.config import train_config
from kpo_cli.policy.load import load_policy
from kpo_cli.policy.sharding import trained_weights
from kpo_cli.rollout import VLLMSampler
from kpo_cli.rollout.check import SamplerCheck, model_score
from kpo_cli.rollout.engine import VLLMEngine

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
"""The twins' own heads of 16 are too small for vLLM's CPU back end; these are of 32."""


def policy_of(shape: str, folder: Path, *overrides: str):
    """The built-in policy, or a twin of tests/hub_twin.py; the twins' qwen2 and llama with wider heads."""
    policy = load_policy(_config(shape, folder, *overrides).model)
    policy.narrow()
    return policy


def _config(shape: str, folder: Path, *overrides: str):
    if shape == "builtin":
        return train_config(compose(*overrides))
    if shape == "qwen3":
        path = hub_twin.shared_model(shape)
    else:
        family = hub_twin.SHAPES[shape]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(hub_twin.SHAPES, shape, dataclasses.replace(family, config=family.config | HEADS))
            path = hub_twin.make_model(shape, folder / shape)
    return train_config(compose("model=hub", f"model.path='{path}'", *overrides))


def bare(model):
    """What the engine asks of a policy, around a model without a tokenizer."""
    return SimpleNamespace(model=model, dtype="float32", half=False)


@contextmanager
def started(policy, max_length: int = 400, float32_logits: bool = False, **options) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(policy, max_length=max_length, options=options, float32_logits=float32_logits)
    try:
        yield engine
    finally:
        engine.close()


def sampler_of(engine, stop_ids, **changes) -> VLLMSampler:
    settings = {"stop_ids": stop_ids, "temperature": 0.7, "max_response_tokens": 24} | changes
    return VLLMSampler(engine, **settings)


def check_of(policy, temperature: float = 0.7) -> SamplerCheck:
    return SamplerCheck(model_score(policy, temperature), policy.half)


def prompts_of(policy, count: int = 6) -> list[list[int]]:
    """Of unequal length, with a common beginning of several cache blocks (of 128 tokens on a CPU)."""
    draw = torch.Generator().manual_seed(1)
    # Bytes of the built-in policy, words of the twins: no special tokens.
    shared = torch.randint(32, 120, (290,), generator=draw).tolist()
    own = [torch.randint(32, 120, (5 + 7 * i,), generator=draw).tolist() for i in range(count)]
    return [[*shared[: 260 if i % 2 else 290], *tokens] for i, tokens in enumerate(own)]


def gaps(policy, prompts, groups, temperature: float = 0.7) -> torch.Tensor:
    """|engine - transformers| for every sampled token."""
    score = model_score(policy, temperature)
    return torch.cat(
        [
            (score(prompt, response.token_ids) - torch.tensor(response.log_probs)).abs()
            for prompt, group in zip(prompts, groups, strict=True)
            for response in group
        ]
    )


def update(policy, seed: int) -> None:
    """Change every weight that trains, as an optimizer step of a large learning rate would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trained_weights(policy.model):
            weight += 0.02 * torch.randn(weight.shape, generator=draw)
