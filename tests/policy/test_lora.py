"""LoRA: what trains, what is stored, and that every way to the weights is the same model (truth: peft's own merge)."""

import copy
import json
import sys

import hub_twin
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from small_runs import metrics, raw_config, resume, same_weights
from transformers import AutoModelForCausalLM

from kpo_cli.config import LoraConfig, ModelConfig, convert
from kpo_cli.errors import UserError
from kpo_cli.evaluation.config import EvalConfig
from kpo_cli.evaluation.subject import find_subjects
from kpo_cli.policy.load import load_policy
from kpo_cli.policy.lora import adaptable, adapted, add_adapters, named_weights, without_adapters
from kpo_cli.policy.memory import GIB, check_memory, plan_memory
from kpo_cli.training.main import run

SETTINGS = [
    "model=hub",
    "data=file",
    "model.lora.rank=4",
    "trainer.steps=2",
    "trainer.prompts_per_step=2",
    "trainer.group_size=2",
    "trainer.mini_batches=2",
    "trainer.checkpoint_every=1",
    "trainer.warmup_steps=0",
    "trainer.lr=1e-2",
    "rollout.max_prompt_tokens=200",
    "rollout.max_response_tokens=8",
    "data.limit=8",
    "data.heldout=2",
    "trainer.kl_coefficient=0.1",
    "trainer.entropy_bonus=1",  # a random model earns no reward: this is what it learns
]
IDS = torch.randint(0, 1000, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    return hub_twin.make_jsonl(path, hub_twin.make_problems(12))


def train(run_dir, data, *overrides, shape="qwen3"):
    model = hub_twin.shared_model(shape)
    run(raw_config(*SETTINGS, f"model.path='{model}'", f"data.path='{data}'", f"run_dir='{run_dir}'", *overrides))
    return run_dir


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    return train(tmp_path_factory.mktemp("lora") / "run", data, "model.lora.merge_checkpoints=true")


def adapters(run_dir, step):
    return load_file(run_dir / f"checkpoints/step-{step:06d}/adapter_model.safetensors")


def model_config(path=None, **changes):
    lora = {"rank": 0, "alpha": None, "targets": "all-linear", "merge_checkpoints": False}
    lora |= {key: changes.pop(key) for key in list(changes) if key in lora}
    raw = {"name": "hub", "path": str(path), "architecture": None, "chat_template": "auto", "chat_template_kwargs": {}}
    raw |= {"dtype": "auto", "device": "cpu", "gradient_checkpointing": False, "lora": lora}
    return convert(ModelConfig, raw | changes)


def adapted_policy(shape="qwen3", **changes):
    """With adapters away from zero, so that they show."""
    policy = load_policy(model_config(hub_twin.shared_model(shape), rank=4, **changes))
    draw = torch.Generator().manual_seed(1)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=draw)
    return policy


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def test_only_adapters_train(trained):
    stored = adapters(trained, 2)
    assert len(stored) == 2 * 7 * 2  # A and B of seven linear layers in each of two decoder layers
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stored)
    assert all(stored[name].any() for name in stored)  # B began at zero
    before = adapters(trained, 1)
    assert not any(torch.equal(stored[name], before[name]) for name in stored)
    moments = load_file(trained / "checkpoints/step-000002/trainer/optimizer.safetensors")
    assert len(moments) == 3 * len(stored)
    rows = metrics(trained)
    assert rows[1]["rollout_log_prob_gap"] < 1e-4
    assert rows[1]["ref_kl"] >= 0


