"""Problems from files and from the built-in task, and the prompts made of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import compose

from kpo_cli.builtin import POLICY_DIR
from kpo_cli.config import DataConfig, ModelConfig, train_config
from kpo_cli.data.load import ProblemSets, load_problems
from kpo_cli.data.problems import Problem
from kpo_cli.data.prompts import PromptBuilder
from kpo_cli.errors import UserError

CONFIG = train_config(compose("data=file", "data.path=x.jsonl"))


def from_file(path: Path, **changes: Any) -> DataConfig:
    fields = dataclasses.replace(CONFIG.data.fields, **changes.pop("fields", {}))
    return dataclasses.replace(CONFIG.data, path=str(path), fields=fields, **changes)


def everything(sets: ProblemSets) -> list[Problem]:
    return sorted(sets.train + sets.heldout, key=lambda problem: problem.id)


def ids(problems: list[Problem]) -> list[str]:
    return [problem.id for problem in problems]


@pytest.fixture
def file(tmp_path: Path, write_jsonl, problems) -> Path:
    return write_jsonl(tmp_path / "d.jsonl", problems)


def test_every_problem_is_on_one_side(file: Path, problems):
    sets = load_problems(from_file(file, heldout=3))
    assert (len(sets.train), len(sets.heldout), sets.duplicates) == (17, 3, 0)
    assert sorted(ids(sets.train + sets.heldout)) == sorted(row["id"] for row in problems)
    assert {(p.id, p.problem, p.answer) for p in everything(sets)} == {
        (row["id"], row["problem"], row["answer"]) for row in problems
    }


def test_the_split_depends_on_the_seed_of_the_data_alone(file: Path):
    first, again, other = (load_problems(from_file(file, heldout=4, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert ids(first.heldout) != ids(other.heldout)


def test_at_most_a_fifth_is_held_out(file: Path):
    assert len(load_problems(from_file(file, heldout=128)).heldout) == 4


def test_a_limit_takes_training_problems_only(file: Path):
    whole, part = (load_problems(from_file(file, heldout=4, limit=limit)) for limit in (None, 5))
    assert part.heldout == whole.heldout
    assert part.train == whole.train[:5]
    assert part.sha256 == whole.sha256


def test_duplicates_are_counted_and_left_out(tmp_path: Path, write_jsonl, problems):
    path = write_jsonl(
        tmp_path / "d.jsonl", [*problems, *({**row, "id": f"again-{row['id']}"} for row in problems[:7])]
    )
    sets = load_problems(from_file(path))
    assert sets.duplicates == 7
    assert len({problem.problem for problem in everything(sets)}) == len(everything(sets)) == 20
    assert not any(problem.id.startswith("again") for problem in everything(sets))


def test_missing_ids_are_made_up_by_place(tmp_path: Path, write_jsonl, problems):
    rows = [{key: row[key] for key in ("problem", "answer")} for row in problems]
    sets = load_problems(from_file(write_jsonl(tmp_path / "d.jsonl", rows)))
    assert set(ids(everything(sets))) == {f"d-{i}" for i in range(20)}
    by_id = {problem.id: problem.problem for problem in everything(sets)}
    assert by_id["d-7"] == rows[7]["problem"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_fields_of_other_names_and_nested_ones(suffix: str, tmp_path: Path, write_jsonl, problems):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["problem"]}],
            "reward": {"truth": row["answer"]},
            "extra": {"index": i},
            "a.b": f"q{i}",
        }
        for i, row in enumerate(problems)
    ]
    path = tmp_path / f"d{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    names = {"problem": "prompt.0.content", "answer": "reward.truth", "id": "extra.index"}
    sets = load_problems(from_file(path, fields=names))
    assert {(p.id, p.problem, p.answer) for p in everything(sets)} == {
        (str(i), row["problem"], row["answer"]) for i, row in enumerate(problems)
    }
    # A name that has a dot in it.
    dotted = load_problems(from_file(path, fields={**names, "problem": "a.b"}))
    assert {p.problem for p in everything(dotted)} == {f"q{i}" for i in range(20)}


def test_numbers_are_answers(tmp_path: Path, write_jsonl):
    rows = [{"problem": f"q{i}", "answer": answer} for i, answer in enumerate([7, -3, 0.5, "x", 10**30])]
    sets = load_problems(from_file(write_jsonl(tmp_path / "d.jsonl", rows)))
    assert [p.answer for p in everything(sets)] == ["7", "-3", "0.5", "x", "1" + "0" * 30]


def test_parquet_and_jsonl_give_the_same_problems(file: Path, tmp_path: Path, problems):
    pq.write_table(pa.Table.from_pylist(problems), tmp_path / "d.parquet", row_group_size=6)
    one, two = load_problems(from_file(file)), load_problems(from_file(tmp_path / "d.parquet"))
    assert (one.train, one.heldout) == (two.train, two.heldout)


def test_rows_of_a_long_parquet_file_are_counted_through(tmp_path: Path):
    """Batches are of 65,536 rows; the number in the message is that of the file."""
    rows = [{"problem": f"q{i}", "answer": "1"} for i in range(70_000)]
    rows[69_999]["answer"] = " "
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"\(row 70000\): answer must be"):
        load_problems(from_file(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b"\n", b"\n\n \n"),
        lambda text: text.rstrip(b"\n"),
    ],
    ids=["BOM", "CRLF", "blank lines", "no last newline"],
)
def test_what_editors_do_to_files(change, file: Path):
    plain = load_problems(from_file(file))
    file.write_bytes(change(file.read_bytes()))
    other = load_problems(from_file(file))
    assert (other.train, other.heldout) == (plain.train, plain.heldout)


def test_text_stays_as_it_is(tmp_path: Path, write_jsonl):
    texts = ["Größe 訓練 🙂", "line\u2028separator", "two\nlines", "  spaces  ", '"\\boxed{}"']
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": text, "answer": "1"} for text in texts])
    path.write_text(
        "".join(json.dumps({"problem": t, "answer": "1"}, ensure_ascii=False) + "\n" for t in texts), "utf-8"
    )
    assert [p.problem for p in everything(load_problems(from_file(path)))] == texts


def test_the_suffix_may_be_in_capitals_and_the_home_directory_short(
    tmp_path: Path, write_jsonl, problems, monkeypatch: pytest.MonkeyPatch
):
    write_jsonl(tmp_path / "D.JSONL", problems)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(everything(load_problems(from_file(Path("~/D.JSONL"))))) == 20


def test_the_builtin_task():
    config = train_config(compose("data.limit=50", "data.heldout=9")).data
    sets, again = load_problems(config), load_problems(config)
    assert sets == again
    assert (len(sets.train), len(sets.heldout), sets.duplicates) == (50, 9, 0)
    assert {p.problem for p in sets.train}.isdisjoint(p.problem for p in sets.heldout)
    other = load_problems(dataclasses.replace(config, seed=1))
    assert other.sha256 != sets.sha256
    with pytest.raises(UserError, match=r"only .* chains with 1 operators.*raise data.operators"):
        load_problems(dataclasses.replace(config, operators=1, limit=4000))


# --- prompts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if think is defined and not think %}no thinking {% endif %}{% endif %}"
)
PROBLEM = Problem("p", "1+1?", "2")


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POLICY_DIR)


def build(tokenizer: Any, model: dict[str, Any] | None = None, **data: Any):
    model_config: ModelConfig = dataclasses.replace(CONFIG.model, **(model or {}))
    data_config = dataclasses.replace(CONFIG.data, **{"instruction": None, "system_prompt": None, **data})
    return PromptBuilder(tokenizer, model_config, data_config).build(PROBLEM)


def test_without_a_template_the_text_is_plain(tokenizer):
    assert build(tokenizer).text == "1+1?"
    prompt = build(tokenizer, instruction="Think.", system_prompt="You count.")
    assert prompt.text == "You count.\n\n1+1?\nThink."
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert prompt.problem is PROBLEM


def test_a_chat_template_is_applied(tokenizer, tmp_path: Path):
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompt = build(loaded, instruction="Think.", system_prompt="You count.")
    assert prompt.text == "<system>You count.</system><user>1+1?\nThink.</user><assistant>"
    assert loaded.decode(prompt.token_ids) == prompt.text
    assert build(loaded).text == "<user>1+1?</user><assistant>"
    assert build(loaded, {"chat_template_kwargs": {"think": False}}).text.endswith("<assistant>no thinking ")


def test_a_chat_template_can_be_left_out(tokenizer):
    tokenizer.chat_template = TEMPLATE
    assert build(tokenizer, {"chat_template": "none"}).text == "1+1?"


class Tokenizer:
    """As many are: it puts a token (0) before every text that is not said to have one."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + list(text.replace("<s>", "\0").encode())}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "<s>" + messages[0]["content"]


