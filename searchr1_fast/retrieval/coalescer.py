"""Batches the searches of many coroutines for a retriever that blocks.

For retrievers that do not batch by themselves (BM25, remote); those over vectors use batcher.py. There is no timer: a
batch is whatever arrived while the one before it was searched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from searchr1_fast.retrieval.protocol import Retriever
from searchr1_fast.types import Passage

_BATCH_ROWS = 1024  # queries searched at once


@dataclass
class _Waiting:
    queries: list[str]
    k: int
    future: asyncio.Future[list[list[Passage]]]


class Coalescer:
    """Gathers the searches of all requests: whatever waits when one search ends is the next, equal queries once.

    One thread searches. A failed search fails only the requests that were in it.
    """

    def __init__(self, retriever: Retriever, on_batch: Callable[[int], None] = lambda rows: None) -> None:
        """`on_batch` is called with the number of queries of each batch."""
        self._retriever = retriever
        self._on_batch = on_batch
        self._queue: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Return the passages of each query, once its batch has been searched."""
        waiting = _Waiting(queries, k, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await waiting.future

    async def close(self) -> None:
        """Wait until no request is left."""
        if self._task is not None:
            await self._task

    async def _work(self) -> None:
        await asyncio.sleep(0)  # requests read in the same iteration of the loop join this batch
        while batch := self._take():
            unique = list(dict.fromkeys(query for waiting in batch for query in waiting.queries))
            self._on_batch(len(unique))
            try:
                found = await asyncio.to_thread(self._retriever.search, unique, batch[0].k)
                passages = dict(zip(unique, found, strict=True))
            except Exception as error:  # of any kind: it goes to the waiting requests
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
                continue
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_result([list(passages[query]) for query in waiting.queries])

    def _take(self) -> list[_Waiting]:
        """Take the next batch: requests with the first one's k, up to _BATCH_ROWS queries; drop cancelled ones."""
        self._queue = [waiting for waiting in self._queue if not waiting.future.done()]
        batch: list[_Waiting] = []
        rest: list[_Waiting] = []
        num_rows = 0
        for waiting in self._queue:
            fits = not batch or (waiting.k == batch[0].k and num_rows + len(waiting.queries) <= _BATCH_ROWS)
            (batch if fits else rest).append(waiting)
            num_rows += len(waiting.queries) if fits else 0
        self._queue = rest
        return batch
