import pytest

from pipeline.errors import StorageError, VerificationError
from pipeline.operations import doctor
from pipeline.operations.doctor import examine, examine_storage
from pipeline.root.log import Log, writing
from pipeline.root.storage import Storage
from tests.conftest import MINILM, make_config, sentences, write_jsonl


def pretend(monkeypatch):
    """Storages that say they made an object although one was there."""

    def create(self, path, data):
        self.put(path, data)
        return True

    monkeypatch.setattr(Storage, "_create_remote", create)


def test_this_machine_can_run_a_job(tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", sentences(2))
    findings = {
        finding.what: finding for finding in examine(make_config(tmp_path, tmp_path / "corpus", encoder={"model": MINILM}))
    }
    assert all(finding.ok for finding in findings.values()), findings
    assert findings["corpus"].found == "1 files"
    assert findings["faiss"].found.startswith("faiss-cpu ")


def test_what_is_wrong_is_said_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "FAISS", ("faiss-cpu", "numpy"))  # two distributions of one module
    config = make_config(tmp_path, tmp_path / "none", encoder={"model": str(tmp_path / "no-model")})
    bad = {finding.what: finding for finding in examine(config) if not finding.ok}
    assert set(bad) == {"faiss", "model", "corpus"}
    assert "overwrite each other" in bad["faiss"].advice
    assert "no input files there" in bad["corpus"].found


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_storage_that_creates_only_if_absent_passes_and_is_left_clean(kind, tmp_path, request):
    server = request.getfixturevalue("s3") if kind == "s3" else None
    uri = f"s3://test/{tmp_path.name}" if server else str(tmp_path)
    store = make_config("r", "c", store=server.store if server else {}).store
    findings = list(examine_storage(uri, store))
    assert [finding.ok for finding in findings] == [True] * 4
    assert findings[-1].found == "20 of 20 races of 8 writers had one winner"
    assert Storage(uri, store).walk() == []


def test_a_storage_that_pretends_is_refused_by_doctor_and_by_writers(tmp_path, monkeypatch):
    pretend(monkeypatch)
    uri = f"memory://{tmp_path.name}"
    with pytest.raises(VerificationError, match="does not create objects only if absent"):
        list(examine_storage(uri, make_config("r", "c").store))
    storage = Storage(uri)
    with (
        pytest.raises(StorageError, match=r"creates objects that are there already .* two writers"),
        writing(storage, "run", 30),
    ):
        pass
    assert Log(storage).refresh().holder is None


def test_a_folder_that_cannot_be_written_is_one_clear_error():
    with pytest.raises(StorageError, match="/proc/none"):
        list(examine_storage("/proc/none", make_config("r", "c").store))
