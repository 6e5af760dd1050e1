"""Reading: records, exports, and what is wrong with them."""

import json
import math

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from ratio_files import tensors, write_record, write_run
from safetensors.torch import save_file

from kpo_cli.analysis.source import find_source, read_file
from kpo_cli.errors import UserError
from kpo_cli.runs.ratios import BadRecord, joined


def read(path):
    return [batch for batch, _ in read_file(path)]


def test_a_record_is_read_as_it_was_written(tmp_path):
    content = tensors(seed=3)
    (batch,) = read(write_record(tmp_path / "step-000003.safetensors", 3, content))
    assert (batch.log_ratio == content["log_ratio"].numpy()).all()
    assert (batch.mask == content["response_mask"].numpy()).all()
    assert (batch.step == 3).all()
    assert batch.off_policy.sum() == 24
    assert batch.advantages.tolist() == content["advantages"].tolist()


def test_what_stands_in_the_padding_is_not_looked_at(tmp_path):
    content = tensors()
    content["log_ratio"][~content["response_mask"]] = math.nan
    (batch,) = read(write_record(tmp_path / "a.safetensors", 1, content))
    assert (batch.log_ratio[~batch.mask] == 0).all()


def damaged(tmp_path, kind):
    """A file with one thing wrong."""
    path, content = tmp_path / f"{kind}.safetensors", tensors()
    match kind:
        case "truncated":
            write_record(path, 1)
            path.write_bytes(path.read_bytes()[:-100])
        case "noise":
            path.write_bytes(b"\x00\x01garbage" * 50)
        case "empty":
            path.touch()
        case "foreign":
            save_file({"weight": torch.zeros(3)}, path)
        case "later format":
            write_record(path, 1, format="kpo-ratios-9")
        case "nan":
            content["log_ratio"][5, 2] = math.nan
            write_record(path, 1, content)
        case "shape":
            content["entropy"] = content["entropy"][:, :-1].contiguous()
            write_record(path, 1, content)
        case "rows":
            content["advantages"] = content["advantages"][:-1].contiguous()
            write_record(path, 1, content)
        case "no mask":
            del content["response_mask"]
            write_record(path, 1, content)
        case "no step":
            write_record(path, None)
        case "integers":
            content["log_ratio"] = content["log_ratio"].int()
            write_record(path, 1, content)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated or not a safetensors file"),
        ("noise", "truncated or not a safetensors file"),
        ("empty", "the file is empty"),
        ("foreign", "not a ratio record kpo-ratios-1"),
        ("later format", "its format is kpo-ratios-9"),
        ("nan", "log_ratio is nan at row 5, token 2, a valid token"),
        ("shape", "entropy has shape"),
        ("rows", "advantages has shape"),
        ("no mask", "it has no response_mask"),
        ("no step", "its metadata has no step"),
        ("integers", "log_ratio has type int32"),
    ],
)
def test_a_bad_file_is_named_and_the_others_are_read(tmp_path, kind, message):
    run = write_run(tmp_path / "run", steps=(1, 3))
    bad = damaged(tmp_path, kind)
    bad.rename(run / "ratios" / "step-000002.safetensors")
    source = find_source(run)
    batches = [batch for _, batch in source.batches()]
    assert [int(batch.step[0]) for batch in batches] == [1, 3]
    (line,) = source.problems
    assert line.startswith(f"{run}/ratios/step-000002.safetensors: ")
    assert message in line
    assert "\n" not in line


def test_other_files_of_the_folder_are_named_and_hidden_ones_are_not(tmp_path):
    run = write_run(tmp_path, steps=(1,))
    (run / "ratios" / "notes.txt").write_text("mine")
    (run / "ratios" / ".step-000002.safetensors.77").write_text("a draft")
    source = find_source(run)
    assert len(list(source.batches())) == 1
    assert [line.partition(": ")[0] for line in source.problems] == [f"{run}/ratios/notes.txt"]


def test_bfloat16_is_read(tmp_path):
    content = tensors()
    content["log_ratio"] = content["log_ratio"].bfloat16()
    (batch,) = read(write_record(tmp_path / "a.safetensors", 1, content))
    assert batch.log_ratio.dtype == np.float32


