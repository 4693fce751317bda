"""An event loop's side of the batcher: many waiting coroutines, one descriptor that wakes them.

All searches that settled since the loop last looked arrive as two arrays, and each coroutine gets its rows of them. A
coroutine awaits an object of the extension, not an asyncio future (csrc/awaited.h says why), and resumes inside the
call that delivers its search. Passages are read in a thread, in one call for all: reading may wait for the disk.

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
    """One event loop's searches for rows.

    It must not hold a reference to the loop, which holds it: a closed loop must be collectable, with the descriptor.
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
        """Start a search; await the result at once, from one task. `loop`: the running loop, which owns this object."""
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
        """The result of a search whose rows were known when it was submitted."""
        return found

    def _deliver(self, searches: list[_C.AwaitedSearch], ends: list[int], found: Rows) -> None:
        """Hand out `found` [R,k], the rows of all `searches`; those of searches[i] end at ends[i]."""
        _C.deliver(searches, ends, found)

    def _wake(self) -> None:
        found, others = self._listener.drain()
        for search, ticket in others:
            search.set_exception(error_of(ticket, self._failure))
        with ExitStack() as deliveries:  # all are delivered, even if the tasks of one raise
            for searches, ends, scores, rows in found:
                deliveries.callback(self._deliver, searches, ends, (scores, rows))


class PassageSearches(RowSearches):
    """One event loop's searches for passages."""

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
        except RuntimeError as error:  # the executor was shut down
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
    """Set an exception of its own on each search, because tracebacks are attached to it."""
    for search in searches:
        own = RetrievalError(str(error))
        own.__cause__ = error
        search.set_exception(own)
