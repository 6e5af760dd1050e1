"""A policy that does not move has ratio 1 to itself: exactly, in every mini-batch.

Old log-probabilities come from a pass without gradients and the new ones from one with them; a difference of kernels,
casts or shapes between the two would be noise in every ratio.
"""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from small_runs import model_config
from test_scorer import ragged_batch
from test_sharding import model_of
from varlen_reference import varlen_reference

from kpo_cli.core import load_objective
from kpo_cli.policy.batch import make_batch
from kpo_cli.policy.load import load_policy, narrow
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.sharding import full, trained_weights
from kpo_cli.policy.threads import Workers
from kpo_cli.policy.varlen import Segments
from kpo_cli.rollout import HFSampler
from kpo_cli.training.step import Updater


def still(scorer, workers=1, lr=0.0):
    return Updater(
        scorer=scorer,
        optimizer=torch.optim.AdamW(trained_weights(scorer.model), lr=lr, weight_decay=0.0, fused=True),
        objective=load_objective("kpo", time_constant=5),
        mini_batches=4,
        max_tokens=60,
        max_grad_norm=1.0,
        mask_truncated=False,
        workers=Workers(workers),
    )


def scorer_of(name, half, packed, lora=False, checkpointing=False):
    model = model_of(name, packed=packed, lora=lora, recompute=checkpointing)
    if half:
        narrow(model, torch.bfloat16)
    return Scorer(model, 0.8, half, packed)


@pytest.mark.parametrize(
    ("checkpointing", "workers"),
    [(False, 1), (True, 1), (True, 2)],
    ids=["kept", "recomputed", "recomputed in two threads"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_z_is_0_without_an_update(half, packed, lora, checkpointing, workers):
    workers = 1 if half and not lora else workers  # a sharded model runs one pass at a time
    batch = ragged_batch(prompts=8)
    record = still(scorer_of("qwen3", half, packed, lora, checkpointing), workers).update(batch, for_record=True)
    assert record.mini_batch_index.unique().tolist() == [0, 1, 2, 3]
    assert len(record.grad_norms) == 4
    assert min(record.grad_norms) > 1e-3
    assert torch.equal(record.log_ratio, torch.zeros_like(record.log_ratio))
    assert record.old_log_probs[batch.response_mask].max() < 0  # the scores are there


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mistral with a window", "gemma3 with a window", "mixtral", "gpt2", "phi3"])
def test_z_is_0_whatever_the_architecture(name, half):
    batch = ragged_batch(prompts=8)
    for packed in (True, False):
        scorer = scorer_of(name, half, packed)
        for module in scorer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        record = still(scorer).update(batch, for_record=True)
        assert torch.equal(record.log_ratio, torch.zeros_like(record.log_ratio))


@pytest.mark.parametrize("name", ["qwen3", "mistral with a window"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_z_is_0_by_varlen_attention(name, checkpointing):
    """With plain torch in the kernel's place: segments, casts and gathers are the same with gradients and without."""
    scorer = replace(
        scorer_of(name, True, True, checkpointing=checkpointing),
        layout=partial(Segments.of, kernel=varlen_reference),
    )
    record = still(scorer).update(ragged_batch(prompts=8), for_record=True)
    assert min(record.grad_norms) > 1e-3
    assert torch.equal(record.log_ratio, torch.zeros_like(record.log_ratio))


def test_an_update_shows():
    """The test above has teeth: the smallest learning rate moves z from 0, and only behind the first mini-batch."""
    record = still(scorer_of("qwen3", True, True), lr=1e-4).update(ragged_batch(prompts=8), for_record=True)
    moved = record.log_ratio.abs().amax(-1)
    assert (moved[record.mini_batch_index == 0] == 0).all()
    assert (moved[record.mini_batch_index > 0] > 0).all()


@cache
def policy(dtype):
    loaded = load_policy(model_config("model.device=cpu", f"model.dtype={dtype}"))
    assert loaded.way.packed
    loaded.narrow()
    return loaded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_built_in_policy_behind_its_own_sampler(dtype):
    """In one process, weights gathered for sampling and its caches left behind."""
    made = policy(dtype)
    prompts = [made.tokenizer(text)["input_ids"] for text in ("8-6-9+7?", "1+1?", "3*3*3-2-2?", "9-9?")]
    sampler = HFSampler(made.model, stop_ids=made.stop_ids, temperature=0.8, max_response_tokens=16, batch_size=8)
    groups = sampler.sample(prompts, 4, (1,))
    batch = make_batch(prompts, groups, torch.zeros(16), torch.randn(16, generator=torch.Generator().manual_seed(0)))
    before = {name: full(parameter).clone() for name, parameter in made.model.named_parameters()}
    job = still(Scorer(made.model, 0.8, dtype == "bfloat16", True))
    for _ in range(2):
        record = job.update(batch, for_record=True)
        assert torch.equal(record.log_ratio, torch.zeros_like(record.log_ratio))
    assert all(torch.equal(before[name], full(parameter)) for name, parameter in made.model.named_parameters())
