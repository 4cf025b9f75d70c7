import pytest

from pipeline.artifacts.merging import part_sizes
from pipeline.errors import ConfigError
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
