"""A traced model on OpenVINO: the fastest arithmetic for CPUs. The only openvino door.

For throughput one stream per thread, each with a batch of its own, so that no batch waits for threads to meet; for
latency one stream. The model is converted in memory by OpenVINO's PyTorch frontend (under a second); its converter
tool is left alone, it reports usage.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.batching import Lengths, Tokens, pack_batches, pad
from pipeline.errors import ConfigError, EncoderError
from pipeline.numerics import native_bf16

QUERY_WIDTH_MULTIPLE = 8
"""Queries are padded to widths that repeat: a shape unlike the last one costs OpenVINO a millisecond."""
INT8_GROUP = 64
"""Activations that share a scale in int8. MiniLM on Zen 4: 32 gives cosine 0.9993, 64 0.9992, 128 0.9989; 64 is
13 % faster than 32 and as fast as 128."""


class OpenVinoEngine:
    """A compiled model. ``budget``: padded tokens per batch. Not safe for concurrent calls."""

    def __init__(
        self, module: Any, example: tuple[Any, Any], *, pad_id: int, precision: str, threads: int, streams: int
    ) -> None:
        """``module``: a torch module of (ids, mask) in FP32, or with int8 weights; ``example``: tensors to trace it with.

        ``streams``: batches that run side by side and share ``threads``.
        Raises ConfigError without OpenVINO, EncoderError when it cannot convert the module.
        """
        try:
            import openvino
            from openvino.frontend import FrontEndManager
            from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
        except ImportError as error:
            raise ConfigError(
                "encoder.backend: openvino is not installed; pip install openvino, or encoder.backend=torch"
            ) from error
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision != "fp32" and native_bf16() else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": INT8_GROUP if precision == "int8" else 0,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,  # encoders that share a node would all pin the same first cores
        }
        try:
            frontend = FrontEndManager().load_by_framework("pytorch")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # branches on shapes that a batch of texts never takes
                decoder = TorchScriptPythonDecoder(module, example_input=example)  # the frontend keeps no reference to it
            model = frontend.convert(frontend.load(decoder))
            compiled = openvino.Core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise EncoderError(
                f"OpenVINO cannot run this model, {' '.join(str(error).split())[:300]}; set encoder.backend=torch"
            ) from error
        self._request = compiled.create_infer_request()
        self._queue = openvino.AsyncInferQueue(compiled, streams + 1)
        self._multiple = QUERY_WIDTH_MULTIPLE if streams == 1 else 1
        self._pad_id = pad_id
        self.budget = 1

    def run(self, tokens: Sequence[Tokens], lengths: Lengths, prompt_tokens: int = 0) -> npt.NDArray[np.float32]:
        """Unit vectors of texts in order of descending length, (rows, dim). Raises EncoderError when a batch fails."""
        del prompt_tokens  # only models that pool over all tokens are traceable
        runs = list(pack_batches(lengths, self.budget))
        parts: dict[int, npt.NDArray[np.float32]] = {}

        def keep(request: Any, first: int) -> None:
            parts[first] = request.get_output_tensor(0).data.copy()

        self._queue.set_callback(keep)
        try:
            if len(runs) == 1:  # a query: no queue, no callback
                self._request.infer(pad(tokens, self._pad_id, multiple=self._multiple))
                keep(self._request, 0)
            else:
                for first, end in runs:
                    self._queue.start_async(pad(tokens[first:end], self._pad_id), first)
                self._queue.wait_all()
        except RuntimeError as error:
            raise EncoderError(f"OpenVINO: {' '.join(str(error).split())[:300]}; try encoder.backend=torch") from error
        vectors = np.concatenate([parts[first] for first in sorted(parts)])
        return cast(npt.NDArray[np.float32], vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
