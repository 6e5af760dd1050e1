"""`kpo eval` on one's own files and models: lengths that fit, fields by keys of its own, what was trained on."""

import json
import shutil
from pathlib import Path

import hub_twin
import pytest
from small_runs import train
from test_eval import evaluate, rows

from kpo_cli.errors import UserError

FREE = ["eval.max_tokens=null", "eval.n=1", "eval.limit=2"]


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A model with a context of 300 tokens."""
    folder = Path(shutil.copytree(hub_twin.shared_model("qwen3"), tmp_path / "short"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 300}))
    return folder


def test_a_length_that_nobody_gave_is_what_the_context_leaves(short: Path, tmp_path: Path, capsys):
    results = evaluate(tmp_path / "e", f"checkpoint='{short}'", *FREE)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("note: responses of at most"))
    room = results["settings"]["sampling"]["max_tokens"]
    assert f"at most {room} tokens" in line
    assert 0 < room < 300
    assert max(row["tokens"] for row in rows(tmp_path / "e")) <= room
    with pytest.raises(UserError, match=rf"eval.max_tokens={room + 1} exceed .* to {room}, or set it to null"):
        evaluate(tmp_path / "f", f"checkpoint='{short}'", *FREE, f"eval.max_tokens={room + 1}")


def test_both_policies_get_the_same_length(short: Path, tmp_path: Path):
    results = evaluate(tmp_path / "e", "checkpoint=builtin", f"vs='{short}'", *FREE, "eval.limit=1")
    assert results["settings"]["sampling"]["max_tokens"] < 300


def test_a_prompt_longer_than_the_context(short: Path, tmp_path: Path, write_jsonl):
    path = write_jsonl(tmp_path / "long.jsonl", [{"problem": "why? " * 300, "answer": "1"}])
    with pytest.raises(UserError, match=r"long has a prompt of \d+ tokens, and they exceed the model's context of 300"):
        evaluate(tmp_path / "e", f"checkpoint='{short}'", *FREE, f"benchmarks=['{path}']")


def test_fields_of_files(tmp_path: Path, write_jsonl, capsys):
    rows_of_file = [{"question": f"Q: {i}+1? END", "solution": f"so\n#### {i + 1}"} for i in range(3)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows_of_file)
    given = ["data.fields.problem=question", "data.fields.answer=solution"]
    with pytest.raises(UserError, match=r"no field 'problem'; it has question, solution; set data.fields.problem=NAME"):
        evaluate(tmp_path / "e", "checkpoint=builtin", f"benchmarks=['{path}']")
    evaluate(tmp_path / "f", "checkpoint=builtin", f"benchmarks=['{path}']", *given)
    assert [row["answer"] for row in rows(tmp_path / "f")][::2] == ["1", "2", "3"]
    assert "warning: mine: 3 reference answers are worked solutions" in capsys.readouterr().out
    pattern = "data.problem_pattern='Q: (?P<problem>.*) END'"
    evaluate(tmp_path / "g", "checkpoint=builtin", f"benchmarks=['{path}']", *given, "data.answer_style=hash", pattern)
    out = capsys.readouterr().out
    assert "first prompt of builtin: '0+1?\\n" in out
    assert "warning" not in out
    for key, value in (("data.answer_style", "hush"), ("data.problem_pattern", "'('")):
        with pytest.raises(UserError, match=key):
            evaluate(tmp_path / "h", "checkpoint=builtin", f"{key}={value}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=./nowhere"], r"checkpoint=\./nowhere: no such model directory"),
        (["checkpoint=builtin", "vs=./nowhere"], r"vs=\./nowhere: no such model directory"),
        (["checkpoint=builtin", "device=cuda"], r"^device=cuda but torch sees no GPU; set device=cpu"),
        (["checkpoint=builtin", "chat_template=required"], r"set chat_template=none for plain text"),
        (["checkpoint=builtin", "benchmarks=[no.jsonl]"], r"^benchmarks=no\.jsonl does not exist"),
        (["checkpoint=builtin", "benchmarks=[aime24]", "data_dir=no"], r"^data_dir=no has no aime24\.jsonl"),
    ],
)
def test_errors_name_the_keys_of_this_command(overrides: list[str], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message) as caught:
        evaluate(tmp_path / "e", *overrides)
    assert "model." not in str(caught.value)


def test_what_a_run_was_trained_on_is_said(tmp_path: Path, write_jsonl, problems, capsys):
    path = write_jsonl(tmp_path / "mine.jsonl", problems)
    other = write_jsonl(
        tmp_path / "other.jsonl", [{"problem": " 1 +1 ?", "answer": "2"}, {"problem": "b?", "answer": "2"}]
    )
    run = train(tmp_path / "run", f"data.path='{path}'", "data=file", "trainer.steps=1", "rollout.max_prompt_tokens=99")
    capsys.readouterr()
    evaluate(tmp_path / "e", f"checkpoint='{run}'", f"benchmarks=['{path}','{other}',arithmetic]", "eval.limit=null")
    warnings = [line for line in capsys.readouterr().out.replace("\n", " ").split("warning: ")[1:] if "trained" in line]
    assert ["20 problems of mine" in warnings[0], "1 problems of other" in warnings[1], len(warnings)] == [
        True,
        True,
        2,
    ]


def test_thoughts_opened_by_the_prompt_are_graded_again_alike(tmp_path: Path):
    folder = Path(shutil.copytree(hub_twin.shared_model("qwen3"), tmp_path / "m"))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    shown = config["chat_template"].replace(
        "{{- '<|im_start|>assistant\\n' -}}", "{{- '<|im_start|>assistant\\n<think>' -}}"
    )
    assert shown != config["chat_template"]
    file.write_text(json.dumps({**config, "chat_template": shown}))
    first = evaluate(tmp_path / "e", f"checkpoint='{folder}'", "eval.max_tokens=8")
    assert all(row["response"].startswith("<think>") for row in rows(tmp_path / "e"))
    again = evaluate(tmp_path / "f", f"regrade='{tmp_path / 'e'}'")
    assert again["benchmarks"] == first["benchmarks"]
