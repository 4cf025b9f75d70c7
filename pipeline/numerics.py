"""Which arithmetic: precision and backend of an encoder, resolved once per run from what the machine has."""

import importlib.util
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.model import ModelFolder


def resolve_precision(precision: str, *, on_gpu: bool) -> str:
    """``auto`` -> the fastest native arithmetic: fp16 on CUDA, bf16 on CPUs with native bf16, else fp32.

    Raises ConfigError for fp16 without CUDA.
    """
    if precision == "auto":
        return "fp16" if on_gpu else "bf16" if _native_bf16() else "fp32"
    if precision == "fp16" and not on_gpu:
        raise ConfigError("encoder.precision: fp16 needs CUDA encoders; use auto, bf16 or fp32")
    return precision


def resolve_backend(backend: str, folder: ModelFolder, *, on_gpu: bool) -> str:
    """``auto`` -> openvino for transformers on a CPU where it is installed, else torch.

    Raises ConfigError for openvino with GPUs or with a model that is no plain transformer.
    """
    able = folder.traceable and not on_gpu
    if backend == "auto":
        return "openvino" if able and importlib.util.find_spec("openvino") else "torch"
    if backend == "openvino" and not able:
        reason = "the encoders have GPUs" if on_gpu else f"{folder.path} is no transformer pooled over all tokens"
        raise ConfigError(f"encoder.backend: openvino cannot be used, {reason}; use torch or auto")
    return backend


def _native_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (x86: AVX512-BF16 or AMX, Arm: bf16), as Linux lists its features."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
