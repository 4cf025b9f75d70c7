"""A traced model on OpenVINO: the fastest arithmetic for CPUs. The only openvino door.

For throughput one stream per thread, each with a batch of its own, so that no batch waits for threads to meet; for
latency one stream. Torch is needed once per machine: the traced model is kept in the user's cache folder with what
torch said of it, and later encoders start from that in a second.
"""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.encoding.batching import Lengths, Padded, Tokens, Vectors, pack_batches, pad
from pipeline.encoding.model import EncoderSpec, ModelFolder
from pipeline.encoding.numerics import native_bf16
from pipeline.errors import ConfigError, EncoderError
from pipeline.fingerprint import Plain, fingerprint

QUERY_WIDTH_MULTIPLE = 8
"""Queries are padded to widths that repeat: a shape unlike the last one costs OpenVINO a millisecond."""
INT8_GROUP = 64
"""Activations that share a scale in int8. MiniLM on Zen 4: 32 gives cosine 0.9993, 64 0.9992, 128 0.9989; 64 is
13 % faster than 32 and as fast as 128."""
GEMM_SIDE, GEMM_LAYERS, GEMM_RUNS = 1024, 6, 10
GRAPH_FORMAT = 1
TRACERS = ("openvino", "torch", "transformers", "sentence-transformers")
"""Packages that decide what a traced model looks like."""


@dataclass(frozen=True)
class GraphFacts:
    """What torch said of a model when it was traced. ``probe_ids``, ``probe_vector``: of one text, in FP32."""

    pad_id: int
    flops_per_token: float
    probe_ids: list[int]
    probe_vector: list[float]


@dataclass(frozen=True)
class Graph:
    """A model as OpenVINO reads it, (ids, mask) -> vectors, not normalised."""

    facts: GraphFacts
    model: Any


