"""The batcher's promises, each by itself: a backend that a test holds and lets go shows what happens in between."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from searchr1_fast import _C
from searchr1_fast.retrieval import MissingRetriever, RetrievalError
from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.protocol import RetrievalTimeout
from searchr1_fast.types import Passage

PATIENCE = 60.0  # seconds until a test that hangs fails


class Rows:
    """Row r is passage r."""

    def passages(self, rows, scores):
        pairs = zip(rows, scores, strict=True)
        return [Passage(str(row), f"title {row}", f"text {row}", score) for row, score in pairs]


class Backend:
    """Query "n" finds rows 10n, 10n+1, …, at most `num_hits` of them. Held, it waits in the middle of a batch."""

    def __init__(self, num_hits: int = 100) -> None:
        self.num_hits = num_hits
        self.batches: list[list[str]] = []
        self.depths: list[int] = []
        self.error: Exception | None = None
        self._go = threading.Event()
        self._go.set()
        self.entered = threading.Semaphore(0)

    def hold(self) -> None:
        self._go.clear()

    def let_go(self) -> None:
        self._go.set()

    def search_ids(self, queries, k):
        self.batches.append(queries)
        self.depths.append(k)
        self.entered.release()
        assert self._go.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return expected([int(query) for query in queries], k, self.num_hits)

    @property
    def searched(self) -> list[str]:
        return [query for batch in self.batches for query in batch]


def expected(numbers, k, num_hits=100):
    ranks = np.arange(k)
    ids = 10 * np.array(numbers, dtype=np.int64)[:, None] + ranks
    scores = np.tile(-ranks.astype(np.float32), (len(numbers), 1))
    return np.where(ranks < num_hits, scores, -np.inf).astype(np.float32), np.where(ranks < num_hits, ids, -1)


@pytest.fixture
def backend():
    backend = Backend()
    yield backend
    backend.let_go()


@pytest.fixture
def make(backend):
    """Options -> a batched retriever over `backend` (or another one), closed at the end."""
    made = []

    def build(other=None, **options) -> BatchedRetriever:
        retriever = BatchedRetriever(other or backend, Rows(), **options)
        made.append(retriever)
        return retriever

    yield build
    backend.let_go()
    for retriever in made:
        retriever.close()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def eventually(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.001)


def ids_of(results: list[list[Passage]]) -> list[list[int]]:
    return [[int(passage.id) for passage in passages] for passages in results]


def hold_with_one(retriever, backend, pool, query="999"):
    """A batch of one query is in the backend and stays there."""
    backend.hold()
    future = pool.submit(retriever.search, [query], 2)
    assert backend.entered.acquire(timeout=PATIENCE)
    return future


# --------------------------------------------------------------------------------------------------------- results


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
    """Depths are powers of two times the smallest: one entry serves many k, and none is cut from another's depth."""
    retriever = make(min_depth=4)
    for k, depths in ((3, [4]), (4, [4]), (9, [4, 16]), (16, [4, 16]), (1, [4, 16])):
        assert ids_of(retriever.search(["7"], k)) == [[70 + rank for rank in range(k)]]
        assert backend.depths == depths


# -------------------------------------------------------------------------------------------------------- batching


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
    """In rows and in bytes of text, first come, first served; a query above the bound goes alone."""
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


def test_equal_queries_under_way_are_searched_once(make, backend, pool):
    """Queued or in the backend, in one search or in many."""
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


class TwoStages(Backend):
    """`prepare` doubles; batches are recorded where they are prepared."""

    def __init__(self):
        super().__init__()
        self.prepared: list[list[str]] = []

    def prepare(self, queries):
        self.prepared.append(queries)
        return [2 * int(query) for query in queries]

    def search_prepared(self, prepared, k):
        return super().search_ids([str(number) for number in prepared], k)


def test_two_stages_prepare_one_batch_ahead(make, pool):
    backend = TwoStages()
    retriever = make(backend)
    first = hold_with_one(retriever, backend, pool, "1")
    second = pool.submit(retriever.search, ["2"], 1)
    eventually(lambda: backend.prepared == [["1"], ["2"]])  # while the first is searched
    third = pool.submit(retriever.search, ["3"], 1)
    eventually(lambda: retriever.statistics()["queued"] == 1)  # but not two ahead
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


