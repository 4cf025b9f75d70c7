"""A model on PyTorch: CUDA, and every CPU. With the re-rankers and the trainer the only torch door.

Weights run in the precision of the spec without autocast; pooling and normalisation always run in FP32. On CUDA
a batch is sent while the last one is computed, and vectors are fetched once per call, so that the GPU never waits.
"""

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging as transformers_logging

from pipeline.encoding import packed
from pipeline.encoding.batching import Lengths, Tokens, Vectors, pad, run_within
from pipeline.encoding.model import EncoderSpec, ModelFolder
from pipeline.encoding.traced import Whole, quantize_linear
from pipeline.errors import EncoderError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPU_WIDTH_MULTIPLE = 8
"""Tensor cores take matrices whose sides are multiples of 8."""
GEMM_SIDE = {"cpu": 1536, "cuda": 8192}
GEMM_SECONDS = 0.15
PACKED_PROBE = "Texts have the same vectors, with padding and without."
LONGEST_PROBE = 2048
MIN_PACKED_COSINE = 0.999
CANNOT_PACK = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class TorchEngine:
    """A loaded model. Not safe for concurrent calls."""

    def __init__(self, spec: EncoderSpec, folder: ModelFolder, precision: str = "fp32") -> None:
        """``precision``: of the weights of the first module, which is all but pooling and heads.

        Raises EncoderError for a model that cannot be loaded, MemoryError for one that the GPU has no room for.
        """
        self.on_gpu = has_cuda()
        self.budget = 1
        """Padded tokens per batch; set by the caller, halved for good when the GPU runs out of memory."""
        self.padded_tokens = 0
        """Tokens that went through the model so far, with padding."""
        self._precision = precision
        self._device = device()
        self._dim = spec.dim
        self._model = load(str(folder.path), self._device, trust_remote_code=spec.trust_remote_code)
        self._static = folder.is_static
        if not self._static:
            self._model.max_seq_length = spec.max_tokens
        self.pad_id = 0 if self._static else int(self._model.tokenizer.pad_token_id or 0)
        self._parts = list(self._model.children())
        lower(self._parts[0], DTYPES[precision])
        self._packs, self._offset = False, 0
        if not self._static and packed.is_possible(self._device, precision):
            self._pack(spec.max_tokens)

    def token_ids(self, text: str) -> list[int]:
        """What sentence-transformers makes of a text."""
        return cast(list[int], self._model.preprocess([text])["input_ids"][0].tolist())

    @property
    def flops_per_token(self) -> float:
        """Twice the weights of the linear layers: one multiplication and one addition each.

        Attention is left out, and a pooler, which sees one token of a text.
        """
        named = self._parts[0].named_modules()
        linear = [module for name, module in named if isinstance(module, torch.nn.Linear) and "pooler" not in name]
        return 2.0 * sum(module.weight.numel() for module in linear)

    def run(self, tokens: Sequence[Tokens], lengths: Lengths, prompt_tokens: int = 0) -> Vectors:
        """Unit vectors of texts in order of descending length, (rows, dim); infinite for one that does not fit into memory."""

        def forward(first: int, end: int) -> torch.Tensor:
            return self._forward(tokens[first:end], prompt_tokens)

        with torch.inference_mode():
            parts, self.budget = run_within(lengths, self.budget, forward, torch.OutOfMemoryError)
            lost = torch.full((1, self._dim), torch.inf, device=self._device)
            found: Vectors = torch.cat([lost if part is None else part for part in parts]).cpu().numpy()
        return found

    def run_spans(self, tokens: Sequence[Tokens], lengths: Lengths, spans: Sequence[Sequence[tuple[int, int]]]) -> Vectors:
        """The same of parts of each text, given as (first token, end), after the model has read all of it: (parts, dim)."""

        def forward(first: int, end: int) -> torch.Tensor:
            features = self._rectangle(tokens[first:end])
            self.padded_tokens += features["input_ids"].numel()
            read = self._parts[0](features)["token_embeddings"].float()
            parts = [read[row, start:stop] for row, own in enumerate(spans[first:end]) for start, stop in own]
            mask = [torch.ones(len(part), dtype=torch.long, device=self._device) for part in parts]
            padded = {"token_embeddings": parts, "attention_mask": mask}
            features = {name: pad_sequence(values, batch_first=True) for name, values in padded.items()}
            return self._unit(through(self._parts[1:], features))

        with torch.inference_mode():
            found, self.budget = run_within(lengths, self.budget, forward, torch.OutOfMemoryError)
        vectors = np.full((sum(map(len, spans)), self._dim), np.inf, dtype=np.float32)
        row = place = 0
        for part in found:
            end = place + (len(spans[row]) if part is None else len(part))
            if part is not None:
                vectors[place:end] = part.cpu().numpy()
            while place < end:
                place, row = place + len(spans[row]), row + 1
        return vectors

    def matmul_rate(self) -> float:
        """FLOP/s of a large square matrix product on this device in the engine's precision, the best of several."""
        return matmul_rate(self._precision)

    def as_function(self, example: Sequence[Tokens], *, int8: bool) -> tuple[Any, tuple[Any, Any]]:
        """The whole model as a module of (ids, mask) -> vectors, not normalised, and tensors to trace it with.

        ``int8``: with linear weights in int8; this engine is then spent.
        """
        if int8:
            quantize_linear(self._parts[0])
        ids, mask = pad(example, self.pad_id)
        return Whole(self._parts, self._dim), (torch.from_numpy(ids), torch.from_numpy(mask))

    def _pack(self, max_tokens: int) -> None:
        """From here on put no padding between texts, if probes then have the same vectors, to a cosine of 0.999."""
        first = self._parts[0]
        with contextlib.suppress(*CANNOT_PACK), torch.inference_mode():
            ids = self.token_ids(PACKED_PROBE)
            probe = [np.resize(ids, length) for length in (min(max_tokens, LONGEST_PROBE), len(ids), 3)]
            padded = self._forward(probe, 0)
            if packed.switch(first):
                self._packs, self._offset = True, packed.position_offset(first)
                self._parts.insert(1, packed.Apart())
                found = self._forward(probe, 0)
                if found.shape == padded.shape and bool(((found * padded).sum(dim=1) >= MIN_PACKED_COSINE).all()):
                    return
        self._packs = False
        packed.switch_back(first)

    def _forward(self, batch: Sequence[Tokens], prompt_tokens: int) -> torch.Tensor:
        shape = self._flat if self._static else self._packed if self._packs else self._rectangle
        features = shape(batch)
        self.padded_tokens += features["input_ids"].numel()
        if prompt_tokens:
            features["prompt_length"] = prompt_tokens
        return self._unit(through(self._parts, features))

    def _unit(self, features: dict[str, Any]) -> torch.Tensor:
        return torch.nn.functional.normalize(features["sentence_embedding"][:, : self._dim].float(), dim=1)

    def _rectangle(self, batch: Sequence[Tokens]) -> dict[str, Any]:
        ids, mask = pad(batch, self.pad_id, multiple=width_multiple())
        return {"input_ids": self._send(ids), "attention_mask": self._send(mask)}

    def _packed(self, batch: Sequence[Tokens]) -> dict[str, Any]:
        named, longest = packed.features(batch, self._offset)
        return {name: self._send(values) for name, values in named.items()} | {packed.LONGEST: longest}

    def _flat(self, batch: Sequence[Tokens]) -> dict[str, Any]:
        starts = np.cumsum([0, *(len(tokens) for tokens in batch[:-1])], dtype=np.int64)
        flat = np.fromiter((token for tokens in batch for token in tokens), dtype=np.int64)
        return {"input_ids": self._send(flat), "offsets": self._send(starts)}

    def _send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return send(array, self._device)


