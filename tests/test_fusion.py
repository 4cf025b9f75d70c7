import numpy as np
import pytest

from pipeline.search.fusion import RRF_K, fuse


def ranking(*pairs):
    return np.array([score for score, _ in pairs], np.float32), np.array([ordinal for _, ordinal in pairs], np.int64)


DENSE = ranking((0.9, 7), (0.8, 3), (0.1, 5))
LEXICAL = ranking((12.0, 3), (2.0, 9))


def test_ranks_are_fused_by_their_reciprocals():
    scores, ordinals = fuse([DENSE, LEXICAL], [1, 1], "rrf")
    assert ordinals.tolist() == [3, 7, 9, 5]
    expected = [1 / (RRF_K + 2) + 1 / (RRF_K + 1), 1 / (RRF_K + 1), 1 / (RRF_K + 2), 1 / (RRF_K + 3)]
    assert scores == pytest.approx(expected, rel=1e-6)


def test_scores_are_fused_on_one_scale():
    scores, ordinals = fuse([DENSE, LEXICAL], [0.5, 0.5], "weighted")
    assert dict(zip(ordinals.tolist(), scores.tolist(), strict=True)) == pytest.approx(
        {3: 0.5 * 0.875 + 0.5, 7: 0.5, 9: 0, 5: 0}, abs=1e-6
    )
    assert ordinals.tolist() == [3, 7, 5, 9]  # equal ones by ordinal


@pytest.mark.parametrize("how", ["rrf", "weighted"])
def test_all_the_weight_on_one_gives_its_order(how):
    nothing = ranking()
    assert fuse([DENSE, LEXICAL], [1, 0], how)[1][:2].tolist() == [7, 3]
    assert fuse([DENSE, LEXICAL], [0, 1], how)[1][0] == 3
    assert fuse([DENSE, nothing], [0.5, 0.5], how)[1].tolist() == [7, 3, 5]
    assert len(fuse([nothing, nothing], [0.5, 0.5], how)[1]) == 0


def test_equal_scores_count_fully():
    scores, _ = fuse([ranking((2.0, 1), (2.0, 2))], [1], "weighted")
    assert scores.tolist() == [1, 1]
