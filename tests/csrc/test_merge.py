"""The merge of shards, against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast import _C


def plain_merge(scores, ids, k):
    """scores, ids: lists of [Q,k_s]. Sort everything once, stably, in fp64 and Python."""
    merged = np.full((len(scores[0]), k), -np.inf, dtype=np.float32), np.full((len(scores[0]), k), -1)
    for query in range(len(scores[0])):
        hits = [
            (-float(score), int(number))
            for shard_scores, shard_ids in zip(scores, ids, strict=True)
            for score, number in zip(shard_scores[query], shard_ids[query], strict=True)
            if number >= 0
        ]
        for rank, (score, number) in enumerate(sorted(hits)[:k]):
            merged[0][query, rank], merged[1][query, rank] = -score, number
    return merged


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(0, 4),
    widths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    k=st.integers(1, 12),
    num_levels=st.sampled_from([1, 3, 1000]),
)
def test_it_is_a_sort_of_everything(seed, num_queries, widths, k, num_levels):
    """Few levels make many ties, which ids decide."""
    generator = np.random.default_rng(seed)
    numbers = generator.permutation(1000)
    scores, ids = [], []
    for place, width in enumerate(widths):
        scores.append(generator.integers(-num_levels, num_levels, (num_queries, width)).astype(np.float32))
        shard = numbers[place * 100 :][: num_queries * width].reshape(num_queries, width)
        ids.append(np.where(generator.random((num_queries, width)) < 0.2, -1, shard))
    found, wanted = _C.merge_topk(scores, ids, k), plain_merge(scores, ids, k)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])


def test_shards_do_not_matter():
    """One shard or seven, in any order: the same rows, bit for bit."""
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 40, (8, 200)).astype(np.float32) / 7
    ids = np.tile(np.arange(200), (8, 1))
    whole = _C.merge_topk([scores], [ids], 9)
    cuts = np.array_split(np.arange(200), 7)[::-1]
    parts = [_C.merge_topk([scores[:, cut]], [ids[:, cut]], 9) for cut in cuts]
    merged = _C.merge_topk([part[0] for part in parts], [part[1] for part in parts], 9)
    assert merged[0].tobytes() == whole[0].tobytes() and merged[1].tobytes() == whole[1].tobytes()


def test_what_cannot_be_merged_is_refused():
    scores, ids = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int64)
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN for query 1, row 0"):
        _C.merge_topk([scores], [ids], 1)
    with pytest.raises(ValueError, match="shard 1"):
        _C.merge_topk([scores, scores[:1]], [ids, ids[:1]], 1)
    with pytest.raises(ValueError, match="shard 0"):
        _C.merge_topk([scores], [ids[:, :2]], 1)
    with pytest.raises(ValueError, match="as many arrays"):
        _C.merge_topk([], [], 1)
    with pytest.raises(ValueError, match="k must be"):
        _C.merge_topk([scores], [ids], 0)