def has_cuda() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where models run here."""
    return torch.device("cuda" if has_cuda() else "cpu")


def width_multiple() -> int:
    """What the width of a batch is rounded up to here."""
    return GPU_WIDTH_MULTIPLE if has_cuda() else 1


def send(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array on a device; a GPU is not waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def through(modules: Iterable[Any], features: dict[str, Any]) -> dict[str, Any]:
    """What the modules of a model make of features, one after the other: those after the first in FP32."""
    first, *rest = modules
    features = first(features)
    for name in {"token_embeddings", "sentence_embedding", "scores"} & features.keys():
        features[name] = features[name].float()
    for module in rest:
        features = module(features)
    return features


def lower(module: Any, dtype: torch.dtype, but_for: Collection[int] = ()) -> None:
    """Weights of a module in ``dtype``, but for those with these ids.

    Not its buffers: rotary frequencies in 16 bits garble long texts.
    """
    for weights in module.parameters():
        if id(weights) not in but_for:
            weights.data = weights.data.to(dtype)


def gpu_name() -> str:
    """The model of the GPU that torch uses."""
    return str(torch.cuda.get_device_name())


def set_threads(threads: int) -> None:
    """CPU threads of this process for torch, whatever Ray or the environment set before."""
    torch.set_num_threads(threads)


def matmul_rate(precision: str) -> float:
    """FLOP/s of a large square matrix product here, the best of several."""
    device = "cuda" if has_cuda() else "cpu"
    side = GEMM_SIDE[device]
    matrix = torch.ones(side, side, dtype=DTYPES[precision], device=device)
    rates: list[float] = []
    started = time.perf_counter()
    with torch.inference_mode():
        while len(rates) < 3 or time.perf_counter() - started < GEMM_SECONDS:
            begin = time.perf_counter()
            torch.mm(matrix, matrix)
            if device == "cuda":
                torch.cuda.synchronize()
            rates.append(2.0 * side**3 / (time.perf_counter() - begin))
    return max(rates)


def device_name() -> str:
    """What encodes here, in words."""
    return gpu_name() if has_cuda() else f"CPU, {torch.get_num_threads()} threads"


def load_plain(spec: EncoderSpec, folder: ModelFolder, precision: str) -> Any:
    """A SentenceTransformer as people load it, in ``precision``: what we measure ourselves against."""
    model = SentenceTransformer(
        str(folder.path),
        device="cuda" if has_cuda() else "cpu",
        local_files_only=True,
        trust_remote_code=spec.trust_remote_code,
        truncate_dim=spec.dim,
        model_kwargs={"dtype": DTYPES[precision]},
    )
    if not folder.is_static:
        model.max_seq_length = spec.max_tokens
    return model


def plainly(model: Any, texts: Sequence[str], **settings: Any) -> Any:
    """What a plain SentenceTransformer's ``encode`` gives, with the attention that torch picks where nobody says otherwise."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        return model.encode(list(texts), **settings)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def load(path: str, device: torch.device, *, trust_remote_code: bool, kind: Any = SentenceTransformer) -> Any:
    """A model in FP32, with the attention that it prefers; SDPA by torch's own kernels, not by cuDNN (see ``packed``).

    ``kind``: its class in sentence-transformers. Raises EncoderError when it cannot be loaded, MemoryError when the GPU has
    no room for it.
    """
    transformers_logging.disable_progress_bar()
    torch.backends.cuda.enable_cudnn_sdp(False)
    settings = {"use_safetensors": True}
    try:
        model = kind(
            path, device=str(device), local_files_only=True, trust_remote_code=trust_remote_code, model_kwargs=settings
        ).float()
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{path}: no room on the GPU") from error
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"{path}: cannot be loaded, {' '.join(str(error).split())}; check the model folder") from error
    return model.eval()