def test_a_checkpoint_is_small_and_no_pickle(trained):
    checkpoint = trained / "checkpoints/step-000002"
    assert not (checkpoint / "model.safetensors").exists()
    names = {path.name for path in checkpoint.rglob("*") if path.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "state.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.0)
    assert config["base_model_name_or_path"] == str(hub_twin.shared_model("qwen3"))


def test_a_killed_run_resumes_to_the_same_bits(data, trained, tmp_path):
    part = train(tmp_path / "part", data, "trainer.steps=1")
    resume(part, "trainer.steps=2")
    assert same_weights(adapters(part, 2), adapters(trained, 2))
    assert metrics(part)[-1]["ref_kl"] == metrics(trained)[-1]["ref_kl"]


def test_every_reader_sees_the_same_model(trained):
    """Ours as a start and as a subject of evaluation, merged and not; peft; transformers with the merged folder."""
    checkpoint = trained / "checkpoints/step-000002"
    training = load_policy(model_config(hub_twin.shared_model("qwen3"), rank=4), checkpoint)
    truth = logits(training.model)
    start = logits(load_policy(model_config(hub_twin.shared_model("qwen3"))).model)
    assert (truth - start).abs().max() > 0.1
    by_peft = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert torch.equal(logits(by_peft), truth)
    merged = AutoModelForCausalLM.from_pretrained(checkpoint / "merged").eval()
    assert merged.dtype == torch.float32
    assert torch.allclose(logits(merged), truth, atol=1e-5 * float(truth.abs().max()))
    for path in (trained, checkpoint, checkpoint / "merged"):
        policy = evaluated(path).load("checkpoint")
        assert torch.allclose(logits(policy.model), truth, atol=1e-5 * float(truth.abs().max()))
        assert policy.stop_ids == training.stop_ids
        assert not adapted(policy.model)


def evaluated(path):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from kpo_cli.cli.compose import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw = OmegaConf.to_container(compose("eval", [f"checkpoint='{path}'", "benchmarks=[x]"]), resolve=True)
    return find_subjects(convert(EvalConfig, {k: v for k, v in raw.items() if k not in ("run_dir", "overrides")}))[
        "checkpoint"
    ]


def test_an_evaluation_of_the_merged_folder_asks_as_the_run_did(trained):
    one, other = evaluated(trained), evaluated(trained / "checkpoints/step-000002/merged")
    assert (one.system_prompt, one.instruction) == (other.system_prompt, other.instruction)
    assert other.label == f"{one.label}-merged"


@pytest.mark.parametrize("shape", ["qwen3", "qwen2", "llama"])
def test_named_weights_are_those_of_peft_s_own_merge(shape):
    """Tied and untied heads, layers with a bias and without."""
    model = adapted_policy(shape).model
    named = dict(named_weights(model))
    base = AutoModelForCausalLM.from_pretrained(hub_twin.shared_model(shape), dtype=torch.float32)
    import peft

    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    state = {f"base_model.model.{name}": value for name, value in model.state_dict().items()}
    wrapped.load_state_dict(state)
    truth = wrapped.merge_and_unload().state_dict()
    assert list(named) == list(truth)
    for name, tensor in truth.items():
        assert torch.allclose(named[name], tensor, atol=1e-6), name


def test_named_weights_of_a_model_without_adapters_are_its_own():
    model = load_policy(model_config(hub_twin.shared_model("qwen3"))).model
    named, state = dict(named_weights(model)), model.state_dict()
    assert list(named) == list(state)
    assert all(named[name].data_ptr() == state[name].data_ptr() for name in state)


def test_the_model_below_the_adapters_is_the_start_and_shares_its_memory():
    model = adapted_policy(dtype="bfloat16").model
    below = without_adapters(model)
    start = load_policy(model_config(hub_twin.shared_model("qwen3"))).model
    assert torch.equal(logits(below), logits(start))
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own and not p.requires_grad for p in below.parameters())
    assert adapted(model)
    assert not adapted(below)