@pytest.mark.parametrize("where", ["run", "run/ratios", "run/ratios/step-000001.safetensors"])
def test_a_run_its_folder_and_one_file_can_be_named(tmp_path, where):
    write_run(tmp_path / "run", steps=(1,))
    source = find_source(tmp_path / where)
    assert len(list(source.batches())) == 1
    inside = where.endswith(".safetensors")
    assert source.output == tmp_path / ("run/ratios/step-000001-analysis" if inside else "run/analysis")


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "does not exist"), ("a.csv", "unknown kind"), ("folder", "not a run directory")]
)
def test_what_is_no_source_is_refused(tmp_path, name, message):
    (tmp_path / "a.csv").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        find_source(tmp_path / name)


ROWS = [
    {"log_probs": [-1.0, -2.0, -0.5], "old_log_probs": [-1.1, -2.0, -0.4], "advantage": 1, "mini_batch_index": 1},
    {"log_probs": [-1.0], "old_log_probs": [-1.0], "advantage": -0.5, "mini_batch_index": 0},
]


def exported(tmp_path, kind, rows):
    path = tmp_path / f"ratios.{kind}"
    if kind == "parquet":
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_exports_are_read(tmp_path, kind):
    (batch,) = read(exported(tmp_path, kind, ROWS))
    assert batch.log_ratio == pytest.approx(np.array([[0.1, 0, -0.1], [0, 0, 0]]))
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.off_policy.tolist() == [True, False]
    assert batch.advantages.tolist() == [1, -0.5]
    assert batch.entropy is None


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_export_with_everything(tmp_path, kind):
    more = {
        "response_mask": [1, 0, 1],
        "rollout_log_probs": [-1.1, -2.0, -0.4],
        "entropy": [0.1, 0.2, 0.3],
        "response_ids": [5, 6, 7],
        "reward": 1.0,
        "step": 12,
        "prompt_index": 3,
        "response": "<b>",
    }
    (batch,) = read(exported(tmp_path, kind, [ROWS[0] | more]))
    assert batch.mask.tolist() == [[True, False, True]]
    assert batch.step.tolist() == [12]
    assert batch.texts.tolist() == ["<b>"]
    assert batch.response_ids.tolist() == [[5, 0, 7]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_export_is_read_in_chunks(tmp_path, kind):
    batches = read(exported(tmp_path, kind, [ROWS[0]] * 600))
    assert [len(batch) for batch in batches] == [256, 256, 88]
    assert len(joined(batches)) == 600


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (["[]"], "line 1 is not an object"),
        ([json.dumps(ROWS[0]), "", json.dumps({"log_probs": [1.0]})], "line 3: old_log_probs is missing"),
        ([json.dumps({"log_probs": [], "old_log_probs": []})], "log_probs is not a list of numbers"),
        (
            [json.dumps({"log_probs": [1.0, 2.0], "old_log_probs": [1.0]})],
            "old_log_probs has 1 values",
        ),
        ([json.dumps({"log_probs": ["a"], "old_log_probs": [1.0]})], "log_probs must hold numbers"),
        ([json.dumps({"log_probs": [math.nan], "old_log_probs": [1.0]})], "nan at row 0, token 0"),
        ([json.dumps({**ROWS[1], "step": 1.5})], "step must hold whole numbers"),
        ([json.dumps(ROWS[0]), json.dumps({**ROWS[1], "entropy": [0.1]})], "line 1 has no entropy, other rows have"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, message):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(BadRecord, match=message):
        read(path)


def test_lines_of_an_export_end_at_newlines(tmp_path):
    """A mark of the byte order, carriage returns within a line and after it, and separators in a response."""
    text = "a\u2028b\x85c\vd\re"
    row = json.dumps({**ROWS[0], "response": text}, ensure_ascii=False)
    content = "\ufeff" + row.replace(", ", ",\r") + "\r\n" + row + "\n"
    (tmp_path / "a.jsonl").write_bytes(content.encode())
    (batch,) = read(tmp_path / "a.jsonl")
    assert list(batch.texts) == [text, text]


def test_bad_exports_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(BadRecord, match="truncated or not a parquet file"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRecord, match="UTF-8"):
        read(tmp_path / "a.jsonl")
