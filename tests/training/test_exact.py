"""What rounding did to the log-ratios of an update in bfloat16, against float64 models from both ends of its step."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from small_runs import metrics, train
from test_update import batch, policy, updater  # noqa: F401

from kpo_cli.config import LoraConfig
from kpo_cli.core.rounding import Rounding
from kpo_cli.policy.lora import add_adapters, named_weights
from kpo_cli.policy.sharding import trained_weights
from kpo_cli.policy.unrounded import Unrounded
from kpo_cli.runs.ratios import ROUNDING
from kpo_cli.training.exact import RESPONSES


def wide_log_probs(weights, model, batch, rows):  # noqa: F811
    """(n, T) at temperature 0.8, by the model's own forward pass in float64, row by row."""
    wide = copy.deepcopy(model).double()
    wide.load_state_dict(weights)
    wide.set_attn_implementation("eager")
    values = torch.zeros(len(rows), batch.response_ids.shape[1], dtype=torch.float64)
    for place, row in enumerate(rows.tolist()):
        prompt, length = int(batch.prompt_lengths[row]), int(batch.response_mask[row].sum())
        ids = torch.cat([batch.prompt_ids[row, :prompt], batch.response_ids[row, :length]])
        with torch.no_grad():
            logits = wide(input_ids=ids[None]).logits[0, prompt - 1 : -1] / 0.8
        values[place, :length] = logits.log_softmax(-1).gather(-1, ids[prompt:, None]).squeeze(-1)
    return values


def narrowed(policy, method, packed=True, lora=False, lr=0.05):  # noqa: F811
    """An updater in bfloat16 that measures, of a copy of the policy, and its weights before and behind each step."""
    model = copy.deepcopy(policy.model)
    if lora:
        add_adapters(model, LoraConfig(4, None, "all-linear", False))
    other = dataclasses.replace(
        policy, model=model, dtype="bfloat16", way=dataclasses.replace(policy.way, packed=packed)
    )
    unrounded = Unrounded.of(other, 0.8)
    other.narrow()
    job = updater(
        policy,
        method,
        scorer=other.way.scorer(model, 0.8, half=True),
        optimizer=torch.optim.SGD(trained_weights(model), lr=lr),
        unrounded=unrounded,
    )
    kept = [masters(model)]
    job.optimizer.register_step_post_hook(lambda *_: kept.append(masters(model)))
    return job, kept


def masters(model):
    return {name: weight.float().clone() for name, weight in named_weights(model)}


@pytest.mark.parametrize(("packed", "lora"), [(True, False), (False, False), (True, True)])
def test_it_is_that_of_the_weights_behind_the_first_step(policy, batch, packed, lora):  # noqa: F811
    job, kept = narrowed(policy, "grpo_tight", packed, lora, lr=50.0 if lora else 0.05)
    record = job.update(batch, for_record=True, measured=True)
    rows = torch.arange(8, 16)  # of the second mini-batch all, since it has no more
    assert len(rows) == RESPONSES
    mask = batch.response_mask[rows]
    before, behind = (wide_log_probs(weights, policy.model, batch, rows)[mask] for weights in kept[:2])
    true_z = behind - before
    z = record.log_ratio[rows][mask].double()
    assert record.rounding.tokens == int(mask.sum())
    assert record.rounding.z == pytest.approx(float(true_z.square().mean().sqrt()), rel=1e-3)
    assert record.rounding.z_error == pytest.approx(float((z - true_z).square().mean().sqrt()), rel=1e-2)
    assert record.rounding.filtered_error == record.rounding.z_error  # this method has no filter
    assert record.rounding.z_error > 1e-4
    positive = (batch.advantages[rows, None] > 0).expand_as(mask)[mask]
    low, high = math.log1p(-3e-4), math.log1p(4e-4)
    own, true = (torch.where(positive, values > high, values < low) for values in (z, true_z))
    assert record.rounding.decided == pytest.approx(float((own != true).double().mean()))


def test_a_twin_holds_no_weights_but_while_it_is_asked(policy, batch):  # noqa: F811
    job, _ = narrowed(policy, "kpo")
    twin = job.unrounded.twin.model
    assert sum(parameter.numel() for parameter in twin.parameters()) == 0
    with job.unrounded.weighted():
        pairs = zip(twin.parameters(), trained_weights(job.scorer.model), strict=True)
        assert all(own.data_ptr() == weight.data_ptr() for own, weight in pairs)  # no copies
    assert sum(parameter.numel() for parameter in twin.parameters()) == 0


def test_an_update_that_measures_computes_the_same(policy, batch):  # noqa: F811
    plain, measured = (narrowed(policy, "kpo")[0] for _ in range(2))
    plain.unrounded = None
    assert plain.update(batch, measured=True).rounding is None
    assert measured.update(batch, measured=True).rounding is not None
    pairs = zip(trained_weights(plain.scorer.model), trained_weights(measured.scorer.model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_where_memory_does_not_suffice_nothing_is_measured_and_the_run_goes_on(policy, batch):  # noqa: F811
    job, _ = narrowed(policy, "kpo")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    object.__setattr__(job.unrounded.twin, "_packed", full)
    assert job.update(batch, measured=True).rounding is None
    assert job.max_tokens == 10_000


@pytest.mark.parametrize(("dtype", "seen"), [("bfloat16", True), ("float32", False)])
def test_a_run_says_it_and_records_it(tmp_path, capsys, dtype, seen):
    run = train(tmp_path / "run", "rollout=hf", f"model.dtype={dtype}", "trainer.steps=2", "trainer.ratios_every=2")
    printed = "".join(capsys.readouterr())
    assert (f"rounding: behind the first optimizer step log-ratios in {dtype} are off by" in printed) == seen
    _, first, second = metrics(run)
    for row, step in ((first, 1), (second, 2)):
        assert ("log_ratio_rounding" in row) == seen
        with safe_open(run / f"ratios/step-{step:06d}.safetensors", "pt") as file:
            facts = {name: json.loads(value) for name, value in file.metadata().items()}
        assert facts["dtype"] == dtype
        assert (facts["rounding"] or {}).get("z_error") == row.get("log_ratio_rounding")


def test_a_record_knows_the_names():
    assert tuple(Rounding.__dataclass_fields__) == ROUNDING
