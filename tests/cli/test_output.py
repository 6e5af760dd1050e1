"""Runs whose texts, locale or terminal are out of the ordinary end as others do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kpo_cli.policy.load import Policy

SEPARATORS = "\u2028\u2029\x85\v\f\x1c\r\x1b]0;title\x07\x9b2J\u202e"
OBEYED = {character for character in SEPARATORS if not character.isprintable()}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems with every separator and code in them, unescaped where JSON allows it."""
    rows = [{"problem": f"{i}{SEPARATORS}+1 ü 日本?", "answer": str((i + 1) % 10)} for i in range(20)]
    path = tmp_path_factory.mktemp("odd") / "ü ${.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def test_separators_and_codes_in_problems_and_responses(
    odd: Path, kpo, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = Policy.decode
    monkeypatch.setattr(Policy, "decode", lambda policy, ids: f"{real(policy, ids)}{SEPARATORS}end")
    result = kpo("train", *small, f"data.path={odd}", "rollout.max_prompt_tokens=200", "run_dir=a", "model=tiny")
    assert (result.code, result.err) == (0, "")
    assert not OBEYED & set(result.out)
    assert "\\x1b]0;title\\x07" in result.out
    assert "1 step in " in result.out
    for name in ("evals/step-000000.jsonl", "evals/step-000001.jsonl", "metrics.jsonl"):
        lines = (tmp_path / "a" / name).read_bytes().decode().split("\n")
        assert lines.pop() == ""
        assert all(isinstance(json.loads(line), dict) for line in lines)
    row = json.loads((tmp_path / "a/evals/step-000001.jsonl").read_bytes().split(b"\n")[0])
    assert SEPARATORS in row["problem"]
    assert row["greedy"]["response"].endswith(f"{SEPARATORS}end")
    result = kpo("eval", "a", f"benchmarks=[{odd}]", "eval.n=1", "eval.temperature=0", "eval.max_tokens=8", "run_dir=e")
    assert (result.code, result.err) == (0, "")
    assert not OBEYED & set(result.out)
    assert len((tmp_path / "e/samples.jsonl").read_bytes().split(b"\n")) == 21


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"}


@pytest.mark.slow
def test_a_locale_without_umlauts(odd: Path, run_kpo, small: list[str], tmp_path: Path):
    """Every command, to its end; what cannot be shown is escaped, and the files are UTF-8."""
    (tmp_path / "in.jsonl").write_bytes(odd.read_bytes())
    arguments = [
        "data.path=in.jsonl",
        "rollout.max_prompt_tokens=200",
        "run_dir=a",
        "model=tiny",
        "trainer.ratios_every=1",
    ]
    for command in (
        ["train", *small, *arguments],
        ["eval", "a", "benchmarks=[in.jsonl]", "eval.n=1", "eval.temperature=0", "eval.max_tokens=8", "run_dir=e"],
        ["analyze", "a", "nulls.draws=0", "report=false"],
    ):
        result = run_kpo(*command, cwd=tmp_path, env=ASCII)
        assert (result.code, result.err) == (0, "")
        assert result.out.isascii()
    assert "日本" in (tmp_path / "a/evals/step-000000.jsonl").read_text("utf-8")
    shown = run_kpo("train", "run_dir=ü", cwd=tmp_path, env=ASCII)
    assert shown.code == 2  # the name's bytes mean nothing here
    assert "PYTHONUTF8=1" in shown.err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "left"])
def test_a_run_outlives_its_reader(how: str, small: list[str], tmp_path: Path):
    command = [sys.executable, "-m", "kpo_cli", "train", *small, "run_dir=a"]
    shell = 'exec "$@" >&-' if how == "closed" else 'set -o pipefail; "$@" | head -1'
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *command], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if how == "closed" else "run: a\n")
    assert (tmp_path / "a/summary.json").is_file()
    assert sorted(path.name for path in (tmp_path / "a/checkpoints").iterdir()) == ["step-000001"]


def completed(line: str, kpo, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    result = kpo("-sc", "query=bash")
    assert (result.code, result.err) == (0, "")
    return result.out.split()


def test_completion(kpo, monkeypatch: pytest.MonkeyPatch):
    assert completed("kpo ", kpo, monkeypatch) == ["train", "eval", "analyze"]
    assert completed("kpo ev", kpo, monkeypatch) == ["eval"]
    assert completed("kpo train method=gr", kpo, monkeypatch) == ["method=grpo", "method=grpo_tight"]
    assert completed("kpo train seed=3 trainer.lr", kpo, monkeypatch) == ["trainer.lr="]
    assert completed("kpo eval checkp", kpo, monkeypatch) == ["checkpoint="]
    assert completed("kpo analyze clip", kpo, monkeypatch) == ["clip_widths."]
    assert completed("kpo nonsense x", kpo, monkeypatch) == []
    for shell in ("bash", "fish", "zsh"):
        for arguments in (["-sc", f"install={shell}"], ["train", "--shell-completion", f"install={shell}"]):
            result = kpo(*arguments)
            assert (result.code, result.err) == (0, "")
            assert "kpo train" not in result.out
            assert "kpo" in result.out


def test_completion_in_a_shell(tmp_path: Path):
    """What bash itself makes of it."""
    (tmp_path / "kpo").write_text(f'#!/bin/bash\nexec "{sys.executable}" -m kpo_cli "$@"\n')
    (tmp_path / "kpo").chmod(0o755)
    script = (
        'eval "$(kpo -sc install=bash)"\n'
        'COMP_LINE="kpo train method=gr"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=($COMP_LINE); COMP_CWORD=2\n'
        'function=$(complete -p kpo | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $function; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("method=grpo method=grpo_tight\n", "")
