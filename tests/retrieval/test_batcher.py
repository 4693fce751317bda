"""The batcher's promises about results and batches; a held backend shows what happens in between."""

from __future__ import annotations

import numpy as np
import pytest
from batcher_fakes import PATIENCE, Backend, TwoStages, eventually, hold_with_one, ids_of

from searchr1_fast.retrieval import MissingRetriever, RetrievalError
from searchr1_fast.types import Passage

# -------------------------------------------------------------------------------------------------------------- results


def test_results_are_the_backends(make):
    results = make().search(["3", "1", "3"], 2)
    assert ids_of(results) == [[30, 31], [10, 11], [30, 31]]
    assert results[0][1] == Passage("31", "title 31", "text 31", -1.0)


def test_fewer_hits_are_fewer_passages_and_none_is_no_error(make):
    assert ids_of(make(Backend(num_hits=2)).search(["1", "2"], 3)) == [[10, 11], [20, 21]]
    assert make(Backend(num_hits=0)).search(["1"], 3) == [[]]


def test_a_small_corpus_gives_narrower_results(make):
    class Small(Backend):
        def search_ids(self, queries, k):
            return super().search_ids(queries, min(k, 2))

    scores, ids = make(Small()).search_ids(["4"], 3)
    assert ids.tolist() == [[40, 41, -1]] and scores.tolist() == [[0.0, -1.0, -np.inf]]


def test_no_queries_no_results(make, backend):
    assert make().search([], 3) == []
    assert backend.batches == []


def test_it_is_a_retriever_under_others(make):
    missing = MissingRetriever(make(), rate=0.5, seed=1)
    queries = [str(number) for number in range(40)]
    missed = [missing.misses(query) for query in queries]
    wanted = [[10 * n + 1, 10 * n + 2] if miss else [10 * n, 10 * n + 1] for n, miss in enumerate(missed)]
    assert ids_of(missing.search(queries, 2)) == wanted
    assert 0 < sum(missed) < 40


@pytest.mark.parametrize("k", [0, -1, 2**20 + 1, 2**40])
def test_k_must_make_sense(make, k):
    with pytest.raises(ValueError, match=r"k is the number of"):
        make().search(["1"], k)


def test_queries_must_be_texts(make):
    with pytest.raises(TypeError, match="not one text"):
        make().search("abc", 1)
    with pytest.raises(TypeError, match="must be a str"):
        make().search([1], 1)
    with pytest.raises(ValueError, match="surrogates"):
        make().search(["\ud800"], 1)


def test_what_is_found_does_not_depend_on_the_k_of_others(make, backend):
    """Depths are powers of two times the smallest. One entry serves many k, and none is cut from a deeper one."""
    retriever = make(min_depth=4)
    for k, depths in ((3, [4]), (4, [4]), (9, [4, 16]), (16, [4, 16]), (1, [4, 16])):
        assert ids_of(retriever.search(["7"], k)) == [[70 + rank for rank in range(k)]]
        assert backend.depths == depths


# ------------------------------------------------------------------------------------------------------------- batching


def test_what_queued_meanwhile_is_the_next_batch(make, backend, pool):
    retriever = make()
    first = hold_with_one(retriever, backend, pool)
    others = [pool.submit(retriever.search, [str(number)], 1) for number in range(8)]
    eventually(lambda: retriever.statistics()["queued"] == 8)
    backend.let_go()
    assert ids_of(first.result(PATIENCE)) == [[9990, 9991]]
    assert [ids_of(other.result(PATIENCE)) for other in others] == [[[10 * number]] for number in range(8)]
    assert [len(batch) for batch in backend.batches] == [1, 8]


