"""Any order of changes, runs, crashes, rollbacks, collections and rival writers: what is live is always one whole corpus."""

import contextlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pipeline.artifacts.artifact import verify
from pipeline.artifacts.publish import commit, live_artifact
from pipeline.errors import ConfigError, LockedError, StorageError
from pipeline.operations import upkeep
from pipeline.root import layout
from pipeline.root.log import Log, writing
from pipeline.root.storage import Storage
from pipeline.run import reindex
from pipeline.search.partition import LocalPartition
from tests.conftest import make_config, sentences, stored_documents, write_jsonl
from tests.faults.alone import alone as alone  # a fixture
from tests.faults.test_crash_points import WAYS, Killed, Writes, check_log

TTL_S = 0.1
PATIENCE_S = 3.0
"""A holder that is alive shows it within that on the busiest machine; who watches goes on at its first beat."""
MAX_DOCUMENTS = 12
EXAMPLES, STEPS = int(os.environ.get("VECMILL_EXAMPLES", "20")), 14


class Root(RuleBasedStateMachine):
    """``corpus`` is what a run would read; ``published``: the corpora that were live, by artifact."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="vmstate"))
        compute = {"lease_ttl_s": TTL_S, "unit_passages": 4}
        self.config = make_config(
            self.folder / "root", self.folder / "corpus", index={"kind": "flat"}, compute=compute, publish={"max_shrink": 1}
        )
        self.storage = Storage(self.config.root)
        self.corpus: dict[str, str] = {}
        self.published: dict[str, dict[str, str]] = {}
        self.live: str | None = None
        self.reader: tuple[str, LocalPartition] | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize()
    def some_documents(self) -> None:
        self.corpus = {f"d{number}": f"The first text of document {number}." for number in range(3)}
        self._write()

    @rule(number=st.integers(0, MAX_DOCUMENTS - 1), text=st.integers(0, 5))
    def set_document(self, number: int, text: int) -> None:
        self.corpus[f"d{number}"] = f"Text {text} of document {number if text else 'unknown'}."
        self._write()

    @precondition(lambda self: len(self.corpus) > 1)
    @rule(data=st.data())
    def remove_document(self, data: st.DataObject) -> None:
        del self.corpus[data.draw(st.sampled_from(sorted(self.corpus)))]
        self._write()

    @rule()
    def run(self) -> None:
        outcome = reindex(self.config)
        self._went_live(outcome.live.version)
        again = reindex(self.config)
        assert (again.encoded, again.committed) == (0, False)

    @rule(fatal=st.integers(0, 20), way=st.sampled_from(WAYS))
    def crash(self, fatal: int, way: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            Writes(patch, fatal, way)
            with contextlib.suppress(Killed, StorageError):
                reindex(self.config)
        found = live_artifact(self.storage)
        if found is not None and found.version not in self.published:
            self._went_live(found.version)
        elif found is not None:  # nothing new went live, or an artifact of this corpus was live before
            self.live = found.version

    @precondition(lambda self: self.live is not None)
    @rule()
    def roll_back(self) -> None:
        try:
            self.live = upkeep.rollback(self.config, None).version
        except ConfigError as error:
            assert "no earlier artifact" in str(error)
            return
        assert self.live in self.published

    @rule(keep=st.integers(1, 3))
    def collect(self, keep: int) -> None:
        upkeep.collect(self.config, keep=keep, grace_s=-1)

    @rule()
    def rival(self) -> None:
        compute = self.config.compute.model_copy(update={"lease_ttl_s": PATIENCE_S})
        patient = self.config.model_copy(update={"compute": compute})
        with writing(self.storage, "rival", TTL_S), pytest.raises(LockedError, match="another run is writing"):
            reindex(patient)

    @precondition(lambda self: self.live is not None)
    @rule()
    def open_reader(self) -> None:
        manifest = live_artifact(self.storage)
        folder = Path(self.storage.at(layout.artifact(manifest.version)))
        self.reader = manifest.version, LocalPartition(folder, manifest)

    @invariant()
    def what_is_live_is_whole(self) -> None:
        found = live_artifact(self.storage)
        assert (found.version if found else None) == self.live
        check_log(self.config)
        if found is None:
            return
        folder = layout.artifact(found.version)
        verify(self.storage, folder)
        rows = stored_documents(Path(self.config.root) / folder).to_pylist()
        assert {row["doc_id"]: row["text"] for row in rows} == self.published[found.version]
        assert len(rows) == len(self.published[found.version])

    @invariant()
    def a_reader_keeps_its_artifact(self) -> None:
        if self.reader:
            version, partition = self.reader
            everything = partition.collection.exact(partition.collection.vectors[:1].astype("float32"), MAX_DOCUMENTS)[1][0]
            rows = [row for found in partition.documents.rows(everything[everything >= 0]).values() for row in found]
            assert {row["doc_id"]: row["text"] for row in rows} == self.published[version]

    def _went_live(self, version: str) -> None:
        self.live = version
        known = self.published.setdefault(version, dict(self.corpus))
        assert known == self.corpus

    def _write(self) -> None:
        """Two files, so that one of them often stays as it was."""
        rows = [{"id": name, "text": text} for name, text in self.corpus.items()]
        for number in range(2):
            chosen = [row for row in rows if int(row["id"][1:]) % 2 == number]
            file = self.folder / "corpus" / f"{number}.jsonl"
            if chosen:
                write_jsonl(file, chosen)
            else:
                file.unlink(missing_ok=True)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("alone")
def test_what_is_live_is_always_one_whole_corpus():
    checks = list(HealthCheck)
    run_state_machine_as_test(
        Root,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, derandomize=True, suppress_health_check=checks
        ),
    )


PUBLISHES = int(os.environ.get("VECMILL_PUBLISHES", "1000"))
"""``make soak`` makes ten thousand."""


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("alone")
def test_readers_see_one_whole_artifact_through_thousands_of_publishes(tmp_path):
    config = make_config(tmp_path / "root", tmp_path / "corpus", index={"kind": "flat"}, publish={"max_shrink": 1})
    storage = Storage(config.root)
    artifacts = []
    for count in (3, 5):
        write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(count))
        artifacts.append(reindex(config).live)
    seen: list[tuple[str, int]] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            manifest = live_artifact(storage)
            rows = len(stored_documents(Path(config.root) / layout.artifact(manifest.version)))
            seen.append((manifest.version, rows))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with writing(storage, "publisher", 30) as lease:
            for number in range(PUBLISHES):
                commit(lease, storage, artifacts[number % 2])
    finally:
        ended.set()
        reader.join()
    assert set(seen) == {(artifact.version, count) for artifact, count in zip(artifacts, (3, 5), strict=True)}
    assert len(seen) > 100
    check_log(config)
    assert [entry.kind for entry in Log(storage).refresh().backwards()].count("commit") == PUBLISHES + 2
