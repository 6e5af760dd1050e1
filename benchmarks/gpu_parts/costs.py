"""What it costs: memory against the plan, a training step, sampling."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from step import (
    GROUP,
    SHAPES,
    Variant,
    in_its_dtype,
    make_model,
    make_optimizer,
    make_rows,
    measure_steps,
    one_step,
    peak_flops,
)

from gpu_parts import NOT_MEASURED, Numbers, Setting, composed, require, saved_model
from gpu_parts.machine import GIB
from kpo_cli.policy.load import load_policy
from kpo_cli.policy.memory import MemoryPlan, plan_memory
from kpo_cli.policy.threads import Workers
from kpo_cli.rollout import HFSampler
from kpo_cli.rollout.check import SamplerCheck
from kpo_cli.training.sampler import trainer_score

MEASURED_PEAK = (790e12, "bf16 matrix products reach 790 TFLOP/s there")
"""What an 8,192-wide product was seen to reach on H100 and H200 cards; their maker says 989."""
ROOM_FOR_ALL = 100 * GIB
"""From here on the weights, gradients and moments of the 4B shape and the activations fit beside each other."""


def memory(setting: Setting) -> Numbers:
    """Most bytes of one packed step (two mini-batches) against `plan_memory`, with random weights."""
    cases = {"0.6b": (8192, False), "4b": (8192, True)} if not setting.small else {"tiny": (256, True)}
    wrong: list[str] = []
    for name, (tokens, large) in cases.items():
        case = f"{name}, {tokens:,} tokens{', recompute, offload' if large else ''}"
        model = in_its_dtype(make_model(SHAPES[name], setting.device))
        plan = planned(model.config, tokens, large, setting)
        parts = {part: getattr(plan, part) / GIB for part in ("weights", "gradients", "optimizer", "activations")}
        yield {f"{case}: planned {part}, GiB": size for part, size in parts.items()}
        peak, seconds = measured_peak(model, name, tokens, large, setting)
        yield {f"{case}: seconds of two steps": seconds}
        if not setting.cuda:
            yield {
                f"{case}: measured peak": f"{NOT_MEASURED}: the process took {peak / GIB:.2g} GiB with its libraries"
            }
            continue
        total = (plan.fixed + plan.activations) / GIB
        yield {f"{case}: planned, GiB": total, f"{case}: measured, GiB": peak / GIB}
        yield {f"{case}: measured / planned": peak / GIB / total}
        if peak / GIB > 1.15 * total:
            wrong.append(f"{case}: {peak / GIB:.1f} GiB where {total:.1f} are planned")
        del model
        torch.cuda.empty_cache()
    require(wrong)


def planned(model_config: Any, tokens: int, large: bool, setting: Setting) -> MemoryPlan:
    """What `kpo train` says before such a run; sampling is kept so small that the update decides."""
    config = composed(
        f"trainer.max_tokens_per_micro_batch={tokens}",
        f"model.gradient_checkpointing={str(large).lower()}",
        f"trainer.offload_optimizer={'always' if large else 'none'}",
        *("rollout.batch_size=1", "rollout.max_prompt_tokens=64", "rollout.max_response_tokens=64"),
    )
    return plan_memory(config, model_config, torch.device(setting.device), half=setting.cuda)


def measured_peak(model: Any, name: str, tokens: int, large: bool, setting: Setting) -> tuple[int, float]:
    """Bytes and seconds; the second step has the optimizer's state from its beginning."""
    optimizer = make_optimizer(model, large and setting.cuda)
    batch, variant, start = make_rows(SHAPES[name], tokens), Variant(recompute=large), time.perf_counter()
    peaks = [one_step(variant, model, optimizer, batch, tokens)["peak"] for _ in range(2)]
    return int(max(peaks)), time.perf_counter() - start


def step(setting: Setting) -> Numbers:
    """benchmarks/step.py, KPO and GRPO in turns; its head states the formula of MFU."""
    peak = MEASURED_PEAK if setting.cuda else peak_flops("cpu")
    yield {"MFU is of": peak[1]}
    for name in ("tiny",) if setting.small else ("0.6b", "4b"):
        big = name == "4b"
        host = big and torch.cuda.get_device_properties(0).total_memory < ROOM_FOR_ALL
        variants = [Variant(method=method, recompute=big) for method in ("kpo", "grpo")]
        tokens = SHAPES[name].tokens
        rows = measure_steps(name, setting.device, tokens, 1 if big or setting.small else 2, variants, peak, host)
        for row in rows:
            case = f"{name}, {row['method']}{', recompute' if big else ''}{', offload' if host else ''}"
            names = ("tokens/s", "MFU step", "MFU fwd+bwd", "step", "fwd+bwd", "optimizer", "objective", "pass")
            yield {f"{case}: {key}": row[key] for key in names}
            yield {f"{case}: peak, GiB": row["peak"] / GIB if setting.cuda else NOT_MEASURED}
        yield {f"{name}: step of KPO / step of GRPO": rows[0]["step"] / rows[1]["step"]}
        if setting.cuda:
            torch.cuda.empty_cache()


def rollout(setting: Setting) -> Numbers:
    """rollout=hf in bfloat16, the layers of Qwen3-0.6B over bytes: speed, shapes, and the gap to the trainer."""
    path = saved_model(setting, **(SMALL_BODY if setting.small else LARGE_BODY))
    config = composed(f"model.path='{path}'", f"model.device={setting.device}", "model.dtype=bfloat16")
    policy = load_policy(config.model)
    policy.narrow()
    scorer = policy.way.scorer(policy.model, 1.0, policy.half)
    prompts, length = (2, 24) if setting.small else (32, 128)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(256, (20 + i,), generator=draw).tolist() for i in range(prompts)]
    settings = {"stop_ids": policy.stop_ids, "temperature": 1.0, "max_response_tokens": length}
    sampler = HFSampler(policy.model, batch_size=256, workers=Workers(1), **settings)
    for again in (False, True):
        start = time.perf_counter()
        with attention_shapes() as seen:
            groups = sampler.sample(ids, GROUP, (int(again),))
        spent, tokens = time.perf_counter() - start, sum(len(r.token_ids) for group in groups for r in group)
        name = f"{prompts * GROUP} responses of up to {length} tokens{', again' if again else ''}"
        yield {f"{name}: tokens/s": tokens / spent, f"{name}: distinct shapes in attention": len(seen)}
    gaps = SamplerCheck(trainer_score(scorer), half=True)(ids, groups)
    yield {f"gap to the trainer, nats: {key.removeprefix('sampler_gap_')}": value for key, value in gaps.items()}


LARGE_BODY = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
SMALL_BODY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@contextmanager
def attention_shapes() -> Iterator[set[Any]]:
    """The shapes of queries, keys and masks that go into scaled_dot_product_attention within the block."""
    seen: set[Any] = set()
    own = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Any, key: Any, *others: Any, **named: Any) -> Any:
        mask = named.get("attn_mask")
        seen.add((tuple(query.shape), tuple(key.shape), None if mask is None else tuple(mask.shape)))
        return own(query, key, *others, **named)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", noted):
        yield seen
