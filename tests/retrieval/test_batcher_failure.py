"""The first error is final, nobody is left waiting, and a closed, abandoned or forked batcher says so."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading

import numpy as np
import pytest
from batcher_fakes import PATIENCE, Backend, Rows, TwoStages, eventually, expected, hold_with_one, ids_of, run

from searchr1_fast import _C
from searchr1_fast.retrieval import RetrievalError, batcher_workers
from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.protocol import RetrievalTimeout


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
    with pytest.raises(ValueError, match="answered already"):
        batch.complete(*expected([1], 4))
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
    closers = [pool.submit(retriever.close) for _ in range(4)]  # they wait for the batch that is being searched
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
    """The garbage collector may close it in that thread, with the last reference in a cycle."""
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


def test_a_program_that_forgets_to_close_ends():
    """Nobody joins its thread."""
    code = """
    import sys
    sys.path.insert(0, {tests!r})
    from batcher_fakes import Backend, Rows
    from searchr1_fast.retrieval.batcher import BatchedRetriever
    backend = Backend()
    retriever = BatchedRetriever(backend, Rows())
    print(retriever.search(["4"], 1)[0][0].id)
    """
    assert run(code) == "40\n"


def test_a_fork_is_noticed_and_the_parent_goes_on():
    """A batch, a waiter and a deadline are under way, so that locks and condition variables are in use."""
    code = """
    import gc, os, sys, threading, warnings
    sys.path.insert(0, {tests!r})
    from batcher_fakes import Backend, Rows
    from searchr1_fast.retrieval import RetrievalError, batcher_workers
    warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on Python warns of forks beside threads
    from searchr1_fast.retrieval.batcher import BatchedRetriever
    backend = Backend()
    backend.hold()
    retriever = BatchedRetriever(backend, Rows())
    found = []
    waiter = threading.Thread(target=lambda: found.append(retriever.search(["4"], 1, timeout=1000.0)))
    waiter.start()
    backend.entered.acquire()
    ticket = retriever._batcher.submit(["5"], 1)
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
    """They are admitted at once, or later by the clock's thread; a dropped ticket leaves no deadline behind."""
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
    listener = _C.Listener(batcher)
    blocked = listener.search(None, *huge)
    assert type(blocked) is _C.AwaitedSearch and small.is_pending
    print(small.wait().name)
    while not (drained := listener.drain())[1]:
        time.sleep(0.001)
    (search, ticket), = drained[1]
    print(ticket.outcome.name, search is blocked, drained[0])
    assert batcher.statistics()["pending_bytes"] == 0
    """
    assert run(code) == "EXPIRED\nFAILED True []\n"


def test_passages_that_cannot_be_read_fail_the_search(backend):
    class Gone:
        def passages(self, rows, scores):
            raise ValueError("passages.bin was cut short")

    with BatchedRetriever(backend, Gone()) as retriever, pytest.raises(RetrievalError, match="was cut short"):
        retriever.search(["1"], 1)


class Speechless(Exception):
    def __str__(self):
        raise ZeroDivisionError("no text")


@pytest.mark.parametrize("two_stages", [False, True])
@pytest.mark.parametrize("moment", ["complete", "text", "take"])
def test_a_worker_does_not_die_unheard(make, monkeypatch, two_stages, moment, pool):
    """Whatever is raised in its thread, even after a batch was answered, whoever searches is told."""
    backend = TwoStages() if two_stages else Backend()
    take, complete = _C.Batcher.take, _C.Batch.complete
    if moment == "complete":

        def complete_and_raise(batch, *found):
            complete(batch, *found)
            raise MemoryError("no memory to remember it")

        monkeypatch.setattr(_C.Batch, "complete", complete_and_raise)
    elif moment == "text":
        backend.error = Speechless()
    else:

        def take_and_raise(batcher):
            batch = take(batcher)
            raise MemoryError(f"no memory for {len(batch)}")

        monkeypatch.setattr(_C.Batcher, "take", take_and_raise)
    retriever = make(backend)
    first = pool.submit(retriever.search, ["1"], 1)
    if moment == "complete":
        assert ids_of(first.result(PATIENCE)) == [[20 if two_stages else 10]]
        eventually(lambda: not any(thread.is_alive() for thread in retriever.threads[-1:]))
    else:
        with pytest.raises(RetrievalError, match="MemoryError: no memory|Speechless: <exception str"):
            first.result(PATIENCE)
    with pytest.raises(RetrievalError, match="MemoryError: no memory|Speechless: <exception str"):
        pool.submit(retriever.search, ["2"], 1).result(PATIENCE)


def test_closing_does_not_wait_for_a_backend_that_hangs(make, backend, pool, monkeypatch, capfd):
    """A backend that was given up on must not hold up the end of a run."""
    monkeypatch.setattr(batcher_workers, "CLOSING_SECONDS", 0.05)
    retriever = make()
    first = hold_with_one(retriever, backend, pool)
    retriever.close()
    with pytest.raises(RetrievalError, match="closed"):
        first.result(PATIENCE)
    assert "did not come back within 0.05 s of closing; left behind" in capfd.readouterr().err