def test_a_template_writes_its_own_special_tokens():
    tokenizer = Tokenizer()
    assert build(tokenizer).token_ids == [0, *b"1+1?"]
    tokenizer.chat_template = "given"
    assert build(tokenizer).token_ids == [0, *b"1+1?"]


def test_a_failing_template_names_the_ways_out(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"\(System role not supported\).*model.chat_template=none"):
        build(tokenizer, system_prompt="x")


def test_long_prompts_are_left_out_and_counted(tokenizer):
    builder = PromptBuilder(tokenizer, CONFIG.model, dataclasses.replace(CONFIG.data, instruction=None))
    texts = [Problem(str(i), "x" * i, "1") for i in range(1, 11)]
    kept, dropped = builder.build_all(texts, 6, "training")
    assert [len(prompt.token_ids) for prompt in kept] == [1, 2, 3, 4, 5, 6]
    assert dropped == 4
    with pytest.raises(UserError, match=r"all 5 training prompts are longer .*the shortest has 6\); raise it"):
        builder.build_all(texts[5:], 5, "training")


def test_a_tokenizer_that_yields_nothing(tokenizer):
    class Mute:
        chat_template = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": []}

    builder = PromptBuilder(Mute(), CONFIG.model, CONFIG.data)
    with pytest.raises(UserError, match="makes no tokens"):
        builder.build_all([PROBLEM], 5, "training")
