"""The memory plan against what fake tensors count, and that an estimate which fails stops nothing."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import REPOSITORY, compose
from transformers import AutoModelForCausalLM

from kpo_cli.config import LoraConfig, train_config
from kpo_cli.core import load_objective
from kpo_cli.errors import UserError
from kpo_cli.policy import memory
from kpo_cli.policy.activations import Decoder, NoEstimate, Pass, activation_bytes, cache_bytes
from kpo_cli.policy.fidelity import Way
from kpo_cli.policy.load import load_policy, narrow
from kpo_cli.policy.memory import GIB, MemoryPlan, check_memory, largest_micro_batch, plan_memory
from kpo_cli.policy.recompute import recompute_layers
from kpo_cli.policy.scorer import Scorer, pack
from kpo_cli.rollout import hf, running
from kpo_cli.training import check

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import memory as counting  # benchmarks/memory.py

CPU = torch.device("cpu")


def config_of(*overrides):
    return train_config(compose(*overrides))


@pytest.mark.parametrize(
    ("shape", "vocabulary", "half", "recomputed", "rank"),
    [
        ("0.6b", 4_096, True, 0, 0),  # layers are nearly all of it
        ("0.6b", 151_936, True, 3, 0),  # as is the head
        ("4b", 4_096, True, 3, 0),
        ("4b", 4_096, True, 2, 0),
        ("4b", 4_096, False, 0, 0),
        ("4b", 151_936, False, 3, 0),
        ("4b", 4_096, True, 0, 16),
        ("0.6b", 4_096, False, 1, 0),
        ("0.6b", 4_096, False, 3, 16),
    ],
)
def test_the_plan_is_what_fake_tensors_count(shape, vocabulary, half, recomputed, rank):
    """Three layers: all but the constant part is linear in them. Whole models: benchmarks/memory.py."""
    config = counting.qwen3(shape, 3)
    config.vocab_size = vocabulary
    settings = {"half": half, "recomputed": recomputed, "lora": LoraConfig(rank, None, "all-linear", False)}
    batch = counting.rows_of(2, 8, 128, 480)
    plan, found = counting.planned(config, batch, **settings), counting.count(config, batch, **settings)
    assert plan.gradients == pytest.approx(found.gradients, rel=1e-3)
    assert plan.moments == pytest.approx(found.moments, rel=1e-3)
    assert plan.step == pytest.approx(found.step, rel=0.01)
    assert plan.forward_and_backward == pytest.approx(found.forward_and_backward, rel=0.15)
    beside = [peak.forward_and_backward - found.weights - found.gradients - found.moments for peak in (plan, found)]
    assert beside[0] == pytest.approx(beside[1], rel=0.15)  # the estimate alone


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 512}
SHAPES = {
    "scores": ("Llama", {"vocab_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
    "logits": ("Granite", {"vocab_size": 2000, "num_attention_heads": 4, "num_key_value_heads": 4}),
    "capped": ("Gemma2", {"vocab_size": 500, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}),
}


def counted_peak(model, batch, half):
    """Of a pass of padded rows with real tensors, beside weights and gradients."""
    if half:
        narrow(model, torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with counting.Peak() as peak:
        counting._pass(Scorer(model, 1.0, half), load_objective("grpo"), batch)
    return peak.most


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("half", "recompute"), [(False, False), (True, False), (False, True)])
def test_padded_rows_take_what_is_counted(shape, attention, half, recompute):
    family, sizes = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(**SMALL | sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    recomputed = recompute_layers(model) if recompute else 0
    rows, prompt, response = 4, 64, 192
    sizes = rows * (prompt + response), rows * (prompt + response), rows * response
    settings = {"adapters": 0, "on_gpu": False, "rows": rows, "eager": attention == "eager"}
    planned = activation_bytes(Decoder.of(config, model), Pass(*sizes, half, recomputed, **settings))
    found = counted_peak(model, counting.rows_of(1, rows, prompt, response), half)
    assert planned == pytest.approx(found, rel=0.15)


def test_the_plan_of_a_slow_way_has_its_rows():
    sizes = ["trainer.prompts_per_step=8", "trainer.group_size=4", "trainer.mini_batches=4"]
    config = config_of(*sizes, "rollout.max_prompt_tokens=30", "rollout.max_response_tokens=100")
    padded, eager, alone = Way("sdpa"), Way("eager"), Way("eager", alone=True)
    assert largest_micro_batch(config, 10**9, True, padded) == (8 * 130, 8 * 130, 8 * 100, 8)
    assert largest_micro_batch(config, 10**9, True, alone) == (130, 130, 100, 1)
    limited = config_of(*sizes, "rollout.max_response_tokens=100", "trainer.max_tokens_per_micro_batch=600")
    assert largest_micro_batch(limited, 10**9, True, padded)[3] == 600 // (limited.rollout.max_prompt_tokens + 100)
    plans = [plan_memory(config, plain_decoder(), CPU, False, way) for way in (None, padded, eager, alone)]
    assert [plan.unknown for plan in plans] == [None] * 4
    packed, padded, eager, alone = (plan.activations for plan in plans)
    assert eager - padded == pytest.approx(
        (2 + 2) * 4 * 4 * 8 * 130**2, rel=0.3
    )  # of 2 layers and at work, bytes, heads, rows
    assert alone < packed < padded


def test_the_largest_micro_batch_is_one_of_full_rows():
    sizes = ["trainer.prompts_per_step=8", "trainer.group_size=4", "trainer.mini_batches=4"]
    config = config_of(*sizes, "rollout.max_prompt_tokens=30", "rollout.max_response_tokens=100")
    tokens, gathered, predicted, _ = largest_micro_batch(config, 10**9, gpu=True)
    packed = pack(counting.rows_of(2, 4, 30, 101), CPU)  # the last token of a response predicts nothing
    assert tokens == packed.input_ids.numel() == 2 * (30 + 4 * 100)
    assert gathered == sum(bucket.numel() for bucket in packed.packing.buckets)
    assert predicted == pytest.approx(len(packed.predictors), rel=0.02)
    limited = config_of(*sizes, "rollout.max_response_tokens=100", "trainer.max_tokens_per_micro_batch=500")
    assert largest_micro_batch(limited, 10**9, gpu=True)[0] == 500
    one_row = config_of(*sizes, "rollout.max_response_tokens=1000", "trainer.max_tokens_per_micro_batch=500")
    assert largest_micro_batch(one_row, 10**9, gpu=True)[2] == 1000


def test_auto_recomputes_as_few_layers_as_make_it_fit(monkeypatch):
    """Of all numbers of layers the smallest whose plan leaves a tenth of the device free."""

    def plan(setting, free=2**50):
        monkeypatch.setattr(memory, "_free", lambda device: int(free))
        sizes = ["rollout.max_response_tokens=2000", "trainer.max_tokens_per_micro_batch=16384"]
        config = config_of(*sizes, f"model.gradient_checkpointing={setting}")
        return plan_memory(config, shape, CPU, True)

    shape = counting.qwen3("0.6b", 3)
    shape.vocab_size = 4_096  # else the head's part of a pass were the largest
    plans = [plan(count) for count in range(4)]
    needs = [p.fixed + p.activations for p in plans]
    assert [p.recomputed for p in plans] == [(count, 3) for count in range(4)]
    assert needs[0] > needs[1] > needs[2]
    assert needs[2] < needs[3]  # the last one again, beside all that it would have kept
    assert (plan("false"), plan("true")) == (plans[0], plans[3])
    for count, need in enumerate(needs[:3]):
        assert plan("auto", need / 0.9 + 1).recomputed == (count, 3)
    assert plan("auto", needs[1] / 0.9 - 1).recomputed == (2, 3)
    assert plan("auto", needs[2] / 2).recomputed == (2, 3)  # nothing fits: the least there is
    assert "with 2 of 3 layers recomputed" in plans[2].describe()


@pytest.mark.parametrize(("free", "layers"), [(2**40, 0), (2**20, 2)])
def test_a_run_stores_the_layers_that_auto_chose(free, layers, monkeypatch, tmp_path):
    config = config_of("model.gradient_checkpointing=auto")
    monkeypatch.setattr(memory, "_free", lambda device: free)
    monkeypatch.setattr(check, "check_memory", lambda plan: None)
    assert check.check_fit(config, tmp_path)[0].model.gradient_checkpointing == layers


@pytest.mark.parametrize("setting", ["some", "-1", "1.5", "null", "[1]"])
def test_other_words_for_recomputation_are_refused(setting):
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing="):
        config_of(f"model.gradient_checkpointing={setting}")


def test_the_cache_is_the_samplers(monkeypatch):
    """At the end of its longest responses; in it one layer of three is held twice while it grows."""
    model = load_policy(config_of().model).model
    config = model.config
    decoder = Decoder.of(config, model)
    made, spread = [], running.spread
    monkeypatch.setattr(running, "spread", lambda cache, *a, **k: made.append(cache) or spread(cache, *a, **k))
    sampler = hf.HFSampler(model, stop_ids=[], temperature=1.0, max_response_tokens=60, batch_size=64)
    sampler.sample([[1, 2, 3, 4]] * 2, 8, (0,))
    held = sum(t.nbytes for layer in made[0].layers for t in (layer._key_store, layer._value_store))
    tokens = made[0].layers[0]._key_store.shape[-2]
    planned = cache_bytes(decoder, 16, tokens, False) - 16 * config.vocab_size * 12
    assert planned == held * (decoder.layers + 1) / decoder.layers
    assert cache_bytes(decoder, 16, tokens, True) < 0.6 * cache_bytes(decoder, 16, tokens, False)


SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ODD = {
    "a list of widths": ("Gemma3nTextConfig", {**SIZES, "intermediate_size": [32, 64], "num_kv_shared_layers": 0}),
    "heads of two sizes": ("Gemma4TextConfig", {**SIZES, "intermediate_size": 32, "num_kv_shared_layers": 0}),
    "experts": ("MixtralConfig", {**SIZES, "intermediate_size": 32, "num_local_experts": 4}),
    "state spaces among attention": ("JambaConfig", {**SIZES, "intermediate_size": 32, "use_mamba_kernels": False}),
    "another MLP": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 24}),
}


def plain_decoder(**changes):
    sizes = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2, **changes}
    return transformers.LlamaConfig(**sizes)


@pytest.mark.parametrize("kind", ODD)
def test_odd_configurations_get_a_reason_or_an_estimate_but_never_stop_a_run(kind, monkeypatch, tmp_path):
    name, sizes = ODD[kind]
    model_config = getattr(transformers, name)(**sizes)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config).parameters())
    plan = plan_memory(config_of(), model_config, CPU, False)
    assert (plan.parameters, plan.fixed) == (count, 16 * count)
    if kind == "another MLP":
        assert plan.unknown is None
        assert plan.activations > 0
    else:
        assert plan.unknown
        assert plan.describe().startswith(f"memory: no estimate ({plan.unknown}), but ")


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        ({"intermediate_size": [32, 32]}, "intermediate_size of this model is [32, 32]"),
        ({"head_dim": None}, None),  # then it is the hidden size over the heads
        ({"head_dim": {"local": 4, "global": 8}}, "head_dim of this model is {'local': 4, 'global': 8}"),
        ({"num_key_value_heads": [2, 4]}, "num_key_value_heads of this model is [2, 4]"),
        ({"head_dim": 6}, "its layers are not attention and an MLP of the sizes in its config"),
    ],
)
def test_attributes_that_are_no_numbers_are_a_reason(breaking, reason):
    model_config = plain_decoder()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    held = SimpleNamespace(**{**model_config.to_dict(), **breaking})
    held.get_text_config = lambda: held
    if reason is None:
        assert Decoder.of(held, model) == Decoder.of(model_config, model)
    else:
        with pytest.raises(NoEstimate, match=f"^{re.escape(reason)}$"):
            Decoder.of(held, model)


def test_a_plan_that_fails_altogether_is_a_line(monkeypatch, tmp_path):
    def broken(*arguments):
        raise TypeError("unsupported operand")

    monkeypatch.setattr(check, "plan_memory", broken)
    config = config_of()
    assert check.check_fit(config, tmp_path) == (config, ["memory: no estimate (TypeError: unsupported operand)"])


def test_what_is_off_the_device_is_counted_where_it_is(monkeypatch):
    """Learning and sampling do not need their memory at the same time."""
    monkeypatch.setattr("kpo_cli.policy.memory._free", lambda device: 80 * GIB)
    gpu = torch.device("cuda", 0)
    plans = {
        offload: plan_memory(config_of(f"trainer.offload_optimizer={offload}"), counting.qwen3("0.6b"), gpu, True)
        for offload in ("none", "sampling", "always")
    }
    count = plans["none"].parameters
    assert count == 596_049_920
    assert [plan.optimizer for plan in plans.values()] == [8 * count, 8 * count, 0]
    assert [plan.sampling - plan.cache for plan in plans.values()] == [12 * count, 4 * count, 4 * count]
    assert all(plan.most == max(plan.fixed + plan.activations, plan.sampling) for plan in plans.values())


def test_a_cache_that_does_not_fit_is_warned_about():
    plan = MemoryPlan(1, GIB, GIB, GIB, GIB, 10 * GIB, "cuda:0", cache=9 * GIB)
    assert "rollout.batch_size" in check_memory(plan)
    assert check_memory(MemoryPlan(1, GIB, GIB, GIB, GIB, 10 * GIB, "cuda:0", cache=7 * GIB)) is None


def plan_of(weights):
    return MemoryPlan(weights, 4 * weights, 4 * weights, 8 * weights, 0, 10**15, "cpu")


def disk(monkeypatch, free, *overrides, run_dir, weights=10**9):
    monkeypatch.setattr(check.shutil, "disk_usage", lambda place: SimpleNamespace(free=int(free)))
    return check.check_disk(config_of(*overrides), plan_of(weights), run_dir)


def test_a_checkpoint_that_cannot_fit_is_refused(monkeypatch, tmp_path):
    """10^9 weights: 4 GB, 8 GB of moments."""
    run_dir = tmp_path / "not/there/yet"
    with pytest.raises(UserError, match=rf"a checkpoint takes 11.18 GiB, but 11.2 GiB are free in {tmp_path}; make"):
        disk(monkeypatch, 12.0e9, run_dir=run_dir)
    many = ["trainer.steps=100", "trainer.checkpoint_every=10"]
    # Three are kept, two of them with moments, and there is the one that is being written: 3 * 4 + 2 * 8 + 12.
    (line,) = disk(monkeypatch, 40.1e9, *many, run_dir=run_dir)
    assert line.startswith("disk: a checkpoint takes 11.18 GiB, all of them 37.25 GiB at most; ")
    assert "the disk may run full" in disk(monkeypatch, 39.9e9, *many, run_dir=run_dir)[1]
    assert len(disk(monkeypatch, 16.1e9 + 12e9, *many, "trainer.keep_checkpoints=1", run_dir=run_dir)) == 1
    assert len(disk(monkeypatch, 10 * 4e9 + 2 * 8e9 - 1e8, *many, "trainer.keep_checkpoints=0", run_dir=run_dir)) == 2
    assert len(disk(monkeypatch, 10 * 4e9 + 2 * 8e9 + 1e8, *many, "trainer.keep_checkpoints=0", run_dir=run_dir)) == 1
    only_last = ["trainer.steps=100", "trainer.checkpoint_every=0"]
    assert len(disk(monkeypatch, 12.1e9, *only_last, run_dir=run_dir)) == 1


def test_a_resumed_run_has_its_checkpoints_already(monkeypatch, tmp_path):
    many = ["trainer.steps=100", "trainer.checkpoint_every=10"]
    (tmp_path / "checkpoints/step-000010").mkdir(parents=True)
    (tmp_path / "checkpoints/step-000010/model.safetensors").write_bytes(b"0" * 10_000_000)
    needed = 40e6 + 4 * 2e5  # of a tokenizer
    assert len(disk(monkeypatch, needed, *many, run_dir=tmp_path, weights=10**6)) == 1
    assert len(disk(monkeypatch, needed - 11e6, *many, run_dir=tmp_path, weights=10**6)) == 2
    with pytest.raises(UserError, match="a checkpoint takes"):
        disk(monkeypatch, 11e6, *many, run_dir=tmp_path, weights=10**6)
