"""Searches in coroutines: many share one descriptor, and each ends by itself."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import select
import sys
import threading
import weakref

import pytest
from batcher_fakes import PATIENCE, Rows, eventually, expected, hold_with_one, ids_of

from searchr1_fast import _C
from searchr1_fast.retrieval import RetrievalError
from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.protocol import RetrievalTimeout


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


def test_searches_that_ended_are_gone_however_they_did(make, backend, pool):
    """The searches that coroutines awaited were found, cancelled or late."""

    def num_searches() -> int:
        gc.collect()
        return sum(type(one) is _C.AwaitedSearch for one in gc.get_objects())

    before = num_searches()
    retriever = make()
    first = hold_with_one(retriever, backend, pool)

    async def end_some():
        tasks = [asyncio.create_task(retriever.search_async([str(number)], 1)) for number in range(30)]
        late = [asyncio.create_task(retriever.search_ids_async(["7"], 1, timeout=0.01)) for _ in range(10)]
        while retriever.statistics()["num_searches"] < 41:
            await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        await asyncio.wait(late)
        backend.let_go()
        return [*(await asyncio.gather(*tasks, return_exceptions=True)), *(task.exception() for task in late)]

    ended = asyncio.run(end_some())
    assert [type(one) for one in ended[:30:3]] == [asyncio.CancelledError] * 10
    assert [type(one) for one in ended[30:]] == [RetrievalTimeout] * 10
    first.result(PATIENCE)
    del ended
    eventually(lambda: num_searches() <= before)


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

    def num_open() -> int:
        gc.collect()  # does nothing while another thread collects, so ask again
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    asyncio.run(search(0))
    before = num_open()
    results = list(pool.map(lambda number: asyncio.run(search(number)), range(30)))
    assert [ids_of(result) for result in results] == [[[10 * number]] for number in range(30)]
    eventually(lambda: num_open() <= before)


def test_a_listener_is_readable_while_there_is_news():
    batcher = _C.Batcher(
        max_batch_rows=8, max_batch_bytes=100, max_pending_bytes=100000, max_cache_bytes=0, min_depth=4,
        max_batches_in_flight=1, identity="",
    )  # fmt: skip
    listener = _C.Listener(batcher)

    def is_readable() -> bool:
        return bool(select.select([listener.fileno()], [], [], 0)[0])

    searches = [listener.search(None, [str(number)], 1) for number in range(3)]
    searches.append(listener.search(None, ["0", "2"], 2))
    assert not is_readable()
    assert searches[1].cancel() and not searches[1].cancel()
    batch = batcher.take()
    batch.complete(*expected([0, 2], 4))
    assert is_readable()
    (one, two), others = listener.drain()
    assert others == []  # the canceller knows it already
    assert (one[:2], one[3].tolist()) == (([searches[0], searches[2]], [1, 2]), [[0], [20]])
    assert (two[:2], two[3].tolist()) == (([searches[3]], [2]), [[0, 1], [20, 21]])
    assert (one[2].tolist(), two[2].tolist()) == ([[0.0], [0.0]], [[0.0, -1.0]] * 2)
    assert not is_readable()
    assert listener.drain() == ([], [])
    batcher.fail("over")
    assert listener.search(None, ["3"], 1).error == "over"


def test_passages_are_read_outside_of_the_loop(backend):
    """Reading may wait for the disk. The loop runs on meanwhile, and what settles together is read together."""
    reads, go = [], threading.Event()

    class Slow(Rows):
        def passages(self, rows, scores):
            reads.append((threading.get_ident(), len(rows)))
            assert go.wait(PATIENCE)
            return super().passages(rows, scores)

    async def search():
        searches = [asyncio.create_task(retriever.search_async([str(n)], 2)) for n in range(50)]
        while not reads:
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        go.set()
        found = await asyncio.gather(*searches)
        return found, await retriever.search_async(["3"], 2)  # from the cache, but the passages are read again

    backend.hold()
    with BatchedRetriever(backend, Slow()) as retriever:
        threading.Timer(0.05, backend.let_go).start()
        found, again = asyncio.run(search())
    assert [ids_of(one) for one in found] == [[[10 * n, 10 * n + 1]] for n in range(50)]
    assert again == found[3]
    assert threading.get_ident() not in {thread for thread, _ in reads}
    assert sum(rows for _, rows in reads) == 102
    assert len(reads) < 20


def test_passages_that_cannot_be_read_fail_each_coroutine(backend):
    class Gone:
        def passages(self, rows, scores):
            raise ValueError("passages.bin was cut short")

    async def search_all():
        searches = (retriever.search_async([str(n)], 1) for n in range(5))
        return await asyncio.gather(*searches, return_exceptions=True)

    with BatchedRetriever(backend, Gone()) as retriever:
        errors = asyncio.run(search_all())
    assert len({id(error) for error in errors}) == 5
    assert all(isinstance(error, RetrievalError) and "was cut short" in str(error) for error in errors)


# ------------------------------------------------------------------------------------- what a task is owed by a future


def test_a_task_that_nobody_holds_is_not_collected_while_it_waits(make, backend):
    retriever = make()
    found = []

    async def search():
        found.append(ids_of(await retriever.search_async(["1"], 1)))

    async def forget_it():
        backend.hold()
        asyncio.get_running_loop().create_task(search()).add_done_callback(lambda _: gone.set())
        gone = asyncio.Event()
        await asyncio.sleep(0)
        gc.collect()
        backend.let_go()
        await asyncio.wait_for(gone.wait(), PATIENCE)

    asyncio.run(forget_it())
    assert found == [[[10]]]


def test_a_loop_that_was_closed_on_a_search_is_collected_with_all_that_it_held(backend):
    """Coroutine, task, search, listener, retriever and loop hold one another."""
    retriever, loop = BatchedRetriever(backend, Rows()), asyncio.new_event_loop()
    backend.hold()
    task = loop.create_task(retriever.search_async(["1"], 1))
    loop.run_until_complete(asyncio.sleep(0))
    assert not task.done()
    task._log_destroy_pending = False
    are_gone = weakref.ref(loop), weakref.ref(retriever)
    loop.close()
    backend.let_go()
    del loop, task, retriever
    gc.collect()
    assert [is_gone() for is_gone in are_gone] == [None, None]


def test_an_interrupt_in_one_task_ends_the_run_and_no_other_search(make, backend):
    """`deliver` steps tasks by itself, so it gets exceptions that the tasks do not keep."""
    retriever = make()
    ended = []

    async def search(number):
        try:
            found = await retriever.search_async([str(number)], 1)
            if number == 3:
                raise KeyboardInterrupt
            ended.append(ids_of(found))
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    loop = asyncio.new_event_loop()
    backend.hold()
    tasks = [loop.create_task(search(number)) for number in range(6)]
    threading.Timer(0.05, backend.let_go).start()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    others = tasks[:3] + tasks[4:]
    loop.run_until_complete(asyncio.gather(*others))  # the loop runs again, as in an interactive shell
    loop.close()
    assert sorted(ended) == [[[10 * number]] for number in range(6) if number != 3]
    assert isinstance(tasks[3].exception(), KeyboardInterrupt)


def test_a_task_goes_on_in_its_own_context_and_in_the_order_of_settling(make, backend):
    retriever = make()
    who, seen = contextvars.ContextVar("who"), []

    async def search(number):
        who.set(number)
        await retriever.search_async([str(number)], 1)
        seen.append((number, who.get(), asyncio.current_task().get_name()))

    async def search_all():
        tasks = [asyncio.create_task(search(number), name=f"task {number}") for number in range(20)]
        await asyncio.gather(*tasks)

    backend.hold()
    threading.Timer(0.05, backend.let_go).start()
    asyncio.run(search_all())
    assert seen == [(number, number, f"task {number}") for number in range(20)]


def test_a_search_that_was_found_may_still_be_cancelled_before_its_passages_are_read(make, backend):
    reads, go = threading.Event(), threading.Event()

    class Slow(Rows):
        def passages(self, rows, scores):
            reads.set()
            assert go.wait(PATIENCE)
            return super().passages(rows, scores)

    async def search():
        one, other = (asyncio.create_task(retriever.search_async([query], 1)) for query in ("1", "2"))
        while not reads.is_set():
            await asyncio.sleep(0)
        one.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await one
        go.set()
        return await other

    backend.hold()
    with BatchedRetriever(backend, Slow()) as retriever:
        threading.Timer(0.05, backend.let_go).start()
        assert ids_of(asyncio.run(search())) == [[20]]


def test_searches_wait_under_a_time_limit_a_tracer_and_a_debugging_loop(make, backend):
    retriever = make()

    async def search():
        found = await asyncio.wait_for(retriever.search_ids_async(["1", "2"], 2), PATIENCE)
        backend.hold()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(retriever.search_ids_async(["3"], 2), 0.02)
        backend.let_go()
        return found

    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        scores, rows = asyncio.run(search(), debug=True)
    finally:
        sys.settrace(before)
    assert (scores.tolist(), rows.tolist()) == ([[0.0, -1.0]] * 2, [[10, 11], [20, 21]])


def test_a_search_is_awaited_by_one_task_and_asks_for_no_other_use():
    batcher = _C.Batcher(
        max_batch_rows=8, max_batch_bytes=100, max_pending_bytes=100000, max_cache_bytes=0, min_depth=4,
        max_batches_in_flight=1, identity="",
    )  # fmt: skip
    listener = _C.Listener(batcher)

    async def misuse():
        loop = asyncio.get_running_loop()
        search = listener.search(loop, ["1"], 1)

        async def wait():
            return await search

        one, other = loop.create_task(wait()), loop.create_task(wait())
        with pytest.raises(asyncio.InvalidStateError, match="not settled"):
            await other
        with pytest.raises(asyncio.InvalidStateError, match="not settled"):
            search.result()
        batcher.take().complete(*expected([1], 4))
        ((searches, ends, scores, rows),), _ = listener.drain()
        with pytest.raises(TypeError, match="lists of one length"):
            _C.deliver(searches, [], (scores, rows))
        loop.call_soon(_C.deliver, searches, ends, (scores, rows))
        scores, rows = await one
        assert (scores.tolist(), rows.tolist(), search.result()[1].tolist()) == ([[0.0]], [[10]], [[10]])
        assert not search.cancel() and search.done() and not search.cancelled()

    asyncio.run(misuse())
    with pytest.raises(TypeError):
        _C.AwaitedSearch()
