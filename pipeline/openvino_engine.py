"""A traced model on OpenVINO: the fastest arithmetic for CPUs. The only openvino door.

One stream per thread, each with a batch of its own, so that no batch waits for threads to meet. The model is
converted in memory by OpenVINO's PyTorch frontend (under a second); its converter tool is left alone, it reports usage.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError, EncoderError

Padded = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Token ids and attention mask of a batch, both (rows, width)."""
HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """A compiled model: (ids, mask) -> vectors. Not safe for concurrent calls."""

    def __init__(self, module: Any, example: tuple[Any, Any], *, precision: str, threads: int) -> None:
        """``module``: a torch module of (ids, mask) in FP32; ``example``: tensors to trace it with.

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
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # encoders that share a node would all pin the same first cores
        }
        try:
            frontend = FrontEndManager().load_by_framework("pytorch")
            decoder = TorchScriptPythonDecoder(module, example_input=example)  # the frontend keeps no reference to it
            model = frontend.convert(frontend.load(decoder))
            compiled = openvino.Core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise EncoderError(
                f"OpenVINO cannot run this model, {' '.join(str(error).split())[:300]}; set encoder.backend=torch"
            ) from error
        self._queue = openvino.AsyncInferQueue(compiled, threads + 1)

    def run(self, batches: Iterable[Padded], out: npt.NDArray[np.float32]) -> None:
        """Fill ``out`` (rows of all batches, dim) in the order of ``batches``. Raises EncoderError when a batch fails."""

        def keep(request: Any, first: int) -> None:
            vectors = request.get_output_tensor(0).data
            out[first : first + len(vectors)] = vectors

        self._queue.set_callback(keep)
        first = 0
        try:
            for ids, mask in batches:
                self._queue.start_async([ids, mask], first)
                first += len(ids)
            self._queue.wait_all()
        except RuntimeError as error:
            raise EncoderError(f"OpenVINO: {' '.join(str(error).split())[:300]}; try encoder.backend=torch") from error
