"""What the engine would be told on a GPU, and in which order: on a stand-in made from the installed vLLM's signatures.

A method that vLLM does not have, an argument that it does not take, or a tag that it does not know fails here. What a
GPU then does with it is not tested.
"""

import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import call, create_autospec

import pytest
import torch
from vllm_policies import policy_of

from kpo_cli.errors import SamplingFailed, UserError
from kpo_cli.rollout import VLLMSampler
from kpo_cli.rollout import engine as engines
from kpo_cli.rollout.engine import Request, Sampling, VLLMEngine, engine_arguments, installed, model_folder
from kpo_cli.rollout.room import GIB

if not installed():
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

engines._import_vllm()

import vllm  # noqa: E402
from vllm.config import CacheConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.engine.core_client import InprocClient  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402
from vllm.v1.executor.uniproc_executor import UniProcExecutor  # noqa: E402
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1  # noqa: E402
from vllm.v1.worker.gpu_worker import Worker  # noqa: E402
from vllm.v1.worker.utils import request_memory  # noqa: E402


class Stand:
    """In for vllm.LLM: real signatures all the way down, the real book-keeping of what is asleep, no device."""

    def __init__(self, model):
        self.calls, self.served = [], copy.deepcopy(model)
        self.executor = UniProcExecutor.__new__(UniProcExecutor)
        self.executor.sleeping_tags = set()
        self.executor.collective_rpc = self.worker
        self.make = create_autospec(vllm.LLM)
        self.make.side_effect = self.started
        self.llm = create_autospec(vllm.LLM, instance=True)
        self.llm.llm_engine = create_autospec(LLMEngine, instance=True)
        self.llm.llm_engine.engine_core = create_autospec(InprocClient, instance=True)
        self.llm.collective_rpc.side_effect = self.worker
        self.llm.apply_model.side_effect = self.applied
        self.llm.sleep.side_effect = lambda level: self.executor.sleep(level)
        self.llm.wake_up.side_effect = lambda tags: self.executor.wake_up(tags)
        self.llm.reset_prefix_cache.side_effect = lambda: self.calls.append("reset_prefix_cache") or True

    def started(self, model, **arguments):
        self.calls.append("start")
        self.arguments = arguments | {"model": model}
        return self.llm

    def applied(self, function):
        self.calls.append("apply_model")
        return [function(self.served)]

    def worker(self, method, timeout=None, args=(), kwargs=None):
        """As the executor calls a GPU's worker, which hands reload_weights on to either of its two runners."""
        kwargs = kwargs or {}
        inspect.signature(getattr(Worker, method)).bind(None, *args, **kwargs)
        self.calls.append((method, kwargs.get("tags")) if "tags" in kwargs else method)
        if method == "reload_weights":
            for runner in (RunnerV1, RunnerV2):
                inspect.signature(runner.reload_weights).bind(None, *args, **kwargs)
            assert "kv_cache" in self.executor.sleeping_tags or not self.executor.sleeping_tags
            assert "weights" not in self.executor.sleeping_tags
            self.served.load_state_dict(dict(kwargs["weights_iterator"]))


@pytest.fixture
def policy(tmp_path):
    """The built-in policy, whose model says that it is on a GPU."""
    policy = policy_of("builtin", tmp_path, "model.dtype=bfloat16")
    kind = type(policy.model)
    policy.model.__class__ = type(kind.__name__, (kind,), {"device": property(lambda self: torch.device("cuda"))})
    return policy


@pytest.fixture
def stand(policy, monkeypatch, tmp_path):
    stand = Stand(policy_of("builtin", tmp_path).model)
    stand.served.bfloat16()
    monkeypatch.setattr(vllm, "LLM", stand.make)
    monkeypatch.setattr(engines, "_check_platform", lambda device, config: None)
    monkeypatch.setattr(engines, "free_memory", lambda: (50 * GIB, 80 * GIB))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return stand


def start(policy, **changes):
    settings = {"max_length": 300, "options": {}, "reserved": 6 * GIB, "training": True, "float32_logits": True}
    return VLLMEngine(policy, **(settings | changes))


def changed(policy):
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)


PUSH = ["reload_weights", "apply_model"]


