"""A unit encoded in pieces by processes that may die: the passage that kills its process is found, the others are encoded."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from pipeline.manifest import Record
from pipeline.stages.cluster import own_error

if TYPE_CHECKING:
    from pipeline.encoder import Encoded

CUTS = 16
"""Pieces that one which died is cut into: 4,096 passages are single ones after three deaths."""
DEATHS = 2
"""A passage that its process died of so often, alone, is given up."""
CRASHED = "E_CRASH: {} tokens, the process that encoded it alone died {} times"


class Pieces:
    """Encodes tokenized units with an encoder actor that is started anew whenever it dies. ``dim``: of its vectors."""

    def __init__(self, start: Callable[[], Any], dim: int) -> None:
        self._start = start
        self._dim = dim
        self._actor: Any = None

    def encode(self, row: dict[str, Any]) -> tuple["Encoded", Record]:
        """What ``EncoderActor.encode`` gives for the whole unit; passages that kill their process are among the failed."""
        from pipeline.encoder import Encoded

        started = time.perf_counter()
        ids, lengths = np.frombuffer(row["ids"], dtype=np.int32), np.frombuffer(row["lengths"], dtype=np.int32)
        texts = np.split(ids, np.cumsum(lengths)[:-1])
        found = Encoded(np.full((len(texts), self._dim), np.nan, dtype=np.float32))
        todo, deaths = [range(len(texts))], 0
        while todo:
            piece = todo.pop()
            part = np.concatenate([texts[number] for number in piece]).tobytes()
            encoded = self._try(row | {"ids": part, "lengths": lengths[piece.start : piece.stop].tobytes()})
            deaths = deaths + 1 if encoded is None and len(piece) == 1 else 0
            if encoded is not None:
                found = _joined(found, encoded, piece)
            elif len(piece) > 1:
                todo += _cut(piece)[::-1]
            elif deaths < DEATHS:
                todo.append(piece)
            else:
                found.failed[piece.start] = CRASHED.format(lengths[piece.start], deaths)
                deaths = 0
        counts = {"tokens": found.tokens, "padded_tokens": found.padded_tokens, "rescued": found.rescued}
        timings = row["timings"] | {"encode": time.perf_counter() - started, "waiting": 0.0}
        return found, Record(unit=row["name"], files=(), counts=counts, timings_s=timings)

    def close(self) -> None:
        """End the process."""
        if self._actor is not None:
            ray.kill(self._actor)

    def _try(self, row: dict[str, Any]) -> "Encoded | None":
        """Vectors of a piece, None when its process died; raises what the encoder raises."""
        if self._actor is None:
            self._actor = self._start()
        try:
            encoded: Encoded = ray.get(self._actor.encode.remote(row))[0]
        except ray.exceptions.RayActorError:
            self._actor = None
            return None
        except ray.exceptions.RayError as error:
            raise own_error(error) from error
        return encoded


def _joined(found: "Encoded", encoded: "Encoded", piece: range) -> "Encoded":
    found.vectors[piece.start : piece.stop] = encoded.vectors
    failed = found.failed | {piece.start + row: reason for row, reason in encoded.failed.items()}
    sums = {name: getattr(found, name) + getattr(encoded, name) for name in ("tokens", "padded_tokens", "rescued")}
    return replace(found, failed=failed, **sums)


def _cut(piece: range) -> list[range]:
    size = -(-len(piece) // CUTS)
    return [range(first, min(first + size, piece.stop)) for first in range(piece.start, piece.stop, size)]
