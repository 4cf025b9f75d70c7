"""Texts -> unit vectors. Knows neither Ray nor FAISS, so that it runs alone on any GPU box: ``python -m pipeline.encoder``.

Texts are tokenized once, ordered by token count and packed into batches of a token budget, so almost nothing
is padding. Weights run in FP16 on CUDA, BF16 on CPUs with native bf16, else FP32. An encoder that cannot give
what its spec promises refuses to start, and a text that has no vector never harms its neighbours.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from pipeline.encoding.batching import Lengths, Places, Tokens, Vectors, lengths_of
from pipeline.encoding.calibration import BUDGETS
from pipeline.encoding.model import EncoderSpec, ModelFolder, find_model, resolve_spec
from pipeline.encoding.numerics import cpu_threads, on_gpu, resolve_backend, resolve_here
from pipeline.encoding.openvino_engine import Graph, GraphFacts, OpenVinoEngine, graph_folder, load_graph, save_graph, trace
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.unit_vectors import are_unit, mean_of_windows, why_none
from pipeline.encoding.windows import Spans, Windowed, by_row, document_tokens
from pipeline.errors import EncoderError

if TYPE_CHECKING:
    from pipeline.encoding.torch_engine import TorchEngine

    Engine = TorchEngine | OpenVinoEngine

MIN_ENGINE_COSINE = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.98}
PROBE = "The tokenizer file and the model must agree: Ünïcode, 数学 and emoji 🙂 too."


@dataclass(frozen=True)
class Encoded:
    """``vectors``: float32 (n, dim). ``failed``: row -> ``<code>: <reason>`` for texts that have no vector; their rows are NaN.

    ``padded_tokens``: what went through the model; ``rescued``: texts that got their vector alone or in FP32.
    """

    vectors: Vectors
    tokens: int = 0
    padded_tokens: int = 0
    rescued: int = 0
    failed: dict[int, str] = field(default_factory=dict)


class Encoder:
    """A loaded model. One per process; not safe for concurrent calls."""

    def __init__(
        self, spec: EncoderSpec, *, threads: int | None = None, batch_tokens: int | None = None, one_by_one: bool = False
    ) -> None:
        """``one_by_one``: threads work together on one batch, for the latency of single texts instead of throughput."""
        self._folder = _check_spec(spec)
        self.spec = spec
        self.dim = spec.dim
        self.tokenizer = TextTokenizer(self._folder, spec.max_tokens, spec.prompts)
        self._threads = threads
        self._engine: TorchEngine | OpenVinoEngine
        if spec.backend == "torch":
            self._engine = self._load(spec.precision)
            self._check_tokenizer(self._engine.token_ids(PROBE))
        else:
            self._engine = self._compile(one_by_one=one_by_one)
        self.budgets = BUDGETS["cuda" if self._engine.on_gpu else "cpu"]
        """What padded tokens per batch may be (see calibration)."""
        self._engine.budget = batch_tokens or self.budgets[1]
        self._probe()

    @property
    def batch_tokens(self) -> int:
        """Padded tokens per batch as calibrated, or as little as the GPU's memory allowed."""
        return self._engine.budget

    @batch_tokens.setter
    def batch_tokens(self, budget: int) -> None:
        self._engine.budget = budget

    @property
    def flops_per_token(self) -> float:
        """FLOPs of one token in the linear layers of the model; 0 for a bag of token vectors."""
        return self._engine.flops_per_token

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of passages, float32 (n, dim), in the order of ``texts``. EncoderError when one has none."""
        tokens, windows = self.tokenize_documents(texts)
        return self._whole(self.encode_tokens(tokens, prompt=self.spec.document_prompt, windows=windows))

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of queries, float32 (n, dim), in the order of ``texts``. EncoderError when one has none."""
        prompt = self.spec.query_prompt
        return self._whole(self.encode_tokens(self.tokenizer([prompt + text for text in texts]), prompt=prompt))

    def encode_tokens(self, tokens: Sequence[Tokens], *, prompt: str = "", windows: Windowed | None = None) -> Encoded:
        """Unit vectors of texts tokenized before with ``prompt``, in their order.

        ``windows``: of how many rows of ``tokens`` the vector of each text is the mean; default: of one. A text whose vector is
        zero or not finite is tried again alone, then in FP32; then it is among the failed.
        Where a GPU runs out of memory the batch budget is halved for good.
        """
        before, prompt_tokens = self._engine.padded_tokens, self.tokenizer.prompt_tokens(prompt)

        def run(engine: "Engine", rows: Places) -> Vectors:
            return self._run(engine, [tokens[row] for row in rows], prompt_tokens)

        vectors = run(self._engine, np.arange(len(tokens)))
        lengths = lengths_of(tokens)
        rescued, failed = self._rescue(vectors, run, np.arange(len(tokens)), lengths)
        padded = self._engine.padded_tokens - before
        if windows is not None and len(windows) < len(tokens):
            vectors, failed = mean_of_windows(vectors, failed, np.asarray(windows))
        return Encoded(vectors, int(lengths.sum()), padded, rescued, failed)

    def encode_spans(self, tokens: Sequence[Tokens], spans: Spans) -> Encoded:
        """Unit vectors of parts of texts after the model has read all of each: late chunking (arXiv 2409.04701), on torch.

        What is not finite is tried again as in ``encode_tokens``.
        """
        before, lengths = self._engine.padded_tokens, lengths_of(tokens)

        def run(engine: "Engine", chosen: Places) -> Vectors:
            order, own = by_row(spans[chosen], lengths)
            rows = [tokens[row] for row in own]
            vectors = np.empty((len(chosen), self.dim), dtype=np.float32)
            vectors[order] = cast("TorchEngine", engine).run_spans(rows, lengths_of(rows), list(own.values()))
            return vectors

        vectors = run(self._engine, np.arange(len(spans)))
        rescued, failed = self._rescue(vectors, run, spans[:, 0].astype(np.int64), lengths[spans[:, 0]])
        padded = self._engine.padded_tokens - before
        return Encoded(vectors, int(lengths[np.unique(spans[:, 0])].sum()), padded, rescued, failed)

    def _run(self, engine: "Engine", tokens: Sequence[Tokens], prompt_tokens: int) -> Vectors:
        """Vectors of texts of any length in any order."""
        lengths = lengths_of(tokens)
        order = np.argsort(-lengths, kind="stable")
        vectors = np.empty((len(tokens), self.dim), dtype=np.float32)
        if len(tokens):
            vectors[order] = engine.run([tokens[row] for row in order], lengths[order], prompt_tokens)
        return vectors

    def _rescue(
        self, vectors: Vectors, run: Callable[["Engine", Places], Vectors], texts: Places, lengths: Lengths
    ) -> tuple[int, dict[int, str]]:
        """Try what is zero or not finite again, each text alone, then in FP32; what is left is NaN, and why it is.

        ``texts``: which text each vector is of; ``lengths``: its tokens.
        """
        bad = np.flatnonzero(~are_unit(vectors))
        for text in np.unique(texts[bad]):
            own = bad[texts[bad] == text]
            vectors[own] = run(self._engine, own)
        still = bad[~are_unit(vectors[bad])]
        if len(still) and (exact := self._exact_or_none()) is not None:
            found = run(exact, still)
            vectors[still] = np.where(np.isnan(found), vectors[still], found)
        lost = still[~are_unit(vectors[still])]
        failed = {int(row): why_none(vectors[row], int(lengths[row])) for row in lost}
        vectors[lost] = np.nan
        return len(bad) - len(lost), failed

    def tokenize_documents(self, texts: Sequence[str]) -> tuple[list[Tokens], list[int]]:
        """Token ids of texts after the document prompt, and how many rows of them belong to each text."""
        return document_tokens(self.tokenizer, self.spec, texts)

    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product on this device in the encoder's arithmetic: what MFU is a share of.

        For int8 that of bf16 where the CPU has it, else fp32.
        """
        return self._engine.matmul_rate()

    def cosine_to_exact(
        self, tokens: Sequence[Tokens], vectors: Vectors, *, prompt: str = "", windows: Windowed | None = None
    ) -> npt.NDArray[np.float32]:
        """Cosine of each vector to the one in FP32, (n,): the price of a precision. Else as ``encode_tokens``."""
        engine = self._exact_or_none() if len(tokens) else None
        if engine is None:
            return np.full(len(vectors), np.nan, dtype=np.float32)
        exact = self._run(engine, tokens, self.tokenizer.prompt_tokens(prompt))
        if windows is not None:
            exact, _ = mean_of_windows(exact, {}, np.asarray(windows))
        return cast(npt.NDArray[np.float32], (vectors * exact).sum(axis=1))

    def _whole(self, encoded: Encoded) -> Vectors:
        for row, reason in encoded.failed.items():
            raise EncoderError(f"{self.spec.model}: text {row} of {len(encoded.vectors)} has no vector, {reason}; leave it out")
        return encoded.vectors

    def _exact_or_none(self) -> "TorchEngine | None":
        """FP32 weights, loaded when first needed; None where a GPU has no room for them.

        Not kept on a GPU, where every byte is the batches'.
        """
        try:
            engine: TorchEngine = getattr(self, "_exact_engine", None) or self._load("fp32")
        except MemoryError:
            return None
        engine.budget = self.budgets[0]
        if not engine.on_gpu:
            self._exact_engine = engine
        return engine

    def _load(self, precision: str) -> "TorchEngine":
        from pipeline.encoding import torch_engine  # seconds to import, and an encoder on OpenVINO seldom needs it

        if self._threads is not None:
            torch_engine.set_threads(self._threads)
        return torch_engine.TorchEngine(self.spec, self._folder, precision)

    def _compile(self, *, one_by_one: bool) -> OpenVinoEngine:
        """The model on OpenVINO, from the graph that this machine keeps or by way of torch."""
        folder = graph_folder(self.spec, self._folder)
        kept = load_graph(folder)
        if kept is not None:
            with contextlib.suppress(EncoderError):  # damaged on disk: made again
                return self._start(kept, one_by_one=one_by_one)
        graph = self._trace()
        engine = self._start(graph, one_by_one=one_by_one)
        save_graph(graph, folder)
        return engine

    def _trace(self) -> Graph:
        exact = self._load("fp32")
        ids = exact.token_ids(PROBE)
        vector = exact.run([ids], lengths_of([ids]))[0]
        facts = GraphFacts(
            pad_id=exact.pad_id,
            flops_per_token=exact.flops_per_token,
            probe_ids=ids,
            probe_vector=vector.tolist(),
        )
        return trace(*exact.as_function(self.tokenizer([PROBE, "a"]), int8=self.spec.precision == "int8"), facts)

    def _start(self, graph: Graph, *, one_by_one: bool) -> OpenVinoEngine:
        """A compiled graph; raises EncoderError unless its vector of a probe is that of torch in FP32."""
        ids = graph.facts.probe_ids
        self._check_tokenizer(ids)
        threads = self._threads or cpu_threads()
        engine = OpenVinoEngine(graph, precision=self.spec.precision, threads=threads, streams=1 if one_by_one else threads)
        cosine = float(engine.run([ids], lengths_of([ids]))[0] @ np.array(graph.facts.probe_vector, dtype=np.float32))
        if not cosine >= MIN_ENGINE_COSINE[self.spec.precision]:
            raise EncoderError(
                f"{self.spec.model}: OpenVINO gives other vectors than torch, cosine {cosine:.5f} on a probe; "
                "set encoder.backend=torch"
            )
        return engine

    def _probe(self) -> None:
        tokens = self.tokenizer([PROBE])
        vector = self._engine.run(tokens, lengths_of(tokens))
        if vector.shape[1] != self.dim:
            raise EncoderError(
                f"{self.spec.model}: gives {vector.shape[1]} dimensions, its module configs say {self.dim}; mend them"
            )
        if not are_unit(vector)[0]:
            raise EncoderError(
                f"{self.spec.model}: no finite vector of a plain sentence in {self.spec.precision}; "
                f"set encoder.precision={'bf16' if self.spec.precision == 'fp16' else 'fp32'}"
            )

    def _check_tokenizer(self, ids: list[int]) -> None:
        """The ids of tokenizer.json and those of sentence-transformers are one, or the vectors would be of other texts."""
        if not self.tokenizer.is_static and self.tokenizer([PROBE])[0] != ids:
            raise EncoderError(
                f"{self.spec.model}: tokenizer.json gives other ids than the model's tokenizer class; save the model again"
            )


def _check_spec(spec: EncoderSpec) -> ModelFolder:
    """The model folder of this machine; EncoderError unless it is of the space and numerics of the plan."""
    precision = spec.precision if spec.backend == "openvino" else resolve_here(spec.precision)
    request = spec.request | {"query_model": None}  # of another encoder
    found, folder = resolve_spec(**request, precision=precision, backend=spec.backend)
    if found.fingerprint != spec.fingerprint:
        raise EncoderError(f"{spec.model}: this machine has {found}, the job was planned with {spec}; install the same model")
    return folder


def load_query_encoder(spec: EncoderSpec, *, threads: int | None = None) -> Encoder:
    """An encoder for queries against vectors made with ``spec``: same space, this machine's own best precision and engine.

    A model that OpenVINO cannot run is run by torch. Raises EncoderError when the model here is not of the same space.
    """
    spec = spec.for_queries()
    folder = find_model(spec.model, spec.revision)
    precision = resolve_here("auto", overflows=folder.overflows)
    backend = resolve_backend("auto", folder, on_gpu=on_gpu(), precision=precision)
    if backend == "openvino":
        with contextlib.suppress(EncoderError):
            return Encoder(replace(spec, precision=precision, backend=backend), threads=threads, one_by_one=True)
    return Encoder(replace(spec, precision=precision, backend="torch"), threads=threads, one_by_one=True)


if __name__ == "__main__":
    from pipeline.encoding.encoder_bench import main

    main()
