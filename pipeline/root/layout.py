"""Every path under a root, and nothing else.

Snapshots, embeddings, trained indexes and index shards are shared by all runs, because their names are
hashes of what they were made from. Artifacts and log entries belong to one writer: its epoch is in the name.
"""

LOG = "log"
BEATS = "beats"
PASSAGES = "passages"
SNAPSHOTS = "snapshots"
EMBEDDINGS = "embeddings"
RUNS = "runs"
EVENTS = "events"


def ingest_record(unit: str) -> str:
    """The record of one ingest unit."""
    return f"{PASSAGES}/{unit}.json"


def snapshot(snapshot_id: str) -> str:
    """The manifest of a snapshot."""
    return f"{SNAPSHOTS}/{snapshot_id}.json"


def trained(fingerprint: str) -> str:
    """The folder of one trained index."""
    return f"trained/{fingerprint}"


def index_shards(trained_fingerprint: str) -> str:
    """The index shards made with one trained index."""
    return f"shards/{trained_fingerprint}"


def artifact(version: str) -> str:
    """The folder of one artifact."""
    return f"artifacts/{version}"


def log_entry(number: int) -> str:
    """Entry ``number`` of the log."""
    return f"{LOG}/{number:012d}.json"


def beat(epoch: int, sequence: int) -> str:
    """One heartbeat of the writer that acquired the root in slot ``epoch``."""
    return f"{BEATS}/{epoch:012d}/{sequence:012d}.json"


def run(run_id: str, name: str) -> str:
    """A file of one run: ``plan.json``, ``merge.json``, ``evaluation-<hash>.json``, ``result.json``."""
    return f"{RUNS}/{run_id}/{name}"


def events(run_id: str) -> str:
    """The folder of what a run told while it went on."""
    return run(run_id, EVENTS)
