"""Texts -> unit vectors. The only torch and sentence-transformers door; knows neither Ray nor FAISS.

Texts are tokenized once, ordered by token count and packed into batches of a token budget, so almost nothing
is padding. Weights run in FP16 on CUDA, BF16 on CPUs with native bf16, else FP32; pooling and normalisation
always run in FP32. An encoder that cannot give what its spec promises refuses to start.
"""

import os
import time
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
from pipeline.model import EncoderSpec, TextTokenizer, resolve_precision, resolve_spec

Vectors = npt.NDArray[np.float32]
"""(n, dim), rows of length 1."""
Tokens = Sequence[int] | npt.NDArray[np.int32]
"""Token ids of one text."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BATCH_TOKENS = 1536
"""Padded tokens per batch on a CPU: 1 to 2 k was the flat optimum for MiniLM on 2 Zen 5 cores (DESIGN)."""
CUDA_BATCH_TOKENS = 32768
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
        self._first.to(DTYPES[spec.precision])
        self.dim = spec.dim
        if (width := self.encode_documents([PROBE]).shape[1]) != self.dim:
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
        parts = []
        with torch.inference_mode():
            for first, end in pack_batches(lengths[order], self._batch_tokens):
                parts.append(self._forward([tokens[number] for number in order[first:end]], prompt))
            if not parts:
                return np.empty((0, self.dim), dtype=np.float32)
            sorted_vectors = torch.cat(parts).cpu().numpy()
        vectors = np.empty_like(sorted_vectors)
        vectors[order] = sorted_vectors
        if not np.isfinite(vectors).all():
            bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise EncoderError(
                f"{self.spec.model}: text {bad} of {len(tokens)} has a non-finite vector in {self.spec.precision}; try fp32"
            )
        return vectors

    def _encode_texts(self, texts: Sequence[str], prompt: str) -> Vectors:
        return self.encode_tokens(self.tokenizer([prompt + text for text in texts]), prompt=prompt)

    def _forward(self, batch: Sequence[Tokens], prompt: str) -> torch.Tensor:
        if self.tokenizer.is_static:
            features = _flat_features(batch, self._device)
        else:
            features = _padded_features(batch, self._device, self._pad_id)
            if prompt:
                features["prompt_length"] = self.tokenizer.prompt_tokens(prompt)
        features = self._first(features)
        if "token_embeddings" in features:
            features["token_embeddings"] = features["token_embeddings"].float()
        for module in self._rest:
            features = module(features)
        return torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1)

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


def _padded_features(batch: Sequence[Tokens], device: torch.device, pad_id: int) -> dict[str, Any]:
    width = max(1, *(len(ids) for ids in batch))
    ids = np.full((len(batch), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(batch), width), dtype=np.int64)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}


def _flat_features(batch: Sequence[Tokens], device: torch.device) -> dict[str, Any]:
    lengths = np.array([0, *(len(tokens) for tokens in batch[:-1])], dtype=np.int64)
    flat = np.fromiter((token for tokens in batch for token in tokens), dtype=np.int64)
    return {"input_ids": torch.from_numpy(flat).to(device), "offsets": torch.from_numpy(np.cumsum(lengths)).to(device)}


def resolve_here(precision: str) -> str:
    """``auto`` resolved for encoders on this machine."""
    return resolve_precision(precision, on_gpu=torch.cuda.is_available())


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

    Raises EncoderError when the model here is not of the same space.
    """
    return Encoder(replace(spec, precision=resolve_here("auto")))
