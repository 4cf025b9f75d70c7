"""Ingest units: planning what one ingest task reads.

A unit is named by the hash of what it reads (file, content, columns, splitting), so a file that did not change is never
read again.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.config import Config, StoreConfig
from pipeline.config_what import PassagesConfig
from pipeline.fingerprint import fingerprint
from pipeline.ingest.corpus import choose_files
from pipeline.ingest.listing import FileInfo, content_hash, list_files
from pipeline.ingest.parquet_input import row_group_bytes
from pipeline.ingest.slices import Slice
from pipeline.root import layout
from pipeline.root.manifest import InputFile
from pipeline.root.storage import Storage

UNIT_BYTES = 64 << 20
"""Input per ingest unit. Constant, because it decides the names of units and so what is done again."""
SMALL_BYTES = UNIT_BYTES // 8
"""Smaller files are read together, in units of at most about so much: some seconds of work each."""


class IngestUnit(BaseModel):
    """What one ingest task reads. ``limit``: at most so many documents (a run with ``--limit``).

    ``before``: names of units that read earlier contents of the same files, whose passages need not be counted again.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    slices: tuple[Slice, ...]
    limit: int | None = None
    before: tuple[str, ...] = ()


ALWAYS_NAMED = ("long", "overlap")
"""The other keys of ``passages`` decide the name of a unit only where they are not as they always were."""


@dataclass(frozen=True)
class CorpusFiles:
    """The corpus files with their formats, by URI, and the URIs of the listed files that are none of it."""

    chosen: list[tuple[InputFile, str]]
    ignored: tuple[str, ...]


def identify_files(config: Config, known: Iterable[InputFile] = ()) -> CorpusFiles:
    """The corpus files, each with its format and a content identity: the etag, or on local disk the hash.

    A local file whose size and modification time are those of ``known`` is not hashed again.
    """
    seen = {(file.uri, file.size_bytes, file.stamp): file.content for file in known}
    chosen, ignored = find_files(config)
    return CorpusFiles([(_identified(info, seen), file_format) for info, file_format in chosen], ignored)


def find_files(config: Config) -> tuple[list[tuple[FileInfo, str]], tuple[str, ...]]:
    """The corpus files as they are listed, each with its format, and the URIs of the listed files that are none of it."""
    listed = list_files(config.corpus.uri, config.store)
    chosen = choose_files([file for file in listed if not file.hidden], config.corpus)
    taken = {file.uri for file, _ in chosen}
    return chosen, tuple(file.uri for file in listed if file.uri not in taken)


def deletes_config(config: Config) -> Config:
    """The config whose corpus are the files of ``corpus.deletes``."""
    return config.model_copy(
        update={"corpus": config.corpus.model_copy(update={"uri": config.corpus.deletes, "format": "auto"})}
    )


def plan_units(files: Sequence[tuple[InputFile, str]], config: Config, space: str) -> list[IngestUnit]:
    """Cut large Parquet files into runs of row groups and pack small files together, stably.

    Small files go to buckets by the hash of their URI, so that one changed file redoes one bucket.
    """
    small = [(file, kind) for file, kind in files if file.size_bytes < SMALL_BYTES]
    buckets = 1 << (sum(file.size_bytes for file, _ in small) // SMALL_BYTES).bit_length()
    packed: dict[int, list[Slice]] = {}
    units: list[tuple[Slice, ...]] = []
    for file, kind in files:
        part = Slice(uri=file.uri, size_bytes=file.size_bytes, stamp=file.stamp, content=file.content, format=kind)
        if file.size_bytes < SMALL_BYTES:
            packed.setdefault(int(fingerprint(file.uri, length=8), 16) % buckets, []).append(part)
        elif kind == "parquet" and file.size_bytes > UNIT_BYTES:
            units += [(run,) for run in _row_group_runs(part, config.store)]
        else:
            units.append((part,))
    units += [tuple(slices) for _, slices in sorted(packed.items())]
    return [IngestUnit(name=_unit_name(slices, config, space, None), slices=slices) for slices in units]


def follow(units: Sequence[IngestUnit], earlier: Iterable[InputFile], config: Config, space: str) -> list[IngestUnit]:
    """The units, each with those that read its files when they were as ``earlier``: a full export repeats most of its rows."""
    kinds = {part.uri: part.format for unit in units for part in unit.slices}
    known = [(file, kinds[file.uri]) for file in earlier if file.uri in kinds]
    whole = [(file, kind) for file, kind in known if kind != "parquet" or file.size_bytes <= UNIT_BYTES]
    readers = {part.uri: unit.name for unit in plan_units(whole, config, space) for part in unit.slices}
    before = [{readers[part.uri] for part in unit.slices if part.uri in readers} - {unit.name} for unit in units]
    return [unit.model_copy(update={"before": tuple(sorted(names))}) for unit, names in zip(units, before, strict=True)]


def limited(unit: IngestUnit, limit: int, config: Config, space: str) -> IngestUnit:
    """The same unit, cut after ``limit`` documents: other content, so another name."""
    return unit.model_copy(update={"name": _unit_name(unit.slices, config, space, limit), "limit": limit})


def reading(config: Config, space: str) -> dict[str, Any]:
    """What decides how files become passages, whatever the files: the part of a unit's name that all units share."""
    passages, plain = config.passages.model_dump(mode="json"), PassagesConfig().model_dump(mode="json")
    return {
        "corpus": config.corpus.model_dump(include={"uri", "id", "text", "title", "metadata"}, mode="json"),
        "skips": config.corpus.on_error == "skip_file",
        "passages": {key: value for key, value in passages.items() if key in ALWAYS_NAMED or value != plain[key]},
        "space": space,
    }


def count_done(storage: Storage, units: Iterable[IngestUnit]) -> int:
    """How many of the units have their record, and so need not be read again."""
    return sum(storage.exists(layout.ingest_record(unit.name)) for unit in units)


def _identified(info: FileInfo, seen: dict[tuple[str, int, str], str]) -> InputFile:
    known = seen.get((info.uri, info.size_bytes, info.stamp))
    content = known if known is not None else content_hash(info)
    return InputFile(uri=info.uri, size_bytes=info.size_bytes, stamp=info.stamp, content=content)


def _row_group_runs(part: Slice, store: StoreConfig) -> Iterator[Slice]:
    first, total = 0, 0
    sizes = row_group_bytes(part, store)
    for group, size in enumerate(sizes):
        total += size
        if total >= UNIT_BYTES or group == len(sizes) - 1:
            yield part.model_copy(update={"first_row_group": first, "end_row_group": group + 1})
            first, total = group + 1, 0


def _unit_name(slices: Sequence[Slice], config: Config, space: str, limit: int | None) -> str:
    what: dict[str, Any] = {"slices": [part.model_dump(exclude={"stamp"}) for part in slices], "limit": limit}
    return fingerprint({"ingest": 3, **what, **reading(config, space)})
