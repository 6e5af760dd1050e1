"""benchmarks/gpu.py: one part's end is not another's, what was measured is kept, and the parts can fail."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.append(str(BENCHMARKS))  # at the end: its names are plain ones

import gpu_bundle  # noqa: E402
from gpu import PARTS, main, read_results, shown, tables  # noqa: E402
from gpu_parts import Setting, attention, composed, costs, largest, numerics, runs  # noqa: E402
from varlen_reference import varlen_reference  # noqa: E402

from kpo_cli.policy import attention as packing  # noqa: E402
from kpo_cli.policy.memory import MemoryPlan  # noqa: E402

FAKE = """
import os, sys, time
from pathlib import Path

from gpu import Part, main

NAMES = "env good raises aborts quits hangs leaves last"


def env(setting):
    if "FORKS_FAIL" in os.environ and "--fresh-child" not in sys.argv:
        raise RuntimeError("no fork can do this")
    yield {"leads its group": str(os.getpid() == os.getpgid(0))}


def good(setting):
    yield {"one": 1, "half": 0.5}
    yield {"text": "a | b", "seconds": setting.seconds}


def raises(setting):
    yield {"before": 1}
    raise ValueError("first line\\nof two")


def aborts(setting):
    yield {"before": 2}
    print("on its way out", file=sys.stderr)
    os.abort()


def quits(setting):
    yield {"before": 3}
    os._exit(7)


def hangs(setting):
    yield {"before": 4}
    if os.fork() == 0:
        time.sleep(8)
        Path(os.environ["TRACE"]).write_text("a child of a part outlived it")
    time.sleep(60)


def leaves(setting):
    raise SystemExit("by another door")
    yield


def last(setting):
    time.sleep(6)  # the child of `hangs` would have written by now
    yield {"reached": 1}


if __name__ == "__main__":
    parts = [Part(name, f"{name}?", f"parts:{name}", 4 if name == "hangs" else 90) for name in NAMES.split()]
    parts = [Part(p.name, p.question, p.function, p.seconds, small_seconds=p.seconds) for p in parts]
    sys.exit(main(parts=parts))
