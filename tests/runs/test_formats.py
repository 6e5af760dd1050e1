"""What an older kpo wrote opens; what a newer one wrote is refused in one line. `before_formats` is a run of kpo 0.1.0
from before its files bore a version, without its checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import metrics, resume, train

from kpo_cli.analysis.compare.curves import load_run
from kpo_cli.analysis.source import find_source
from kpo_cli.cli.compose import conf_dir
from kpo_cli.config import convert
from kpo_cli.errors import UserError
from kpo_cli.evaluation.config import EvalConfig
from kpo_cli.evaluation.subject import find_subjects
from kpo_cli.runs.directory import RunDir
from kpo_cli.runs.formats import RATIOS, RUN, unreadable

OLD = Path(__file__).parent / "before_formats"


@pytest.fixture
def old_run(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "run"))


@pytest.mark.parametrize("own", [RUN, RATIOS])
def test_a_format_is_read_up_to_its_own_version(own):
    kind, _, version = own.rpartition("-")
    assert unreadable(own, own) is None
    assert unreadable(f"{kind}-0", own) is None
    newer = f"{kind}-{int(version) + 1}"
    assert unreadable(newer, own) == f"its format is {newer}, and this kpo reads {own} and older: update kpo"


@pytest.mark.parametrize("found", ["kpo-other-1", "kpo-run-", "kpo-run-1.5", "kpo-run", "", 1, None, ["kpo-run-1"], {}])
def test_what_is_no_such_format_is_named(found):
    assert unreadable(found, "kpo-run-1") == f"its format is {found!r}, not kpo-run-1"


def test_a_run_without_versions_is_resumed(old_run):
    assert "format" not in json.loads((old_run / "manifest.json").read_text())
    before = metrics(old_run)
    resume(old_run)
    after = metrics(old_run)
    assert [row["step"] for row in after] == [row["step"] for row in before] == [0, 1, 2]
    assert after[0]["accuracy_greedy"] == before[0]["accuracy_greedy"]
    assert after[1]["response_tokens"] == before[1]["response_tokens"]


def test_a_run_without_versions_is_analysed(old_run):
    assert load_run("old", old_run).config["method.name"] == "kpo"
    source = find_source(old_run)
    ((path, batch),) = source.batches()
    assert source.problems == []
    assert path.name == "step-000002.safetensors"
    assert len(batch) == 16


@pytest.fixture
def newer_run(tmp_path):
    run = train(tmp_path / "run", "trainer.steps=1")
    content = json.loads((run / "manifest.json").read_text())
    assert content["format"] == RUN
    (run / "manifest.json").write_text(json.dumps({**content, "format": "kpo-run-2"}))
    return run


def test_a_newer_run_is_refused_by_every_command(newer_run):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw = OmegaConf.to_container(compose("eval", [f"checkpoint='{newer_run}'", "benchmarks=[x]"]), resolve=True)
    evaluation = convert(EvalConfig, {key: raw[key] for key in raw if key not in ("run_dir", "overrides")})
    line = "its format is kpo-run-2, and this kpo reads kpo-run-1 and older: update kpo"
    for opens in (
        lambda: resume(newer_run, "trainer.steps=2"),
        lambda: find_subjects(evaluation),
        lambda: load_run("newer", newer_run),
        lambda: find_source(newer_run),
        lambda: RunDir(newer_run).config(),
    ):
        with pytest.raises(UserError, match=line):
            opens()


def test_a_newer_record_is_left_out_and_named(old_run):
    path = old_run / "ratios" / "step-000002.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "format": json.dumps("kpo-ratios-2")})
    source = find_source(old_run)
    assert list(source.batches()) == []
    assert source.problems == [
        f"{path}: its format is kpo-ratios-2, and this kpo reads {RATIOS} and older: update kpo; left out"
    ]
