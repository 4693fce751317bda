"""An event loop's side of the batcher: many coroutines that wait, one descriptor that wakes them.

What settled since the loop last looked comes as two arrays for all of them, and each coroutine gets its rows of these.
A coroutine awaits an object of the extension's, not a future of asyncio's (csrc/awaited.h says why), and goes on where
its search is delivered. Passages are read in a thread, for all of them in one call: reading may wait for the disk.

Shape legend
    Q  queries of a search    k  hits of a query    R  queries of all searches that settled
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from typing import Any

import numpy as np

from searchr1_fast import _C
from searchr1_fast.retrieval.batcher_workers import Failure, error_of, forked
from searchr1_fast.retrieval.protocol import RetrievalError
from searchr1_fast.types import Passage

Rows = tuple[np.ndarray, np.ndarray]  # scores [Q,k] fp32, rows [Q,k] int64
Gather = Callable[[np.ndarray, np.ndarray], list[list[Passage]]]  # scores [R,k], rows [R,k] -> passages of each query


class RowSearches:
    """Searches of one event loop for rows.

    It must not hold the loop, which holds it: a loop that was closed is to be collected, with the descriptor.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        batcher: _C.Batcher,
        failure: Failure,
        on_loop_gone: Callable[[], None],
    ) -> None:
        self._listener = _C.Listener(batcher)
        self._failure = failure
        loop.add_reader(self._listener.fileno(), self._wake)
        self._loop = weakref.ref(loop, lambda _: on_loop_gone())

    def search(
        self, loop: asyncio.AbstractEventLoop, queries: Sequence[str], k: int, timeout: float | None
    ) -> Awaitable[Any]:
        """What is found, to be awaited at once, by one task. `loop`: the one that runs, which is this one's."""
        try:
            search = self._listener.search(loop, queries, k, timeout)
        except _C.UsedAfterFork as error:
            raise forked(error) from error
        if type(search) is _C.AwaitedSearch:
            return search
        if not search.is_done:
            raise error_of(search, self._failure)
        return self._at_once(search.result())

    async def _at_once(self, found: Rows) -> Any:
        """What a search gives whose rows were known when it was asked."""
        return found

    def _deliver(self, searches: list[_C.AwaitedSearch], ends: list[int], found: Rows) -> None:
        """found [R,k] of as many searches as there are; the rows of searches[i] end at ends[i]."""
        _C.deliver(searches, ends, found)

    def _wake(self) -> None:
        found, others = self._listener.drain()
        for search, ticket in others:
            search.set_exception(error_of(ticket, self._failure))
        with ExitStack() as deliveries:  # all of them, whatever the tasks of another raise
            for searches, ends, scores, rows in found:
                deliveries.callback(self._deliver, searches, ends, (scores, rows))


class PassageSearches(RowSearches):
    """Searches of one event loop for passages."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        batcher: _C.Batcher,
        failure: Failure,
        on_loop_gone: Callable[[], None],
        gather: Gather,
        thread: Executor,
    ) -> None:
        super().__init__(loop, batcher, failure, on_loop_gone)
        self._gather = gather
        self._thread = thread

    async def _at_once(self, found: Rows) -> Any:
        return await self._read(found)

    def _read(self, found: Rows) -> asyncio.Future[list[list[Passage]]]:
        try:
            return asyncio.get_running_loop().run_in_executor(self._thread, self._gather, *found)
        except RuntimeError as error:  # it was shut down
            raise RetrievalError("the retriever was closed before the passages were read") from error

    def _deliver(self, searches: list[_C.AwaitedSearch], ends: list[int], found: Rows) -> None:
        try:
            reading = self._read(found)
        except RetrievalError as error:
            _tell(searches, error)
            return

        def hand_out(reading: asyncio.Future[list[list[Passage]]]) -> None:
            error = asyncio.CancelledError() if reading.cancelled() else reading.exception()
            if error is not None:
                _tell(searches, error)
            else:
                _C.deliver(searches, ends, reading.result())

        reading.add_done_callback(hand_out)


def _tell(searches: list[_C.AwaitedSearch], error: BaseException) -> None:
    """Everybody an exception of their own: tracebacks are hung on it."""
    for search in searches:
        own = RetrievalError(str(error))
        own.__cause__ = error
        search.set_exception(own)
