"""Which passages an index covers: those of a snapshot but for the ones the encoder can make no vector of."""

from dataclasses import dataclass

import numpy as np

from pipeline.embed.embeddings import contexts_of, quarantined_keys
from pipeline.errors import DataError
from pipeline.ingest.quarantine import put_quarantine
from pipeline.ingest.snapshot import ceiling, live_keys, parts
from pipeline.root.job import Event, Job
from pipeline.root.manifest import SnapshotManifest
from pipeline.root.shards import Keys, is_among


@dataclass(frozen=True)
class Coverage:
    """A snapshot and the sorted keys of its passages that are left out. Read once per run: others may write the store."""

    snapshot: SnapshotManifest
    left_out: Keys


def covered(job: Job, snapshot: SnapshotManifest) -> Coverage:
    """What an index of the snapshot covers, by what the embedding store says of the job's encoder. Writes nothing."""
    return Coverage(snapshot, _left_out(job, snapshot)[0])


def _left_out(job: Job, snapshot: SnapshotManifest) -> tuple[Keys, int]:
    """Sorted keys of the snapshot that have no vector, and how many keys it has; those are counted where one may have none."""
    found = quarantined_keys(job.embeddings, job.embedding_folder, job.embedding_records())
    if not len(found):
        return found, 0
    live = live_keys(job.storage, parts(job.storage, snapshot))
    return found[is_among(found, live)], len(live)


def cover(job: Job, snapshot: SnapshotManifest) -> Coverage:
    """What ``covered`` says; whatever is not goes to the quarantine of the run.

    Raises DataError when more passages are left out than the config accepts, or all. Those that are read together count as one.
    """
    left_out, total = _left_out(job, snapshot)
    rejected, skipped = snapshot.counts["rejected"], snapshot.counts["skipped_files"]
    where = put_quarantine(job, snapshot, left_out) if rejected or skipped or len(left_out) else ""
    if len(left_out):
        counts = f"{total} passages = {total - len(left_out)} with a vector + {len(left_out)} quarantined"
        job.say(Event("embed", f"{counts}, see {where}"))
        most = ceiling(job.config.corpus, total)
        if len(np.unique(contexts_of(left_out))) > most or len(left_out) == total:
            raise DataError(
                f"{where}: {len(left_out)} of {total} passages have no vector, the ceiling is {most}; "
                "use another model or precision, or raise corpus.max_bad_fraction / max_bad_rows"
            )
    elif where:
        job.say(Event("embed", f"what was rejected, {rejected} rows and {skipped} files, is in {where}"))
    return Coverage(snapshot, left_out)


def covered_keys(job: Job, coverage: Coverage) -> Keys:
    """Sorted distinct keys of the passages that have a vector and belong into the index."""
    keys = live_keys(job.storage, parts(job.storage, coverage.snapshot))
    return keys[~is_among(keys, coverage.left_out)]