@pytest.mark.parametrize(
    ("options", "queries", "batches"),
    [
        ({"max_batch_rows": 3}, ["1", "2", "3", "4", "5"], [["1", "2", "3"], ["4", "5"]]),
        ({"max_batch_bytes": 4}, ["11", "22", "3", "44"], [["11", "22"], ["3", "44"]]),
        ({"max_batch_bytes": 2}, ["1", "55555", "2", "3"], [["1"], ["55555"], ["2", "3"]]),
    ],
)
def test_batches_are_bounded(make, backend, pool, options, queries, batches):
    """By rows and by bytes of text, first come, first served; a query above the bound goes alone."""
    retriever = make(**options)
    first = hold_with_one(retriever, backend, pool)
    second = pool.submit(retriever.search, queries, 1)
    eventually(lambda: retriever.statistics()["queued"] == len(queries))
    backend.let_go()
    first.result(PATIENCE)
    assert ids_of(second.result(PATIENCE)) == [[10 * int(query)] for query in queries]
    assert backend.batches[1:] == batches


def test_depths_are_not_mixed_and_the_oldest_goes_first(make, backend, pool):
    retriever = make(min_depth=2)
    first = hold_with_one(retriever, backend, pool)
    asked = []
    for query, k in (("1", 1), ("2", 5), ("3", 2), ("4", 6)):
        asked.append(pool.submit(retriever.search, [query], k))
        eventually(lambda: retriever.statistics()["queued"] == len(asked))
    backend.let_go()
    for future in [first, *asked]:
        future.result(PATIENCE)
    assert backend.batches[1:] == [["1", "3"], ["2", "4"]]
    assert backend.depths == [2, 2, 8]


def test_the_deepest_goes_first_where_it_has_waited_longest(make, backend, pool):
    retriever = make(min_depth=2)
    first = hold_with_one(retriever, backend, pool)
    asked = []
    for query, k in (("1", 6), ("2", 1), ("3", 3)):
        asked.append(pool.submit(retriever.search, [query], k))
        eventually(lambda: retriever.statistics()["queued"] == len(asked))
    backend.let_go()
    for future in [first, *asked]:
        future.result(PATIENCE)
    assert (backend.batches[1:], backend.depths) == ([["1"], ["2"], ["3"]], [2, 8, 2, 4])


def test_equal_queries_under_way_are_searched_once(make, backend, pool):
    """Whether queued or in the backend, in one search or in many."""
    retriever = make(cache_bytes=0)
    first = hold_with_one(retriever, backend, pool, "5")
    others = [pool.submit(retriever.search, ["5", "6", "6"], 2) for _ in range(6)]
    eventually(lambda: retriever.statistics()["num_queries"] == 19)
    backend.let_go()
    assert ids_of(first.result(PATIENCE)) == [[50, 51]]
    for other in others:
        assert ids_of(other.result(PATIENCE)) == [[50, 51], [60, 61], [60, 61]]
    assert backend.searched == ["5", "6"]
    statistics = retriever.statistics()
    assert (statistics["num_unique"], statistics["num_coalesced"]) == (2, 17)
    retriever.search(["5"], 2)  # nothing was remembered
    assert backend.searched == ["5", "6", "5"]


def test_two_stages_prepare_one_batch_ahead(make, pool):
    backend = TwoStages()
    retriever = make(backend)
    first = hold_with_one(retriever, backend, pool, "1")
    second = pool.submit(retriever.search, ["2"], 1)
    eventually(lambda: backend.prepared == [["1"], ["2"]])  # while the first is searched
    third = pool.submit(retriever.search, ["3"], 1)
    eventually(lambda: retriever.statistics()["queued"] == 1)  # but not two batches ahead
    assert backend.prepared == [["1"], ["2"]] and backend.batches == [["2"]]
    backend.let_go()
    assert [ids_of(future.result(PATIENCE))[0][0] for future in (first, second, third)] == [20, 40, 60]


def test_two_stages_stop_at_the_first_error(make, pool):
    backend = TwoStages()
    retriever = make(backend)
    first = hold_with_one(retriever, backend, pool, "1")
    second = pool.submit(retriever.search, ["2"], 1)
    eventually(lambda: len(backend.prepared) == 2)
    backend.error = OSError("gone")
    backend.let_go()
    for future in (first, second):
        with pytest.raises(RetrievalError, match="gone"):
            future.result(PATIENCE)
    retriever.close()
    assert backend.batches == [["2"]]