class OpenVinoEngine:
    """A compiled model. ``budget``: padded tokens per batch. Not safe for concurrent calls."""

    on_gpu = False

    def __init__(self, graph: Graph, *, precision: str, threads: int, streams: int) -> None:
        """``streams``: batches that run side by side and share ``threads``. Raises EncoderError when it cannot compile."""
        if precision == "bf16" and not native_bf16():
            raise EncoderError("this CPU has no bf16 of its own; set encoder.precision=fp32, or encoder.backend=torch")
        self._core = _openvino().Core()
        self._settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision != "fp32" and native_bf16() else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,  # encoders that share a node would all pin the same first cores
        }
        group = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": INT8_GROUP if precision == "int8" else 0}
        try:
            compiled = self._core.compile_model(graph.model, "CPU", self._settings | group)
        except RuntimeError as error:
            raise EncoderError(f"OpenVINO cannot run this model, {_words(error)}; set encoder.backend=torch") from error
        self._request = compiled.create_infer_request()
        self._queue = _openvino().AsyncInferQueue(compiled, streams + 1)
        self._multiple = QUERY_WIDTH_MULTIPLE if streams == 1 else 1
        self._pad_id = graph.facts.pad_id
        self.flops_per_token = graph.facts.flops_per_token
        self.budget = 1
        self.padded_tokens = 0
        """Tokens that went through the model so far, with padding."""

    def run(self, tokens: Sequence[Tokens], lengths: Lengths, prompt_tokens: int = 0) -> Vectors:
        """Unit vectors of texts in order of descending length, (rows, dim). Raises EncoderError when a batch fails."""
        del prompt_tokens  # only models that pool over all tokens are traceable
        runs = list(pack_batches(lengths, self.budget))
        parts: dict[int, npt.NDArray[np.float32]] = {}

        def keep(request: Any, first: int) -> None:
            parts[first] = request.get_output_tensor(0).data.copy()

        self._queue.set_callback(keep)
        try:
            if len(runs) == 1:  # a query: no queue, no callback
                self._request.infer(self._pad(tokens, self._multiple))
                keep(self._request, 0)
            else:
                for first, end in runs:
                    self._queue.start_async(self._pad(tokens[first:end]), first)
                self._queue.wait_all()
        except RuntimeError as error:
            raise EncoderError(f"OpenVINO: {_words(error)}; try encoder.backend=torch") from error
        vectors = np.concatenate([parts[first] for first in sorted(parts)])
        return cast(Vectors, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    def _pad(self, batch: Sequence[Tokens], multiple: int = 1) -> Padded:
        ids, mask = pad(batch, self._pad_id, multiple=multiple)
        self.padded_tokens += ids.size
        return ids, mask

    def matmul_rate(self) -> float:
        """FLOP/s of large matrix products with all threads on one batch, the best of several."""
        from openvino import Model, opset13

        side = GEMM_SIDE
        weights = opset13.constant(np.full((side, side), 1 / side, dtype=np.float32))
        inputs = outputs = opset13.parameter([side, side], np.float32)
        for _ in range(GEMM_LAYERS):
            outputs = opset13.matmul(outputs, weights, False, True)
        request = self._core.compile_model(
            Model([outputs], [inputs]), "CPU", self._settings | {"NUM_STREAMS": 1}
        ).create_infer_request()
        ones = np.ones((side, side), dtype=np.float32)
        times_ms = []
        for _ in range(GEMM_RUNS):
            request.infer([ones])
            times_ms.append(float(request.latency))
        return 2.0 * side**3 * GEMM_LAYERS / (min(times_ms) / 1000)


def trace(module: Any, example: tuple[Any, Any], facts: GraphFacts) -> Graph:
    """Convert a torch module of (ids, mask), in FP32 or with int8 weights; ``example``: tensors to trace it with.

    By OpenVINO's PyTorch frontend, in memory; its converter tool is left alone, it reports usage.
    Raises ConfigError without OpenVINO, EncoderError when it cannot convert the module.
    """
    _openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    try:
        frontend = FrontEndManager().load_by_framework("pytorch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # branches on shapes that a batch of texts never takes
            decoder = TorchScriptPythonDecoder(module, example_input=example)  # the frontend keeps no reference to it
        return Graph(facts, frontend.convert(frontend.load(decoder)))
    except RuntimeError as error:
        raise EncoderError(f"OpenVINO cannot run this model, {_words(error)}; set encoder.backend=torch") from error


def graph_folder(spec: EncoderSpec, model: ModelFolder) -> Path:
    """Where the traced model of a spec is kept on this machine."""
    weights = "int8" if spec.precision == "int8" else "fp32"
    versions = " ".join(_version(name) for name in TRACERS)
    what: dict[str, Plain] = {"files": model.files_hash, "dim": spec.dim, "max_tokens": spec.max_tokens, "weights": weights}
    name = fingerprint({**what, "versions": versions, "format": GRAPH_FORMAT})
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vecmill" / "graphs" / name


def load_graph(folder: Path) -> Graph | None:
    """The traced model kept in ``folder``; None when there is none, or none that can be read."""
    try:
        facts = GraphFacts(**json.loads((folder / "facts.json").read_bytes()))
        return Graph(facts, _openvino().Core().read_model(folder / "model.xml"))
    except (OSError, ValueError, TypeError, RuntimeError):
        return None


def save_graph(graph: Graph, folder: Path) -> None:
    """Keep a traced model in ``folder``, whole or not at all; a cache that cannot be written only costs time."""
    with contextlib.suppress(OSError, RuntimeError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as scratch:
            made = Path(scratch) / "graph"
            made.mkdir()
            _openvino().save_model(graph.model, made / "model.xml", compress_to_fp16=False)
            (made / "facts.json").write_text(json.dumps(asdict(graph.facts)), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(
            "encoder.backend: openvino is not installed; pip install openvino, or encoder.backend=torch"
        ) from error
    return openvino


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
