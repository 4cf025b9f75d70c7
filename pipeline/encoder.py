"""Texts -> unit vectors. The only torch and sentence-transformers door; knows neither Ray nor FAISS.

Texts are tokenized once, ordered by token count and packed into batches of a token budget, so almost nothing
is padding. Weights run in FP16 on CUDA, BF16 on CPUs with native bf16, else FP32; pooling and normalisation
always run in FP32. An encoder that cannot give what its spec promises refuses to start.
"""

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from pipeline.errors import EncoderError
from pipeline.model import EncoderSpec, TextTokenizer, resolve_spec
from pipeline.numerics import resolve_precision
from pipeline.openvino_engine import OpenVinoEngine, Padded

Vectors = npt.NDArray[np.float32]
"""(n, dim), rows of length 1."""
Tokens = Sequence[int] | npt.NDArray[np.int32]
"""Token ids of one text."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BATCH_TOKENS = 1536
"""Padded tokens per batch on a CPU: 1 to 2 k was the flat optimum for MiniLM on 2 Zen 5 cores (DESIGN)."""
CUDA_BATCH_TOKENS = 32768
MIN_ENGINE_COSINE = 0.999
PROBE = "The tokenizer file and the model must agree: Ünïcode, 数学 and emoji 🙂 too."


class Encoder:
    """A loaded model. One per process; not safe for concurrent calls."""

    def __init__(self, spec: EncoderSpec, *, threads: int | None = None, batch_tokens: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        found, folder = resolve_spec(
            model=spec.model,
            revision=spec.revision,
            document_prompt=spec.document_prompt,
            query_prompt=spec.query_prompt,
            max_tokens=spec.max_tokens,
            precision=resolve_here(spec.precision),
            backend=spec.backend,
        )
        if found.fingerprint != spec.fingerprint:
            raise EncoderError(
                f"{spec.model}: this machine has {found}, the job was planned with {spec}; install the same model"
            )
        self.spec = spec
        self.tokenizer = TextTokenizer(folder, spec.max_tokens)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._batch_tokens = batch_tokens or (CUDA_BATCH_TOKENS if self._device.type == "cuda" else CPU_BATCH_TOKENS)
        self._model = _load(str(folder.path), self._device)
        if not self.tokenizer.is_static:
            self._model.max_seq_length = spec.max_tokens
        self._check_tokenizer()
        self._first, *self._rest = list(self._model.children())
        self._engine = self._compile() if spec.backend == "openvino" else None
        self._first.to(DTYPES[spec.precision])
        self.dim = spec.dim
        if (width := self._probe().shape[1]) != self.dim:
            raise EncoderError(
                f"{spec.model}: gives vectors of {width} dimensions, its module configs say {self.dim}; mend them"
            )

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of passages, float32 (n, dim), in the order of ``texts``."""
        return self._encode_texts(texts, self.spec.document_prompt)

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of queries, float32 (n, dim), in the order of ``texts``."""
        return self._encode_texts(texts, self.spec.query_prompt)

    def encode_tokens(self, tokens: Sequence[Tokens], *, prompt: str = "") -> Vectors:
        """Unit vectors of texts tokenized before with ``prompt``; float32 (n, dim). Raises EncoderError on a non-finite one."""
        lengths = np.fromiter((len(ids) for ids in tokens), dtype=np.int64, count=len(tokens))
        order = np.argsort(-lengths, kind="stable")
        batches = ([tokens[row] for row in order[first:end]] for first, end in pack_batches(lengths[order], self._batch_tokens))
        vectors = np.empty((len(tokens), self.dim), dtype=np.float32)
        if len(tokens):
            vectors[order] = self._run(batches, len(tokens), prompt)
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise EncoderError(
                f"{self.spec.model}: text {bad} of {len(tokens)} has a non-finite vector in {self.spec.precision}; try fp32"
            )
        return vectors

    def _encode_texts(self, texts: Sequence[str], prompt: str) -> Vectors:
        return self.encode_tokens(self.tokenizer([prompt + text for text in texts]), prompt=prompt)

    def _run(self, batches: Iterator[Sequence[Tokens]], rows: int, prompt: str) -> Vectors:
        """Vectors of all batches one after the other, (rows, width of the model)."""
        if self._engine is not None:
            vectors = np.empty((rows, self.dim), dtype=np.float32)
            self._engine.run((_pad(batch, self._pad_id) for batch in batches), vectors)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)  # in FP32, whatever the engine computes in
            return vectors
        with torch.inference_mode():
            found: Vectors = torch.cat([self._forward(batch, prompt) for batch in batches]).cpu().numpy()
        return found

    def _compile(self) -> OpenVinoEngine:
        ids, mask = (torch.from_numpy(array) for array in _pad(self.tokenizer([PROBE, "a"]), self._pad_id))
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # branches on shapes that a batch of texts never takes
            return OpenVinoEngine(
                _Whole(self._model), (ids, mask), precision=self.spec.precision, threads=torch.get_num_threads()
            )

    def _forward(self, batch: Sequence[Tokens], prompt: str) -> torch.Tensor:
        if self.tokenizer.is_static:
            features = _flat_features(batch, self._device)
        else:
            ids, mask = (torch.from_numpy(array).to(self._device) for array in _pad(batch, self._pad_id))
            features = {"input_ids": ids, "attention_mask": mask}
            if prompt:
                features["prompt_length"] = self.tokenizer.prompt_tokens(prompt)
        features = self._first(features)
        if "token_embeddings" in features:
            features["token_embeddings"] = features["token_embeddings"].float()
        for module in self._rest:
            features = module(features)
        return torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1)

    def _probe(self) -> Vectors:
        """The vector of a probe text, by torch; an engine that gives another vector is refused."""
        tokens = self.tokenizer([PROBE])
        with torch.inference_mode():
            vectors: Vectors = self._forward(tokens[0:1], "").cpu().numpy()
        if self._engine is not None:
            cosine = float((vectors * self._run(iter([tokens]), 1, "")).sum())
            if not cosine >= MIN_ENGINE_COSINE:
                raise EncoderError(
                    f"{self.spec.model}: OpenVINO gives other vectors than torch, cosine {cosine:.5f} on a probe; "
                    "set encoder.backend=torch"
                )
        return vectors

    def _check_tokenizer(self) -> None:
        """The ids of tokenizer.json and those of sentence-transformers are one, or the vectors would be of other texts."""
        if self.tokenizer.is_static:
            self._pad_id = 0
            return
        theirs = self._model.preprocess([PROBE])["input_ids"][0].tolist()
        self._pad_id = int(self._model.tokenizer.pad_token_id or 0)
        ours = self.tokenizer([PROBE])[0]
        if ours != theirs:
            raise EncoderError(
                f"{self.spec.model}: tokenizer.json gives other ids than the model's tokenizer class; save the model again"
            )


def pack_batches(lengths: npt.NDArray[np.int64], budget: int) -> Iterator[tuple[int, int]]:
    """Cut descending token counts into runs (first, end) of at most ``budget`` padded tokens; a longer text goes alone."""
    first = 0
    while first < len(lengths):
        end = min(len(lengths), first + max(1, budget // max(1, int(lengths[first]))))
        yield first, end
        first = end


def _load(path: str, device: torch.device) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            path, device=str(device), local_files_only=True, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"{path}: cannot be loaded, {' '.join(str(error).split())}; check the model folder") from error
    return model.eval().float()


class _Whole(torch.nn.Module):
    """All modules of a model as one function of (ids, mask), for tracing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(model.children())

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors, (rows, dim), not normalised."""
        features = {"input_ids": ids, "attention_mask": mask}
        for module in self.parts:
            features = module(features)
        return features["sentence_embedding"]


def _pad(batch: Sequence[Tokens], pad_id: int) -> Padded:
    width = max(1, *(len(ids) for ids in batch))
    ids = np.full((len(batch), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(batch), width), dtype=np.int64)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def _flat_features(batch: Sequence[Tokens], device: torch.device) -> dict[str, Any]:
    lengths = np.array([0, *(len(tokens) for tokens in batch[:-1])], dtype=np.int64)
    flat = np.fromiter((token for tokens in batch for token in tokens), dtype=np.int64)
    return {"input_ids": torch.from_numpy(flat).to(device), "offsets": torch.from_numpy(np.cumsum(lengths)).to(device)}


def on_gpu() -> bool:
    """Whether encoders on this machine have a GPU."""
    return torch.cuda.is_available()


def resolve_here(precision: str) -> str:
    """``auto`` resolved for encoders on this machine."""
    return resolve_precision(precision, on_gpu=on_gpu())


def measure_rate(spec: EncoderSpec, texts: Sequence[str]) -> float:
    """Tokens per second of this machine on ``texts``, after a warm-up."""
    encoder = Encoder(spec)
    tokens = encoder.tokenizer([spec.document_prompt + text for text in texts])
    encoder.encode_tokens(tokens[: len(tokens) // 4], prompt=spec.document_prompt)
    started = time.perf_counter()
    encoder.encode_tokens(tokens, prompt=spec.document_prompt)
    return sum(len(ids) for ids in tokens) / (time.perf_counter() - started)


def load_query_encoder(spec: EncoderSpec) -> Encoder:
    """An encoder for queries against vectors made with ``spec``: same space, this machine's own best precision.

    On torch, which starts sooner and takes one text without a queue.
    Raises EncoderError when the model here is not of the same space.
    """
    return Encoder(replace(spec, precision=resolve_here("auto"), backend="torch"))
