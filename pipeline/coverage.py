"""Which passages an index covers: those of a snapshot but for the ones the encoder can make no vector of."""

from dataclasses import dataclass

import numpy as np

from pipeline.embeddings import quarantined_keys
from pipeline.errors import DataError
from pipeline.job import Event, Job
from pipeline.manifest import SnapshotManifest
from pipeline.shards import KEY_DTYPE, Keys, is_among
from pipeline.snapshot import ceiling, live_keys, parts


@dataclass(frozen=True)
class Coverage:
    """A snapshot and the sorted keys of its passages that are left out. Read once per run: others may write the store."""

    snapshot: SnapshotManifest
    left_out: Keys


def cover(job: Job, snapshot: SnapshotManifest) -> Coverage:
    """What an index of the snapshot covers. Raises DataError when more is left out than the config accepts, or all."""
    records = job.embedding_records()
    if not any(record.rejected for record in records):
        return Coverage(snapshot, np.empty(0, dtype=KEY_DTYPE))
    found = quarantined_keys(job.embeddings, job.embedding_folder, records)
    live = live_keys(job.storage, parts(job.storage, snapshot))
    found = found[is_among(found, live)]
    most = ceiling(job.config.corpus, len(live))
    if len(found):
        where = f"{job.embeddings.at(job.embedding_folder)}/*.rejected.parquet"
        counts = f"{len(live)} passages = {len(live) - len(found)} with a vector + {len(found)} quarantined"
        job.say(Event("embed", f"{counts}, see {where}"))
        if len(found) > most or len(found) == len(live):
            raise DataError(
                f"{where}: {len(found)} of {len(live)} passages have no vector, the ceiling is {most}; "
                "use another model or precision, or raise corpus.max_bad_fraction / max_bad_rows"
            )
    return Coverage(snapshot, found)


def covered_keys(job: Job, coverage: Coverage) -> Keys:
    """Sorted distinct keys of the passages that have a vector and belong into the index."""
    keys = live_keys(job.storage, parts(job.storage, coverage.snapshot))
    return keys[~is_among(keys, coverage.left_out)]