def test_the_order_of_things(stand, policy):
    engine = start(policy)
    assert stand.calls == ["start", *PUSH, "reset_prefix_cache"]
    stand.calls.clear()
    engine.sleep()
    engine.sleep()  # what sleeps is left alone
    assert stand.calls == ["sleep"]
    assert stand.llm.sleep.call_args_list == [call(level=2)]
    stand.calls.clear()
    changed(policy)
    engine.push()
    woken = [("wake_up", ["weights"]), *PUSH, ("wake_up", ["kv_cache"]), "reset_prefix_cache"]
    assert stand.calls == woken
    assert not stand.executor.sleeping_tags
    stand.calls.clear()
    engine.push()  # awake: nothing to wake
    assert stand.calls == [*PUSH, "reset_prefix_cache"]
    engine.close()
    stand.llm.llm_engine.engine_core.shutdown.assert_called_once_with()


def test_an_engine_for_evaluation_never_sleeps(stand, policy):
    engine = start(policy, training=False)
    engine.sleep()
    assert "sleep" not in stand.calls
    assert stand.arguments["enable_sleep_mode"] is False


def test_a_push_that_fails_half_way_is_made_again(stand, policy):
    """The weights are awake then, the cache is not."""
    engine = start(policy)
    engine.sleep()
    changed(policy)
    stand.calls.clear()
    applied, failed = stand.llm.apply_model.side_effect, []

    def failing(function):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("once")
        return applied(function)

    stand.llm.apply_model.side_effect = failing
    VLLMSampler(engine, stop_ids=[1], temperature=1.0, max_response_tokens=4).refresh()
    assert stand.calls[-4:] == [*PUSH, ("wake_up", ["kv_cache"]), "reset_prefix_cache"]
    assert not stand.executor.sleeping_tags


def test_a_stale_tensor_is_found_before_the_cache_wakes(stand, policy):
    engine = start(policy)
    engine.sleep()
    changed(policy)
    stand.calls.clear()
    load = stand.served.load_state_dict
    late = "model.layers.1.self_attn.k_norm.weight"
    stand.served.load_state_dict = lambda new: load(new | {late: stand.served.state_dict()[late].clone()})
    sampler = VLLMSampler(engine, stop_ids=[1], temperature=1.0, max_response_tokens=4)
    with pytest.raises(SamplingFailed, match=re.escape(f"in 1 of {len(stand.served.state_dict())} tensors ({late})")):
        sampler.refresh()
    assert ("wake_up", ["kv_cache"]) not in stand.calls
    assert "reset_prefix_cache" not in stand.calls


def test_what_is_passed_is_what_vllm_has(stand, policy):
    start(policy, options={"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}})
    arguments = dict(stand.arguments)
    EngineArgs(**arguments)  # a field that is not there is a TypeError
    assert arguments["gpu_memory_utilization"] == pytest.approx((50 - 6) / 80 - 0.05)
    assert arguments["enable_sleep_mode"] is True
    # Chunked prefill, CUDA graphs and asynchronous scheduling are vLLM's own affair here.
    assert not arguments.keys() & {"enable_chunked_prefill", "enforce_eager", "async_scheduling"}
    defaults = EngineArgs(model="x")
    assert (defaults.enable_chunked_prefill, defaults.enforce_eager, defaults.async_scheduling) == (None, False, None)
    assert UniProcExecutor.supports_async_scheduling()
    arguments["enable_sleep_mode"] = False  # refused on a CPU, where this is read
    config = EngineArgs(**arguments).create_model_config()
    assert config.head_dtype == torch.float32
    assert config.dtype == torch.bfloat16
    assert config.is_chunked_prefill_supported


def test_on_a_cpu_prompts_stay_whole():
    arguments = engine_arguments("float32", "cpu", 300, False, True, {})
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["enforce_eager"] is True
    assert "hf_overrides" not in arguments  # everything is float32 already
    EngineArgs(model="x", **arguments)


def test_the_users_own_arguments_come_last():
    own = {"max_num_seqs": 8, "hf_overrides": {"rope_theta": 5.0}}
    arguments = engine_arguments("bfloat16", "cuda", 300, True, True, own)
    assert arguments["max_num_seqs"] == 8
    assert arguments["hf_overrides"] == {"head_dtype": "float32", "rope_theta": 5.0}
    assert own["hf_overrides"] == {"rope_theta": 5.0}


def test_a_given_share_is_passed_on_as_it_is(stand, policy):
    start(policy, options={"gpu_memory_utilization": 0.3})
    assert stand.arguments["gpu_memory_utilization"] == 0.3


def test_a_given_cache_comes_with_a_share_that_is_free_at_the_start(stand, policy):
    """vLLM sizes the cache as it is told, but first refuses to start unless its whole share is free."""
    start(policy, options={"kv_cache_memory_bytes": GIB}, reserved=49 * GIB)  # who gives a number has counted himself
    assert stand.arguments["kv_cache_memory_bytes"] == GIB
    cache = create_autospec(CacheConfig, instance=True)
    cache.gpu_memory_utilization = stand.arguments.get("gpu_memory_utilization", CacheConfig.gpu_memory_utilization)
    memory = SimpleNamespace(free_memory=50 * GIB, total_memory=80 * GIB, device_="cuda")
    assert GIB < request_memory(memory, cache) < 50 * GIB


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "a smaller gpu_memory_utilization"),
        (ValueError("No available memory for the cache blocks."), "trainer.offload_optimizer=sampling"),
    ],
)
def test_memory_that_is_short_at_the_start_is_one_line_with_a_way_out(error, hint, stand, policy):
    stand.make.side_effect = error
    with pytest.raises(UserError, match=hint) as caught:
        start(policy)
    assert "\n" not in str(caught.value)


