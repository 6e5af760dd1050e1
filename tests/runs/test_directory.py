"""The files of a run: UTF-8, lines that end at a newline and nowhere else, texts as they stand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from kpo_cli.data import overlap
from kpo_cli.runs import directory
from kpo_cli.runs.directory import RunDir, make_manifest, read_lines, run_of, write_text
from kpo_cli.runs.samples import SampleFile

SEPARATORS = "\u2028\u2029\x85\v\f\x1c\x1d\x1e\r"
TEXT = f"one{SEPARATORS}two ü 日本 ${{x}} ${{ \x1b[1m 😀"


def make_run(path: Path, **config: object) -> RunDir:
    return RunDir.create(path, {"seed": 0, **config}, make_manifest())


def test_rows_and_metrics_survive_every_separator(tmp_path: Path):
    rows = [{"response": TEXT, "n": i} for i in range(3)]
    with make_run(tmp_path / "run") as run:
        run.write_rows("evals/step-000001.jsonl", rows)
        for i in range(3):
            run.append_metrics({"step": i, "note": TEXT})
        run.replace_last_metrics({"step": 2, "note": "last" + TEXT})
        run.cut_after(2, None)
        assert run.rows("evals/step-000001.jsonl") == rows
        assert [row["note"] for row in run.metrics()] == [TEXT, TEXT, "last" + TEXT]
        raw = (run.path / "evals/step-000001.jsonl").read_bytes()
        assert [json.loads(line) for line in raw.split(b"\n")[:-1]] == rows
        # Written by another tool, unescaped, which JSON allows for all that are no controls.
        write_text(
            run.path / "metrics.jsonl", json.dumps({"step": 0, "note": "a\u2028\x85b"}, ensure_ascii=False) + "\n{"
        )
        assert run.metrics() == [{"step": 0, "note": "a\u2028\x85b"}]


def test_lines(tmp_path: Path):
    (tmp_path / "f").write_bytes("a\rb\u2028\n\n \r\nc\n".encode())
    assert read_lines(tmp_path / "f") == ["a\rb\u2028", "c"]


def test_a_configuration_keeps_its_texts(tmp_path: Path):
    """Also those that would be a reference of OmegaConf's, whole or broken; and reads as it always did."""
    texts = [
        TEXT,
        "${seed}",
        "a ${",
        "\\${b}",
        "1e3",
        "2026_11_26",
        "null",
        "~",
        " x ",
        "",
        "- a",
        "a: b",
        "#",
        "'",
        '"',
    ]
    config = {"data": {"instruction": TEXT, "list": texts}, "lr": 1e-6, "big": 1e22, "none": None, "flag": True}
    with make_run(tmp_path / "run", **config) as run:
        assert run.config() == {"seed": 0, **config}
        run.write_config(config)
        assert RunDir(run.path).config() == config
        plain = {"lr": 1e-6, "names": ["1e3", "x"], "inf": float("inf"), "none": None, "text": "ü: \u2028"}
        run.write_config(plain)
        assert (run.path / "config.yaml").read_text("utf-8") == OmegaConf.to_yaml(OmegaConf.create(plain))
        assert yaml.safe_load((run.path / "config.yaml").read_text("utf-8")) == plain


def test_samples_survive_every_separator(tmp_path: Path):
    row = {"subject": "checkpoint", "benchmark": TEXT, "place": 0, "id": TEXT, "sample": 0, "response": TEXT}
    SampleFile(tmp_path / "s.jsonl", 1).append(("checkpoint", TEXT), [row])
    again = SampleFile(tmp_path / "s.jsonl", 1)
    assert again.table(("checkpoint", TEXT), [TEXT]) == [[row]]


def test_fingerprints_are_made_of_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"problem": f"How many{SEPARATORS}are {i}?"} for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "b.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode())
    monkeypatch.setattr(overlap, "FINGERPRINTS", tmp_path / "prints.json")
    overlap._build({"b": str(tmp_path / "b.jsonl")})
    found = json.loads((tmp_path / "prints.json").read_bytes())
    assert found == {"b": sorted(overlap.fingerprint(f"how many are {i}") for i in range(3))}


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A full disk, or Ctrl-C: the old file stays, and no draft beside it."""
    (tmp_path / "f.json").write_text("old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(descriptor: int, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(directory.os, "fsync", fail)
        with pytest.raises(type(error)):
            write_text(tmp_path / "f.json", "new")
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else Exception):
            make_run(tmp_path / "deep" / "run")
        monkeypatch.undo()
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f.json", "old")]


def test_the_run_of_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with make_run(tmp_path / "run"):
        (tmp_path / "run" / "checkpoints").mkdir()
        (tmp_path / "checkpoints").mkdir()
    for path, run in (("run", "run"), ("run/checkpoints", "run"), ("checkpoints", "checkpoints"), ("nope", "nope")):
        assert run_of(tmp_path / path) == tmp_path / run
    monkeypatch.chdir(tmp_path / "run")
    assert run_of(Path("checkpoints")) == Path(".")
    assert run_of(Path("checkpoints/")) == Path(".")


LATIN = """
import json, sys
from pathlib import Path
from kpo_cli.runs.directory import RunDir, make_manifest
from kpo_cli.analysis.source import find_source
text = "\\u2028 \\xfc \\u65e5"
with RunDir.create(Path(sys.argv[1]), {"text": text}, make_manifest(note=text)) as run:
    run.write_rows("r.jsonl", [{"text": text}])
    run.append_metrics({"step": 0, "text": text})
    assert run.config() == {"text": text} and run.manifest()["note"] == text
    assert run.rows("r.jsonl")[0]["text"] == text and run.metrics()[0]["text"] == text
"""


def test_the_locale_does_not_matter(tmp_path: Path):
    """In the C locale, without Python's own way out of it, what has no encoding named is ASCII."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-X", "warn_default_encoding", "-c", LATIN, str(tmp_path / "run")]
    done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kpo_cli" not in done.stderr  # no EncodingWarning of ours