# ----------------------------------------------------------------------------------------------------------- cache


def test_what_was_found_is_not_searched_again(make, backend):
    retriever = make()
    before = retriever.search(["1", "2"], 3)
    assert retriever.search(["2", "1"], 3) == before[::-1]
    assert ids_of(retriever.search(["1"], 2)) == [[10, 11]]
    assert backend.searched == ["1", "2"]
    assert retriever.statistics()["num_cache_hits"] == 3


def test_the_cache_is_bounded_and_forgets_the_least_recently_used(make, backend):
    retriever = make(cache_bytes=3000, min_depth=4)
    for number in range(100):
        retriever.search(["0"], 1)
        retriever.search([str(number)], 1)
    statistics = retriever.statistics()
    assert 0 < statistics["cache_bytes"] <= 3000
    assert statistics["cache_entries"] + statistics["cache_evicted"] == 100
    assert backend.searched.count("0") == 1  # used all the time
    retriever.search(["99", "1"], 1)
    assert backend.searched[100:] == ["1"]


def test_a_result_larger_than_the_cache_is_not_kept(make, backend):
    retriever = make(cache_bytes=200, min_depth=16)
    assert ids_of(retriever.search(["1"], 1)) == [[10]]
    assert retriever.statistics()["cache_entries"] == 0