"""
Rows = dict[str, dict[str, Any]]


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., tuple[Rows, subprocess.CompletedProcess[str]]]:
    """The runner with parts of our own, in a process of its own; their lines by name, and how it went."""
    script = tmp_path / "parts.py"
    script.write_text(FAKE)

    def run(*arguments: str, **variables: str) -> tuple[Rows, subprocess.CompletedProcess[str]]:
        paths = os.pathsep.join([str(tmp_path), str(BENCHMARKS), str(REPOSITORY / "src")])
        known = {"PYTHONPATH": paths, "TRACE": str(tmp_path / "trace"), "OUT": str(tmp_path / "out")}
        done = subprocess.run(
            [sys.executable, str(script), "--device", "cpu", "--small", *arguments],
            env={**os.environ, **known, **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
        return {row["part"]: row for row in map(json.loads, lines)}, done

    return run


def test_a_part_that_fails_aborts_or_hangs_ends_alone(fake, tmp_path: Path):
    rows, done = fake()
    failed = dict.fromkeys(("raises", "aborts", "quits", "leaves"), "failed")
    statuses = {"hangs": "timeout", **dict.fromkeys(("env", "good", "last"), "ok"), **failed}
    assert {name: row["status"] for name, row in rows.items()} == statuses
    assert done.returncode == 5
    assert rows["env"]["numbers"] == {"leads its group": "True"}
    assert rows["good"]["numbers"] == {"one": 1, "half": 0.5, "text": "a | b", "seconds": 90}
    before = [rows[name]["numbers"]["before"] for name in ("raises", "aborts", "quits", "hangs")]
    assert before == [1, 2, 3, 4], "what was measured is kept, whatever the end"
    assert rows["raises"]["reason"] == "ValueError: first line"
    assert rows["aborts"]["reason"] == "killed by SIGABRT; the last line in log.txt: on its way out"
    assert rows["quits"]["reason"].startswith("exit status 7")
    assert rows["hangs"]["reason"] == "stopped after 4 s"
    assert rows["hangs"]["seconds"] < 20
    assert not (tmp_path / "trace").exists()
    assert "| good | text | a \\| b |" in done.stdout
    assert (tmp_path / "out/table.md").read_text().strip() in done.stdout
    assert "on its way out" in (tmp_path / "out/log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_keeps_what_the_part_had_measured(number, fake, tmp_path: Path):
    def stop() -> None:
        while not (tmp_path / "out/log.txt").exists() or "===== hangs" not in (tmp_path / "out/log.txt").read_text():
            time.sleep(0.1)
        time.sleep(1)
        found = subprocess.run(["pgrep", "-f", "--oldest", str(tmp_path)], capture_output=True, check=True)
        os.kill(int(found.stdout), number)

    thread = threading.Thread(target=stop)
    thread.start()
    rows, done = fake("--only", "env,hangs,last")
    thread.join()
    assert [rows[name]["status"] for name in ("env", "hangs", "last")] == ["ok", "timeout", "skipped"]
    assert rows["hangs"]["numbers"] == {"before": 4}
    assert done.returncode == 2
    assert "| hangs | before | 4 |" in done.stdout


def test_where_no_fork_works_new_interpreters_do(fake):
    rows, done = fake("--only", "env,good,aborts", FORKS_FAIL="1")
    assert {name: row["status"] for name, row in rows.items()} == {"env": "ok", "good": "ok", "aborts": "failed"}
    assert rows["good"]["numbers"]["seconds"] == 90
    assert done.returncode == 1


def test_a_part_that_no_longer_fits_says_no_time(fake):
    rows, done = fake("--only", "good,hangs", "--budget", "44")
    assert rows["good"]["status"] == "skipped"
    assert rows["good"]["reason"].startswith("no time")
    assert rows["hangs"]["status"] == "timeout", "one that fits is still run"
    assert done.returncode == 2, "what was left out is no pass"


def test_the_real_script_on_a_cpu_and_its_table(tmp_path: Path):
    only = "env,log_probs,filters,backends,varlen,memory"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--small", "--only", only]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OUT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_results(tmp_path / "results.jsonl")
    assert [row["part"] for row in rows] == only.split(",")
    for row in rows:
        assert (row["status"], row["small"]) == ("ok", True)
        assert row["device"].startswith("cpu"), "a CPU's numbers bear its name"
        assert row["versions"]["torch"] == torch.__version__
        assert row["numbers"]
    # What a CPU does not have is not measured there, and nothing else says so.
    silent = {row["part"] for row in rows if any("not measured" in str(v) for v in row["numbers"].values())}
    assert silent == {"env", "filters", "varlen", "memory"}
    again = subprocess.run([*command[:2], "--table", str(tmp_path / "results.jsonl")], capture_output=True, text=True)
    assert again.stdout.strip() in done.stdout


def test_the_limits_of_all_parts_fit_into_five_minutes():
    assert sum(part.seconds for part in PARTS) <= 300
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert [part.name for part in PARTS if part.takes_the_rest] == [PARTS[-1].name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "env,stp"], "no part stp; there are: env, on_policy"),
        (["--device", "cpu"], "--device cpu goes with --small"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "a file/out"], "a file/out cannot be written to (Not a directory)"),
        (["--out", "a file"], "a file cannot be written to (File exists)"),
        (["--out", "taken"], "taken cannot be written to (Is a directory)"),
        (["--table", "nowhere"], "nowhere cannot be read (No such file or directory)"),
        (["--table", "a file"], "a file cannot be read (Expecting value"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(arguments, said, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("no results")
    Path("taken/results.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--only", "env"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_without_a_gpu_a_part_says_so(fake):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    rows, done = fake("--device", "cuda", "--only", "good")
    assert rows["good"]["status"] == "failed"
    assert "torch sees no GPU" in rows["good"]["reason"]
    assert done.returncode == 1


def test_the_table_shows_the_newest_line_of_a_part(tmp_path: Path):
    row = {"part": "step", "device": "GPU", "small": False, "status": "ok", "reason": "", "seconds": 1.0, "numbers": {}}
    other = row | {"device": "cpu", "small": True, "numbers": {"x": 1}}
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in (row | {"numbers": {"x": 1}}, other, row | {"numbers": {"x": 2}})))
    lines = tables(read_results(file), PARTS).splitlines()
    assert [line for line in lines if "| x |" in line] == ["| step | x | 2 |", "| step | x | 1 |"]
    assert [shown(v) for v in (0.12345678, 123456.7, 12, "text", float("nan"))] == [
        *("0.1235", "123,457", "12", "text", "nan")
    ]


@pytest.fixture
def small(tmp_path: Path) -> Setting:
    return Setting("cpu", True, 60.0, tmp_path)


def looks_ahead(*arguments, window_size, **options):
    return varlen_reference(*arguments, window_size=(window_size[0], 1), **options)


def test_varlen_would_see_another_alignment(small, monkeypatch):
    monkeypatch.setattr(attention, "plain_kernel", lambda: looks_ahead)
    with pytest.raises(AssertionError, match="without torch's varlen attention \\(off by"):
        list(attention.varlen(small))
    monkeypatch.setattr(attention, "choose_kernel", lambda model, way, kernels: replace(way, kernel=kernels[0]))
    with pytest.raises(AssertionError, match=r"varlen, causal: off by .* varlen, window of 4: off by"):
        list(attention.varlen(small))


def test_varlen_would_see_a_wrong_bucket(small, monkeypatch):
    own = packing.packed_attention
    monkeypatch.setattr(packing, "packed_attention", lambda q, k, v, p, window, scale: own(q, k, v, p, None, scale))
    with pytest.raises(AssertionError, match=r"^buckets, window of 4: off by [\d.]+$"):
        list(attention.varlen(small))


def test_varlen_would_see_a_kernel_that_is_not_the_same_twice(small, monkeypatch):
    def changing(query, *arguments, **options):
        return varlen_reference(query, *arguments, **options) * (1 + 2**-7 * torch.is_grad_enabled())

    monkeypatch.setattr(attention, "plain_kernel", lambda: changing)
    monkeypatch.setattr(attention, "choose_kernel", lambda model, way, kernels: replace(way, kernel=kernels[0]))
    with pytest.raises(AssertionError, match=r"\|z\| at lr = 0, varlen: up to"):
        list(attention.varlen(small))


def test_on_policy_would_see_a_policy_that_is_not_the_same_twice(small, monkeypatch):
    """Old log-probs that differ in their last bits, as those of another plan of attention do."""
    own = numerics.Updater._old_log_probs
    nudged = lambda self, batch, rows: own(self, batch, rows) * (1 + 1e-7)  # noqa: E731
    monkeypatch.setattr(numerics.Updater, "_old_log_probs", nudged)
    with pytest.raises(AssertionError, match=r"float32, packed: \|z\| up to"):
        list(numerics.on_policy(small))


def test_layouts_would_see_a_row_of_another_prompt(small, monkeypatch):
    class Wrong(numerics.Scorer):
        def __call__(self, batch, entropy_gradient=False):
            other = (batch.prompt_ids + (batch.prompt_index == 1).long()[:, None]) % 256
            return super().__call__(replace(batch, prompt_ids=other), entropy_gradient)

    monkeypatch.setattr(numerics, "Scorer", Wrong)
    with pytest.raises(AssertionError, match=r"float32, packed: off by .* bfloat16, padded: off by"):
        list(numerics.layouts(small))


def test_log_probs_and_filters_would_see_an_error(small, monkeypatch):
    own = numerics.linear_log_probs
    monkeypatch.setattr(numerics, "linear_log_probs", lambda h, *a, **k: own(h * (1 + 1e-3), *a, **k))
    with pytest.raises(AssertionError, match="float32 log-prob: off by"):
        list(numerics.log_probs(small))
    ema = numerics.FILTERS["ema"]
    monkeypatch.setitem(numerics.FILTERS, "ema", lambda: lambda z, m, old: ema()(z, m, old) + 1e-6)
    with pytest.raises((AssertionError, AttributeError), match=r"ema|gain"):
        list(numerics.filters(small))


def test_a_nan_is_no_small_error(small, monkeypatch):
    """`max` passes over a NaN that does not come first."""
    assert math.isnan(largest([1.0, math.nan, 2.0]))
    one, nan = torch.ones(1), torch.full((1,), math.nan)
    zero = torch.zeros(1)
    assert math.isnan(numerics.errors((zero, {"a": one, "b": nan}), (zero, {"a": one, "b": one}))[1])
    monkeypatch.setattr(numerics, "relative_error", lambda *_: math.nan)
    with pytest.raises(AssertionError, match="kalman: off by nan"):
        list(numerics.filters(small))


def test_an_error_of_our_own_attention_is_no_pass(small, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(attention, "decode_attention", broken)
    with pytest.raises(AssertionError, match="decoding, bfloat16: RuntimeError: no kernel"):
        list(attention.backends(small))


def test_the_difference_of_two_runs(tmp_path: Path):
    for name, rows in (("a", [{"step": 1, "x": 1.0, "time_step": 1}]), ("b", [{"step": 1, "x": 1.5, "time_step": 2}])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 2, "x"')
    assert runs.difference(tmp_path / "a", tmp_path / "a") == 0
    assert runs.difference(tmp_path / "a", tmp_path / "b") == pytest.approx(1 / 3)


def test_the_bundle_refuses_what_may_not_install_there(tmp_path: Path):
    names = {name.replace("-", "_") for name in gpu_bundle.WHEELS}
    for name in names:
        (tmp_path / f"{name}-1.0-py3-none-any.whl").touch()
    assert gpu_bundle.check(tmp_path) is None
    (tmp_path / "more-1.0-py2.py3-none-any.whl").touch()
    assert gpu_bundle.check(tmp_path) is None
    (tmp_path / "xxhash-4.1-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert "xxhash-4.1-cp311" in str(gpu_bundle.check(tmp_path))
    (tmp_path / "xxhash-4.1-cp311-cp311-manylinux_2_28_x86_64.whl").unlink()
    (tmp_path / "omegaconf-1.0-py3-none-any.whl").unlink()
    assert gpu_bundle.check(tmp_path) == "no wheel of omegaconf"


def test_what_stays_behind_is_not_imported_where_it_is_not_needed():
    """The bundle leaves out `datasets`: every import of it and of vLLM stands inside the function that needs it."""
    late = "datasets|vllm|peft|numba|triton|pandas|dill|multiprocess|xxhash"
    eager = re.compile(rf"^(import|from) ({late})\b", re.MULTILINE)
    assert [path for path in (REPOSITORY / "src").rglob("*.py") if eager.search(path.read_text())] == []


class SaysItIsAGpu(Setting):
    """A CPU that takes the branches of a GPU, so that a slip in them is found without one."""

    @property
    def cuda(self) -> bool:
        return True


@pytest.fixture
def pretending(tmp_path: Path) -> Setting:
    return SaysItIsAGpu("cpu", True, 60.0, tmp_path)


def every(numbers: Any) -> dict[str, Any]:
    return {name: value for some in numbers for name, value in some.items()}


def test_varlen_asks_for_the_kernels_of_a_gpu(pretending, monkeypatch):
    monkeypatch.setattr(attention, "kernels_for", lambda device, half: (varlen_reference,))
    assert every(attention.varlen(pretending))["varlen, causal: error of values"] > 0
    monkeypatch.setattr(attention, "kernels_for", lambda device, half: ())
    with pytest.raises(AssertionError, match="the installed torch has none"):
        list(attention.varlen(pretending))


def test_the_branches_of_a_gpu_have_no_slip(pretending, monkeypatch):
    monkeypatch.setattr(costs, "planned", lambda *_: MemoryPlan(1, 2**30, 0, 0, 0, 2**40, "cuda"))
    found = every(costs.memory(pretending))
    name = "tiny, 256 tokens, recompute, offload"
    assert found[f"{name}: planned, GiB"] == 1
    assert found[f"{name}: measured / planned"] == found[f"{name}: measured, GiB"] > 0
    monkeypatch.setattr(costs, "planned", lambda *_: MemoryPlan(1, 2**20, 0, 0, 0, 2**40, "cuda"))
    with pytest.raises(AssertionError, match=r"GiB where 0\.0 are planned"):
        list(costs.memory(pretending))
    found = every(costs.step(pretending))
    assert found["MFU is of"] == costs.MEASURED_PEAK[1]
    assert found["tiny, kpo: MFU step"] > 0
    assert found["tiny, grpo: peak, GiB"] > 0
    assert any("cuDNN alone" in name for name in every(attention.backends(pretending)))


@pytest.mark.parametrize("off", [0.0, 1e-9, math.nan])
def test_triton_is_held_against_torch(pretending, off, monkeypatch):
    monkeypatch.setattr(numerics, "_triton_kernel", object)
    monkeypatch.setattr(numerics, "launch_triton", lambda kernel, *rows: numerics.saturated_scan_torch(*rows) + off)
    if off:
        with pytest.raises(AssertionError, match=f"Triton differs from torch by {off:.2g}"):
            list(numerics.filters(pretending))
    else:
        found = every(numerics.filters(pretending))
        assert found["robust, Triton - torch"] == 0
        assert found["robust, Triton, ms"] > 0


def test_the_layouts_of_a_gpu_are_compared_under_tf32_too(pretending):
    found = every(numerics.layouts(pretending))
    assert found["float32 with TF32: packed - padded, nats"] < 1e-5


@pytest.mark.parametrize("seconds", [60.0, 500.0])
def test_what_the_long_run_asks_for_is_a_configuration(seconds, tmp_path, monkeypatch):
    """On a GPU: cut down where there is little time, else the experiment as it is."""
    asked: list[str] = []

    def launched(*arguments: str) -> subprocess.Popen[bytes]:
        asked.extend(arguments)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(runs, "launch", launched)
    found = every(runs.long(Setting("cpu", False, seconds, tmp_path)))
    config = composed(*(argument for argument in asked if not argument.startswith("run_dir=")))
    whole = seconds > runs.WHOLE
    assert config.trainer.stop_after == seconds - 25
    assert config.trainer.supervised.steps == (4000 if whole else 70)
    assert config.rollout.max_response_tokens == (2048 if whole else 512)
    assert ("cut down to the time there is" in found) is not whole
    assert found["RL steps"] == 0
