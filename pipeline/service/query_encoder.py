"""Queries of many requests, encoded together by one thread that owns the encoder.

Nobody waits for company: what has gathered while the encoder was at work is its next batch. The queue is bounded, and a
request that was given up before its turn is not encoded.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from pipeline.encoder import Encoder, load_query_encoder
from pipeline.encoding.batching import Vectors
from pipeline.encoding.model import EncoderSpec
from pipeline.metrics import QUERY_BATCH, QUEUE_DEPTH
from pipeline.operations.exposition import Meters
from pipeline.service.refusals import RefusedError

BATCH_TEXTS = 64
"""A batch is closed at so many texts: those of a large request do not hold up the next for longer than its own."""


@dataclass(frozen=True)
class QueryVectors:
    """``vectors``: float32 (n, dim), unit length. ``truncated``: rows whose text is longer than the model's limit."""

    vectors: Vectors
    tokens: int
    truncated: tuple[int, ...]
    queue_s: float
    encode_s: float


@dataclass(frozen=True)
class _Work:
    texts: Sequence[str]
    future: "Future[QueryVectors]"
    submitted: float


class QueryEncoder:
    """Starts the thread and loads the encoder in it; raises EncoderError when that fails. ``close`` ends it."""

    def __init__(self, spec: EncoderSpec, queue: int, meters: Meters) -> None:
        self._limit = queue
        self._meters = meters
        self._queue: deque[_Work] = deque()
        self._depth = 0
        self._changed = threading.Condition()
        self._closed = False
        loaded: Future[Encoder] = Future()
        self._thread = threading.Thread(target=self._run, args=(spec, loaded), daemon=True, name="vecmill-encoder")
        self._thread.start()
        encoder = loaded.result()
        self.dim, self.max_tokens = encoder.dim, encoder.tokenizer.max_tokens
        meters.follow(QUEUE_DEPTH, lambda: self._depth, queue="encoder")

    def submit(self, texts: Sequence[str]) -> "Future[QueryVectors]":
        """Vectors of texts, to come; RefusedError 429 when too many wait. An empty queue takes any number."""
        work = _Work(texts, Future(), time.perf_counter())
        with self._changed:
            if self._closed:
                raise RefusedError(503, "closing", "the service is shutting down")
            if self._depth and self._depth + len(texts) > self._limit:
                raise RefusedError(429, "queue_full", f"{self._depth} texts wait for the encoder, its limit; come again")
            self._queue.append(work)
            self._depth += len(texts)
            self._changed.notify()
        return work.future

    def close(self) -> None:
        """Take no more work, finish what is there."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self, spec: EncoderSpec, loaded: "Future[Encoder]") -> None:
        try:
            encoder = load_query_encoder(spec)
        except BaseException as error:  # noqa: BLE001 - raised where the encoder was asked for, in another thread
            loaded.set_exception(error)
            return
        loaded.set_result(encoder)
        while works := self._take():
            wanted = [work for work in works if work.future.set_running_or_notify_cancel()]
            if wanted:
                self._answer(encoder, wanted)
            with self._changed:
                self._depth -= sum(len(work.texts) for work in works)

    def _take(self) -> list[_Work]:
        """The next batch: whatever waits, at once, up to BATCH_TEXTS; nothing when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            works: list[_Work] = []
            while self._queue and (not works or sum(len(each.texts) for each in [*works, self._queue[0]]) <= BATCH_TEXTS):
                works.append(self._queue.popleft())
            return works

    def _answer(self, encoder: Encoder, works: list[_Work]) -> None:
        started = time.perf_counter()
        texts = [text for work in works for text in work.texts]
        self._meters.observe(QUERY_BATCH, len(texts))
        try:
            prompt = encoder.spec.query_prompt
            prompted = [prompt + text for text in texts]
            tokens = encoder.tokenizer(prompted)
            full = [row for row, ids in enumerate(tokens) if len(ids) >= encoder.tokenizer.max_tokens]
            counts = encoder.tokenizer.count([prompted[row] for row in full])
            cut = {row for row, count in zip(full, counts, strict=True) if count > encoder.tokenizer.max_tokens}
            encoded = encoder.encode_tokens(tokens, prompt=prompt)
        except Exception as error:  # noqa: BLE001 - raised in every request that waits for this batch
            for work in works:
                work.future.set_exception(error)
            return
        taken, first = time.perf_counter() - started, 0
        for work in works:
            rows = range(first, first + len(work.texts))
            first = rows.stop
            if lost := [row - rows.start for row in rows if row in encoded.failed]:
                work.future.set_exception(RefusedError(422, "no_vector", f"text {lost[0]} has no finite vector; leave it out"))
                continue
            work.future.set_result(
                QueryVectors(
                    vectors=encoded.vectors[rows.start : rows.stop],
                    tokens=sum(len(tokens[row]) for row in rows),
                    truncated=tuple(row - rows.start for row in rows if row in cut),
                    queue_s=started - work.submitted,
                    encode_s=taken,
                )
            )
