"""Which arithmetic: precision and backend of an encoder, resolved once per run from what the machine has."""

import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from pipeline.encoding.model import ModelFolder
from pipeline.errors import ConfigError

GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""Device files of NVIDIA, Jetson, WSL and ROCm."""


def resolve_precision(precision: str, *, on_gpu: bool, overflows: bool = False) -> str:
    """``auto`` -> the fastest arithmetic that keeps the vectors: fp16 on CUDA, bf16 on CPUs that have it, else fp32.

    ``overflows``: the model leaves the range of fp16, so it is bf16 on CUDA too.
    Raises ConfigError for fp16 without CUDA and int8 with it.
    """
    if precision == "auto" and on_gpu:
        return "bf16" if overflows else "fp16"
    if precision == "auto":
        return "bf16" if native_bf16() else "fp32"
    if precision == "fp16" and not on_gpu:
        raise ConfigError("encoder.precision: fp16 needs CUDA encoders; use auto, bf16 or fp32")
    if precision == "int8" and on_gpu:
        raise ConfigError("encoder.precision: int8 is for CPU encoders; use auto")
    return precision


def resolve_here(precision: str, *, overflows: bool = False) -> str:
    """``auto`` resolved for encoders on this machine."""
    return resolve_precision(precision, on_gpu=on_gpu(), overflows=overflows)


def resolve_backend(backend: str, folder: ModelFolder, *, on_gpu: bool, precision: str) -> str:
    """``auto`` -> openvino for transformers on a CPU where it is installed, else torch.

    Raises ConfigError for openvino with GPUs or with a model that is no plain transformer, and for int8 without openvino.
    """
    able = folder.traceable and not on_gpu
    if backend == "auto":
        backend = "openvino" if able and importlib.util.find_spec("openvino") else "torch"
    if backend == "torch" and precision == "int8":
        raise ConfigError("encoder.precision: int8 needs encoder.backend openvino and a plain transformer; use auto")
    if backend == "openvino" and not able:
        reason = "the encoders have GPUs" if on_gpu else f"{folder.path} is no transformer pooled over all tokens"
        raise ConfigError(f"encoder.backend: openvino cannot be used, {reason}; use torch or auto")
    return backend


def on_gpu() -> bool:
    """Whether encoders on this machine have a GPU. Asks torch only where a driver is: it takes seconds to import."""
    if sys.platform == "linux" and not any(Path(device).exists() for device in GPU_DEVICES):
        return False
    from pipeline.encoding import torch_engine

    return torch_engine.has_cuda()


def machine_name(threads: int) -> str:
    """What computes for an encoder of this process: the model of its GPU, or of the CPU with the threads that it has."""
    if on_gpu():
        from pipeline.encoding import torch_engine

        return torch_engine.gpu_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
    return f"{named.group(1).strip() if named else platform.machine()} x {threads}"


def cpu_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def native_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (x86: AVX512-BF16 or AMX, Arm: bf16), as Linux lists its features."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