def test_requests_and_steps(stand, policy):
    """Asynchronous scheduling returns nothing at first, and several tokens of a request at a time are in order."""
    engine, core = start(policy), stand.llm.llm_engine

    def output(name, tokens, reason=None):
        entries = [{token: SimpleNamespace(logprob=-float(token))} for token in tokens]
        done = SimpleNamespace(token_ids=tokens, logprobs=entries, finish_reason=reason)
        return SimpleNamespace(request_id=name, outputs=[done])

    core.has_unfinished_requests.side_effect = [True, True, True, True, False]
    core.step.side_effect = [[], [output("0", [3])], [output("1", [5, 4], "length")], [output("0", [9], "stop")]]
    seen = []
    sampling = Sampling(0.7, 1.0, (9,), 4)
    responses = engine.generate([Request([1, 2], 5), Request([7], None)], sampling, lambda *s: seen.append(s))
    assert [(r.token_ids, r.log_probs, r.finished) for r in responses] == [
        ([3, 9], [-3.0, -9.0], True),
        ([5, 4], [-5.0, -4.0], False),
    ]
    assert seen == [(0, 0), (0, 1), (1, 3), (2, 4)]
    (name, prompt, first), (_, _, second) = (each.args for each in core.add_request.call_args_list)
    assert (name, prompt) == ("0", {"prompt_token_ids": [1, 2]})
    assert isinstance(first, vllm.SamplingParams)
    assert (first.temperature, first.seed, first.max_tokens, first.stop_token_ids) == (0.7, 5, 4, [9])
    assert (second.temperature, second.seed) == (0.0, None)
    core.has_unfinished_requests.side_effect = None
    core.step.side_effect = RuntimeError("lost")
    with pytest.raises(RuntimeError, match="lost"):
        engine.generate([Request([1], 5)], sampling, None)
    core.abort_request.assert_called_once_with(["2"])


def hash_of(folder: Path) -> str:
    arguments = engine_arguments("float32", "cpu", 300, False, False, {}) | {"kv_cache_memory_bytes": GIB}
    return EngineArgs(model=str(folder), **arguments).create_engine_config().compute_hash()


def test_a_second_start_has_the_same_key_for_what_was_compiled(tmp_path, monkeypatch):
    """And a temporary folder, as there was once, would not: the path is a part of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = (policy_of("builtin", tmp_path / name).model for name in "ab")
    second.config.name_or_path = "/elsewhere"
    with model_folder(first) as one:
        key = hash_of(one)
    with model_folder(second) as two:
        assert two == one
        assert hash_of(two) == key
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary/config.json").write_bytes((one / "config.json").read_bytes())
    assert hash_of(tmp_path / "temporary") != key
