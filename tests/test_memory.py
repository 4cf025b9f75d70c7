import numpy as np

from pipeline.memory import anonymous_bytes, peak_memory

MIB = 1 << 20


def test_the_most_that_a_block_took_is_what_it_took_in_between():
    before = anonymous_bytes()
    with peak_memory() as peak:
        large = np.ones(64 * MIB, dtype=np.uint8)
        for _ in range(20):
            large += 1
        del large
    assert peak.size_bytes is not None
    assert 60 * MIB < peak.size_bytes - before < 90 * MIB
    with peak_memory() as idle:
        pass
    assert idle.size_bytes is not None and abs(idle.size_bytes - before) < 8 * MIB
