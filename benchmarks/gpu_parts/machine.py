"""The machine: its parts, and how fast it copies and multiplies."""

import os
import shutil
import subprocess

import torch
from step import Clock, measured_flops

from gpu_parts import NOT_MEASURED, Numbers, Setting

GIB = 2**30


def env(setting: Setting) -> Numbers:
    """What runs here, and two rates to read all others by."""
    yield {"cores": len(os.sched_getaffinity(0)), "driver": driver() if setting.cuda else NOT_MEASURED}
    if setting.cuda:
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        yield {"CUDA of torch": str(torch.version.cuda), "compute capability": f"{major}.{minor}"}
        yield {"memory, GiB": total / GIB, "free, GiB": free / GIB}
    yield {"copies, read and written, GB/s": copy_rate(setting) / 1e9}
    kind = "bf16" if setting.cuda else "float32"
    yield {f"{kind} matrix product, TFLOP/s": measured_flops(setting.device) / 1e12}


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[0]


def copy_rate(setting: Setting) -> float:
    """Bytes a second, the best of three."""
    source = torch.ones(2**22 if setting.small else 2**31, dtype=torch.uint8, device=setting.device)
    target, clock, best = torch.empty_like(source), Clock(setting.device), 0.0
    for _ in range(4):
        start = clock.now()
        target.copy_(source)
        best = max(best, 2 * source.numel() / (clock.now() - start))
    return best
