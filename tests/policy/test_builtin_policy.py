"""The shipped policy: opens like any model, passes any text, and starts where RL has something to teach."""

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kpo_cli.builtin import POLICY_DIR, warmup
from kpo_cli.data.arithmetic import Chain, chains

BOXED = re.compile(r"\\boxed\{(\d)\}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same bits whatever the machine's core count, and no fight over busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(POLICY_DIR)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(POLICY_DIR).eval()


@pytest.fixture(scope="module")
def held_out() -> list[Chain]:
    return list(islice(chains("heldout", seed=77), 1024))


def respond(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[Chain], **how: object
) -> list[str]:
    prompts = tokenizer([chain.problem for chain in held_out], return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(**prompts, max_new_tokens=96, **how)
    return tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)


def is_right(chain: Chain, response: str) -> bool:
    boxes = BOXED.findall(response)
    return bool(boxes) and boxes[-1] == chain.answer


@given(st.text())
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str):
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces   ",
        "\n\n a\r\n\tb\n",
        "🧮👩‍👩‍👧",
        "e\u0301 é \u00a0\u2028",
        "can 't , . ! n't",
        "\x00\x7f",
    ],
)
def test_awkward_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str):
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (256, 257, None)
    assert len(tokenizer) == model.config.vocab_size == 258
    assert tokenizer.chat_template is None
    assert not tokenizer.clean_up_tokenization_spaces
    assert (model.config.pad_token_id, model.config.eos_token_id) == (256, 257)


def test_generation_config_changes_nothing_about_sampling(model: PreTrainedModel):
    assert model.generation_config.to_diff_dict().keys() <= {
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
    }


def test_checkpoint_is_small_float32_and_of_the_built_architecture(model: PreTrainedModel):
    assert sum(file.stat().st_size for file in POLICY_DIR.iterdir()) < 2_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.num_parameters() < 200_000
    built = warmup.build_model().state_dict()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in built.items()
    }


def test_shipped_tokenizer_is_the_built_one(tmp_path: Path):
    warmup.build_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (POLICY_DIR / "tokenizer.json").read_text()


def test_policy_dir_costs_no_torch_import():
    script = "import sys; from kpo_cli.builtin import POLICY_DIR; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"


def test_greedy_leaves_room_for_rl(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[Chain]):
    responses = respond(model, tokenizer, held_out, do_sample=False)
    assert sum(map(is_right, held_out, responses)) / len(held_out) < 0.2


def test_sampling_guesses_often_and_works_well_when_it_works(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[Chain]
):
    responses = respond(model, tokenizer, held_out, do_sample=True, top_k=0)
    right = [is_right(chain, response) for chain, response in zip(held_out, responses, strict=True)]
    assert 0.1 < sum(right) / len(right) < 0.35
    worked = [ok for ok, response in zip(right, responses, strict=True) if "=" in response]
    assert 0.1 < len(worked) / len(responses) < 0.3
    assert sum(worked) / len(worked) > 0.7  # ten steps at 1% noise: 0.99 ** 10 is 0.90 at best
    assert 18 < sum(map(len, responses)) / len(responses) + 1 < 26


def test_demonstration_labels_cover_the_response_and_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warmup, "DEMONSTRATIONS", 50)
    ids, labels = warmup.encode_demonstrations(seed=0)
    for chain, row, label in zip(chains("train", seed=0), ids, labels, strict=False):
        prompt = len(chain.problem)
        assert bytes(row[:prompt].tolist()).decode() == chain.problem
        assert (label[:prompt] == warmup.IGNORED).all()
        response = label[label != warmup.IGNORED]
        assert torch.equal(response, row[prompt : prompt + len(response)])
        assert response[-1] == warmup.EOS_ID
        assert BOXED.search(bytes(response[:-1].tolist()).decode())
        assert (row[prompt + len(response) :] == warmup.PAD_ID).all()


def test_rebuilding_twice_gives_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(warmup, "DEMONSTRATIONS", 200)
    monkeypatch.setattr(warmup, "HELD_OUT", 8)
    for name in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["warmup", "--out", str(tmp_path / name), "--steps", "3"])
        warmup.main()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    assert "sampled accuracy" in capsys.readouterr().out
