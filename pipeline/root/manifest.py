"""Records, manifests and log entries: the JSON that makes data exist.

A record is created after its data, a manifest after its records, a commit after everything. What no record
names does not exist. Every kind carries a format number; another number is refused, never guessed at.
"""

from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config_what import Kind, Rescore
from pipeline.errors import VerificationError
from pipeline.fingerprint import sha256
from pipeline.root.storage import Storage

FORMAT = 4
"""One number (the default of ``Document.format``) for all files under a root: they change together before 1.0."""


class Values(BaseModel):
    """Immutable; unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(Values):
    """JSON with a format number."""

    format: Literal[4] = 4


class DataFile(Values):
    """A finished file: trusted by its size and hash, not by being there."""

    name: str
    rows: int
    size_bytes: int
    sha256: str


class Record(Document):
    """One finished unit of work, beside its data, created if absent. ``documents``: of an ingest unit, who they are.

    ``counts`` and ``timings_s`` say what it took, ``rates`` how well the machine was used: ``mfu``, the share of its
    matrix-product rate, and for int8 the cosine to FP32. ``machine``: what computed, its kind and size.
    """

    unit: str
    files: tuple[DataFile, ...]
    rejected: DataFile | None = None
    documents: DataFile | None = None
    counts: dict[str, int] = Field(default_factory=dict)
    timings_s: dict[str, float] = Field(default_factory=dict)
    rates: dict[str, float] = Field(default_factory=dict)
    machine: str | None = None


class InputFile(Values):
    """An input file of a snapshot. ``stamp`` tells cheaply whether it changed, ``content`` is its identity."""

    uri: str
    size_bytes: int
    stamp: str
    content: str


class SnapshotManifest(Document):
    """The corpus at one moment: the ingest units it consists of, oldest generation first, and their rows that do not count.

    ``read_by``: fingerprint of how files were read and cut. ``rejected``: rows that are bad only beside others.
    """

    snapshot: str
    files: tuple[InputFile, ...]
    generations: tuple[tuple[str, ...], ...]
    read_by: str
    masked: DataFile | None
    rejected: DataFile | None
    counts: dict[str, int]
    limit: int | None = None


class TrainedManifest(Document):
    """A trained index: its file and how it came to be."""

    trained: str
    encoder: str
    file: DataFile | None
    kind: Kind
    dim: int
    nlist: int
    m: int
    nbits: int
    opq: bool
    factory: str
    passages: int
    train_vectors: int
    why: str
    request: dict[str, Any]
    timings_s: dict[str, float] = Field(default_factory=dict)


class OperatingPoint(Values):
    """One measured setting of the search: recall@k against milliseconds per query, one query at a time."""

    nprobe: int
    rescore: int
    recall: float
    latency_ms: float


class Histogram(Values):
    """``counts[i]`` values lie from ``edges[i]`` on, under ``edges[i + 1]``; the last bin has its upper edge."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class Health(Values):
    """How well a trained index fits the vectors in it; see pipeline.ann.drift. ``sizes``: vectors per list."""

    lists: int
    empty_lists: int
    imbalance: float
    quantization_error: float | None
    sizes: Histogram | None = None


class Evaluation(Document):
    """What the index finds of what exact search over the same vectors finds. ``asked``: fingerprint of what was asked for.

    ``health``: None for an index without inverted lists and for a tiny corpus.
    """

    asked: str
    k: int
    queries: int
    source: str
    recall: float
    recall_low: float
    recall_high: float
    gated: bool
    point: OperatingPoint
    points: tuple[OperatingPoint, ...]
    health: Health | None = None
    labelled: dict[str, dict[str, float]] | None = None


class IndexPart(Values):
    """An index file of an artifact: the vectors of ordinals ``first`` to ``first + count``; ``mapped``: FAISS can map it."""

    name: str
    first: int
    count: int
    mapped: bool


class DocumentsFile(Values):
    """A file of the documents of an artifact: ``rows`` rows, of ordinals from ``first`` on."""

    name: str
    first: int
    rows: int


