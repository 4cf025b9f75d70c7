"""What every stage of a run shares: the config, the storages, the resolved encoder, and a way to tell progress."""

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from pipeline import layout
from pipeline.config import Config
from pipeline.manifest import Record, list_records
from pipeline.model import EncoderSpec, ModelFolder, find_model, resolve_spec
from pipeline.numerics import resolve_backend, resolve_precision
from pipeline.storage import Storage


@dataclass(frozen=True)
class Event:
    """Something a person or a log wants to know. ``done`` of ``total`` units; ``counts`` are sums so far."""

    stage: str
    message: str = ""
    done: int = 0
    total: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON lines."""
        return asdict(self)


Say = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """One run. ``run_id`` names its records; nothing else depends on it."""

    config: Config
    spec: EncoderSpec
    model: ModelFolder
    storage: Storage
    embeddings: Storage
    run_id: str
    say: Say

    @property
    def embedding_folder(self) -> str:
        """Folder of this encoder's shards in the embedding store."""
        return self.spec.fingerprint

    def embedding_records(self) -> list[Record]:
        """Records of this encoder's shards, by unit name."""
        return list(list_records(self.embeddings, self.embedding_folder).values())


def plan_job(config: Config, *, on_gpu: bool, say: Say = lambda _: None, run_id: str | None = None) -> Job:
    """Resolve the encoder for encoders with or without GPUs and open the storages. Writes nothing."""
    folder = find_model(config.encoder.model, config.encoder.revision)
    precision = resolve_precision(config.encoder.precision, on_gpu=on_gpu, overflows=folder.overflows)
    backend = resolve_backend(config.encoder.backend, folder, on_gpu=on_gpu, precision=precision)
    settings = config.encoder.model_dump(exclude={"precision", "backend"})
    spec, model = resolve_spec(**settings, precision=precision, backend=backend)
    storage = Storage(config.root, config.store)
    store = config.store.embeddings or storage.at(layout.EMBEDDINGS)
    return Job(config, spec, model, storage, Storage(store, config.store), run_id or new_run_id(), say)


def new_run_id() -> str:
    """Name of a run: when it began, and something that no other has."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
