from types import SimpleNamespace

import pytest

from pipeline.artifacts.key_merge import MORE_AHEAD_BYTES, _ahead_bytes
from pipeline.artifacts.merging import part_sizes
from pipeline.errors import ConfigError
from pipeline.root.manifest import DataFile
from pipeline.root.shards import AHEAD_BYTES
from tests.conftest import make_config


def sizes(count, entry_bytes, trained_size=0, memory="4GB", partitions=None):
    config = make_config("/r", "/c", compute={"merge_memory": memory}, index={"partitions": partitions})
    return part_sizes(config, count, entry_bytes, trained_size)


@pytest.mark.parametrize(
    ("count", "entry", "trained", "memory", "partitions", "expected"),
    [
        (0, 64, 0, "4GB", None, [0]),
        (1, 64, 0, "4GB", None, [1]),
        (10**6, 64, 10**7, "4GB", None, [10**6]),
        (10**6, 64, 0, "200MB", None, [250_000] * 4),
        (10**6, 64, 16_000_000, "200MB", None, [66_666, 66_667, 66_667] * 5),
        (10, 64, 0, "4GB", 3, [3, 3, 4]),
        (2, 64, 0, "4GB", 5, [1, 1]),
    ],
)
def test_parts_hold_everything_within_the_memory(count, entry, trained, memory, partitions, expected):
    assert sizes(count, entry, trained, memory, partitions) == expected


def test_partitions_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"index.partitions: 2 of 1000000 vectors .* set it to 4 or more"):
        sizes(10**6, 64, 0, "200MB", 2)
    with pytest.raises(ConfigError, match=r"compute.merge_memory: 64000 bytes, this index needs at least 134473728"):
        sizes(10**6, 64, 0, "64kB")


def ahead_of(shards, *, is_local, memory, rows=1 << 15, dim=128):
    """What each file of a merge may read ahead: shards with codes, and a part of the corpus for each."""
    storage, file = (
        SimpleNamespace(is_local=is_local),
        DataFile(name="f", rows=rows, size_bytes=(2 * dim + 16) * rows, sha256=""),
    )
    config = make_config("r", "c", compute={"merge_memory": memory})
    sources = SimpleNamespace(
        job=SimpleNamespace(storage=storage, embeddings=storage, config=config),
        parts=[SimpleNamespace(file=file, rows=rows)] * shards,
        shards=[SimpleNamespace(files=[file])] * shards,
        trained=SimpleNamespace(dim=dim),
        has_codes=True,
        code_size=64,
    )
    return _ahead_bytes(sources, 1 << 15)


def test_remote_files_read_ahead_what_the_memory_of_a_merge_leaves():
    found = [ahead_of(shards, is_local=False, memory="1GB") for shards in (1, 20, 100)]
    assert found[0] == AHEAD_BYTES + MORE_AHEAD_BYTES
    assert found[0] > found[1] > found[2] >= AHEAD_BYTES
    group = 2048 * (2 * 128 + 16)
    assert 2 * group * 100 + 3 * 100 * found[2] < 1e9
    assert ahead_of(400, is_local=True, memory="1GB") >= AHEAD_BYTES
    with pytest.raises(ConfigError, match=r"compute\.merge_memory: 1000000000 bytes, merging 1200 files needs at least 2"):
        ahead_of(400, is_local=False, memory="1GB")
