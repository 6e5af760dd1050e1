"""`kpo analyze` as a command: arguments, errors, what it leaves behind, and the view of a run in progress."""

import json
import threading
import time

import pytest
from ratio_config import QUICK, config
from ratio_files import write_run
from rich.console import Console
from test_comparison import make_run

from kpo_cli.analysis.source import find_source
from kpo_cli.analysis.watch import watch


@pytest.fixture
def run(tmp_path):
    return write_run(make_run(tmp_path / "runs" / "a b"), steps=(1, 2))


def test_a_run_of_the_built_in_task_is_analysed(kpo, small, tmp_path):
    """The whole way: train, then the table raw, null, filtered, and the on-policy mini-batch apart."""
    larger = ["trainer.steps=1", "trainer.prompts_per_step=8", "trainer.group_size=4", "trainer.mini_batches=4"]
    assert kpo("train", *small, *larger, "run_dir=r", "trainer.ratios_every=1").code == 0
    before = set(tmp_path.rglob("*"))
    result = kpo("analyze", "r", "report=false", *QUICK)
    assert (result.code, result.err) == (0, "")
    assert all(word in result.out for word in ("Switch frequency", "shuffled", "recorded", "0, on-policy"))
    assert "z is exactly 0" in result.out
    written = {path.relative_to(tmp_path).parts[:2] for path in set(tmp_path.rglob("*")) - before}
    assert written == {("r", "analysis")}
    found = json.loads((tmp_path / "r" / "analysis" / "analysis.json").read_text())
    assert found["filters"]["recorded"]["switch_frequency"]["null_shuffled"] is not None


def test_a_path_may_look_like_a_setting(kpo, run, tmp_path):
    odd = run.rename(tmp_path / "seed=1,lr=2")
    result = kpo("analyze", str(odd), "run_dir=out", "report=false", *QUICK)
    assert (result.code, result.err) == (0, "")
    assert (tmp_path / "out" / "analysis.json").is_file()


def test_results_go_where_run_dir_says(kpo, run, tmp_path, tree):
    before = tree(tmp_path)
    result = kpo("analyze", str(run / "ratios" / "step-000001.safetensors"), "run_dir=out", "report=false", *QUICK)
    assert result.code == 0
    assert tree(tmp_path) - before == {"out", "out/analysis.json"}
    assert result.out.splitlines()[-1] == "analysis.json is in out"


def test_paths_with_any_characters(kpo, tmp_path):
    write_run(tmp_path / "it's, [a] run", steps=(1,))
    assert kpo("analyze", "it's, [a] run", "report=false", *QUICK).code == 0
    write_run(tmp_path / "a=b", steps=(1,))
    assert kpo("analyze", "runs=['a=b']", "report=false", *QUICK).code == 0


def test_damaged_files_are_named_on_stderr_and_the_rest_is_analysed(kpo, run):
    (run / "ratios" / "step-000001.safetensors").write_bytes(b"\x00" * 50)
    result = kpo("analyze", str(run), "report=false", *QUICK)
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert result.err.startswith(f"kpo: {run}/ratios/step-000001.safetensors: truncated or not a safetensors file")
    assert "1 of 2 files could not be used" in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give what to analyse: kpo analyze RUN"),
        (["nowhere"], "nowhere does not exist"),
        (["RUN", "dead_zne=1"], "unknown key dead_zne; did you mean dead_zone?"),
        (["RUN", "dead_zone=-1"], "dead_zone=-1.0 must be at least 0"),
        (["RUN", "filters=[kalmann]"], "unknown filter 'kalmann'; did you mean 'kalman'?"),
        (["RUN", "--wach"], "no such option --wach"),
        (["RUN", "-m", "seed=1,2"], "kpo analyze makes no sweeps; give it all runs at once"),
        (["RUN", "run_dir=file"], "file is a file; choose another run_dir="),
        (["RUN", "--watch", "refresh=0"], "refresh=0.0 must be at least 0.1"),
        (["RUN/config.yaml"], "unknown kind of file"),
        (["--watch", "RUN/ratios/step-000001.safetensors"], "--watch takes a run directory"),
    ],
)
def test_bad_input_is_one_line(kpo, run, tmp_path, tree, arguments, message):
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    result = kpo("analyze", *(argument.replace("RUN", str(run)) for argument in arguments))
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.startswith("kpo: ")
    assert result.err.count("\n") == 1
    assert tree(tmp_path) == before


def test_help_and_configuration_are_shown(kpo):
    shown = kpo("analyze", "--help")
    assert shown.code == 0
    assert "kpo analyze RUN_A RUN_B" in shown.out
    assert "dead_zone: 0.0" in kpo("analyze", "--cfg", "job").out


def test_several_runs_are_compared(kpo, run, tmp_path):
    other = write_run(make_run(tmp_path / "runs" / "grpo", "grpo"), steps=(1,))
    result = kpo("analyze", str(run), str(other), "report=false", *QUICK)
    assert (result.code, result.err) == (0, "")
    assert "Final held-out accuracy" in result.out
    (folder,) = (tmp_path / "outputs" / "analyze").iterdir()
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "a b", "grpo"}


def test_watch_shows_a_run_until_it_ends(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    console = Console(record=True, width=100)

    def finish():
        time.sleep(0.4)
        write_run(run, steps=(7,))
        (run / "summary.json").write_text("{}")

    before = time.monotonic()
    thread = threading.Thread(target=finish)
    thread.start()
    watch(find_source(run), config("refresh=0.1", "watch=true"), console)
    thread.join()
    assert 0.3 < time.monotonic() - before < 20
    text = console.export_text()
    assert "finished" in text
    assert "Ratios of step-000007.safetensors" in text
    assert "Newest steps" in text
    assert not (run / "analysis").exists()


def test_watch_is_a_command(kpo, run):
    (run / "summary.json").write_text("{}")
    result = kpo("analyze", "--watch", str(run))
    assert result.code == 0
    assert "no finding without the nulls" in " ".join(result.out.split())