def test_saved_and_loaded(make, backend, tmp_path):
    path = tmp_path / "cache.bin"
    first = make(identity="index a")
    first.search(["1", "2", "ü"[:0] + "3"], 3)
    first.search(["1"], 40)
    first.save_cache(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.bin"]
    other = Backend()
    second = make(other, identity="index a")
    assert second.load_cache(path) == 4
    assert ids_of(second.search(["3", "1", "2"], 2)) == [[30, 31], [10, 11], [20, 21]]
    assert len(second.search(["1"], 33)[0]) == 33
    assert other.batches == []


def test_loading_keeps_the_bound_and_the_most_recent(make, backend, tmp_path):
    path = tmp_path / "cache.bin"
    big = make(min_depth=4, identity="index a")
    for number in range(50):
        big.search([str(number)], 1)
    big.save_cache(path)
    other = Backend()
    small = make(other, min_depth=4, cache_bytes=1500, identity="index a")
    small.load_cache(path)
    assert small.statistics()["cache_bytes"] <= 1500
    small.search(["49", "0"], 1)
    assert other.searched == ["0"]


def test_a_cache_of_other_searches_or_a_damaged_one_is_refused(make, backend, tmp_path):
    path = tmp_path / "cache.bin"
    retriever = make(identity="index a")
    retriever.search(["1"], 3)
    retriever.save_cache(path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"other searches \(index a, here index b\)"):
        make(identity="index b").load_cache(path)
    for nameless in (make().load_cache, make().save_cache):
        with pytest.raises(ValueError, match="has no identity"):
            nameless(path)
    for length in (0, 5, 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cache.bin"):
            retriever.load_cache(path)
    for place in range(8, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="altered"):
            retriever.load_cache(path)
    with pytest.raises(ValueError, match="No such file"):
        retriever.load_cache(tmp_path / "absent")
    with pytest.raises(ValueError, match="cannot write"):
        retriever.save_cache(tmp_path / "absent" / "cache.bin")


# ------------------------------------------------------------------------------------------- deadlines, cancellation


def test_a_search_past_its_deadline_raises_and_the_others_go_on(make, backend, pool):
    """Held, the backend cannot be what ends it."""
    retriever = make()
    first = hold_with_one(retriever, backend, pool)
    patient = pool.submit(retriever.search, ["1", "2"], 1)
    with pytest.raises(RetrievalTimeout, match="2 queries"):
        retriever.search(["1", "3"], 1, timeout=0.02)
    assert not patient.done()
    backend.let_go()
    assert ids_of(patient.result(PATIENCE)) == [[10], [20]]
    first.result(PATIENCE)
    assert backend.searched == ["999", "1", "2"]  # nobody waited for 3 any more
    assert ids_of(retriever.search(["3"], 1)) == [[30]]
    assert retriever.statistics()["num_expired"] == 1


def test_a_deadline_that_has_passed_expires_at_once_even_where_the_result_is_known(make, backend):
    retriever = make()
    retriever.search(["1"], 1)
    with pytest.raises(RetrievalTimeout):
        retriever.search(["1"], 1, timeout=-1.0)
    assert retriever.statistics()["pending_bytes"] == 0


def test_the_timeout_of_the_retriever_holds_where_the_call_has_none(make, backend, pool):
    retriever = make(timeout=0.02)
    backend.hold()
    with pytest.raises(RetrievalTimeout):
        retriever.search(["1"], 1)
    with pytest.raises(RetrievalTimeout):
        asyncio.run(retriever.search_async(["2"], 1))
    backend.let_go()
    assert ids_of(retriever.search(["1"], 1, timeout=PATIENCE)) == [[10]]


@pytest.mark.parametrize("timeout", [1e300, float("inf")])
def test_a_deadline_beyond_the_clock_is_none(make, timeout):
    assert ids_of(make().search(["1"], 1, timeout=timeout)) == [[10]]


def test_no_number_is_no_deadline(make):
    with pytest.raises(ValueError, match="NaN"):
        make().search(["1"], 1, timeout=float("nan"))


def test_a_cancelled_ticket_detaches_alone(make, backend, pool):
    retriever = make()
    first = hold_with_one(retriever, backend, pool)
    batcher = retriever._batcher
    shared, alone = batcher.submit(["1"], 1), batcher.submit(["1", "2"], 1)
    alone.cancel()
    alone.cancel()
    assert alone.wait() is _C.Outcome.CANCELLED
    with pytest.raises(ValueError, match="not done"):
        alone.result()
    assert retriever.statistics()["queued"] == 1
    backend.let_go()
    assert shared.wait() is _C.Outcome.DONE
    shared.cancel()  # nothing, it is settled
    assert shared.result()[1].tolist() == [[10]]
    first.result(PATIENCE)
    assert backend.searched == ["999", "1"]


def test_a_ticket_that_is_dropped_frees_what_it_asked_for(make, backend, pool):
    retriever = make()
    first = hold_with_one(retriever, backend, pool)
    before = retriever.statistics()["pending_bytes"]
    tickets = [retriever._batcher.submit([str(number)], 1) for number in range(10)]
    assert retriever.statistics()["pending_bytes"] > before
    tickets.clear()
    statistics = retriever.statistics()
    assert (statistics["pending_bytes"], statistics["queued"], statistics["num_cancelled"]) == (before, 0, 10)
    backend.let_go()
    first.result(PATIENCE)


def test_ctrl_c_ends_the_wait():
    code = """
    import os, signal, sys, threading
    sys.path.insert(0, {tests!r})
    from test_batcher import Backend, BatchedRetriever, Rows
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background deaf to it
    backend = Backend()
    backend.hold()
    retriever = BatchedRetriever(backend, Rows())
    threading.Thread(target=lambda: (backend.entered.acquire(), os.kill(os.getpid(), signal.SIGINT))).start()
    try:
        retriever.search(["1"], 1)
    except KeyboardInterrupt:
        assert retriever.statistics()["num_cancelled"] == 1
        print("interrupted")
    backend.let_go()
    """
    assert run(code) == "interrupted\n"


# --------------------------------------------------------------------------------------------------- back-pressure


def test_what_does_not_fit_waits_in_line_and_nothing_is_rejected(make, backend, pool):
    retriever = make(max_pending_bytes=1000)
    first = hold_with_one(retriever, backend, pool)
    producers = []
    for number in range(12):
        producers.append(pool.submit(retriever.search, [str(number)], 1))
        eventually(lambda: retriever.statistics()["num_searches"] == 1 + len(producers))
    statistics = retriever.statistics()
    assert statistics["blocked"] == statistics["num_blocked"] > 0
    assert statistics["pending_bytes"] <= 1000
    assert statistics["blocked"] + statistics["queued"] == 12
    backend.let_go()
    for number, producer in enumerate(producers):
        assert ids_of(producer.result(PATIENCE)) == [[10 * number]]
    first.result(PATIENCE)
    assert backend.searched == ["999", *(str(number) for number in range(12))]  # in line, too
    statistics = retriever.statistics()
    assert (statistics["blocked"], statistics["pending_bytes"]) == (0, 0)


def test_what_is_larger_than_the_bound_goes_alone(make, backend):
    retriever = make(max_pending_bytes=10)
    queries = [str(number) for number in range(500)]
    assert ids_of(retriever.search(queries, 1)) == [[10 * number] for number in range(500)]


def test_the_producer_itself_is_blocked(make, backend, pool):
    """`submit` does not return before there is room; a coroutine is suspended, its loop runs on."""
    retriever = make(max_pending_bytes=10)
    first = hold_with_one(retriever, backend, pool)
    submission = pool.submit(retriever._batcher.submit, ["1"], 1)
    eventually(lambda: retriever.statistics()["blocked"] == 1)

    async def search_beside():
        task = asyncio.create_task(retriever.search_async(["2"], 1))
        while retriever.statistics()["blocked"] < 2:
            await asyncio.sleep(0)
        assert not task.done()
        backend.let_go()
        return await task

    assert not submission.done()
    assert ids_of(asyncio.run(search_beside())) == [[20]]
    assert submission.result(PATIENCE).wait() is _C.Outcome.DONE
    first.result(PATIENCE)


def test_in_line_a_search_expires_fails_and_is_cancelled_as_anywhere(make, backend, pool):
    retriever = make(max_pending_bytes=10)
    first = hold_with_one(retriever, backend, pool)
    with pytest.raises(RetrievalTimeout):
        retriever.search(["1"], 1, timeout=0.02)
    channel = _C.Channel()
    dropped = retriever._batcher.submit(["2"], 1, None, channel)
    waiting = pool.submit(retriever.search, ["3"], 1)
    eventually(lambda: retriever.statistics()["blocked"] == 2)
    dropped.cancel()
    assert channel.drain() == [dropped.id]
    backend.error = OSError("gone")
    backend.let_go()
    for future in (first, waiting):
        with pytest.raises(RetrievalError, match="gone"):
            future.result(PATIENCE)
    assert backend.searched == ["999"]


# ---------------------------------------------------------------------------------------------------- failure, close


def test_the_first_error_fails_every_search_pending_and_future(make, backend, pool):
    retriever = make()
    retriever.search(["7"], 1)
    assert backend.entered.acquire(timeout=PATIENCE)
    first = hold_with_one(retriever, backend, pool)
    queued = pool.submit(retriever.search, ["1"], 1)
    eventually(lambda: retriever.statistics()["queued"] == 1)
    backend.error = OSError("the GPU fell off the bus")
    backend.let_go()
    for search in (first.result, queued.result, lambda: retriever.search(["2"], 1), lambda: retriever.search(["7"], 1)):
        with pytest.raises(RetrievalError, match=r"OSError: the GPU fell off the bus") as caught:
            search()
        assert caught.value.__cause__ is backend.error
        assert not isinstance(caught.value, RetrievalTimeout)
    with pytest.raises(RetrievalError, match="fell off the bus"):
        asyncio.run(retriever.search_async(["3"], 1))
    assert backend.searched == ["7", "999"]
    assert retriever.statistics()["num_failed"] == 5


def wrong(change):
    class Wrong(Backend):
        def search_ids(self, queries, k):
            scores, ids = super().search_ids(queries, k)
            return change(scores, ids)

    return Wrong()


def put(array, index, value):
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda scores, ids: (scores[:1], ids[:1]), r"scores \[1, 16\] and ids \[1, 16\] for 2 queries"),
        (lambda scores, ids: (scores[:, :3], ids), r"scores \[2, 3\] and ids \[2, 16\]"),
        (lambda scores, ids: (scores[:, :0], ids[:, :0]), "gave 0 hits a query; asked for were 16"),
        (lambda scores, ids: (np.tile(scores, 2), np.tile(ids, 2)), "gave 32 hits a query; asked for were 16"),
        (lambda scores, ids: (scores[0], ids[0]), "not of 1 dimensions"),
        (lambda scores, ids: (scores.astype(np.float64), ids), "float32"),
        (lambda scores, ids: (scores, ids.astype(np.int32)), "int64"),
        (lambda scores, ids: (put(scores, (1, 2), np.nan), ids), "NaN for the query '2'"),
        (lambda scores, ids: (put(scores, (1, 2), 5.0), ids), "'2' that are not ordered by score"),
        (lambda scores, ids: (scores, put(ids, (1, 2), -1)), "after the end"),
        (lambda scores, ids: (scores, put(ids, (0, 2), -2)), "the row -2 for the query '1'"),
        (lambda scores, ids: None, "TypeError"),
    ],
)
def test_a_backend_that_breaks_its_promise_is_an_error(make, change, sentence):
    with pytest.raises(RetrievalError, match=sentence):
        make(wrong(change)).search(["1", "2"], 3)


