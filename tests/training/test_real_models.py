"""Whole runs on hub twins (tests/hub_twin.py): what a researcher's first own run meets."""

import json
import re
import shutil

import hub_twin
import pytest
import torch
from safetensors.torch import load_file
from small_runs import metrics, raw_config, resume, same_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from kpo_cli.errors import UserError
from kpo_cli.policy.memory import GIB, MemoryPlan, check_memory
from kpo_cli.training.main import run

SETTINGS = [
    "trainer.steps=2",
    "trainer.prompts_per_step=2",
    "trainer.group_size=2",
    "trainer.mini_batches=2",
    "trainer.checkpoint_every=1",
    "trainer.ratios_every=1",
    "trainer.lr=1e-3",
    "rollout.max_prompt_tokens=200",
    "rollout.max_response_tokens=8",
    "data.limit=8",
    "data.heldout=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    problems = hub_twin.make_problems(12)
    hub_twin.make_jsonl(folder / "problems.jsonl", problems)
    hub_twin.make_dapo_parquet(folder / "dapo.parquet", problems, repeat=5)
    return folder


def source(data, kind):
    if kind == "jsonl":
        return [f"data.path='{data}/problems.jsonl'"]
    return ["data=dapo_math_17k", f"data.path='{data}/dapo.parquet'"]


def train(run_dir, *overrides):
    config = raw_config(*SETTINGS, *with_groups(overrides), f"run_dir='{run_dir}'")
    run(config)
    return run_dir


def with_groups(overrides):
    """The groups that the command line implies."""
    groups = {"model.path": "model=hub", "data.path": "data=file"}
    keys = {override.split("=")[0] for override in overrides}
    return [*(g for k, g in groups.items() if k in keys and g.split("=")[0] not in keys), *overrides]


@pytest.mark.parametrize("template", ["required", "none"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("shape", ["qwen3", "qwen2", "llama"])
def test_the_matrix_trains_resumes_and_reloads(shape, kind, template, data, tmp_path):
    model = hub_twin.shared_model(shape)
    run_dir = train(tmp_path / "run", f"model.path='{model}'", f"model.chat_template={template}", *source(data, kind))
    before = {path.name: path.read_bytes() for path in model.glob("*.safetensors")}
    resume(run_dir, "trainer.steps=3")
    assert [row["step"] for row in metrics(run_dir)] == [0, 1, 2, 3]
    assert all(row["rollout_log_prob_gap"] < 1e-4 for row in metrics(run_dir)[1:])
    assert {path.name: path.read_bytes() for path in model.glob("*.safetensors")} == before  # the source is untouched
    checkpoint = run_dir / "checkpoints/step-000003"
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    stored = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in reloaded.state_dict().items() if name in stored)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer("1 + 1 = ?")["input_ids"] == AutoTokenizer.from_pretrained(model)("1 + 1 = ?")["input_ids"]
    assert reloaded.generation_config.top_k in (None, 50)  # transformers' own default, not the hostile 20
    assert reloaded.generation_config.repetition_penalty in (None, 1.0)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["data"]["duplicates"] == (0 if kind == "jsonl" else 48)
    prompt = manifest["first_prompt"]
    assert prompt.count("\\boxed{}") == 1
    assert "Answer:" not in prompt  # the set's own request is gone
    assert ("<|im_start|>" in prompt or "<|start_header_id|>" in prompt or "header" in prompt) == (
        template == "required"
    )


def test_a_real_run_resumes_to_the_same_bits(data, tmp_path):
    model = f"model.path='{hub_twin.shared_model('qwen3')}'"
    whole = train(tmp_path / "whole", model, *source(data, "jsonl"), "trainer.steps=3", "trainer.warmup_steps=0")
    part = train(tmp_path / "part", model, *source(data, "jsonl"), "trainer.warmup_steps=0")
    resume(part, "trainer.steps=3")
    assert same_weights(weights(part, 3), weights(whole, 3))


def test_a_run_resumes_from_anywhere_but_not_on_changed_data(data, tmp_path, monkeypatch):
    shutil.copy(data / "problems.jsonl", tmp_path / "mine.jsonl")
    monkeypatch.chdir(tmp_path)
    run_dir = train(tmp_path / "run", "data.path=mine.jsonl", "trainer.steps=1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume(run_dir, "trainer.steps=2")
    assert [row["step"] for row in metrics(run_dir)] == [0, 1, 2]
    with (tmp_path / "mine.jsonl").open("a") as file:
        file.write('{"problem": "new", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"mine\.jsonl has changed since"):
        resume(run_dir, "trainer.steps=3")


def test_bfloat16_trains_on_float32_weights_and_reports_its_noise(data, tmp_path):
    model = f"model.path='{hub_twin.shared_model('qwen3')}'"
    run_dir = train(tmp_path / "run", model, "model.dtype=bfloat16", *source(data, "jsonl"))
    stored = weights(run_dir, 2)
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert json.loads((run_dir / "manifest.json").read_text())["dtype"] == "bfloat16"
    row = metrics(run_dir)[1]
    assert row["rollout_log_prob_gap"] < 0.5  # bf16's own noise is reported, not hidden
    exact = train(tmp_path / "exact", model, "model.dtype=float32", *source(data, "jsonl"))
    assert metrics(exact)[1]["entropy"] != row["entropy"]  # the forward pass really ran in bfloat16
    assert metrics(exact)[1]["entropy"] == pytest.approx(row["entropy"], rel=0.05)


@pytest.mark.parametrize("shape", ["qwen3", "llama"])
def test_gradient_checkpointing_changes_nothing(shape, data, tmp_path):
    model = f"model.path='{hub_twin.shared_model(shape)}'"
    plain = train(tmp_path / "plain", model, *source(data, "jsonl"))
    other = train(tmp_path / "other", model, "model.gradient_checkpointing=true", *source(data, "jsonl"))
    first, second = weights(plain, 2), weights(other, 2)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def broken(kind, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(hub_twin.shared_model("qwen3"), path)
    hub_twin.DAMAGE[kind](path)
    return f"model.path='{path}'"


def wrong_data(tmp_path, **row):
    path = tmp_path / "data.jsonl"
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} | row for i in range(8)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return f"data.path='{path}'"


def without_attention(tmp_path):
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    return f"model.path='{tmp_path / 'mamba'}'"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: [broken("missing_template", t), "model.chat_template=required"], "set model.chat_template=none"),
        (
            lambda t: [wrong_data(t), "data.fields.problem=question"],
            "data.jsonl:1: no field 'question'; it has problem",
        ),
        (lambda t: [wrong_data(t, answer=None)], "answer must be a text or a number, found null"),
        (lambda t: [wrong_data(t, answer=["2"])], 'answer must be a text or a number, found ["2"]'),
        (lambda t: [wrong_data(t, answer="no mark"), "data.answer_style=hash"], "no #### in"),
        (lambda t: [wrong_data(t), "data.problem_pattern='x(?P<problem>y)'"], "data.problem_pattern finds no problem"),
        (lambda t: [wrong_data(t), "rollout.max_response_tokens=4000"], "exceed the model's context of 2048 tokens"),
        (lambda t: [broken("large_tokenizer", t)], "they do not belong together"),
        (lambda t: [broken("truncated_shard", t)], "damaged or missing: download it again"),
        (lambda t: [broken("missing_shard", t)], "damaged or missing: download it again"),
        (lambda t: [broken("dropped_tensor", t)], "weights are in no file"),
        (lambda t: [broken("unknown_architecture", t)], "does not know the architecture"),
        (lambda t: [without_attention(t)], "it has no attention"),
        (lambda t: ["model.device=cuda"], "model.device=cuda but torch sees no GPU"),
    ],
)
def test_ways_to_get_it_wrong_each_give_one_line_and_no_directory(make, message, data, tmp_path):
    if message.endswith("no GPU") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    overrides = make(tmp_path)
    if not any(o.startswith("model.path=") for o in overrides):
        overrides.append(f"model.path='{hub_twin.shared_model('qwen3')}'")
    if not any(o.startswith("data.path=") for o in overrides):
        overrides += source(data, "jsonl")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        train(tmp_path / "run", *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.path=some-org/some-model", "data.path=some-org/some-set"])
def test_an_unreachable_hub_is_one_line(name, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    overrides = [name, *(source(data, "jsonl") if name.startswith("model") else [])]
    with pytest.raises(UserError, match=r"cannot be loaded") as caught:
        train(tmp_path / "run", *overrides)
    assert "\n" not in str(caught.value)
    assert re.search("check the name and the network|and the network", str(caught.value))


def test_a_model_that_cannot_fit_is_refused_with_a_suggestion():
    plan = MemoryPlan(8_000_000_000, 32 * GIB, 32 * GIB, 64 * GIB, GIB, 100 * GIB, "cuda:0")
    with pytest.raises(UserError, match=r"8.00B parameters need 128.0 GiB .* take a smaller model"):
        check_memory(plan)
    tight = MemoryPlan(1, 10 * GIB, 10 * GIB, 20 * GIB, 70 * GIB, 100 * GIB, "cuda:0")
    assert "gradient_checkpointing=true" in check_memory(tight)
    assert check_memory(MemoryPlan(1, GIB, GIB, GIB, GIB, 100 * GIB, "cuda:0")) is None


def test_the_memory_plan_counts_what_is_there(data, tmp_path, capsys):
    model = hub_twin.shared_model("llama")
    train(tmp_path / "run", f"model.path='{model}'", *source(data, "jsonl"), "trainer.steps=1")
    out = capsys.readouterr().out
    count = AutoModelForCausalLM.from_pretrained(model).num_parameters()
    assert f"{count:,} parameters" in out
    assert f"weights {4 * count / GIB:.2f}, gradients {4 * count / GIB:.2f}, optimizer {8 * count / GIB:.2f}" in out


def test_training_on_a_benchmark_is_reported(tmp_path, capsys, monkeypatch):
    from kpo_cli.data import overlap

    known = {"math500": frozenset({overlap.fingerprint("3 + 1?")})}
    monkeypatch.setattr(overlap, "_known", lambda: known)
    train(tmp_path / "run", wrong_data(tmp_path), "trainer.steps=1", "data.heldout=1")
    assert "training problems that stand in benchmarks: 1 in math500" in capsys.readouterr().out
