"""Many searches at once become few calls of a backend: the C++ batcher (`csrc/batcher.h`) behind a `Retriever`.

Equal queries under way are searched once, what was found before comes from a cache, and whatever queued while the
backend ran is its next batch. Callers may be threads (`search`) or coroutines (`search_async`); both wait without the
GIL, and the backend is called by one thread, so it needs no lock of its own.

A search ends in passages or in a named error: RetrievalTimeout past its deadline, RetrievalError otherwise. The first
error of the backend is final: it fails every search that is pending and every later one, because a backend that broke
once (a lost GPU, a truncated file) must not look like one that finds nothing.

Left out: retries (they belong to the backend that knows what can pass, as `remote` does), and waiting for fuller
batches: the next batch begins when the last one ends anyway.

Shape legend
    Q  queries of a batch    k  hits of a query
"""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any, Protocol

import numpy as np

from searchr1_fast import _C
from searchr1_fast.retrieval.protocol import RetrievalError, RetrievalTimeout, check_k
from searchr1_fast.types import Passage


class SearchBackend(Protocol):
    """What finds rows. Called from one thread at a time, with different queries, at most `max_batch_rows` of them.

    One that also has `prepare(queries) -> prepared` and `search_prepared(prepared, k)` works in two stages, each in a
    thread: the next batch is prepared (tokenised, encoded) while the last is searched.
    """

    def search_ids(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """scores [Q,k'] fp32, descending, and rows [Q,k'] int64; k' <= k. A row with fewer hits ends in row -1."""
        ...


class PassageSource(Protocol):
    """What knows the passages of rows. Called from the threads that search."""

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Passage]: ...