def test_arrays_of_any_layout_are_taken(make):
    backend = wrong(lambda scores, ids: (np.asfortranarray(scores), ids[:, ::-1][:, ::-1]))
    assert ids_of(make(backend).search(["1", "2"], 2)) == [[10, 11], [20, 21]]


def test_a_batch_that_nobody_answers_fails_all(make):
    batcher = _C.Batcher(
        max_batch_rows=8, max_batch_bytes=100, max_pending_bytes=1000, max_cache_bytes=0, min_depth=4,
        max_batches_in_flight=1, identity="",
    )  # fmt: skip
    ticket = batcher.submit(["1", "2"], 1)
    batch = batcher.take()
    assert batch.queries == ["1", "2"] and len(batch) == 2
    del batch
    assert ticket.wait() is _C.Outcome.FAILED
    assert ticket.error == "a batch of 2 queries was dropped without an answer"
    assert batcher.take() is None


def test_a_batch_is_answered_once():
    batcher = _C.Batcher(
        max_batch_rows=8, max_batch_bytes=100, max_pending_bytes=1000, max_cache_bytes=0, min_depth=4,
        max_batches_in_flight=1, identity="",
    )  # fmt: skip
    ticket = batcher.submit(["1"], 1)
    batch = batcher.take()
    batch.complete(*expected([1], 4))
    assert ticket.wait() is _C.Outcome.DONE
    for answer in (lambda: batch.complete(*expected([1], 4)), lambda: batch.fail("x")):
        with pytest.raises(ValueError, match="answered already"):
            answer()
    assert batcher.submit(["1"], 1).is_pending


