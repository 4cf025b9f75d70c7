"""A run that ends at its n-th write, for every n and every way to end there; then the same command again.

The invariants are those of a commit protocol: what is live is always whole; a rerun without any cleaning up ends where an
undisturbed run ends; what is left over is found by gc.
"""

import shutil
from pathlib import Path

import pytest

from pipeline.artifacts.artifact import verify
from pipeline.artifacts.audit import audit
from pipeline.artifacts.publish import live_artifact
from pipeline.errors import StorageError
from pipeline.operations import upkeep
from pipeline.root import layout
from pipeline.root.log import Log
from pipeline.root.storage import Storage
from pipeline.run import reindex
from tests.conftest import make_config, sentences, stored_documents, write_jsonl
from tests.faults.alone import alone as alone  # a fixture

pytestmark = pytest.mark.usefixtures("alone")

WAYS = ("before", "torn", "refused", "reply lost")
"""Killed after a write leaves what killed before the next one leaves."""
KILLED = {"before", "torn"}
FATES = ("documents", "rejected", "duplicates", "replaced", "deleted")
WRITES = ("put", "create", "adopt")
TTL_S = 0.1
TIMING = {
    "created",
    "version",
    "timings_s",
    "checksum",
    "points",
    "latency_ms",
    "point",
    "asked",
    "config",
    "verdict",
    "report",
}
"""What may differ between two runs to the same end: when, under which epoch, how fast. A report tells how fast."""


class Killed(BaseException):
    """The process is gone: nothing catches this, and nothing is written afterwards."""


class Writes:
    """Counts the writes of every Storage; the one numbered ``fatal`` ends in the given way."""

    def __init__(self, monkeypatch, fatal=None, way="before"):
        self.count = 0
        self.fatal, self.way = fatal, way
        self.is_dead = False
        for name in WRITES:
            monkeypatch.setattr(Storage, name, self._counted(getattr(Storage, name)))

    def _counted(self, write):
        def counted(storage, path, data):
            if path.startswith(layout.BEATS) or f"/{layout.EVENTS}/" in path:  # of a thread: they come when they come
                if self.is_dead:
                    raise StorageError("the process is gone")
                return write(storage, path, data)
            if self.is_dead:
                raise Killed
            self.count += 1
            if self.count - 1 != self.fatal:
                return write(storage, path, data)
            self.is_dead = self.way in KILLED
            if self.way == "torn":
                half = data.read_bytes() if isinstance(data, Path) else data
                folder = Path(storage.at(path)).parent
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f".tmp-{self.count}").write_bytes(half[: len(half) // 2])
            if self.way == "reply lost":
                write(storage, path, data)
            raise Killed if self.is_dead else StorageError(f"{storage.at(path)}: the storage is away")

        return counted


def config_of(folder):
    index = {"kind": "ivfpq", "nlist": 4, "m": 16}
    compute = {"lease_ttl_s": TTL_S, "unit_passages": 24}
    return make_config(folder / "root", folder / "corpus", index=index, compute=compute, publish={"max_shrink": 1})


def first_corpus(folder):
    for number in range(2):
        write_jsonl(folder / "corpus" / f"{number}.jsonl", sentences(24, start=24 * number))


def second_corpus(folder):
    """One file as it was, one changed: rows gone, rows new, one bad; one more."""
    rows = sentences(60)
    write_jsonl(folder / "corpus" / "1.jsonl", [*rows[30:48], {"id": "empty", "text": ""}])
    write_jsonl(folder / "corpus" / "2.jsonl", rows[47:])


def outcome(config):
    """What is live: its manifest without what may differ, its documents, and what is left after a gc that keeps only that."""
    storage = Storage(config.root)
    live = live_artifact(storage)
    root = Path(config.root)
    rows = stored_documents(root / layout.artifact(live.version)).drop_columns("source_uri").to_pylist()
    assert audit(config, 100).passages == live.counts["passages"]
    upkeep.collect(config, keep=1, grace_s=-1)
    verify(storage, layout.artifact(live.version))
    run = next(entry.run for entry in Log(storage).refresh().backwards() if entry.kind == "commit")
    files = sorted(
        str(path.relative_to(root)).replace(live.version, "live").replace(run, "run")
        for path in root.rglob("*")
        if path.is_file() and not {"log", layout.BEATS, layout.EVENTS} & {*path.relative_to(root).parts}
    )
    return without_timing(live.model_dump(mode="json")), rows, files


def without_timing(value):
    if isinstance(value, dict):
        return {
            name: without_timing(item)
            for name, item in value.items()
            if name not in TIMING and not (name == "uri" or name.endswith("_uri"))
        }
    return [without_timing(item) for item in value] if isinstance(value, list) else value


def check_log(config):
    """No gap, no fork: every commit under the last acquire, each naming the one before it."""
    epoch = parent = None
    entries = Log(Storage(config.root)).refresh().entries
    assert len(entries) == len(list((Path(config.root) / "log").glob("*.json")))
    for number, entry in enumerate(entries):
        assert entry.number == number
        if entry.kind == "acquire":
            epoch = entry.epoch
        assert entry.epoch == epoch
        if entry.kind == "commit":
            assert entry.parent == parent
            parent = entry.number


@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_live", [False, True], ids=["first run", "second run"])
def test_a_run_that_ends_at_any_write_is_finished_by_the_same_command(tmp_path, monkeypatch, is_live, way):
    work, template = tmp_path / "work", tmp_path / "template"
    config, storage = config_of(work), Storage(str(work / "root"))
    first_corpus(work)
    if is_live:
        reindex(config)
        second_corpus(work)
    shutil.copytree(work, template)
    with monkeypatch.context() as patch:
        undisturbed = Writes(patch)
        reindex(config)
    expected = outcome(config)
    assert undisturbed.count > 10
    for number in range(undisturbed.count):
        shutil.rmtree(work)
        shutil.copytree(template, work)
        with monkeypatch.context() as patch:
            Writes(patch, number, way)
            with pytest.raises((Killed, StorageError)):
                reindex(config)
        found = live_artifact(storage)
        assert found is not None or not is_live
        if found is not None:
            verify(storage, layout.artifact(found.version))
        counts = reindex(config).snapshot.counts
        assert counts["rows"] == sum(counts.get(name, 0) for name in FATES)
        check_log(config)
        for what, mine, theirs in zip(("manifest", "documents", "files"), outcome(config), expected, strict=True):
            assert mine == theirs, f"write {number}, {way}: {what}"
