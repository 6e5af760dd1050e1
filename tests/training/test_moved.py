"""A run whose model, data or prompts are not where, or what, they were; and one that is measured by what it learns."""

import json
import re
import shutil
from pathlib import Path

import hub_twin
import pytest
from small_runs import metrics, resume, same_weights, train, weights

from kpo_cli.errors import UserError

LIMITS = ["rollout.max_prompt_tokens=99", "rollout.max_response_tokens=8", "trainer.ratios_every=0"]


@pytest.fixture
def files(tmp_path: Path, write_jsonl, problems):
    model = Path(shutil.copytree(hub_twin.shared_model("qwen3"), tmp_path / "old" / "model"))
    data = write_jsonl(tmp_path / "old" / "data.jsonl", problems)
    return model, data


def begin(tmp_path: Path, model: Path, data: Path, *overrides: str) -> Path:
    groups = ["model=hub", "data=file", "trainer.steps=1", "data.heldout=2", "trainer.prompts_per_step=2"]
    return train(tmp_path / "run", *groups, f"model.path='{model}'", f"data.path='{data}'", *LIMITS, *overrides)


def moved(tmp_path: Path, *paths: Path) -> list[Path]:
    (tmp_path / "new").mkdir()
    return [path.rename(tmp_path / "new" / f"renamed-{path.name}") for path in paths]


def test_a_run_goes_on_when_its_model_and_data_were_moved(files, tmp_path: Path):
    run = begin(tmp_path, *files)
    whole = resume(Path(shutil.copytree(run, tmp_path / "whole")), "trainer.steps=2")
    model, data = moved(tmp_path, *files)
    with pytest.raises(
        UserError, match=r"model.path=.* is not there any more; say where it lies now: resume=.*model.path"
    ):
        resume(run, "trainer.steps=2")
    with pytest.raises(UserError, match=r"data.path=.* is not there any more"):
        resume(run, "trainer.steps=2", f"model.path='{model}'")
    resume(run, "trainer.steps=2", f"model.path='{model}'", f"data.path='{data}'")
    assert same_weights(weights(run, 2), weights(whole, 2))
    assert metrics(run) == metrics(whole)
    resume(run, "trainer.steps=3")  # where they lie now is stored


def test_another_model_or_other_data_are_refused(files, tmp_path: Path, write_jsonl, problems):
    run = begin(tmp_path, *files)
    other = write_jsonl(tmp_path / "other.jsonl", [*problems[:-1], {"problem": "other?", "answer": "1"}])
    with pytest.raises(UserError, match=rf"data.path={re.escape(str(other))} has changed since"):
        resume(run, "trainer.steps=2", f"data.path='{other}'")
    llama = hub_twin.shared_model("llama")
    with pytest.raises(UserError, match=rf"model.path={re.escape(str(llama))} has changed since"):
        resume(run, "trainer.steps=2", f"model.path='{llama}'")
    with pytest.raises(UserError, match=r"a resumed run may change only .* and model.path, data.path"):
        resume(run, "data.heldout=3")


def test_another_first_prompt_is_refused(files, tmp_path: Path):
    run = begin(tmp_path, *files)
    file = run / "checkpoints/step-000001/chat_template.jinja"
    before = file.read_text()
    file.write_text(before.replace("assistant\\n", "helper\\n"))
    assert file.read_text() != before
    sums = json.loads((run / "checkpoints/step-000001/checksums.json").read_text())
    from kpo_cli.runs.directory import sha256_of

    sums[file.name] = sha256_of(file)
    (run / "checkpoints/step-000001/checksums.json").write_text(json.dumps(sums))
    with pytest.raises(UserError, match=r"the first prompt of .* was '.*assistant.*' and is '.*helper.*' now"):
        resume(run, "trainer.steps=2")


def test_a_benchmark_that_is_trained_on_is_warned_of_and_reported(files, tmp_path: Path, capsys):
    model, data = files
    run = begin(tmp_path, model, data, f"trainer.eval.benchmarks=['{data}']", "data.limit=5")
    out = capsys.readouterr().out
    assert "warning: 5 training problems stand in the benchmark data of trainer.eval" in out
    assert "left out of 20 rows: 0 duplicate problems, 0 prompts of more than 99 tokens, 13 behind data.limit" in out
    of = json.loads((run / "summary.json").read_text())["benchmarks"]["data"]
    rows = metrics(run)
    assert of["problems"] == 20
    for kind in ("greedy", "sampled"):
        assert of[f"{kind}_before"] == rows[0][f"accuracy_{kind}/data"]
        assert of[f"{kind}_after"] == rows[-1][f"accuracy_{kind}/data"]
        assert f"data, {kind} accuracy" in out


def test_fields_of_benchmarks_have_keys_of_their_own(files, tmp_path: Path, write_jsonl):
    other = write_jsonl(tmp_path / "other.jsonl", [{"question": "1?", "answer": "1"}])
    with pytest.raises(UserError, match=r"set trainer.eval.data.fields.problem=NAME"):
        begin(tmp_path, *files, f"trainer.eval.benchmarks=['{other}']")
    begin(tmp_path, *files, f"trainer.eval.benchmarks=['{other}']", "trainer.eval.data.fields.problem=question")


def test_the_filter_is_measured_in_the_first_step(tmp_path: Path, capsys):
    """Responses of some tens of tokens, and 96 at most, in which a time constant of 250 tokens passes 7% of a shift."""
    train(tmp_path / "run", "filter.time_constant=250", "rollout.max_response_tokens=96", "trainer.steps=2")
    out = capsys.readouterr().out
    length = round(metrics(tmp_path / "run")[1]["response_length_mean"])
    assert f"of a constant shift shows after {length} tokens, the mean response of step 1" in out
    assert out.count("mean response of step 1") == 1
    assert f"warning: the filter passes next to nothing in {length} tokens" in out
    assert "next to nothing in 96 tokens" not in out


def test_a_data_preset_sets_the_noise_and_says_so(files, tmp_path: Path, capsys):
    from kpo_cli.config import q_of
    from kpo_cli.runs.directory import RunDir

    model, data = files
    given = ["data=gsm8k", "data.fields.problem=problem", "data.answer_style=plain", "data.subset=null"]
    run = begin(tmp_path, model, data, *given)
    assert RunDir(run).config()["filter"]["q"] == pytest.approx(q_of(70, 1.0), rel=1e-12)
    assert "method=kpo alone has filter.q=1e-06" in capsys.readouterr().out
    shutil.rmtree(run)
    run = begin(tmp_path, model, data, *given, "filter.q=1e-6")
    assert RunDir(run).config()["filter"]["q"] == 1e-6
    assert "method=kpo alone" not in capsys.readouterr().out