@pytest.mark.parametrize("name", ["max_batch_rows", "max_batch_bytes", "max_pending_bytes", "min_depth"])
def test_bounds_must_allow_something(make, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        make(**{name: 0})


def test_close_fails_what_is_pending_and_can_be_called_again(make, backend, pool):
    retriever = make()
    first = hold_with_one(retriever, backend, pool)
    queued = pool.submit(retriever.search, ["1"], 1)
    eventually(lambda: retriever.statistics()["queued"] == 1)
    closers = [pool.submit(retriever.close) for _ in range(4)]  # they wait for the batch that is searched
    for future in (first, queued):
        with pytest.raises(RetrievalError, match="closed"):
            future.result(PATIENCE)
    backend.let_go()
    for closer in closers:
        closer.result(PATIENCE)
    retriever.close()
    retriever._batcher.close()
    with pytest.raises(RetrievalError, match="closed"):
        retriever.search(["1"], 1)


def test_a_retriever_that_is_forgotten_ends_its_threads(backend):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "retrieval"]

    before = len(threads())
    retriever = BatchedRetriever(backend, Rows())
    retriever.search(["1"], 1)
    assert len(threads()) == before + 1
    del retriever
    gc.collect()
    assert len(threads()) == before


def test_closing_in_a_worker_waits_for_no_other(make):
    """The garbage collector may run there, with the last reference in a cycle."""
    has_closed = threading.Event()

    class Closing(TwoStages):
        def prepare(self, queries):
            retriever.close()
            has_closed.set()
            return super().prepare(queries)

    others = {thread for thread in threading.enumerate() if thread.name == "retrieval"}
    retriever = make(Closing())
    with pytest.raises(RetrievalError, match="closed"):
        retriever.search(["2"], 1)
    assert has_closed.wait(10.0)
    eventually(lambda: {thread for thread in threading.enumerate() if thread.name == "retrieval"} <= others)