class Merged(Document):
    """The data files of an artifact and the embedding shards in it, by unit name (``records``).

    ``lexical``: language of the BM25 index, None where there is none; ``columns``: metadata that filters can ask for.
    """

    version: str
    dim: int
    files: dict[str, DataFile]
    parts: tuple[IndexPart, ...]
    documents: tuple[DocumentsFile, ...]
    rescore: Rescore
    lexical: str | None = None
    columns: tuple[str, ...] = ()
    records: dict[str, str]
    counts: dict[str, int]

    @property
    def index_bytes(self) -> int:
        """Of all its index files."""
        return sum(self.files[part.name].size_bytes for part in self.parts)

    @property
    def bytes_per_vector(self) -> float:
        """Of the index files: code, id, and a share of centroids and codebooks."""
        return round(self.index_bytes / max(1, self.counts["passages"]), 1)


class MergeRecord(Merged):
    """Written by merge, read by evaluate and publish. ``memory_bytes``: of its process at most, with libraries."""

    timings_s: dict[str, float] = Field(default_factory=dict)
    memory_bytes: int | None = None


class ArtifactManifest(Merged):
    """The servable folder: every file with its hash, every record it was made from, what it is and how good.

    ``baseline``: evaluation of the first artifact with this trained index; ``verdict``: whether the trained index still
    fitted, in words; ``drifted``: the measures over their limits. ``report``: files about the artifact, which tell how long
    things took; they are no part of its identity.
    """

    content: str
    created: str
    snapshot: str
    limit: int | None
    encoder: dict[str, Any]
    index: TrainedManifest
    evaluation: Evaluation
    baseline: Evaluation
    verdict: str
    drifted: tuple[str, ...] = ()
    config: dict[str, Any]
    versions: dict[str, str]
    report: dict[str, DataFile] = Field(default_factory=dict)
    checksum: str = ""

    @property
    def all_files(self) -> dict[str, DataFile]:
        """What lies in the folder beside the manifest."""
        return self.files | self.report

    def sealed(self) -> "ArtifactManifest":
        """A copy whose checksum covers its JSON."""
        return self.model_copy(update={"checksum": sha256(to_bytes(self.model_copy(update={"checksum": ""})))})

    def is_sealed(self, data: bytes) -> bool:
        """Whether every byte of the JSON it was parsed from is what was sealed."""
        return self.checksum == sha256(data.replace(self.checksum.encode(), b""))


AnyDocument = TypeVar("AnyDocument", bound=Document)


def to_bytes(document: BaseModel) -> bytes:
    """Indented JSON, as people read it."""
    return document.model_dump_json(indent=1).encode() + b"\n"


def parse(kind: type[AnyDocument], data: bytes, where: str) -> AnyDocument:
    """Parse and check; raises VerificationError naming the file and the field that does not fit."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "content"
        raise VerificationError(
            f"{where}: not a {kind.__name__} of format {FORMAT}, {field}: {first['msg']}; "
            "it is damaged or was written by another version of vecmill"
        ) from error


def load(kind: type[AnyDocument], storage: Storage, path: str) -> AnyDocument | None:
    """Read a document; None where there is none."""
    try:
        data = storage.read(path)
    except FileNotFoundError:
        return None
    return parse(kind, data, storage.at(path))


def put_data(storage: Storage, stem: str, suffix: str, data: bytes, rows: int) -> DataFile:
    """Write immutable bytes under a name that carries their hash: ``<stem>-<sha256[:16]><suffix>``."""
    digest = sha256(data)
    path = f"{stem}-{digest[:16]}{suffix}"
    storage.put(path, data)
    return DataFile(name=PurePosixPath(path).name, rows=rows, size_bytes=len(data), sha256=digest)


def put_record(storage: Storage, folder: str, record: Record) -> Record:
    """Create the record of a finished unit; if another writer was first, its record is the one that counts."""
    path = f"{folder}/{record.unit}.json"
    if storage.create(path, to_bytes(record)):
        return record
    winner = load(Record, storage, path)
    if winner is None:
        raise VerificationError(f"{storage.at(path)}: exists but cannot be read; does this storage support create-if-absent?")
    return winner


def list_records(storage: Storage, folder: str) -> dict[str, Record]:
    """Every record in a folder by unit name, each parsed and checked, in name order."""
    paths = [path for path in storage.list(folder) if path.endswith(".json")]
    records = (load(Record, storage, path) for path in paths)
    return {record.unit: record for record in records if record is not None}