def test_the_reference_kl_is_the_one_to_a_separate_copy(data, tmp_path, monkeypatch):
    shared = train(tmp_path / "shared", data)

    def copied(model):
        return copy.deepcopy(load_policy(model_config(hub_twin.shared_model("qwen3"))).model).requires_grad_(False)

    monkeypatch.setattr("kpo_cli.training.assemble.without_adapters", copied)
    separate = train(tmp_path / "separate", data)
    for one, two in zip(metrics(shared)[1:], metrics(separate)[1:], strict=True):
        assert one["ref_kl"] == pytest.approx(two["ref_kl"], rel=1e-3, abs=1e-7)
    assert metrics(shared)[2]["ref_kl"] > 1e-5
    for name, tensor in adapters(shared, 1).items():
        assert torch.allclose(tensor, adapters(separate, 1)[name], atol=1e-4)


def test_in_bfloat16_all_is_that_is_frozen_and_nothing_else():
    policy = adapted_policy(dtype="bfloat16")
    policy.narrow()
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}


def test_gradients_are_those_of_the_factors():
    """dL/dA = s B^T G x and dL/dB = s G (A x), with G the gradient that full fine-tuning would give to W."""
    policy = adapted_policy()
    layer = policy.model.model.layers[1].mlp.down_proj
    full = AutoModelForCausalLM.from_pretrained(hub_twin.shared_model("qwen3"), dtype=torch.float32)
    full.load_state_dict(dict(named_weights(policy.model)))
    for model in (policy.model, full):
        torch.log_softmax(model(IDS).logits, -1)[..., 7].sum().backward()
    gradient = full.model.layers[1].mlp.down_proj.weight.grad
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for own, truth in ((a.grad, 2 * b.T @ gradient), (b.grad, 2 * gradient @ a.T)):
        assert torch.allclose(own, truth, atol=1e-4 * float(truth.detach().abs().max()))
    assert layer.base_layer.weight.grad is None


def test_gradient_checkpointing_changes_nothing(data, trained, tmp_path):
    other = train(tmp_path / "run", data, "model.gradient_checkpointing=true")
    for name, tensor in adapters(trained, 2).items():
        assert torch.allclose(tensor, adapters(other, 2)[name], atol=1e-5)


