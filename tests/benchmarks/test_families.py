"""benchmarks/families.py on one family of each kind; its models have teeth, and its judge can say no."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.append(str(BENCHMARKS))  # at the end: its names are plain ones

import families  # noqa: E402
from families_parts.build import tiny_model  # noqa: E402
from families_parts.judge import MOST, TOLERANCE, Gap, gap_of  # noqa: E402
from families_parts.shrink import LAYERS, layer_lists  # noqa: E402
from families_parts.table import BEGIN, END, HEADS, counts, written  # noqa: E402

TRAIN = {
    "llama": "plain",
    "mistral": "sliding window",
    "gemma2": "soft cap, sliding and full layers",
    "mixtral": "experts",
    "qwen3_next": "linear and full attention, shared experts",
    "gpt_oss": "sinks, sliding and full layers, experts",
}
NEED_NOT = {"openai-gpt": "no cache", "mamba": "no attention"}
"""They may be refused."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command as it is used, and what it made; the folders of those that trained are gone."""
    out = tmp_path_factory.mktemp("families")
    names = ",".join([*TRAIN, *NEED_NOT])
    command = [sys.executable, str(BENCHMARKS / "families.py"), "--only", names, "--out", str(out), "--jobs", "2"]
    page = out / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    done = subprocess.run(
        [*command, "--write", str(page)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    lines = {line["family"]: line for line in json.loads((out / "families.json").read_text())}
    assert done.stdout.count("\n") == len(lines) + 1, done.stderr
    return {"lines": lines, "code": done.returncode, "page": page.read_text()}


@pytest.mark.parametrize("family", [*TRAIN, *NEED_NOT])
def test_a_family_trains_as_the_untouched_model_or_is_refused_in_a_line(results: dict[str, Any], family: str):
    line = results["lines"][family]
    assert line["outcome"] in ("trained",) if family in TRAIN else ("trained", "refused"), line
    if line["outcome"] == "trained":
        shortest, longest = line["lengths"]
        assert shortest < 10 < 30 < longest


def test_the_page_has_its_table_between_the_marks(results: dict[str, Any]):
    page = results["page"]
    assert page.startswith(f"before\n{BEGIN}\n")
    assert page.endswith(f"{END}\nbehind\n")
    assert "old" not in page.split(BEGIN)[1].split(END)[0].split()
    assert all(f"| `{family}` |" in page for family in (*TRAIN, *NEED_NOT))
    assert results["code"] == any(line["outcome"] == "wrong" for line in results["lines"].values())


def test_the_committed_page_counts_its_own_rows():
    table = (REPOSITORY / "docs/models.md").read_text("utf-8").split(BEGIN)[1].split(END)[0]
    rows: dict[str, list[Any]] = {outcome: [] for outcome in HEADS}
    for part in table.split("\n### ")[1:]:
        rows[part.splitlines()[0].lower()] = [line for line in part.splitlines() if line.startswith("| `")]
    assert counts(rows) in table
    assert len(rows["trained"]) + len(rows["refused"]) >= 60


# The models


def shift(family: str, change: Any) -> float:
    """The largest change of a log-probability by `change` of the model or its configuration."""
    model = tiny_model(family)
    tokens = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits.log_softmax(-1)
        change(model)
        return float((model(tokens, use_cache=False).logits.log_softmax(-1) - before).abs().max())


def without_cap(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None


def without_sinks(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.fill_(-1e4)


def without_window(model: Any) -> None:
    model.config.sliding_window = 10_000


@pytest.mark.parametrize(
    ("family", "change"), [("gemma2", without_cap), ("mistral", without_window), ("gpt_oss", without_sinks)]
)
def test_what_a_family_has_acts_in_its_tiny_model(family: str, change: Any):
    assert shift(family, lambda model: None) == 0
    assert shift(family, change) > 100 * TOLERANCE


def test_every_kind_of_layer_survives_shrinking():
    kinds = ["a"] * 7 + ["b"] * 4 + ["c"]
    lists = layer_lists({"num_hidden_layers": 12, "layer_types": kinds, "sizes": [1] * 6 + [2] * 6, "other": [0] * 3})
    assert set(lists) == {"layer_types", "sizes"}
    assert [len(values) for values in lists.values()] == [LAYERS, LAYERS]
    columns = list(zip(lists["layer_types"], lists["sizes"], strict=True))
    assert sorted(set(columns), key=columns.index) == [("a", 1), ("a", 2), ("b", 2), ("c", 2)]


# The judge


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    families.built("llama", folder)
    problems = families.write_problems(folder / "problems.jsonl")
    code, _, err = families.forked(lambda: families.trained(folder / "model", problems, folder / "run"), folder / "t")
    assert code == 0, err
    return folder


def test_the_judge_sees_other_weights_and_other_numbers(trained_run: Path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model, run = trained_run / "model", trained_run / "run"
    fresh = gap_of(run, 1, model)
    assert max(fresh.trainer, fresh.sampler) < TOLERANCE
    stale = gap_of(run, 2, model)
    assert min(stale.trainer, stale.sampler) > 100 * TOLERANCE  # weights of one step before
    assert 0 < stale.rounding < TOLERANCE / 4
    path = run / "ratios/step-000001.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["old_log_probs"][-1, 0] += 2 * TOLERANCE
    save_file(tensors, path, metadata)
    altered = gap_of(run, 1, model)
    assert altered.trainer > TOLERANCE > altered.sampler


GOOD = Gap(sampler=1e-6, trainer=1e-6, spread=2.0, lengths=(1, 40), rounding=0.0)
TOLD = ["warning: sampled token by token this model says other log-probabilities than in one pass over a text"]
SLOW = [
    "note: this model is sampled with a mask throughout: log-probabilities differ from those of a plain forward pass"
]
NOTES = [
    "warning: this model's forward passes are padded, not packed (its attention is eager): each row takes longer",
    "note: this model is sampled without a cache, every token at the price of the whole text before it: it has none",
    *TOLD,
]


@pytest.mark.parametrize(
    ("change", "notes", "outcome"),
    [
        ({}, [], "trained"),
        ({"trainer": 2e-4}, TOLD, "wrong"),
        ({"trainer": float("nan")}, [], "wrong"),
        ({"sampler": 2e-4}, [], "wrong"),
        ({"sampler": 2e-4}, TOLD, "trained"),
        ({"sampler": 2e-4}, SLOW, "wrong"),  # which is why the way that it goes is another
        ({"sampler": float("nan")}, [], "wrong"),
        ({"spread": 0.01}, [], "wrong"),
        ({"trainer": 3e-4, "rounding": 1e-4}, [], "trained"),
        ({"trainer": 5e-4, "rounding": 1e-4}, [], "wrong"),
        ({"sampler": 1.1 * MOST, "rounding": 1.0}, [], "wrong"),
    ],
)
def test_a_verdict_is_of_the_worst_step(change: dict[str, Any], notes: list[str], outcome: str):
    bad = replace(GOOD, **change)
    for gaps in ([GOOD, bad], [bad, GOOD]):
        assert families.verdict(gaps, notes)["outcome"] == outcome


@pytest.mark.parametrize(
    ("code", "err", "left", "outcome"),
    [
        (2, "kpo: model.path=/a/b cannot be sampled from: it has no attention", False, "refused"),
        (2, "kpo: model.path=/a/b cannot be sampled from: it has no attention", True, "wrong"),
        (1, "kpo: model.path=/a/b cannot be sampled from: it has no attention", False, "wrong"),
        (2, "a warning\nkpo: it has no attention", False, "wrong"),
        (1, "Traceback (most recent call last):\n  ...\nKeyError: 'x'", False, "wrong"),
        (
            2,
            "kpo: model.path=/a/b: KeyError (check that it is a causal language model)",
            False,
            "wrong",
        ),
        (2, "kpo: rollout.max_prompt_tokens=64 exceeds the model's context of -1 tokens; lower it", False, "wrong"),
        (-9, "", False, "wrong"),
    ],
)
def test_a_refusal_is_one_line_that_names_something_and_leaves_nothing(code: int, err: str, left: bool, outcome: str):
    line = families.refusal(code, "", err, left)
    assert line["outcome"] == outcome
    assert "/a/b" not in line["reason"] or outcome == "wrong"


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families, "SECONDS", 1)

    def hang() -> None:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        child.wait()

    code, _, err = families.forked(hang, tmp_path / "hang")
    assert code == 124
    assert "more than 1 s" in err
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    assert not state.exists() or "zombie" in state.read_text()


def test_tables_hold_what_the_lines_say():
    line = {"family": "x", "layers": ["full_attention"], "notes": []} | families.verdict([GOOD], [])
    other = families.verdict([replace(GOOD, sampler=0.3, rounding=2e-4)], TOLD)
    slow = {"family": "z", "layers": ["linear_attention"], "notes": NOTES} | other
    refused = {"family": "y", "outcome": "refused", "reason": "no a|b"}
    page = written(f"{BEGIN}{END}", [line, refused, slow])
    assert "Of 3 families **2 train** and **1 are refused**; 0 do neither. 0 more" in page
    assert "| `x` | full | packed | with a cache | 1e-06 | 1e-06 |  |" in page
    assert "| `z` | linear | padded, eager | without a cache; not used | 3e-01 | 1e-06 | 2e-04 |" in page
    assert "| `y` | no a/b |" in page
