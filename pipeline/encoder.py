"""Texts -> unit vectors. The only torch and sentence-transformers door; knows neither Ray nor FAISS.

Texts are tokenized once, ordered by token count and packed into batches of a token budget, so almost nothing
is padding. Weights run in FP16 on CUDA, BF16 on CPUs with native bf16, else FP32; pooling and normalisation
always run in FP32. An encoder that cannot give what its spec promises refuses to start.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

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

Result = TypeVar("Result")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BATCH_TOKENS = 1536
"""Padded tokens per batch on a CPU: 1 to 2 k was the flat optimum for MiniLM on 2 Zen 5 cores (DESIGN)."""
CUDA_BATCH_TOKENS = 32768
MIN_ENGINE_COSINE = 0.999
NORM_TOLERANCE = 1e-3
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
        self._path = folder.path
        self._model = _load(str(folder.path), self._device)
        if not self.tokenizer.is_static:
            self._model.max_seq_length = spec.max_tokens
        self._check_tokenizer()
        self._parts = list(self._model.children())
        self._engine = self._compile() if spec.backend == "openvino" else None
        self._parts[0].to(DTYPES[spec.precision])
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
        """Unit vectors of texts tokenized before with ``prompt``; float32 (n, dim).

        A text whose vector is not finite or zero is tried again alone, then in FP32; then EncoderError is raised.
        Where a GPU runs out of memory the batch budget is halved for good.
        """
        lengths = np.fromiter((len(ids) for ids in tokens), dtype=np.int64, count=len(tokens))
        order = np.argsort(-lengths, kind="stable")
        vectors = np.empty((len(tokens), self.dim), dtype=np.float32)
        if len(tokens):
            vectors[order] = self._run([tokens[row] for row in order], lengths[order], prompt)
        for row in np.flatnonzero(~_are_unit(vectors)).tolist():
            vectors[row] = self._rescue(tokens[row], prompt, f"text {row} of {len(tokens)}")
        return vectors

    def _encode_texts(self, texts: Sequence[str], prompt: str) -> Vectors:
        return self.encode_tokens(self.tokenizer([prompt + text for text in texts]), prompt=prompt)

    def _run(self, tokens: Sequence[Tokens], lengths: npt.NDArray[np.int64], prompt: str) -> Vectors:
        """Vectors of texts in order of descending length, (rows, dim)."""
        if self._engine is not None:
            vectors = np.empty((len(tokens), self.dim), dtype=np.float32)
            batches = pack_batches(lengths, self._batch_tokens)
            self._engine.run((_pad(tokens[first:end], self._pad_id) for first, end in batches), vectors)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)  # in FP32, whatever the engine computes in
            return vectors

        def forward(first: int, end: int) -> torch.Tensor:
            return self._forward(tokens[first:end], prompt)

        with torch.inference_mode():
            parts, self._batch_tokens = run_within(lengths, self._batch_tokens, forward, torch.OutOfMemoryError)
            found: Vectors = torch.cat(parts).cpu().numpy()
        return found

    def _rescue(self, tokens: Tokens, prompt: str, name: str) -> Vectors:
        """The vector of one text alone, if need be with FP32 weights, (dim,)."""
        vector = self._run([tokens], np.array([len(tokens)]), prompt)
        if not _are_unit(vector)[0]:
            whole = _load(str(self._path), self._device)
            with torch.inference_mode():
                vector = self._forward([tokens], prompt, list(whole.children())).cpu().numpy()
        if not _are_unit(vector)[0]:
            raise EncoderError(
                f"{self.spec.model}: {name} ({len(tokens)} tokens) has a vector that is zero or not finite, in "
                f"{self.spec.precision} and in fp32; leave that text out or use another model"
            )
        return cast(Vectors, vector[0])

    def _compile(self) -> OpenVinoEngine:
        ids, mask = (torch.from_numpy(array) for array in _pad(self.tokenizer([PROBE, "a"]), self._pad_id))
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # branches on shapes that a batch of texts never takes
            return OpenVinoEngine(
                _Whole(self._model), (ids, mask), precision=self.spec.precision, threads=torch.get_num_threads()
            )

    def _forward(self, batch: Sequence[Tokens], prompt: str, parts: Sequence[Any] | None = None) -> torch.Tensor:
        first, *rest = parts or self._parts
        if self.tokenizer.is_static:
            features = _flat_features(batch, self._device)
        else:
            ids, mask = (torch.from_numpy(array).to(self._device) for array in _pad(batch, self._pad_id))
            features = {"input_ids": ids, "attention_mask": mask}
            if prompt:
                features["prompt_length"] = self.tokenizer.prompt_tokens(prompt)
        features = first(features)
        if "token_embeddings" in features:
            features["token_embeddings"] = features["token_embeddings"].float()
        for module in rest:
            features = module(features)
        return torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=1)

    def _probe(self) -> Vectors:
        """The vector of a probe text, by torch; an engine that gives another vector is refused."""
        tokens = self.tokenizer([PROBE])
        with torch.inference_mode():
            vectors: Vectors = self._forward(tokens[0:1], "").cpu().numpy()
        if self._engine is not None:
            cosine = float((vectors * self._run(tokens, np.array([len(tokens[0])]), "")).sum())
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


def run_within(
    lengths: npt.NDArray[np.int64], budget: int, run: Callable[[int, int], Result], too_large: type[Exception]
) -> tuple[list[Result], int]:
    """Run all batches of texts in order of descending length; halve the budget when one does not fit, for the rest too.

    ``run(first, end)`` raises ``too_large`` for a batch that does not fit. Returns the results in order and the
    budget that fitted. Raises ``too_large`` when one text alone does not fit.
    """
    results: list[Result] = []
    first = 0
    while first < len(lengths):
        end = first + next(pack_batches(lengths[first:], budget))[1]
        try:
            results.append(run(first, end))
            first = end
        except too_large:
            if end - first == 1:
                raise
            budget = max(1, int(lengths[first])) * (end - first) // 2
    return results, budget


def _are_unit(vectors: Vectors) -> npt.NDArray[np.bool_]:
    """For each row whether it is finite and of length 1."""
    return cast(npt.NDArray[np.bool_], np.abs(np.linalg.norm(vectors, axis=1) - 1) < NORM_TOLERANCE)


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