class BatchedRetriever:
    """A `Retriever` over a backend and its passages. Close it, or leave it to the garbage collector or to the exit.

    max_batch_rows, max_batch_bytes: a batch takes queries until it has as many, or as many bytes of text (4 to a token,
    roughly; tokens are not known before the backend makes them).
    max_pending_bytes: texts and results under way; beyond it searches wait in line, first come, first served.
    cache_bytes: of remembered results; 0 remembers none.
    min_depth: hits that the backend is asked for, doubled until they cover k. So a query has one entry in the cache for
    every k up to it, and what it finds does not depend on what others ask for.
    identity: names corpus and encoder; a saved cache is loaded only where it is the same.
    """

    def __init__(
        self,
        backend: SearchBackend,
        passages: PassageSource,
        *,
        max_batch_rows: int = 256,
        max_batch_bytes: int = 2**16,
        max_pending_bytes: int = 2**26,
        cache_bytes: int = 2**26,
        min_depth: int = 16,
        timeout: float | None = None,
        identity: str = "",
    ) -> None:
        """`timeout`: seconds that a search may take where the call says nothing else; None: as long as it takes."""
        self._passages = passages
        self._timeout = timeout
        self._identity = identity
        self._batcher = _C.Batcher(
            max_batch_rows=max_batch_rows,
            max_batch_bytes=max_batch_bytes,
            max_pending_bytes=max_pending_bytes,
            max_cache_bytes=cache_bytes,
            min_depth=min_depth,
            max_batches_in_flight=2 if hasattr(backend, "prepare") else 1,
            identity=identity,
        )
        self._failure = _Failure()
        self._listeners: dict[int, _Listener] = {}  # by id of the loop; one that is collected takes its own away
        threads = _start_workers(self._batcher, backend, self._failure)
        # Also at the interpreter's exit, while threads still run. They hold the batcher, never this object.
        self.close = weakref.finalize(self, _close, self._batcher, threads)

    # ---- searching ------------------------------------------------------------------------------------------------

    def search(self, queries: Sequence[str], k: int, timeout: float | None = None) -> list[list[Passage]]:
        """At most `k` passages for each query, best first. Blocks until all are found."""
        return self._gather(*self.search_ids(queries, k, timeout))

    async def search_async(self, queries: Sequence[str], k: int, timeout: float | None = None) -> list[list[Passage]]:
        """The same, for a coroutine. Cancelling it cancels the search."""
        return self._gather(*await self.search_ids_async(queries, k, timeout))

    def search_ids(
        self, queries: Sequence[str], k: int, timeout: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """scores [Q,k] fp32, rows [Q,k] int64; where there are fewer hits, the rest is -inf and -1."""
        check_k(k)
        ticket = self._submit(queries, k, timeout, None)
        if ticket.is_pending:
            try:
                ticket.wait()
            except BaseException:  # Ctrl-C
                ticket.cancel()
                raise
        return self._result(ticket)

    async def search_ids_async(
        self, queries: Sequence[str], k: int, timeout: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same, for a coroutine."""
        check_k(k)
        loop = asyncio.get_running_loop()
        listener = self._listeners.get(id(loop))
        if listener is None:
            listener = self._listeners[id(loop)] = _Listener(loop, self._listeners)
        ticket = self._submit(queries, k, timeout, listener.channel)
        if ticket.is_pending:
            # It settles in the batcher, which this loop hears of later: the future is never too late.
            future = listener.waiting[ticket.id] = loop.create_future()
            try:
                await future
            except asyncio.CancelledError:
                listener.waiting.pop(ticket.id, None)
                ticket.cancel()
                raise
        return self._result(ticket)

    def _submit(
        self, queries: Sequence[str], k: int, timeout: float | None, channel: _C.Channel | None
    ) -> _C.Ticket:
        timeout = self._timeout if timeout is None else timeout
        try:
            # C++ refuses any k above 2**20, in its own words; it cannot be handed more than 32 bits.
            return self._batcher.submit(queries, min(k, 2**31 - 1), timeout, channel)
        except _C.UsedAfterFork as error:
            raise RetrievalError(f"a search in a forked process: {error}") from error

    def _result(self, ticket: _C.Ticket) -> tuple[np.ndarray, np.ndarray]:
        if ticket.is_done:
            return ticket.result()
        outcome = ticket.outcome
        count = "1 query" if len(ticket) == 1 else f"{len(ticket)} queries"
        if outcome is _C.Outcome.EXPIRED:
            raise RetrievalTimeout(f"a search for {count} did not end before its deadline; nothing was returned")
        if outcome is _C.Outcome.CANCELLED:
            raise RetrievalError(f"a search for {count} was cancelled")
        raise RetrievalError(f"a search for {count} failed: {ticket.error}") from self._failure.error

    def _gather(
        self,
        scores: np.ndarray,  # [Q,k] fp32
        rows: np.ndarray,  # [Q,k] int64
    ) -> list[list[Passage]]:
        """One call for all: reading may wait for the disk."""
        is_hit = rows >= 0
        ends = is_hit.sum(axis=1).cumsum().tolist()
        try:
            found = self._passages.passages(rows[is_hit].tolist(), scores[is_hit].tolist())
        except (ValueError, IndexError, OSError) as error:
            raise RetrievalError(f"the passages of what a search found cannot be read: {error}") from error
        return [found[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    # ---- what it knows --------------------------------------------------------------------------------------------

    def statistics(self, reset: bool = False) -> dict[str, Any]:
        """Counters since the start, or since they were last reset, and what is under way now.

        num_queries = num_unique (searched) + num_coalesced (joined an equal one under way) + num_cache_hits.
        `batch_rows`, `batch_seconds` (the backend's time) and `latency_seconds` (of every query that got a result) hold
        count, mean, p50, p90, p99 and max; percentiles are at most 1/16 too high.
        """
        statistics = self._batcher.statistics(reset)
        num_queries = statistics["num_queries"]
        statistics["unique_fraction"] = statistics["num_unique"] / num_queries if num_queries else math.nan
        statistics["cache_hit_fraction"] = statistics["num_cache_hits"] / num_queries if num_queries else math.nan
        return statistics

    def save_cache(self, path: str | Path) -> None:
        """Write what is remembered, whole or not at all, next to a checkpoint."""
        self._check_identity()
        self._batcher.save_cache(str(path))

    def load_cache(self, path: str | Path) -> int:
        """Remember what a file holds, too; how many results it had. ValueError: damaged, or of another identity."""
        self._check_identity()
        return self._batcher.load_cache(str(path))

    def _check_identity(self) -> None:
        """Two corpora without a name would pass for one, and their rows mean other passages."""
        if not self._identity:
            raise ValueError("this retriever has no identity, so its cache cannot be told from others; give it one")

    def __enter__(self) -> BatchedRetriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Listener:
    """The coroutines of one event loop that wait, and the descriptor that wakes them.

    It must not hold the loop, which holds it: a loop that was closed is to be collected, with the descriptor.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, listeners: dict[int, _Listener]) -> None:
        self.channel = _C.Channel()
        self.waiting: dict[int, asyncio.Future[None]] = {}  # by ticket
        loop.add_reader(self.channel.fileno(), self._wake)
        number = id(loop)
        self._loop = weakref.ref(loop, lambda _: listeners.pop(number, None))

    def _wake(self) -> None:
        for number in self.channel.drain():
            future = self.waiting.pop(number, None)
            if future is not None and not future.done():
                future.set_result(None)


# ------------------------------------------------------------------------------------------------------------ workers


class _Failure:
    """The exception that ended the backend, to be named as the cause of every search it failed."""

    def __init__(self) -> None:
        self.error: BaseException | None = None


def _start_workers(batcher: _C.Batcher, backend: Any, failure: _Failure) -> list[threading.Thread]:
    """One thread that searches; one before it that prepares, where the backend has two stages.

    Daemons, so that a program which forgets to close ends; the finalizer joins them before the interpreter goes.
    """
    if not hasattr(backend, "prepare"):
        steps = [lambda: _search_batches(batcher, backend, failure)]
    else:
        prepared: Queue[tuple[_C.Batch, Any] | None] = Queue()  # the batcher gives out two batches at a time
        steps = [
            lambda: _prepare_batches(batcher, backend, failure, prepared),
            lambda: _search_prepared(backend, failure, prepared),
        ]
    threads = [threading.Thread(target=step, name="retrieval", daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    return threads


def _search_batches(batcher: _C.Batcher, backend: SearchBackend, failure: _Failure) -> None:
    while (batch := batcher.take()) is not None:
        try:
            batch.complete(*_checked(backend.search_ids(batch.queries, batch.depth)))
        except BaseException as error:  # whatever it is: it must reach those who wait, who raise it
            _fail(batch, error, failure)


def _prepare_batches(batcher: _C.Batcher, backend: Any, failure: _Failure, prepared: Queue) -> None:
    while (batch := batcher.take()) is not None:
        try:
            prepared.put((batch, backend.prepare(batch.queries)))
        except BaseException as error:
            _fail(batch, error, failure)
    prepared.put(None)


def _search_prepared(backend: Any, failure: _Failure, prepared: Queue) -> None:
    while (item := prepared.get()) is not None:
        if failure.error is not None:
            continue  # every search was told
        batch, inputs = item
        try:
            batch.complete(*_checked(backend.search_prepared(inputs, batch.depth)))
        except BaseException as error:
            _fail(batch, error, failure)


def _fail(batch: _C.Batch, error: BaseException, failure: _Failure) -> None:
    failure.error = failure.error or error
    batch.fail(f"the backend raised {type(error).__name__}: {error}")


def _checked(found: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """C-contiguous, of the types of the protocol; C++ looks at shapes and values."""
    scores, rows = found
    if scores.dtype != np.float32 or rows.dtype != np.int64:
        raise TypeError(f"a backend gives scores as float32 and rows as int64, not {scores.dtype} and {rows.dtype}")
    return np.ascontiguousarray(scores), np.ascontiguousarray(rows)


def _close(batcher: _C.Batcher, threads: list[threading.Thread]) -> None:
    """What is pending fails; then the threads end, after the batch that they are at."""
    batcher.close()
    if threading.current_thread() in threads:
        return  # the garbage collector runs where it likes; the other worker may be waiting for this one
    for thread in threads:
        thread.join()
