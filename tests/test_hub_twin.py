"""The twins of hub models are what they claim to be, and sampling from them is exact."""

import copy
import dataclasses
import json
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hub_twin
import numpy as np
import pyarrow.parquet
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors import safe_open
from scipy.stats import binomtest, chisquare
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kpo_cli.cli.compose import conf_dir
from kpo_cli.config import DataConfig, ModelConfig, train_config
from kpo_cli.data.load import load_problems
from kpo_cli.data.problems import Problem
from kpo_cli.data.prompts import PromptBuilder
from kpo_cli.errors import UserError
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.fidelity import choose_way
from kpo_cli.policy.load import Policy, load_policy
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import Scorer
from kpo_cli.rollout import HFSampler
from kpo_cli.runs.checkpoints import Progress, save_checkpoint

SHAPES = tuple(hub_twin.SHAPES)
HOSTILE = {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.6, "repetition_penalty": 1.05}
PROBLEMS = [
    Problem("short", "2+2?", "4"),
    Problem("long", "A train leaves at 7:45 and runs for $\\frac{5}{3}$ hours. " * 3, "9:25"),
    Problem("middle", "Ünïcode №5: how many primes lie below one hundred, and why?", "25"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """No fight over busy cores, and the same bits whatever their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def defaults() -> tuple[ModelConfig, DataConfig]:
    """The configuration of `model.path=X data.path=X`."""
    overrides = ["model=hub", "data=file", "model.path=X", "data.path=X"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw: Any = OmegaConf.to_container(compose("train", overrides), resolve=True)
    config = train_config({key: value for key, value in raw.items() if key not in ("run_dir", "resume")})
    return config.model, config.data


def model_config(path: Path, **changes: Any) -> ModelConfig:
    return dataclasses.replace(defaults()[0], path=str(path), **changes)


def data_config(path: Path, **fields: str) -> DataConfig:
    config = defaults()[1]
    return dataclasses.replace(config, path=str(path), fields=dataclasses.replace(config.fields, **fields))


@cache
def policy_of(shape: str) -> Policy:
    return load_policy(model_config(hub_twin.shared_model(shape)))


def prompts_of(policy: Policy, *, template: bool, **kwargs: Any) -> list[list[int]]:
    config = model_config(Path("X"), chat_template="auto" if template else "none", chat_template_kwargs=kwargs)
    builder = PromptBuilder(policy.tokenizer, config, defaults()[1])
    return [builder.build(problem).token_ids for problem in PROBLEMS]


def sampler_of(policy: Policy, **changes: Any) -> HFSampler:
    settings = {"stop_ids": policy.stop_ids, "temperature": 0.8, "max_response_tokens": 12, "batch_size": 256}
    return HFSampler(policy.model, **(settings | changes))


def batch_of(prompts: list[list[int]], groups: list[list[Response]]) -> Batch:
    rows = sum(map(len, groups))
    return make_batch(prompts, groups, torch.zeros(rows), torch.zeros(rows))


@contextmanager
def biased(policy: Policy, prompt: list[int], share: float, temperature: float = 0.8) -> Iterator[None]:
    """Shift the logits of the stop ids, so that behind `prompt` each of them has the probability `share`."""
    stops = torch.tensor(policy.stop_ids)
    scaled = policy.model(torch.tensor([prompt])).logits[0, -1] / temperature
    others = scaled.index_fill(0, stops, -torch.inf).logsumexp(-1)
    wanted = others + np.log(share / (1 - share * len(stops)))
    offset = torch.zeros_like(scaled).index_copy(0, stops, (wanted - scaled[stops]) * temperature)
    handle = policy.model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + offset)
    try:
        yield
    finally:
        handle.remove()


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# The twins are what they claim


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weights_are_bf16_in_shards_under_an_index(shape: str):
    directory = hub_twin.shared_model(shape)
    index = read_json(directory / "model.safetensors.index.json")["weight_map"]
    shards = {path.name for path in directory.glob("*.safetensors")}
    assert len(shards) >= 2
    assert shards == set(index.values())
    for name, shard in index.items():
        with safe_open(directory / shard, "pt") as file:
            assert file.get_slice(name).get_dtype() == "BF16"


def test_the_shapes_differ_as_their_families_do():
    names = {s: set(read_json(hub_twin.shared_model(s) / "model.safetensors.index.json")["weight_map"]) for s in SHAPES}
    layer = "model.layers.0.self_attn."
    assert {s for s in SHAPES if layer + "q_norm.weight" in names[s]} == {"qwen3"}
    assert {s for s in SHAPES if layer + "q_proj.bias" in names[s]} == {"qwen2"}
    assert {s for s in SHAPES if "lm_head.weight" in names[s]} == {"llama"}


@pytest.mark.parametrize("shape", SHAPES)
def test_config_files_have_the_layout_and_the_traps_of_the_hub(shape: str):
    directory = hub_twin.shared_model(shape)
    config, generation = read_json(directory / "config.json"), read_json(directory / "generation_config.json")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert config["torch_dtype"] == "bfloat16"
    assert config["vocab_size"] > len(tokenizer) > 10_000
    assert HOSTILE.items() <= generation.items()
    assert len(set(generation["eos_token_id"])) == 2
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    assert generation["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not (directory / "chat_template.jinja").exists()
    assert "chat_template" in read_json(directory / "tokenizer_config.json")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_twin_without_pad_token_has_none_anywhere(shape: str):
    directory = hub_twin.shared_model(shape, pad="none", template=False)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.pad_token is None
    assert tokenizer.chat_template is None
    assert read_json(directory / "tokenizer_config.json").get("pad_token") is None
    for name in ("config.json", "generation_config.json"):
        assert "pad_token_id" not in read_json(directory / name)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_a_twin_and_obeys_its_traps(shape: str):
    directory = hub_twin.shared_model(shape)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.top_k == 20
    inputs = tokenizer("def main(", return_tensors="pt")
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=model(**inputs).logits[0, -1].float()).entropy()
        out = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert 5 < entropy < np.log(model.config.vocab_size) - 1  # neither a loop nor uniform
    assert out.sequences.shape[1] == inputs.input_ids.shape[1] + 4
    assert int(out.scores[0].isfinite().sum()) <= 20


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokenizer_of_transformers_agrees_with_tokenizer_json(shape: str):
    directory = hub_twin.shared_model(shape)
    text = "It's 12345 + x² = 7.5,\n\n\tso $\\frac{1}{2}$ <|im_end|> déjà vu"
    assert AutoTokenizer.from_pretrained(directory)(text).input_ids == (
        Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    )


def test_thinking_is_switched_off_with_an_empty_block():
    tokenizer = AutoTokenizer.from_pretrained(hub_twin.shared_model("qwen3"))
    turns = [{"role": "user", "content": "2+2?"}]
    on, off = (
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        for thinking in (True, False)
    )
    assert on == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert off == on + "<think>\n\n</think>\n\n"
    think = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert set(think) <= set(tokenizer(off).input_ids)


def test_data_files_have_the_schema_of_dapo(tmp_path: Path):
    problems = hub_twin.make_problems(7)
    assert len(dict(problems)) == 7
    path = hub_twin.make_dapo_parquet(tmp_path / "dapo.parquet", problems)
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert len(rows) == 700
    assert set(rows[0]) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
    assert set(rows[0]["prompt"][0]) == {"content", "role"}
    assert rows[3]["reward_model"]["ground_truth"] == problems[3][1]
    content = rows[3]["prompt"][0]["content"]
    assert content == hub_twin.PROBLEM_PREFIX + problems[3][0] + hub_twin.PROBLEM_SUFFIX


def test_our_loader_reads_the_data_files(tmp_path: Path):
    problems = hub_twin.make_problems(10)
    parquet = hub_twin.make_dapo_parquet(tmp_path / "dapo.parquet", problems)
    sets = load_problems(data_config(parquet, problem="prompt.0.content", answer="reward_model.ground_truth"))
    assert len(sets.train) + len(sets.heldout) == 10
    assert sets.duplicates == 990
    jsonl = hub_twin.make_jsonl(tmp_path / "own.jsonl", problems, ("question", "answer"))
    sets = load_problems(data_config(jsonl, problem="question"))
    assert {(p.problem, p.answer) for p in sets.train + sets.heldout} == set(problems)


def test_a_twin_is_the_same_every_time(tmp_path: Path):
    again = hub_twin.make_model("qwen3", tmp_path / "again")
    for path in hub_twin.shared_model("qwen3").iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_command_writes_models_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hub_twin.main([str(tmp_path / "out"), "--shape", "llama", "--pad", "none", "--no-template", "--problems", "5"])
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in written] == ["llama", "dapo.parquet", "problems.jsonl"]
    assert all(path.exists() for path in written)
    assert (tmp_path / "out/llama/config.json").is_file()


DAMAGE_MESSAGES = {
    "truncated_shard": "cannot be loaded",
    "missing_shard": "cannot be loaded",
    "dropped_tensor": "down_proj",
    "large_tokenizer": "do not belong together",
    "unknown_architecture": "cannot be loaded: .*qwen99",
}


@pytest.mark.parametrize("kind", DAMAGE_MESSAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_damage_is_found_on_loading_and_told_in_one_line(shape: str, kind: str, tmp_path: Path):
    directory = Path(shutil.copytree(hub_twin.shared_model(shape), tmp_path / "damaged"))
    hub_twin.DAMAGE[kind](directory)
    with pytest.raises(UserError, match=DAMAGE_MESSAGES[kind]) as error:
        load_policy(model_config(directory))
    assert "\n" not in str(error.value)


def test_a_missing_template_leaves_none(tmp_path: Path):
    directory = Path(shutil.copytree(hub_twin.shared_model("llama"), tmp_path / "base"))
    hub_twin.DAMAGE["missing_template"](directory)
    assert AutoTokenizer.from_pretrained(directory).chat_template is None


# Prompts


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_begins_with_one_bos_or_none(shape: str, template: bool):
    policy = policy_of(shape)
    family = hub_twin.SHAPES[shape]
    for ids in prompts_of(policy, template=template):
        if family.bos is None:
            assert policy.tokenizer.convert_tokens_to_ids("<|endoftext|>") not in ids
        else:
            assert ids.count(policy.tokenizer.bos_token_id) == 1
            assert ids[0] == policy.tokenizer.bos_token_id


def test_the_thinking_switch_reaches_the_prompt():
    policy = policy_of("qwen3")
    closing = policy.tokenizer("<think>\n\n</think>\n\n").input_ids
    on, off = (prompts_of(policy, template=True, enable_thinking=thinking)[0] for thinking in (True, False))
    assert off == on + closing


# The sampler is exact


def reference_log_probs(policy: Policy, prompt: list[int], response: list[int], temperature: float) -> Tensor:
    """Of one response, by one forward pass without padding or cache."""
    logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_log_probs_of_sampler_trainer_and_reference_agree(shape: str, template: bool):
    policy = policy_of(shape)
    prompts = prompts_of(policy, template=template)
    assert len({len(prompt) for prompt in prompts}) == 3
    with biased(policy, prompts[0], share=0.1):  # some end early, so that lengths differ as well
        groups = sampler_of(policy).sample(prompts, 4, (1, 2))
        batch = batch_of(prompts, groups)
        trained, _ = Scorer(policy.model, 0.8)(batch)
        assert not choose_way(policy.model).packed  # `biased` puts a hook on the head
        references = [
            reference_log_probs(policy, prompt, response.token_ids, 0.8)
            for prompt, group in zip(prompts, groups, strict=True)
            for response in group
        ]
    own = copy.deepcopy(policy.model)  # the other tests go on with the model as it is
    assert choose_way(own).packed
    packed, padded = (Scorer(own, 0.8, packed=packed)(batch)[0] for packed in (True, False))
    assert torch.allclose(packed[batch.response_mask], padded[batch.response_mask], atol=1e-5)
    assert batch.response_mask.sum(-1).unique().numel() > 1
    mask = batch.response_mask
    torch.testing.assert_close(trained[mask], batch.rollout_log_probs[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.rollout_log_probs[mask], torch.cat(references), atol=1e-4, rtol=0)


@pytest.mark.parametrize("pad", ["eos", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_pad_token_does_not_matter(shape: str, pad: str):
    policy, other = policy_of(shape), load_policy(model_config(hub_twin.shared_model(shape, pad=pad)))
    prompts = prompts_of(policy, template=True)
    assert prompts_of(other, template=True) == prompts
    assert other.stop_ids == policy.stop_ids
    assert sampler_of(other).sample(prompts, 2, (3,)) == sampler_of(policy).sample(prompts, 2, (3,))


@pytest.mark.parametrize(("eos", "count"), [("two", 2), ("foreign", 2), ("missing", 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_stop_ids_are_those_of_the_tokenizer_and_of_generation_config(shape: str, eos: str, count: int):
    policy = load_policy(model_config(hub_twin.shared_model(shape, eos=eos)))
    family = hub_twin.SHAPES[shape]
    names = (family.eos, family.end_of_text)[:count]
    assert set(policy.stop_ids) == set(policy.tokenizer.convert_tokens_to_ids(names))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_either_eos_ends_a_response_and_belongs_to_it(shape: str):
    policy = policy_of(shape)
    prompt = prompts_of(policy, template=True)[0]
    with biased(policy, prompt, share=0.15):
        groups = sampler_of(policy, max_response_tokens=5).sample([prompt], 400, (4,))
    batch = batch_of([prompt], groups)
    ends = [response.token_ids[-1] for response in groups[0]]
    for row, response in enumerate(groups[0]):
        assert response.finished == (ends[row] in policy.stop_ids) == (not batch.truncated[row])
        assert not set(response.token_ids[:-1]) & set(policy.stop_ids)
        assert batch.response_ids[row][batch.response_mask[row]].tolist() == response.token_ids
    for token in policy.stop_ids:  # neither more nor less often than it should
        at_once = sum(response.token_ids == [token] for response in groups[0])
        assert binomtest(at_once, 400, 0.15).pvalue > 1e-4


def first_tokens(shape: str) -> tuple[Tensor, np.ndarray]:
    """Logits by plain transformers, and how often our sampler began with each token, padded on the left."""
    policy = policy_of(shape)
    short, long, _ = prompts_of(policy, template=True)
    prompts = [*[short] * 63, long] * 40
    groups = sampler_of(policy, max_response_tokens=1, batch_size=64).sample(prompts, 1, (5,))
    tokens = [group[0].token_ids[0] for prompt, group in zip(prompts, groups, strict=True) if prompt is short]
    plain = AutoModelForCausalLM.from_pretrained(hub_twin.shared_model(shape), dtype=torch.float32).eval()
    logits = plain(torch.tensor([short])).logits[0, -1]
    return logits, np.bincount(tokens, minlength=len(logits))


def fit(probabilities: Tensor, counts: np.ndarray) -> float:
    """p-value of a chi-squared test with the tokens expected fewer than 10 times in bins of at least 10."""
    expected = (probabilities.double() / probabilities.double().sum()).numpy() * counts.sum()
    order = np.argsort(-expected)
    bins = np.minimum(np.cumsum(expected[order]) // 10, counts.sum() // 10 - 1).astype(int)
    _, bins = np.unique(bins, return_inverse=True)
    return float(chisquare(np.bincount(bins, counts[order]), np.bincount(bins, expected[order])).pvalue)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_first_tokens_follow_the_softmax_whatever_generation_config_says(shape: str):
    logits, counts = first_tokens(shape)
    assert fit((logits / 0.8).softmax(-1), counts) > 1e-4
    assert fit((logits / 0.6).softmax(-1), counts) < 1e-9  # the test would see another temperature,
    assert counts[logits.topk(20).indices.numpy()].sum() < counts.sum() / 2  # and top-k or top-p


# Text


TEXTS = [
    "The answer is \\boxed{42}.",
    "Wait , is it so ? I can 't say . Don't !",
    "  two  spaces,\n\n\ttabs \r\n and a trailing one ",
    "Ünïcode: π ≈ 3.14159, 数学, 🧮👩\u200d👩\u200d👧, x² → ∞",
    "<think>\nTwelve times 12345 is 148140.\n</think>\n\n148140",
]


@pytest.mark.parametrize("shape", SHAPES)
def test_text_round_trips(shape: str):
    policy = policy_of(shape)
    for text in (unicodedata.normalize("NFC", t) for t in TEXTS):
        ids = policy.tokenizer(text, add_special_tokens=False).input_ids
        for stop in policy.stop_ids:
            assert policy.decode([*ids, stop]) == text


@pytest.mark.parametrize("shape", SHAPES)
def test_responses_decode_to_text_that_round_trips(shape: str):
    policy = policy_of(shape)
    prompts = prompts_of(policy, template=False)
    for group in sampler_of(policy).sample(prompts, 20, (6,)):
        for response in group:
            text = unicodedata.normalize("NFC", policy.decode(response.token_ids))
            assert policy.decode(policy.tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_the_embedding_without_a_token_decode_to_nothing(shape: str):
    policy = policy_of(shape)
    word = policy.tokenizer("twelve", add_special_tokens=False).input_ids
    assert policy.decode([*word, len(policy.tokenizer), policy.model.config.vocab_size - 1]) == "twelve"


# Checkpoints


def stepped(directory: Path) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after one optimizer step."""
    policy = load_policy(model_config(directory))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    ids = torch.tensor(prompts_of(policy, template=False)[:1])
    policy.model(ids).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    return policy, optimizer


@pytest.mark.parametrize("pad", ["other", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_is_the_same_model_in_plain_transformers(shape: str, pad: str, tmp_path: Path):
    original = hub_twin.shared_model(shape, pad=pad)
    policy, optimizer = stepped(original)
    path = save_checkpoint(tmp_path, policy, optimizer, Progress(1, 8), {"lr": 1e-3}, keep=1)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = torch.tensor(prompts_of(policy, template=True)[1:2])
    with torch.no_grad():
        logits = policy.model(ids).logits
        torch.testing.assert_close(plain(ids).logits, logits, atol=1e-5, rtol=0)
        before = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()(ids).logits
    assert not torch.allclose(before, logits, atol=1e-2)
    assert not HOSTILE.items() & plain.generation_config.to_diff_dict().items()
    assert set(plain.generation_config.eos_token_id) == set(policy.stop_ids)
    for text in TEXTS:
        assert tokenizer(text).input_ids == policy.tokenizer(text).input_ids
    turns = [{"role": "user", "content": "2+2?"}]
    assert tokenizer.apply_chat_template(turns) == policy.tokenizer.apply_chat_template(turns)
    assert tokenizer.pad_token == policy.tokenizer.pad_token


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_goes_on_from_its_checkpoint_with_the_same_samples(shape: str, tmp_path: Path):
    directory = hub_twin.shared_model(shape)
    policy, optimizer = stepped(directory)
    path = save_checkpoint(tmp_path, policy, optimizer, Progress(1, 8), {"lr": 1e-3}, keep=1)
    resumed = load_policy(model_config(directory), path)
    assert resumed.stop_ids == policy.stop_ids
    prompts = prompts_of(policy, template=True)
    assert prompts_of(resumed, template=True) == prompts
    assert sampler_of(resumed).sample(prompts, 2, (7,)) == sampler_of(policy).sample(prompts, 2, (7,))
