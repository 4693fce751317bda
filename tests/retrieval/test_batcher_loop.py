"""Coroutines: many on one descriptor, each with its own end."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import threading

import pytest
from batcher_fakes import PATIENCE, Rows, expected, hold_with_one, ids_of

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


def test_a_listener_is_readable_while_there_is_news():
    batcher = _C.Batcher(
        max_batch_rows=8, max_batch_bytes=100, max_pending_bytes=100000, max_cache_bytes=0, min_depth=4,
        max_batches_in_flight=1, identity="",
    )  # fmt: skip
    listener = _C.Listener(batcher)

    def is_readable() -> bool:
        return bool(select.select([listener.fileno()], [], [], 0)[0])

    numbers = [listener.submit([str(number)], 1) for number in range(3)]
    numbers.append(listener.submit(["0", "2"], 2))
    assert not is_readable()
    listener.cancel(numbers[1])
    batch = batcher.take()
    batch.complete(*expected([0, 2], 4))
    assert is_readable()
    (one, two), others = listener.drain()
    assert others == []  # who cancelled knows it
    assert (one[:2], one[3].tolist()) == (([numbers[0], numbers[2]], [1, 2]), [[0], [20]])
    assert (two[:2], two[3].tolist()) == (([numbers[3]], [2]), [[0, 1], [20, 21]])
    assert (one[2].tolist(), two[2].tolist()) == ([[0.0], [0.0]], [[0.0, -1.0]] * 2)
    assert not is_readable()
    assert listener.drain() == ([], [])
    batcher.fail("over")
    assert listener.submit(["3"], 1).error == "over"


def test_passages_are_read_outside_of_the_loop(backend):
    """Reading may wait for the disk: the loop turns on meanwhile, and what settled together is read together."""
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
        return found, await retriever.search_async(["3"], 2)  # from the cache, read all the same

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
