"""How a search may end early, and how it queues: deadlines, cancellation, back-pressure."""

from __future__ import annotations

import asyncio

import pytest
from batcher_fakes import PATIENCE, eventually, hold_with_one, ids_of, run

from searchr1_fast import _C
from searchr1_fast.retrieval import RetrievalError
from searchr1_fast.retrieval.protocol import RetrievalTimeout

# ---------------------------------------------------------------------------------------------- deadlines, cancellation


def test_a_search_past_its_deadline_raises_and_the_others_go_on(make, backend, pool):
    """The backend is held, so it cannot be what ends the search."""
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
    shared.cancel()  # no effect: it is settled
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
    from batcher_fakes import Backend, Rows
    from searchr1_fast.retrieval.batcher import BatchedRetriever
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


# -------------------------------------------------------------------------------------------------------- back-pressure


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
    assert backend.searched == ["999", *(str(number) for number in range(12))]  # and in order
    statistics = retriever.statistics()
    assert (statistics["blocked"], statistics["pending_bytes"]) == (0, 0)


def test_a_small_search_does_not_overtake_a_large_one_that_waits_for_room(make, backend, pool):
    """There is room for the small one; but enough small ones would keep the large one waiting for ever."""
    retriever = make(max_pending_bytes=1500)
    first = hold_with_one(retriever, backend, pool)
    large = pool.submit(retriever.search, ["1", "2", "3", "4", "5"], 1)
    eventually(lambda: retriever.statistics()["blocked"] == 1)
    assert retriever.statistics()["pending_bytes"] < 1000  # a query takes 340
    small = pool.submit(retriever.search, ["6"], 1)
    eventually(lambda: retriever.statistics()["num_searches"] == 3)
    assert retriever.statistics()["blocked"] == 2
    backend.let_go()
    assert ids_of(large.result(PATIENCE)) == [[10], [20], [30], [40], [50]] and ids_of(small.result(PATIENCE)) == [[60]]
    first.result(PATIENCE)
    assert backend.searched == ["999", "1", "2", "3", "4", "5", "6"]


def test_what_is_cancelled_makes_room_at_once(make, backend, pool):
    """Not only when a batch comes back, as there may be none under way."""
    retriever = make(max_pending_bytes=800)
    first = hold_with_one(retriever, backend, pool)
    second = retriever._batcher.submit(["1"], 1)
    third = pool.submit(retriever.search, ["2"], 1)
    eventually(lambda: retriever.statistics()["blocked"] == 1)
    second.cancel()
    statistics = retriever.statistics()
    assert (statistics["blocked"], statistics["queued"]) == (0, 1)
    backend.let_go()
    assert ids_of(third.result(PATIENCE)) == [[20]]
    first.result(PATIENCE)


def test_what_is_larger_than_the_bound_goes_alone(make, backend):
    retriever = make(max_pending_bytes=10)
    queries = [str(number) for number in range(500)]
    assert ids_of(retriever.search(queries, 1)) == [[10 * number] for number in range(500)]


def test_the_producer_itself_is_blocked(make, backend, pool):
    """`submit` does not return until there is room; a coroutine is suspended, and its loop runs on."""
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
    listener = _C.Listener(retriever._batcher)
    dropped = listener.search(None, ["2"], 1)
    waiting = pool.submit(retriever.search, ["3"], 1)
    eventually(lambda: retriever.statistics()["blocked"] == 2)
    dropped.cancel()
    assert retriever.statistics()["blocked"] == 1
    assert listener.drain() == ([], [])
    backend.error = OSError("gone")
    backend.let_go()
    for future in (first, waiting):
        with pytest.raises(RetrievalError, match="gone"):
            future.result(PATIENCE)
    assert backend.searched == ["999"]
