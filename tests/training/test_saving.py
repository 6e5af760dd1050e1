"""What a run that has to stop leaves behind: the last whole step, and one line that says what is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small_runs import metrics, raw_config, resume, rewrite_state, same_weights, train, weights

from kpo_cli.config import train_config
from kpo_cli.errors import RunStopped, UserError
from kpo_cli.evaluation.subject import _locate
from kpo_cli.policy.load import load_policy
from kpo_cli.rollout import HFSampler, trial
from kpo_cli.runs import checkpoints as written
from kpo_cli.runs.checkpoints import checkpoints, newest_checkpoint, resumable_checkpoint
from kpo_cli.runs.directory import RunDir
from kpo_cli.training import loop, saving
from kpo_cli.training.check import changed_config
from kpo_cli.training.step import Updater

SIZE = [
    *("trainer.prompts_per_step=3", "trainer.mini_batches=3", "trainer.group_size=2", "trainer.checkpoint_every=2"),
    *("filter=kalman_adaptive", "trainer.max_tokens_per_micro_batch=1000", "rollout.max_response_tokens=8"),
    *("data.limit=8", "trainer.ratios_every=1", "trainer.eval_every=3", "trainer.threads=1", "trainer.steps=4"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted; its adaptive filter and its data cursor are a part of what must be kept."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("whole") / "run", *SIZE)


def failing(monkeypatch, owner, name, when, error, times=99):
    """Let a function or method raise `error` from its `when`-th call on, from 1, so many `times`."""
    real, calls = getattr(owner, name), []

    def call(*arguments, **keywords):
        calls.append(1)
        if when <= len(calls) < when + times:
            raise error
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, call)


def same_runs(one, other, folders=("ratios", "evals")):
    assert same_weights(weights(one, 4), weights(other, 4))
    assert metrics(one) == metrics(other)
    optimizers = [load_file(run / "checkpoints/step-000004/trainer/optimizer.safetensors") for run in (one, other)]
    assert same_weights(*optimizers)
    states = [json.loads((run / "checkpoints/step-000004/trainer/state.json").read_text()) for run in (one, other)]
    assert states[0] == states[1]
    for name in folders:
        assert [p.name for p in sorted((one / name).iterdir())] == [p.name for p in sorted((other / name).iterdir())]


MEMORY = torch.OutOfMemoryError("CUDA out of memory")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
PINNED = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
EXPLODED = RunStopped("the gradient is not finite")
# Before step 3 there were four calls of the sampler (two of the first evaluation), those of its trial, and three
# mini-batches a step.
STEP_3 = len(trial.PROMPTS) + 5
PLACES = {
    "sampling": (HFSampler, "sample", STEP_3, MEMORY, "step 3: out of memory", "step-000002"),
    "moments on their way": (loop, "leave_device", 4, PINNED, "step 3: out of memory", "step-000002"),
    "the grader": (loop, "_grade", 3, MemoryError(), "step 3: out of memory", "step-000002"),
    "old log-probs": (Updater, "_old_log_probs", 6, CUBLAS, "step 3: out of memory", "step-000002"),
    "the first mini-batch": (Updater, "_learn", 7, EXPLODED, "step 3: the gradient", "step-000002"),
    "the third mini-batch": (Updater, "_learn", 9, MEMORY, "step 3: out of memory", None),
    "the end of a step": (loop, "_metrics", 3, EXPLODED, "step 3: the gradient", None),
    "an evaluation": (loop, "evaluate_heldout", 2, MEMORY, "evaluation after step 3: out", "step-000003"),
    "a record": (loop, "record_ratios", 3, OSError(errno.ENOSPC, "No space left"), "evaluation after", "step-000003"),
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_it_fails_a_resumed_run_goes_on_to_the_same_bits(place, whole, tmp_path, monkeypatch):
    owner, name, when, error, said, saved = PLACES[place]
    run = tmp_path / "run"
    failing(monkeypatch, owner, name, when, error)
    with pytest.raises(RunStopped) as caught:
        train(run, *SIZE, "trainer.checkpoint_every=0")
    monkeypatch.undo()
    line = str(caught.value)
    assert line.startswith(said)
    assert "\n" not in line
    outcome = "there is no checkpoint yet, so begin again" if saved is None else "what there is is saved, go on"
    assert line.endswith(f"; {outcome} with: kpo train resume={run}")
    assert [path.name for path in checkpoints(run)] == ([saved] if saved else [])
    resume(run)
    same_runs(run, whole, ["evals"] if place == "a record" else ["ratios", "evals"])


def test_steps_behind_the_last_checkpoint_are_said_to_be_lost(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    failing(monkeypatch, Updater, "_learn", 12, MEMORY)  # the last mini-batch of step 4
    with pytest.raises(RunStopped, match=r"step 4: out of .* everything after step-000002 is lost, go on from there"):
        train(run, *SIZE)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(run)] == ["step-000002"]
    resume(run)
    same_runs(run, whole)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    run, real = tmp_path / "run", Updater.update

    def exploding(self, *arguments):
        record = real(self, *arguments)
        next(iter(self.scorer.model.parameters())).data[0] = float("nan")
        return record

    monkeypatch.setattr(Updater, "update", exploding)
    with pytest.raises(RunStopped, match=r"NaN.*its weights are not finite and not saved; there is no checkpoint yet"):
        train(run, *SIZE, "trainer.eval_every=0", "trainer.checkpoint_every=0")
    assert not checkpoints(run)


def test_a_stop_in_the_supervised_phase_saves_its_last_step(tmp_path, monkeypatch):
    from test_supervised import CUT, same_run

    once = ["trainer.supervised.checkpoint_every=0", "trainer.checkpoint_every=1", "trainer.keep_optimizer=0"]
    whole = train(tmp_path / "whole", *CUT, *once)
    run = tmp_path / "run"
    failing(monkeypatch, Updater, "update", 3, MEMORY)
    with pytest.raises(RunStopped, match=r"supervised step 3: out of memory; .*what there is is saved"):
        train(run, *CUT, *once)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(run)] == ["supervised-000002"]
    resume(run)
    same_run(run, whole)


def full(monkeypatch, when):
    """A disk that is full at the `when`-th optimizer state written, from 1."""
    real, calls = written.save_file, []

    def save(tensors, path):
        calls.append(path)
        if sum(path.name == "optimizer.safetensors" for path in calls) == when:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(written, "save_file", save)


def test_a_full_disk_is_one_line_and_leaves_older_checkpoints_whole(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    full(monkeypatch, 2)
    with pytest.raises(RunStopped) as caught:
        train(run, *SIZE)
    monkeypatch.undo()
    assert str(caught.value) == (
        f"saving step-000004: {run}/checkpoints/step-000004 could not be written (No space left on device); make room "
        f"or mend the place; everything after step-000002 is lost, go on from there with: kpo train resume={run}"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert newest_checkpoint(run) == (run / "checkpoints/step-000002", [])
    resume(run)
    same_runs(run, whole)


def test_memory_that_lacks_while_saving_is_tried_once_more(tmp_path, monkeypatch):
    run = tmp_path / "run"
    failing(monkeypatch, written, "_write", 1, MEMORY, times=1)
    with pytest.raises(RunStopped, match=r"saving step-000002: out of memory; .*; what there is is saved"):
        train(run, *SIZE)
    assert newest_checkpoint(run)[0] == run / "checkpoints/step-000002"


def test_drafts_of_processes_that_are_gone_are_removed(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    run = train(tmp_path / "run", *SIZE, "trainer.steps=1")
    left = [run / "checkpoints" / f".step-000009.{pid}" for pid in (int(gone.stdout), os.getpid(), os.getppid())]
    for draft in left:
        (draft / "trainer").mkdir(parents=True)
    resume(run, "trainer.steps=2")
    assert [draft.exists() for draft in left] == [False, False, True]  # one is still at work, for all that we know


def test_older_checkpoints_give_up_the_optimizers_state(tmp_path, capsys):
    run = train(tmp_path / "run", *SIZE, "trainer.checkpoint_every=1", "trainer.keep_checkpoints=3")
    found = checkpoints(run)
    assert [path.name for path in found] == ["step-000002", "step-000003", "step-000004"]
    assert [(path / written.OPTIMIZER).exists() for path in found] == [False, True, True]
    assert all(written.is_damaged(path) is None for path in found)
    for path in found[1:]:
        (path / "model.safetensors").write_bytes(b"")
    reason = r"step-000002 has given up its optimizer's state \(trainer.keep_optimizer\)"
    with pytest.raises(UserError, match=rf"step-000004 is damaged .*{reason}; start .* model.path=\S+step-000002"):
        resume(run, "trainer.steps=5")
    assert newest_checkpoint(run)[0] == found[0]  # for an evaluation it is as good as any
    label, path, _ = _locate(str(run))
    assert label.endswith("step-000002")
    assert load_policy(raw_model(path)).parameters > 0


def raw_model(path):
    from small_runs import model_config

    return model_config(f"model.path='{path}'")


def test_all_optimizer_states_stay_on_request(tmp_path):
    run = train(tmp_path / "run", *SIZE, "trainer.checkpoint_every=1", "trainer.keep_optimizer=0")
    assert [(path / written.OPTIMIZER).exists() for path in checkpoints(run)] == [True] * 3


def test_checkpoints_bear_their_format(tmp_path):
    run = train(tmp_path / "run", *SIZE, "trainer.steps=2")
    path = checkpoints(run)[-1]
    assert json.loads((path / written.STATE).read_text())["format"] == "kpo-checkpoint-2"
    rewrite_state(path, format=None)  # as all were before it was written down
    assert resumable_checkpoint(run) == (path, [])
    resume(run, "trainer.steps=3")


def test_a_checkpoint_of_a_newer_kpo_is_refused_by_whoever_opens_it(tmp_path):
    """The newest of a run, whatever else is wrong with it; and one that is named, in merged/ too."""
    run = train(tmp_path / "run", *SIZE, "trainer.steps=2")
    path = checkpoints(run)[-1]
    assert newest_checkpoint(run) == (path, [])
    rewrite_state(path, format="kpo-checkpoint-3")
    (path / "model.safetensors").rename(path / "weights.safetensors")
    written._forget_optimizer(path)
    shutil.copytree(path, path / "merged", ignore=shutil.ignore_patterns("trainer"))
    line = "its format is kpo-checkpoint-3, and this kpo reads kpo-checkpoint-2 and older: update kpo"
    for opens in (
        lambda: resume(run, "trainer.steps=4"),
        lambda: _locate(str(run)),
        lambda: load_policy(raw_model(path)),
        lambda: load_policy(raw_model(path / "merged")),
    ):
        with pytest.raises(UserError, match=line):
            opens()


def test_a_run_of_an_older_version_resumes_without_the_key():
    raw = {k: v for k, v in raw_config().items() if k not in ("run_dir", "resume", "overrides")}
    stored = {**raw, "trainer": {k: v for k, v in raw["trainer"].items() if k != "keep_optimizer"}}
    assert changed_config(stored, raw, []) == train_config(raw)


CPU_ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [CPU_ALLOCATOR, MemoryError(), OSError(errno.EIO, "Input/output error")], ids=str)
def test_a_save_behind_a_failure_that_fails_too_is_one_line(error, tmp_path, monkeypatch):
    run = tmp_path / "run"
    failing(monkeypatch, HFSampler, "sample", STEP_3, MEMORY)
    failing(monkeypatch, saving, "save_checkpoint", 1, error)
    with pytest.raises(RunStopped, match=r"step 3: out of memory; .*saving step-000002 failed as well .*begin again"):
        train(run, *SIZE, "trainer.checkpoint_every=0")


def test_the_end_of_the_supervised_phase_is_saved_for_all_that(tmp_path, monkeypatch):
    from test_supervised import CUT

    run = tmp_path / "run"
    failing(monkeypatch, written, "_write", 1, MEMORY, times=1)
    with pytest.raises(RunStopped, match=r"saving step-000000: out of memory; .*what there is is saved"):
        train(run, *CUT, "trainer.supervised.checkpoint_every=0")
    assert [path.name for path in checkpoints(run)] == ["step-000000"]


def test_a_row_of_metrics_that_could_not_be_written_is_written_by_the_resumed_run(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    failing(monkeypatch, RunDir, "append_metrics", 4, OSError(errno.ENOSPC, "No space left"), times=1)
    with pytest.raises(RunStopped, match=r"step 3: .*No space left"):
        train(run, *SIZE)
    monkeypatch.undo()
    resume(run)
    same_runs(run, whole)


def test_a_full_disk_in_the_supervised_phase_is_one_line(tmp_path, monkeypatch):
    from test_supervised import CUT

    run = tmp_path / "run"
    failing(monkeypatch, RunDir, "append_metrics", 3, OSError(errno.ENOSPC, "No space left"), times=1)
    with pytest.raises(RunStopped, match=r"supervised step 3: .*No space left"):
        train(run, *CUT, "trainer.supervised.checkpoint_every=2")


def test_a_checkpoint_is_kept_beside_a_damaged_one_of_a_later_step(tmp_path):
    sizes = ["trainer.keep_checkpoints=1", "trainer.keep_optimizer=1"]
    run = train(tmp_path / "run", *SIZE, "trainer.keep_checkpoints=0", "trainer.keep_optimizer=0")
    (run / "checkpoints/step-000004/model.safetensors").write_bytes(b"")
    resume(run, *sizes, "trainer.steps=3")
    assert resumable_checkpoint(run)[0] == run / "checkpoints/step-000003"
