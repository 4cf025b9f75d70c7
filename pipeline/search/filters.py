"""Filters on the metadata of documents, as OpenAI's vector stores have them, and the columns that answer them.

``{"type": "eq", "key": "lang", "value": "de"}``; ``ne``, ``gt``, ``gte``, ``lt``, ``lte``, and ``in``, ``nin`` with a list;
``{"type": "and", "filters": [...]}``, ``or``. Numbers are compared as float64, texts by code points (so dates as ISO writes
them are in order), truth values only with eq, ne, in and nin. A value of another kind, a list, an object or no value is equal
to nothing and in no range; ``ne`` and ``nin`` are the opposites of ``eq`` and ``in``, so they let such documents pass.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, TypeAdapter, ValidationError

from pipeline.errors import ConfigError
from pipeline.ingest.corpus import SURROGATES

METADATA = "metadata.arrow"
MAX_DEPTH = 8
MAX_VALUES = 1000

Mask = npt.NDArray[np.bool_]


def _value(value: Any) -> Any:
    """What can be compared. Raises ValueError, which pydantic tells."""
    if not isinstance(value, bool | int | float | str):
        raise ValueError("expected a text, a number, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    if isinstance(value, str) and SURROGATES.search(value):
        raise ValueError("holds half of a surrogate pair, which is no character")
    return value


Text = Annotated[StrictStr, BeforeValidator(_value)]
Value = Annotated[bool | int | float | str, BeforeValidator(_value)]
Values = Annotated[list[Value], Field(min_length=1, max_length=MAX_VALUES)]
ORDERED = {"gt": pc.greater, "gte": pc.greater_equal, "lt": pc.less, "lte": pc.less_equal}


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Comparison(_Node):
    """One value against a column of ``corpus.metadata``."""

    type: Literal["eq", "ne", "gt", "gte", "lt", "lte"]
    key: Text
    value: Value


class Membership(_Node):
    """A column against several values."""

    type: Literal["in", "nin"]
    key: Text
    value: Values


class Compound(_Node):
    """All (and) or any (or) of some filters."""

    type: Literal["and", "or"]
    filters: Annotated[list["Filter"], Field(min_length=1, max_length=64)]


Filter = Annotated[Comparison | Membership | Compound, Field(discriminator="type")]
AnyFilter = Comparison | Membership | Compound
Compound.model_rebuild()


def parse_filter(wanted: str | dict[str, Any]) -> AnyFilter:
    """A filter from JSON or what JSON becomes; raises ConfigError with what is wrong in it."""
    adapter: TypeAdapter[AnyFilter] = TypeAdapter(Filter)
    try:
        return adapter.validate_json(wanted) if isinstance(wanted, str) else adapter.validate_python(wanted)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"filter {str(wanted)[:200]}: {where + ': ' if where else ''}{first['msg']}; "
            'expected such as {"type": "eq", "key": "lang", "value": "de"}'
        ) from error


def write_metadata(documents: Iterator[Any], columns: Sequence[str], file: Path) -> None:
    """Write the columns that filters ask. ``documents``: batches of (ordinal, metadata as JSON), as their files have them."""
    fields = [pa.field(_name(column, kind), form) for column in columns for kind, form in _FORMS.items()]
    schema = pa.schema([pa.field("ordinal", pa.int64(), nullable=False), *fields])
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, schema) as writer:
        for batch in documents:
            rows = [json.loads(text) if text else {} for text in batch.column("metadata").to_pylist()]
            arrays = [batch.column("ordinal")]
            for column in columns:
                values = [row.get(column) for row in rows]
                arrays += [pa.array([_of_kind(value, kind) for value in values], form) for kind, form in _FORMS.items()]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


class Metadata:
    """``metadata.arrow`` of a local artifact folder, memory-mapped: which documents, and which ordinals, pass a filter.

    In memory: 8 bytes for each document.
    """

    def __init__(self, file: Path, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self._table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self._ordinals = self._table.column("ordinal").to_numpy()

    def passing(self, wanted: AnyFilter, count: int, within: range | None = None) -> "Passing":
        """Which rows pass; ConfigError names a column that is not there. ``count``: ordinals of the artifact.

        ``within``: other ordinals pass nothing.
        """
        rows = self._mask(wanted, 0)
        ordinals = np.zeros(count, dtype=bool)
        ordinals[self._ordinals[rows]] = True
        if within is not None:
            ordinals[: within.start] = ordinals[within.stop :] = False
        return Passing(ordinals, rows, self._ordinals)

    def _mask(self, wanted: AnyFilter, depth: int) -> Mask:
        if isinstance(wanted, Compound):
            if depth >= MAX_DEPTH:
                raise ConfigError(f"filter: nested more than {MAX_DEPTH} deep; write it flatter")
            masks = [self._mask(each, depth + 1) for each in wanted.filters]
            return cast(Mask, (np.logical_and if wanted.type == "and" else np.logical_or).reduce(masks))
        if wanted.key not in self.columns:
            known = ", ".join(self.columns)
            raise ConfigError(f"filter: {wanted.key[:100]} is no column of corpus.metadata ({known}); take one of those")
        if isinstance(wanted, Membership):
            found = np.zeros(len(self._table), dtype=bool)
            for kind, form in _FORMS.items():
                values = [asked for value in wanted.value if (asked := _of_kind(value, kind)) is not None]
                if values:
                    found |= _true(pc.is_in(self._column(wanted.key, kind), value_set=pa.array(values, form)))
            return found if wanted.type == "in" else ~found
        (kind,) = (kind for kind in _FORMS if _of_kind(wanted.value, kind) is not None)
        column, value = self._column(wanted.key, kind), pa.scalar(_of_kind(wanted.value, kind), _FORMS[kind])
        if wanted.type in {"eq", "ne"}:
            found = _true(pc.equal(column, value))
            return found if wanted.type == "eq" else ~found
        if kind == "flag":
            raise ConfigError(f"filter: {wanted.type} {str(wanted.value).lower()}: truth values have no order; use eq or ne")
        return _true(ORDERED[wanted.type](column, value))

    def _column(self, key: str, kind: str) -> Any:
        return self._table.column(_name(key, kind))


class Passing:
    """What passes a filter. ``ordinals``: (n,) bool, those that any passing document has."""

    def __init__(self, ordinals: Mask, rows: Mask, row_ordinals: npt.NDArray[np.int64]) -> None:
        self.ordinals = ordinals
        self.count = int(np.count_nonzero(ordinals))
        self._rows = rows
        self._row_ordinals = row_ordinals

    def documents(self, ordinal: int) -> Mask:
        """Which of the documents of an ordinal pass, in the order of the documents."""
        first, end = np.searchsorted(self._row_ordinals, [ordinal, ordinal + 1])
        return self._rows[first:end]


_FORMS = {"number": pa.float64(), "text": pa.string(), "flag": pa.bool_()}


def _name(column: str, kind: str) -> str:
    return f"{column}:{kind}"


def _of_kind(value: Any, kind: str) -> Any:
    """The value where it is of this kind, else None."""
    if isinstance(value, bool):
        return value if kind == "flag" else None
    if isinstance(value, int | float):
        return _float(value) if kind == "number" else None
    return value if kind == "text" and isinstance(value, str) else None


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _true(found: Any) -> Mask:
    """Where a comparison holds; a missing value holds nothing."""
    return cast(Mask, pc.fill_null(found, False).to_numpy(zero_copy_only=False))
