"""Audit: every live passage is in the artifact exactly once, under its own ordinal, with its own text, vector and code.

``verify`` proves that files are the bytes that were written; this proves that what was written belongs together, from
the snapshot's texts to the entries of the inverted lists.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.ann import recall
from pipeline.ann.collection import Collection, open_collection
from pipeline.ann.index import Trained
from pipeline.ann.index_plan import RABITQ_FACTOR_BYTES, is_coded
from pipeline.artifacts.indexing import stored_vectors
from pipeline.artifacts.live import config_spec, spec_of
from pipeline.artifacts.merging import local_files, trained_bytes
from pipeline.artifacts.publish import require_live
from pipeline.config import Config
from pipeline.embed.coverage import covered, covered_keys
from pipeline.errors import VerificationError
from pipeline.ingest.passages import passage_key
from pipeline.ingest.snapshot import snapshot_of
from pipeline.root.job import Job, plan_job
from pipeline.root.manifest import ArtifactManifest
from pipeline.root.shards import KEY_DTYPE, Keys
from pipeline.search.document_files import Documents

MENDING = "run vecmill index --rebuild"
MAX_OTHER_CODES = 0.01
"""Codes that may differ when a vector is encoded again: two centroids equally near, sums in another order."""


@dataclass(frozen=True)
class Audit:
    """What was compared: all passages and document rows; vectors and codes of a sample. No code is kept by a flat index."""

    artifact: str
    passages: int
    document_rows: int
    vectors: int
    codes: int
    other_codes: int


def audit(config: Config, sample: int) -> Audit:
    """Check the live artifact against the stores it was made from; raises VerificationError at the first thing wrong.

    Takes no lock and writes nothing under the root.
    """
    job = plan_job(config, on_gpu=False)
    manifest = require_live(job.storage)
    config_spec(config, manifest)
    job = replace(job, spec=spec_of(manifest))
    live = covered_keys(job, covered(job, snapshot_of(job.storage, manifest)))
    where = job.storage.at(f"artifacts/{manifest.version}")
    if len(live) != manifest.counts["passages"]:
        raise VerificationError(f"{where}: {manifest.counts['passages']} passages, its snapshot has {len(live)}; {MENDING}")
    chosen = recall.training_sample(live, sample, config.index.seed, np.empty(0, dtype=np.int64))
    with local_files(job, manifest) as folder:
        rows = _documents(Documents(folder, manifest.documents), live, where, late=config.passages.late)
        collection = open_collection(folder, manifest)
        _vectors(job, collection, live, chosen, where)
        codes, others = _entries(job, manifest, collection, chosen, where)
    return Audit(manifest.version, len(live), rows, len(chosen), codes, others)


def _documents(documents: Documents, live: Keys, where: str, *, late: bool) -> int:
    """Every row's text has the key that its ordinal stands for, or ends as that where others decide it too (``late``).

    And every ordinal has a row.
    """
    seen = np.zeros(len(live), dtype=bool)
    rows = 0
    for name, first, batch in documents.batches(["ordinal", "text"]):
        ordinals = batch.column("ordinal").to_numpy()
        keys = np.array([passage_key(text.as_py()) for text in batch.column("text")], dtype=KEY_DTYPE)
        stood_for = live[ordinals.clip(0, len(live) - 1)]
        differs = _of_text(stood_for) != _of_text(keys) if late else stood_for != keys
        wrong = np.flatnonzero((ordinals < 0) | (ordinals >= len(live)) | differs)
        if len(wrong):
            raise VerificationError(
                f"{where}/{name}: row {first + int(wrong[0])} is not the text of passage {ordinals[wrong[0]]} of its snapshot; "
                f"{MENDING}"
            )
        seen[ordinals] = True
        rows += len(batch)
    if not seen.all():
        raise VerificationError(f"{where}: passage {int(np.argmin(seen))} has no row among its documents; {MENDING}")
    return rows


def _of_text(keys: Keys) -> npt.NDArray[np.uint32]:
    """The bytes of keys that their text alone decides, (n,)."""
    return np.ascontiguousarray(keys).view(np.uint32).reshape(len(keys), -1)[:, -1]


def _vectors(job: Job, collection: Collection, live: Keys, chosen: recall.Ordinals, where: str) -> None:
    """The sampled vectors are those that the embedding store has for these passages."""
    stored = stored_vectors(job, live[chosen])
    wrong = np.flatnonzero((collection.vectors[chosen] != stored).any(axis=1))
    if len(wrong):
        raise VerificationError(f"{where}: vector {chosen[wrong[0]]} is not that of the embedding store; {MENDING}")


def _entries(
    job: Job, manifest: ArtifactManifest, collection: Collection, chosen: recall.Ordinals, where: str
) -> tuple[int, int]:
    """Every ordinal is in the index once; sampled ones in the list and with the code of their vector. Counts, and of others."""
    sample = chosen if is_coded(manifest.index.kind) else chosen[:0]
    times, codes = collection.index.contents(sample)
    if len(times) != len(collection.vectors) or (times != 1).any():
        wrong = int(np.argmax(times != 1)) if len(times) == len(collection.vectors) else len(times)
        raise VerificationError(f"{where}: passage {wrong} is not in the index exactly once; {MENDING}")
    if not len(sample):
        return 0, 0
    trained = Trained(trained_bytes(job.storage, manifest.index))
    expected = trained.encode(collection.vectors[sample].astype(np.float32), where)
    width = codes.shape[1] - (RABITQ_FACTOR_BYTES if manifest.index.kind == "ivfrabitq" else 0)  # floats: sums in any order
    other = (codes[:, :width] != expected[:, :width]).any(axis=1)
    if other.sum() > max(1, MAX_OTHER_CODES * len(sample)):
        raise VerificationError(
            f"{where}: {int(other.sum())} of {len(sample)} index entries have not the list and code of their vector, the first "
            f"is passage {sample[np.argmax(other)]}; {MENDING}"
        )
    return len(codes), int(other.sum())