def test_bfloat16_trains_float32_adapters(data, tmp_path):
    run_dir = train(tmp_path / "run", data, "model.dtype=bfloat16", "model.lora.merge_checkpoints=true")
    assert all(tensor.dtype == torch.float32 for tensor in adapters(run_dir, 2).values())
    assert metrics(run_dir)[1]["rollout_log_prob_gap"] < 0.5
    merged = load_file(run_dir / "checkpoints/step-000002/merged/model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in merged.values())
    part = train(tmp_path / "part", data, "model.dtype=bfloat16", "trainer.steps=1")
    resume(part, "trainer.steps=2")
    assert same_weights(adapters(part, 2), adapters(run_dir, 2))


def test_training_goes_on_from_adapters_whole_or_with_new_ones(data, trained, tmp_path):
    start = trained / "checkpoints/step-000002"
    truth = logits(load_policy(model_config(start)).model)
    for rank in (0, 2):
        options = [f"model.path='{start}'", f"model.lora.rank={rank}", "trainer.kl_coefficient=0", "trainer.steps=1"]
        settings = [s for s in SETTINGS if s.split("=")[0] not in {o.split("=")[0] for o in options}]
        run_dir = tmp_path / f"rank-{rank}"
        run(raw_config(*settings, *options, f"data.path='{data}'", f"run_dir='{run_dir}'"))
        manifest = json.loads((run_dir / "manifest.json").read_text())["model"]
        assert manifest["base"]["path"] == str(hub_twin.shared_model("qwen3"))
        resume(run_dir, "trainer.steps=2")
        moved = logits(evaluated(run_dir).load("checkpoint").model) - truth
        assert float(moved.abs().max()) > 1e-4


def test_the_run_says_what_trains(data, tmp_path, capsys):
    train(tmp_path / "run", data, "trainer.steps=1", "model.lora.targets=[q_proj,v_proj]", "model.lora.alpha=4")
    out = capsys.readouterr().out
    trained = 2 * 4 * ((64 + 128) + (64 + 64))
    assert f"lora: rank 4, scale 1, {trained:,} trained parameters beside frozen weights" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.rank=-1"], "model.lora.rank=-1 must be at least 0"),
        (["model.lora.alpha=0"], "model.lora.alpha=0.0 must be a finite number above 0"),
        (["model.lora.targets=q_proj"], "must be all-linear or a list of layers"),
        (["model.lora.targets=[]"], "must be all-linear or a list of layers"),
        (["model.lora.targets=[nope]"], r"model.lora.targets=\['nope'\]: Target modules .* not found"),
        (["model.lora.targets=[embed_tokens]"], "only linear layers can have adapters"),
        (["model.lora.rank=100000"], "model.lora.rank=100000 is above [0-9]+, the model's widest layer"),
    ],
)
def test_errors_are_one_line(overrides, message, data, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        train(tmp_path / "run", data, *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_random_weights_get_no_adapters(tmp_path):
    with pytest.raises(UserError, match="adapts a trained model, but model=small begins with random weights"):
        run(raw_config("model=small", "model.lora.rank=4", f"run_dir='{tmp_path}/run'"))


def test_without_peft_it_says_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model.lora.rank=4 needs peft: pip install 'kpo-cli\[lora\]'"):
        train(tmp_path / "run", data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"base_model_name_or_path": "/no/such/model"}', "adapters of /no/such/model, which is not there"),
        ('{"base_model_name_or_path": null}', "does not say of which model"),
        ("{", "does not say of which model"),
    ],
)
def test_adapters_without_their_model_say_so(content, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_policy(model_config(tmp_path))


def test_a_resume_refuses_adapters_of_another_rank(trained):
    with pytest.raises(UserError, match="its adapters are not those that"):
        load_policy(model_config(hub_twin.shared_model("qwen3"), rank=8), trained / "checkpoints/step-000002")


def tiny(kind, **settings):
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    config = getattr(transformers, f"{kind}Config")(vocab_size=32, **small, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


EXPERTS = {"num_key_value_heads": 1, "num_local_experts": 2}


@pytest.mark.parametrize(
    ("kind", "settings", "outside"),
    [("Phimoe", EXPERTS, 2), ("Llama4Text", {**EXPERTS, "intermediate_size_mlp": 16}, 2), ("Falcon", {}, 1)],
)
def test_routers_are_left_out_of_all_linear_layers(kind, settings, outside):
    """They inherit from nn.Linear and return what they chose; Falcon's layers inherit from it and are linear."""
    model = tiny(kind, **settings)
    before = model(IDS % 32).logits
    linear = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    add_adapters(model, LoraConfig(2, None, "all-linear", False))
    assert len(adapted(model)) == linear - outside  # the head, and the router
    assert torch.equal(model(IDS % 32).logits, before)


def test_a_router_that_is_named_is_refused():
    with pytest.raises(UserError, match="only linear layers can have adapters"):
        add_adapters(tiny("Phimoe", **EXPERTS), LoraConfig(2, None, ["router"], False))


@pytest.mark.parametrize("shape", ["qwen3", "llama"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_the_plan_counts_the_adapters_that_peft_makes(shape, targets, data, tmp_path):
    config = train_config_of(shape, "cpu", data, targets)
    model = load_policy(config.model).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    plan = planned(config)
    assert (plan.weights, plan.gradients, plan.optimizer) == (4 * whole, 4 * trained, 8 * trained)
    assert plan.parameters == whole - trained
    below = without_adapters(model)
    assert len(adaptable(below, config.model.lora)) == len(adapted(model))


def train_config_of(shape, device, data, targets="all-linear", *overrides):
    from kpo_cli.config import train_config

    named = targets if isinstance(targets, str) else f"[{','.join(targets)}]"
    raw = raw_config(
        *SETTINGS,
        f"model.path='{hub_twin.shared_model(shape)}'",
        f"data.path='{data}'",
        f"model.lora.targets={named}",
        *overrides,
    )
    return train_config({k: v for k, v in raw.items() if k not in ("overrides", "run_dir", "resume")})


def planned(config):
    from kpo_cli.policy.load import transformers_config

    return plan_memory(config, transformers_config(config.model), torch.device("cpu"), False)


QWEN3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


class TestEightBillionParameters:
    """The shape of Qwen3-8B, untied: 8.19 billion parameters."""

    COUNT = 8_190_735_360
    FROZEN = 36 * (4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 12288)
    TRAINED = 16 * 36 * ((4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 12288))

    def plan(self, data, monkeypatch, *overrides, half=True, free=80 * GIB):
        from transformers import Qwen3Config

        monkeypatch.setattr("kpo_cli.policy.memory._free", lambda device: free)
        config = train_config_of("qwen3", "cpu", data, "all-linear", "trainer.kl_coefficient=0", *overrides)
        return plan_memory(config, Qwen3Config(**QWEN3_8B), torch.device("cuda", 0), half)

    def test_full_fine_tuning_takes_16_bytes_a_parameter(self, data, monkeypatch):
        assert pytest.approx(119.2, abs=0.05) == 16 * 8.0e9 / GIB  # the round number for "8B"
        for half in (False, True):
            plan = self.plan(data, monkeypatch, "model.lora.rank=0", half=half)
            assert plan.parameters == self.COUNT
            assert plan.fixed == 16 * self.COUNT
            assert plan.fixed / GIB == pytest.approx(122.05, abs=0.01)
        with pytest.raises(UserError) as caught:
            check_memory(plan)
        assert str(caught.value) == (
            "8.19B parameters need 122.1 GiB for weights, gradients and optimizer before any activations, but cuda:0 "
            "has 80.0 GiB free; set model.lora.rank=16 (30.5 GiB) or set trainer.offload_optimizer=always (61.0 GiB) "
            "or take a smaller model or a larger device"
        )

    def test_each_way_out_fits(self, data, monkeypatch):
        plan = self.plan(data, monkeypatch, "model.lora.rank=16")
        assert plan.weights == 2 * self.COUNT + 4 * self.TRAINED
        assert (plan.gradients, plan.optimizer) == (4 * self.TRAINED, 8 * self.TRAINED)
        assert plan.weights + plan.gradients + plan.optimizer < 16 * GIB
        assert plan.fixed == 4 * self.COUNT  # while it is loaded
        plan = self.plan(data, monkeypatch, "model.lora.rank=0", "trainer.offload_optimizer=always")
        assert plan.optimizer == 0
        assert plan.fixed == 8 * self.COUNT

    def test_what_would_not_help_is_not_named(self, data, monkeypatch):
        plan = self.plan(data, monkeypatch, "model.lora.rank=0", free=40 * GIB)
        with pytest.raises(UserError, match=r"free; set model.lora.rank=16 \(30.5 GiB\) or take a smaller model"):
            check_memory(plan)
        with pytest.raises(UserError, match="free; take a smaller model or a larger device"):
            check_memory(self.plan(data, monkeypatch, "model.lora.rank=16", free=20 * GIB))


def test_a_reference_beside_adapters_takes_no_memory(data):
    config = train_config_of("qwen3", "cpu", data)
    assert config.trainer.kl_coefficient
    free_of_it = train_config_of("qwen3", "cpu", data, "all-linear", "trainer.kl_coefficient=0")
    assert planned(config).weights == planned(free_of_it).weights


def test_peft_reads_our_adapters_into_a_model_of_its_own(trained):
    base = AutoModelForCausalLM.from_pretrained(hub_twin.shared_model("qwen3"), dtype=torch.float32)
    read = PeftModel.from_pretrained(base, str(trained / "checkpoints/step-000002"))
    names = [name for name, _ in read.named_parameters() if "lora_" in name]
    assert len(names) == len(adapters(trained, 2))