def run(code: str, **names: object) -> str:
    """What a program prints that must end well."""
    tests = os.path.dirname(__file__)
    program = textwrap.dedent(code).format(tests=tests, **names)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=2 * PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_program_that_forgets_to_close_ends():
    """Its thread is one that nobody joins."""
    code = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_batcher import Backend, BatchedRetriever, Rows
    backend = Backend()
    retriever = BatchedRetriever(backend, Rows())
    print(retriever.search(["4"], 1)[0][0].id)
    """
    assert run(code) == "40\n"


def test_a_fork_is_noticed_and_the_parent_goes_on():
    """While a batch, a waiter and a deadline are under way, so that locks and condition variables are in use."""
    code = """
    import gc, os, sys, threading
    sys.path.insert(0, {tests!r})
    from test_batcher import Backend, BatchedRetriever, RetrievalError, Rows
    backend = Backend()
    backend.hold()
    retriever = BatchedRetriever(backend, Rows())
    found = []
    waiter = threading.Thread(target=lambda: found.append(retriever.search(["4"], 1, timeout=1000.0)))
    waiter.start()
    backend.entered.acquire()
    ticket = retriever._batcher.submit(["5"], 1, None, None)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for use in (lambda: retriever.search(["1"], 1), lambda: ticket.wait(), lambda: ticket.cancel(),
                    lambda: retriever._batcher.take(), lambda: retriever.statistics()):
            try:
                use()
            except (RetrievalError, RuntimeError) as error:
                assert "before a fork" in str(error), error
            else:
                os._exit(3)
        retriever._batcher.close()
        del retriever._batcher, ticket, use
        gc.collect()
        again = BatchedRetriever(Backend(), Rows())
        print("child", again.search(["6"], 1)[0][0].id, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    backend.let_go()
    waiter.join()
    print("parent", found[0][0][0].id, ticket.wait().name)
    """
    assert run(code) == "child 60\nparent 40 DONE\n"


@pytest.mark.skipif(sys.platform != "linux", reason="address space is bounded on Linux alone")
def test_results_that_no_memory_holds_fail_their_search_alone():
    """Admitted at once, or later by the clock's thread; a ticket that is gone leaves no deadline behind."""
    code = """
    import resource, time
    from searchr1_fast import _C
    batcher = _C.Batcher(max_batch_rows=8, max_batch_bytes=100, max_pending_bytes=1, max_cache_bytes=0, min_depth=4,
                         max_batches_in_flight=1, identity="")
    resource.setrlimit(resource.RLIMIT_AS, (2**36, resource.getrlimit(resource.RLIMIT_AS)[1]))
    huge = (["1"] * 2**15, 2**20)  # 128 GiB of scores
    ticket = batcher.submit(*huge, 0.05)
    assert ticket.error == "there is no memory for 32768 results of 1048576 hits", ticket.outcome
    del ticket
    small = batcher.submit(["1"], 1, 0.2)
    channel = _C.Channel()
    blocked = batcher.submit(*huge, None, channel)
    assert blocked.is_pending and small.is_pending
    print(small.wait().name, blocked.wait().name, channel.drain() == [blocked.id])
    assert batcher.statistics()["pending_bytes"] == 0
    """
    assert run(code) == "EXPIRED FAILED True\n"


def test_passages_that_cannot_be_read_fail_the_search(backend):
    class Gone:
        def passages(self, rows, scores):
            raise ValueError("passages.bin was cut short")

    with BatchedRetriever(backend, Gone()) as retriever, pytest.raises(RetrievalError, match="was cut short"):
        retriever.search(["1"], 1)


# --------------------------------------------------------------------------------------------------------- asyncio


def test_many_coroutines_wait_on_one_descriptor(make, backend):
    retriever = make()

    async def search_all():
        return await asyncio.gather(*(retriever.search_async([str(n % 300)], 2) for n in range(2000)))

    results = asyncio.run(search_all())
    assert [ids_of(result) for result in results] == [[[10 * (n % 300), 10 * (n % 300) + 1]] for n in range(2000)]
    assert sorted(backend.searched, key=int) == [str(n) for n in range(300)]


def test_a_cancelled_coroutine_cancels_its_search(make, backend, pool):
    retriever = make()
    first = hold_with_one(retriever, backend, pool)

    async def cancel_one():
        one, other = (asyncio.create_task(retriever.search_async([query], 1)) for query in ("1", "2"))
        while retriever.statistics()["queued"] < 2:
            await asyncio.sleep(0)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        backend.let_go()
        return await other

    assert ids_of(asyncio.run(cancel_one())) == [[20]]
    first.result(PATIENCE)
    assert backend.searched == ["999", "2"]


def test_a_coroutine_is_told_of_its_deadline_while_the_backend_hangs(make, backend):
    retriever = make()
    backend.hold()

    async def search():
        with pytest.raises(RetrievalTimeout):
            await retriever.search_async(["1"], 1, timeout=0.02)

    asyncio.run(search())


def test_loops_have_a_descriptor_each_and_give_it_back(make, backend, pool):
    retriever = make()

    async def search(number):
        return (await asyncio.gather(*(retriever.search_async([str(number)], 1) for _ in range(20))))[0]

    asyncio.run(search(0))
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    results = list(pool.map(lambda number: asyncio.run(search(number)), range(30)))
    assert [ids_of(result) for result in results] == [[[10 * number]] for number in range(30)]
    gc.collect()
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_channel_is_readable_while_there_is_news(backend):
    import select

    batcher = _C.Batcher(
        max_batch_rows=8, max_batch_bytes=100, max_pending_bytes=100000, max_cache_bytes=0, min_depth=4,
        max_batches_in_flight=1, identity="",
    )  # fmt: skip
    channel = _C.Channel()

    def is_readable() -> bool:
        return bool(select.select([channel.fileno()], [], [], 0)[0])

    tickets = [batcher.submit([str(number)], 1, None, channel) for number in range(3)]
    assert not is_readable()
    tickets[1].cancel()
    batch = batcher.take()
    batch.complete(*expected([0, 2], 4))
    assert is_readable()
    assert channel.drain() == [tickets[1].id, tickets[0].id, tickets[2].id]
    assert not is_readable()
    assert channel.drain() == []


# ------------------------------------------------------------------------------------------------------ statistics


def test_statistics_add_up_and_can_be_reset(make, backend):
    retriever = make(max_batch_rows=10)
    assert np.isnan(retriever.statistics()["unique_fraction"])
    for _ in range(3):
        retriever.search([str(number % 20) for number in range(40)], 2)
    statistics = retriever.statistics(reset=True)
    assert (statistics["num_searches"], statistics["num_queries"]) == (3, 120)
    assert (statistics["num_unique"], statistics["num_coalesced"], statistics["num_cache_hits"]) == (20, 20, 80)
    assert statistics["unique_fraction"] == pytest.approx(1 / 6)
    assert statistics["cache_hit_fraction"] == pytest.approx(2 / 3)
    assert statistics["latency_seconds"]["count"] == 120
    assert statistics["batch_seconds"]["count"] == statistics["num_batches"] == len(backend.batches)
    assert statistics["batch_rows"]["mean"] == pytest.approx(20 / len(backend.batches))
    assert statistics["batch_rows"]["max"] == max(map(len, backend.batches))
    after = retriever.statistics()
    assert (after["num_queries"], after["latency_seconds"]["count"]) == (0, 0)
    assert after["cache_entries"] == 20  # a gauge, not a counter


def test_percentiles_of_batch_sizes(make, backend):
    """Against numpy's, from above and by at most a sixteenth."""
    retriever = make(max_batch_rows=1000, max_batch_bytes=2**20, cache_bytes=0)
    sizes = np.random.default_rng(0).integers(1, 1000, 300)
    for size in sizes:
        retriever.search([str(number) for number in range(size)], 1)
    assert [len(batch) for batch in backend.batches] == sizes.tolist()
    found = retriever.statistics()["batch_rows"]
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        true = np.percentile(sizes, percent, method="inverted_cdf")
        assert true <= found[name] <= true * 17 / 16
    assert (found["mean"], found["max"]) == (pytest.approx(sizes.mean()), sizes.max())
