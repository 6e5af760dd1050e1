"""The worker processes: limits that stop, deaths that are survived, and a caller that notices nothing."""

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpo_cli.rewards import Grader, Verdict
from kpo_cli.rewards.pool import Pool

ALGEBRA = ("\\boxed{x+1}", "1+x")
RIGHT = Verdict(True, "x+1", "equivalent")
ENDLESS = "\\int_0^1 x^{x^{x^{x+%d}}} dx"
INJECTIONS = [
    "__import__('os').system('touch kpo_pwned_1')",
    "open('kpo_pwned_2','w')",
    "\\operatorname{open}('kpo_pwned_3','w')",
    "x+open(kpo_{pwned},w)",
    "\\text{exec}(open('kpo_pwned_4','w'))",
    "[open('kpo_pwned_5','w'),2]",
    "\\int_0^1 open('kpo_pwned_6','w') dx",
    "\\sum_{k=1}^{2} eval(\"open('kpo_pwned_7','w')\")",
    "{0.__class__}",
    "lambda: print",
]


def run_script(text: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a script of a user, as a file in a folder."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    command = [sys.executable, *flags, str(script)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def wait_until(condition: Callable[[], bool], limit: float = 20.0) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + limit
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_alive(pid: int) -> bool:
    """Whether a process runs (one that is dead but not buried does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_plain_answers_start_nothing(tmp_path: Path) -> None:
    script = """
        import sys, time
        from kpo_cli.rewards import Grader
        pairs = [(f"thinking \\\\boxed{{{i % 10}}}", str(i % 7)) for i in range(256)]
        pairs += [("\\\\boxed{0.5}", "\\\\frac12"), ("\\\\boxed{1,000}", "1e3"), ("\\\\boxed{(1,2)}", "(2,1)")]
        pairs += [("no", "7")]
        grader = Grader(workers=2)
        start = time.perf_counter()
        verdicts = grader.grade_batch(pairs)
        seconds = time.perf_counter() - start
        assert [v.correct for v in verdicts[:256]] == [i % 10 == i % 7 for i in range(256)]
        assert [v.correct for v in verdicts[256:]] == [True, True, False, False]
        assert grader.worker_pids == []
        assert not {"sympy", "mpmath", "math_verify", "torch"} & set(sys.modules)
        assert seconds < 0.5, seconds
    """
    result = run_script(script, tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_script_without_main_guard_and_with_torch(tmp_path: Path) -> None:
    (tmp_path / "sympy.py").write_text("raise RuntimeError('a file of the user was imported')")
    script = """
        import threading, time
        import torch
        from kpo_cli.rewards import grade_batch
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        print("once", torch.ones(3).sum().item(), grade_batch([("\\\\boxed{x+1}", "1+x")])[0].correct)
    """
    result = run_script(script, tmp_path, "-P")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "once 3.0 True\n"


def test_workers_end_with_their_caller(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from kpo_cli.rewards import grade_batch, grader
        grade_batch([("\\\\boxed{x+1}", "1+x")])
        print(*grader._default.worker_pids, flush=True)
        if len(sys.argv) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert len(run_script(script, tmp_path).stdout.split()) == 1
    killed = script.replace("len(sys.argv) > 1", "True")
    for text in (script, killed):
        pids = [int(pid) for pid in run_script(text, tmp_path).stdout.split()]
        assert pids
        assert wait_until(lambda: not any(is_alive(pid) for pid in pids))  # noqa: B023


def test_a_forked_caller_starts_its_own_workers(tmp_path: Path) -> None:
    script = """
        import os
        from kpo_cli.rewards import grade_batch, grader
        def correct():
            return grade_batch([("\\\\boxed{x+1}", "1+x")])[0].correct
        assert correct()
        pids = grader._default.worker_pids
        pid = os.fork()
        if pid == 0:
            os._exit(0 if correct() and grader._default.worker_pids != pids else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert correct() and grader._default.worker_pids == pids
    """
    result = run_script(script, tmp_path)
    assert result.returncode == 0, result.stderr


def test_threads_and_alarms_of_the_caller() -> None:
    def handler(*_: Any) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 300)
    found: list[list[Verdict]] = []
    try:
        with Grader(workers=2, time_limit_s=1) as grader:
            batch = [ALGEBRA, (f"\\boxed{{{ENDLESS % 0}}}", "0")]
            threads = [threading.Thread(target=lambda: found.append(grader.grade_batch(batch))) for _ in range(3)]
            for thread in threads:
                thread.start()
            found.append(grader.grade_batch(batch))
            for thread in threads:
                thread.join()
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 200
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [[verdict.reason for verdict in verdicts] for verdicts in found] == [["equivalent", "timeout"]] * 4


def test_a_killed_worker_is_replaced() -> None:
    with Grader(workers=1, time_limit_s=3) as grader:
        assert grader.grade_batch([ALGEBRA]) == [RIGHT]
        (first,) = grader.worker_pids
        os.killpg(first, signal.SIGKILL)
        assert grader.grade_batch([ALGEBRA]) == [RIGHT]
        (second,) = grader.worker_pids
        assert second != first
        # In the middle of a batch: what was under way is graded again.
        timer = threading.Timer(0.3, os.killpg, (second, signal.SIGKILL))
        timer.start()
        verdicts = grader.grade_batch([ALGEBRA, (f"\\boxed{{{ENDLESS % 0}}}", "0")])
        timer.join()
        assert verdicts[0] == RIGHT
        assert verdicts[1].failed
        assert grader.worker_pids != [second]


def test_a_dead_child_is_a_failure_and_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    with Grader(workers=1, time_limit_s=5) as grader:
        grader.grade_batch([ALGEBRA])
        (supervisor,) = grader.worker_pids
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
        child = int(children.read_text().split()[0])
        timer = threading.Timer(0.2, os.kill, (child, signal.SIGKILL))
        timer.start()
        (verdict,) = grader.grade_batch([(f"\\boxed{{{ENDLESS % 0}}}", "0")])
        timer.join()
        assert verdict.failed
        assert not verdict.correct
        assert verdict.reason == "crashed"
        assert grader.worker_pids == [supervisor]
        assert grader.grade_batch([ALGEBRA]) == [RIGHT]


def test_slow_answers_delay_a_batch_by_the_limit() -> None:
    ordinary = [(f"\\boxed{{x^2+{i}}}", f"{i}+x^2") for i in range(95)]
    slow = [(f"\\boxed{{{ENDLESS % i}}}", "0") for i in range(5)]
    with Grader(workers=2, time_limit_s=2) as grader:
        grader.grade_batch([ALGEBRA])
        start = time.monotonic()
        assert all(verdict.correct for verdict in grader.grade_batch(ordinary))
        alone = time.monotonic() - start
        start = time.monotonic()
        verdicts = grader.grade_batch([*slow, *ordinary])
        assert time.monotonic() - start < alone + 3 * 2
    assert [verdict.reason for verdict in verdicts[:5]] == ["timeout"] * 5
    assert all(verdict.correct for verdict in verdicts[5:])


def test_a_memory_bomb_is_stopped() -> None:
    with Grader(workers=1, time_limit_s=30, memory_limit_bytes=64 << 20) as grader:
        verdicts = grader.grade_batch([("\\boxed{\\sum_{k=1}^{9^9} 2^{k!}}", "7"), ALGEBRA])
    assert verdicts[0].reason == "memory"
    assert verdicts[0].failed
    assert verdicts[1] == RIGHT


def test_nothing_in_an_answer_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Grader(workers=1, time_limit_s=5) as grader:
        verdicts = grader.grade_batch([(f"\\boxed{{{text}}}", "1") for text in INJECTIONS])
    assert not any(verdict.correct for verdict in verdicts)
    # The same past the screen for code, as if it did not exist.
    pool = Pool(1, 5, 1 << 30)
    outcomes = pool.grade([("1", text) for text in INJECTIONS])
    pool.close()
    assert not any(correct for correct, _ in outcomes)
    assert list(tmp_path.iterdir()) == []


def test_the_grading_child_may_do_nothing(tmp_path: Path) -> None:
    script = """
        import os, subprocess
        from kpo_cli.rewards.worker import _confine
        _confine(1 << 30)
        attempts = [
            lambda: open("kpo_pwned", "w"), lambda: os.system("touch kpo_pwned"),
            lambda: os.open("kpo_pwned", os.O_CREAT), lambda: subprocess.run(["touch", "kpo_pwned"]),
            lambda: os.fork(), lambda: os.execv("/bin/true", ["true"]),
        ]
        for attempt in attempts:
            try:
                attempt()
            except PermissionError:
                continue
            raise SystemExit("not denied")
    """
    result = run_script(script, tmp_path)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "kpo_pwned").exists()


def test_an_interrupted_batch_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with Grader(workers=1) as grader:
        grader.grade_batch([ALGEBRA])
        with monkeypatch.context() as patch:
            patch.setattr(Pool, "_wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                grader.grade_batch([("\\boxed{y+2}", "z")])
        assert grader.worker_pids == []
        assert grader.grade_batch([ALGEBRA]) == [RIGHT]


def test_workers_that_cannot_start_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpo_cli.rewards.pool._COMMAND", "raise SystemExit(1)")
    with Grader(workers=1) as grader, pytest.raises(RuntimeError, match="do not start"):
        grader.grade_batch([ALGEBRA])


def test_identical_answers_are_graded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = Pool.grade
    monkeypatch.setattr(Pool, "grade", lambda self, pairs: sizes.append(len(pairs)) or original(self, pairs))
    with Grader(workers=1) as grader:
        verdicts = grader.grade_batch([ALGEBRA, ("\\boxed{x+2}", "1+x")] * 50)
    assert sizes == [2]
    assert [verdict.correct for verdict in verdicts] == [True, False] * 50


@pytest.mark.slow
def test_ten_thousand_ordinary_answers() -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "grading.py"
    spec = importlib.util.spec_from_file_location("grading_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    pairs, truths = benchmark.ordinary_answers(10_000)
    with Grader(workers=2) as grader:
        start = time.monotonic()
        verdicts = grader.grade_batch(pairs)
        seconds = time.monotonic() - start
        wrong = [
            (pair, verdict)
            for pair, verdict, truth in zip(pairs, verdicts, truths, strict=True)
            if verdict.correct != truth
        ]
        assert wrong == []
        assert seconds < 3 * 30
        start = time.monotonic()
        mixed = grader.grade_batch([*pairs[:950], *benchmark.bombs(50)])
        assert time.monotonic() - start < 3 * (seconds / 10 + 5)
    assert mixed[:950] == verdicts[:950]
    assert not any(verdict.correct for verdict in mixed[950:])
