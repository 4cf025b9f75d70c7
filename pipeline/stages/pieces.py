"""Work done in pieces by a process that may die of it: what kills its process is found, all else is done."""

from collections.abc import Callable, Iterator
from typing import Any

import ray

from pipeline.errors import ProcessError
from pipeline.stages.cluster import DEATHS as DEATHS_OF_PROCESSES
from pipeline.stages.cluster import own_error

CUTS = 16
"""Pieces that one which died is cut into: 4,096 passages are single ones after three deaths."""
DEATHS = 2
"""What its process died of so often, alone, is given up."""


class Mortal:
    """An actor that is started anew whenever it has died."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._actor: Any = None

    def ask(self, method: str, *arguments: Any) -> Any | None:
        """What a method gives, never None; None when the process died of it. Raises what the method raises."""
        if self._actor is None:
            self._actor = self._start()
        try:
            return ray.get(getattr(self._actor, method).remote(*arguments))
        except DEATHS_OF_PROCESSES:
            self._actor = None
            return None
        except ray.exceptions.RayError as error:
            raise own_error(error) from error

    def close(self) -> None:
        """End the process."""
        if self._actor is not None:
            ray.kill(self._actor)


def in_pieces(count: int, attempt: Callable[[range], Any | None], most: int) -> Iterator[tuple[range, Any | None]]:
    """Pieces of ``range(count)`` and what ``attempt`` gives for each; None for a single one that kills its process every time.

    Raises ProcessError when those are more than ``most``: then it is not the fault of what is worked on.
    """
    todo, deaths, lost = [range(count)] if count else [], 0, 0
    while todo:
        piece = todo.pop()
        found = attempt(piece)
        deaths = deaths + 1 if found is None and len(piece) == 1 else 0
        if found is not None:
            yield piece, found
        elif len(piece) > 1:
            todo += _cut(piece)[::-1]
        elif deaths < DEATHS:
            todo.append(piece)
        else:
            lost, deaths = lost + 1, 0
            if lost > most:
                raise ProcessError(
                    f"processes of the run died of more than {most} documents; look for lack of memory, then run the same "
                    "command again"
                )
            yield piece, None


def _cut(piece: range) -> list[range]:
    size = -(-len(piece) // CUTS)
    return [range(first, min(first + size, piece.stop)) for first in range(piece.start, piece.stop, size)]
