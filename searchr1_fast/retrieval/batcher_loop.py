"""An event loop's side of the batcher: many coroutines that wait, one descriptor that wakes them.

What settled since the loop last looked comes as two arrays for all of them, and each coroutine gets its rows of these.
Passages are read in a thread, for all of them in one call: reading may wait for the disk.

Shape legend
    Q  queries of a search    k  hits of a query    R  queries of all searches that settled
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
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
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        loop.add_reader(self._listener.fileno(), self._wake)
        self._loop = weakref.ref(loop, lambda _: on_loop_gone())

    async def search(self, queries: Sequence[str], k: int, timeout: float | None) -> Any:
        """What was found."""
        try:
            settled = self._listener.submit(queries, k, timeout)
        except _C.UsedAfterFork as error:
            raise forked(error) from error
        if type(settled) is not int:
            if not settled.is_done:
                raise error_of(settled, self._failure)
            return await self._at_once(settled.result())
        # It settles in the batcher, which this loop hears of later: the future is never too late.
        self._waiting[settled] = future = asyncio.get_running_loop().create_future()
        try:
            return await future
        except asyncio.CancelledError:
            self._waiting.pop(settled, None)
            self._listener.cancel(settled)
            raise

    async def _at_once(self, found: Rows) -> Any:
        """What a search gives whose rows were known when it was asked."""
        return found

    def _deliver(self, futures: list[asyncio.Future[Any] | None], ends: list[int], found: Rows) -> None:
        """found [R,k] of as many searches as there are futures; those of futures[i] end at ends[i]."""
        scores, rows = found
        begin = 0
        for future, end in zip(futures, ends, strict=True):
            if future is not None and not future.done():
                future.set_result((scores[begin:end], rows[begin:end]))
            begin = end

    def _wake(self) -> None:
        found, others = self._listener.drain()
        pop = self._waiting.pop
        for numbers, ends, scores, rows in found:
            self._deliver([pop(number, None) for number in numbers], ends, (scores, rows))
        for number, ticket in others:
            future = pop(number, None)
            if future is not None and not future.done():
                future.set_exception(error_of(ticket, self._failure))


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

    def _deliver(self, futures: list[asyncio.Future[Any] | None], ends: list[int], found: Rows) -> None:
        try:
            reading = self._read(found)
        except RetrievalError as error:
            _tell(futures, error)
            return

        def hand_out(reading: asyncio.Future[list[list[Passage]]]) -> None:
            error = asyncio.CancelledError() if reading.cancelled() else reading.exception()
            if error is not None:
                _tell(futures, error)
                return
            passages, begin = reading.result(), 0
            for future, end in zip(futures, ends, strict=True):
                if future is not None and not future.done():
                    future.set_result(passages[begin:end])
                begin = end

        reading.add_done_callback(hand_out)


def _tell(futures: list[asyncio.Future[Any] | None], error: BaseException) -> None:
    """Everybody an exception of their own: tracebacks are hung on it."""
    for future in futures:
        if future is not None and not future.done():
            own = RetrievalError(str(error))
            own.__cause__ = error
            future.set_exception(own)
