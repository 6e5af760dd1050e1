"""Nothing that comes with a model runs, whatever is answered to whom; and where something would, it is one line."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import hub_twin
import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from small_runs import model_config
from transformers import AutoModelForCausalLM

from kpo_cli.errors import UserError
from kpo_cli.policy import lora
from kpo_cli.policy.load import load_policy, transformers_config

LOADERS = ("from_pretrained", "from_config", "load_custom_generate", "load_adapter", "pipeline")
"""Functions of transformers and peft that may ask for code of a model."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(hub_twin.shared_model("qwen3"), tmp_path / "model"))


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A line of Python that leaves a file behind, on a terminal where everything is answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    sprung = tmp_path / "sprung"
    yield f"open({str(sprung)!r}, 'w').close()\n"
    assert not sprung.exists()


def change(file: Path, **content) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **content}))


def load(folder: Path):
    return load_policy(model_config(f"model.path='{folder}'", "model=hub"))


def own_code(folder: Path, trap: str, what: str) -> None:
    (folder / "own.py").write_text(f"{trap}class Own:\n    pass\n")
    if what == "config":
        change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    if what == "model":
        change(folder / "config.json", model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"})
    if what == "code elsewhere":
        change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "some/where--own.Own"})


@pytest.mark.parametrize("what", ["config", "model", "code elsewhere"])
def test_code_of_a_model_is_refused(what: str, model: Path, trap: str):
    own_code(model, trap, what)
    with pytest.raises(UserError) as caught:
        load(model)
    line = str(caught.value)
    assert "\n" not in line
    assert "trust_remote_code" not in line
    if what != "model":  # that one names no configuration, so that it is unknown before it is asked for code
        assert "needs program code of its own (auto_map), and kpo runs none" in line


def test_code_that_is_not_needed_is_left_alone(model: Path, trap: str):
    """An architecture that transformers has itself; a generate() and a template of its own."""
    (model / "own.py").write_text(trap)
    change(model / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(f"{trap}def generate(*a, **k):\n    pass\n")
    change(model / "generation_config.json", custom_generate="custom_generate/generate.py")
    change(model / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    expected = load(hub_twin.shared_model("qwen3")).tokenizer("12 and 3!")["input_ids"]
    policy = load(model)
    assert type(policy.model).__module__.startswith("transformers.models.qwen3.")
    assert policy.tokenizer("12 and 3!")["input_ids"] == expected
    assert type(policy.model).generate.__module__.startswith("transformers.")


class Bomb:
    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self):
        return exec, (self.line,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_runs_nothing(name: str, form: str, model: Path, trap: str):
    for file in model.glob("*.safetensors*"):
        file.unlink()
    content = {"model.embed_tokens.weight": Bomb(trap)}
    if form == "torch":
        torch.save(content, model / name)
    else:
        (model / name).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError) as caught:
        load(model)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_tensors_in_a_bin_file_are_read(model: Path):
    expected = load(model).model.state_dict()
    weights = {}
    for file in model.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    (model / "model.safetensors.index.json").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    found = load(model).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_kernel_of_the_hub_is_refused(model: Path):
    change(model / "config.json", attn_implementation="some-one/attention")
    with pytest.raises(UserError, match=r"asks for the program some-one/attention"):
        load(model)


@pytest.mark.parametrize("named", ["flash_attention_2", "flash_attention_3", "flex_attention", "eager", "no_such"])
def test_an_attention_that_is_merely_named_is_ours_to_choose(named: str, model: Path):
    """A file that names what its author's machine had is the same model, loaded and planned for as without."""
    expected = load(model)
    change(model / "config.json", attn_implementation=named, experts_implementation=named)
    found = load(model)
    assert (found.way, found.model.config._attn_implementation) == (expected.way, "kpo")
    state = expected.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in found.model.state_dict().items())
    config = transformers_config(model_config(f"model.path='{model}'"))
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "sdpa"


# --- adapters


@pytest.fixture
def adapters(tmp_path: Path, model: Path) -> Path:
    peft = pytest.importorskip("peft")
    folder = tmp_path / "adapters"
    policy = load(model)
    peft.get_peft_model(policy.model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=str(model))
    return folder


def test_adapters_are_merged(adapters: Path):
    assert not hasattr(load(adapters).model, "peft_config")


def test_adapters_in_a_pickle_run_nothing(adapters: Path, trap: str):
    (adapters / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Bomb(trap)}, adapters / "adapter_model.bin")
    with pytest.raises(UserError) as caught:
        load(adapters)
    assert "\n" not in str(caught.value)


def test_names_of_modules_in_an_adapters_file_are_not_imported(
    adapters: Path, trap: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "own_module.py").write_text(trap)
    monkeypatch.syspath_prepend(str(tmp_path))
    mapping = {"base_model_class": "Own", "parent_library": "own_module"}
    change(adapters / "adapter_config.json", auto_mapping=mapping)
    load(adapters)
    change(adapters / "adapter_config.json", megatron_config={"a": 1}, megatron_core="own_module")
    with pytest.raises(UserError, match="asks for a program"):
        load(adapters)


@pytest.mark.parametrize("where", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_never_ends(where: str, adapters: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora, "PATTERN_SECONDS", 0.3)
    pattern = r"(\w+.?)+!"
    change(adapters / "adapter_config.json", **{where: {pattern: 4} if where == "rank_pattern" else pattern})
    with pytest.raises(UserError, match=r"the patterns of layers in .* cannot be matched in 0\.3 s"):
        load(adapters)


def test_a_pattern_that_is_none(adapters: Path):
    change(adapters / "adapter_config.json", target_modules="(q_proj")
    with pytest.raises(UserError) as caught:
        load(adapters)
    assert "\n" not in str(caught.value)


# --- the rule


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            yield owner, name, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}, node.lineno


def test_whatever_is_loaded_by_a_library_is_told_so():
    """peft's PeftModel and datasets' load_dataset know no such argument, and run nothing."""
    import inspect

    import datasets

    assert "trust_remote_code" not in inspect.signature(datasets.load_dataset).parameters
    found, wrong = 0, []
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        for owner, name, keywords, line in calls(path):
            if name in LOADERS and owner != "peft.PeftModel":
                found += 1
                if keywords.get("trust_remote_code") != "False":
                    wrong.append(f"{path}:{line}: {owner}.{name}")
            assert not (name == "load" and owner in ("torch", "pickle", "np", "numpy", "joblib")), f"{path}:{line}"
            assert owner or name not in ("eval", "exec", "import_module", "__import__"), f"{path}:{line}"
    assert wrong == []
    assert found >= 4


def test_nothing_is_sent_away(model: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers has the hub convert a model that comes in a .bin file, in a thread of its own, unless it is told."""
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    load(model)
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"


# --- what the grader reads of a response


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("tags", [("<think>", "</think>"), ("</think>",), ()], ids=["both", "end", "none"])
def test_marks_of_a_thought_survive_decoding(special: bool, tags: tuple[str, ...], model: Path):
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["special"] or (special and token["content"] in tags)
    file.write_text(json.dumps(content))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    for token in tokenizer["added_tokens_decoder"].values():
        token["special"] = token["special"] or (special and token["content"] in tags)
    change(model / "tokenizer_config.json", **tokenizer)
    policy = load(model)
    for text in ("<think>so</think>\\boxed{3}", "a </think> b", "<think>", "訓練 <think>", "nothing", ""):
        ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert policy.decode([*ids, policy.tokenizer.eos_token_id]) == text
