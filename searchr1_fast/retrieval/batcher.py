"""Turns many concurrent searches into few calls of a backend: the C++ batcher (`csrc/batcher.h`) as a `Retriever`.

Equal queries in flight are searched once, earlier results come from a cache, and whatever queued while the backend ran
is its next batch. Callers may be threads (`search`) or coroutines (`search_async`); both wait without the GIL. The
backend is called by one thread (one per stage, if it has two), so it needs no lock of its own.

A search ends in passages or in a named error: RetrievalTimeout past its deadline, RetrievalError otherwise. The first
error of the backend is final: it fails every pending search and every later one, because a backend that broke once (a
lost GPU, a truncated file) must not look like one that finds nothing.

Left out: retries, which belong to a backend that knows which errors can pass (as `remote` does), and waiting for fuller
batches: the next batch begins when the last one ends anyway.

Shape legend
    Q  queries of a batch    k  hits of a query
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from searchr1_fast import _C
from searchr1_fast.retrieval.batcher_loop import PassageSearches, RowSearches
from searchr1_fast.retrieval.batcher_workers import (
    Failure,
    SearchBackend,
    close_workers,
    error_of,
    forked,
    start_workers,
)
from searchr1_fast.retrieval.protocol import Parks, RetrievalError, RetrievalParked, RetrievalTimeout
from searchr1_fast.retrieval.statistics import SearchStatistics
from searchr1_fast.types import Passage


class PassageSource(Protocol):
    """Maps rows to passages. Called from the threads that search."""

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Passage]: ...


class BatchedRetriever:
    """A `Retriever` over a backend and its passages. Close it, or leave that to the garbage collector or program exit.

    max_batch_rows, max_batch_bytes: a batch takes queries until it has this many, or this many bytes of text (roughly 4
    to a token; tokens are not known before the backend makes them).
    max_pending_bytes: limit on texts and results in flight; beyond it searches queue, first come, first served.
    cache_bytes: limit on cached results; 0 caches none.
    min_depth: hits that the backend is asked for, doubled until they cover k. So a query has one cache entry for every
    k of the same depth, and what it finds does not depend on what others ask for.
    identity: names corpus and encoder; a saved cache is loaded only if its identity is the same.
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
        """`timeout`: seconds that a search may take unless the call says otherwise; None sets no limit."""
        self._backend = backend
        self._passages = passages
        self._timeout = timeout
        self.is_parked = False
        self.identity = identity
        self._batcher = _C.Batcher(
            max_batch_rows=max_batch_rows,
            max_batch_bytes=max_batch_bytes,
            max_pending_bytes=max_pending_bytes,
            max_cache_bytes=cache_bytes,
            min_depth=min_depth,
            max_batches_in_flight=2 if hasattr(backend, "prepare") else 1,
            identity=identity,
        )
        self._failure = Failure()
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="passages")  # no thread until a coroutine needs it
        # Keyed by the id of the event loop; a loop's entries go when it is collected.
        self._row_searches: dict[int, RowSearches] = {}
        self._passage_searches: dict[int, PassageSearches] = {}
        self.threads = start_workers(self._batcher, backend, self._failure)
        # Called at interpreter exit too, while threads still run. They hold the batcher, never this object.
        self.close = weakref.finalize(self, _close, self._batcher, self.threads, self._reading)

    @property
    def mode(self) -> str:
        """How the backend searches (`protocol.Mode`); empty if it does not say."""
        return getattr(self._backend, "mode", "")

    # ---- searching ------------------------------------------------------------------------------------------------

    def search(self, queries: Sequence[str], k: int, timeout: float | None = None) -> list[list[Passage]]:
        """At most `k` passages for each query, best first. Blocks until all are found."""
        return _gather(self._passages, *self.search_ids(queries, k, timeout))

    async def search_async(self, queries: Sequence[str], k: int, timeout: float | None = None) -> list[list[Passage]]:
        """`search` for a coroutine; cancelling the coroutine cancels the search."""
        if self.is_parked:
            raise RetrievalParked
        loop = asyncio.get_running_loop()
        searches = self._passage_searches.get(id(loop))
        if searches is None:
            forget, gather = partial(self._passage_searches.pop, id(loop), None), partial(_gather, self._passages)
            searches = PassageSearches(loop, self._batcher, self._failure, forget, gather, self._reading)
            self._passage_searches[id(loop)] = searches
        return await searches.search(loop, queries, k, self._timeout if timeout is None else timeout)

    def search_ids(self, queries: Sequence[str], k: int, timeout: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """scores [Q,k] fp32, rows [Q,k] int64; where a query has fewer hits, the rest is -inf and -1."""
        if self.is_parked:
            raise RetrievalParked
        try:
            ticket = self._batcher.submit(queries, k, self._timeout if timeout is None else timeout)
        except _C.UsedAfterFork as error:
            raise forked(error) from error
        if ticket.is_pending:
            try:
                ticket.wait()
            except BaseException:  # Ctrl-C
                ticket.cancel()
                raise
        if not ticket.is_done:
            raise error_of(ticket, self._failure)
        return ticket.result()

    async def search_ids_async(
        self, queries: Sequence[str], k: int, timeout: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search_ids` for a coroutine."""
        if self.is_parked:
            raise RetrievalParked
        loop = asyncio.get_running_loop()
        searches = self._row_searches.get(id(loop))
        if searches is None:
            forget = partial(self._row_searches.pop, id(loop), None)
            searches = self._row_searches[id(loop)] = RowSearches(loop, self._batcher, self._failure, forget)
        return await searches.search(loop, queries, k, self._timeout if timeout is None else timeout)

    # ---- lending out GPU memory -------------------------------------------------------------------------------------

    def park(self) -> None:
        """Give the backend's GPU memory to others once the searches in flight have ended. RetrievalTimeout if that
        takes longer than a search may. Later searches raise RetrievalParked, even those whose result is cached. Does
        nothing if the backend has no such memory, or if it is parked already."""
        if self.is_parked or not isinstance(self._backend, Parks):
            return
        self.is_parked = True
        try:
            self._wait_for_quiet()
            self._backend.park()
        except BaseException:
            self.is_parked = False
            raise

    def unpark(self) -> None:
        """Take the memory back. Returns before the copies are done; the first search waits for them. If others still
        have the memory (torch.OutOfMemoryError), everything stays parked. Does nothing if not parked."""
        if self.is_parked:
            self._backend.unpark()
            self.is_parked = False

    def _wait_for_quiet(self) -> None:
        """Wait until no search is in flight. Polling will do: where a trainer parks, none is."""
        until = None if self._timeout is None else time.monotonic() + self._timeout
        while True:
            now = self._batcher.statistics()
            if not (now["pending_bytes"] or now["blocked"] or now["batches_in_flight"]):
                return
            if until is not None and time.monotonic() > until:
                raise RetrievalTimeout(f"searches were under way for {self._timeout:g} s, so the index was not parked")
            time.sleep(0.001)

    # ---- what it knows --------------------------------------------------------------------------------------------

    def statistics(self, reset: bool = False) -> dict[str, Any]:
        """Counters since the start, or since they were last reset, and what is in flight now.

        num_queries = num_unique (searched) + num_coalesced (joined an equal one in flight) + num_cache_hits.
        `batch_rows`, `batch_seconds` (the backend's time) and `latency_seconds` (of every query that got a result) hold
        count, mean, p50, p90, p99 and max; percentiles are at most 1/16 too high.
        """
        statistics = self._batcher.statistics(reset)
        num_queries = statistics["num_queries"]
        statistics["unique_fraction"] = statistics["num_unique"] / num_queries if num_queries else math.nan
        statistics["cache_hit_fraction"] = statistics["num_cache_hits"] / num_queries if num_queries else math.nan
        return statistics

    def take_statistics(self) -> SearchStatistics:
        """What a training step reports, counted since the statistics were last taken."""
        taken = self._batcher.statistics(True)
        rows = taken["batch_rows"]
        return SearchStatistics(
            queries=taken["num_queries"],
            unique=taken["num_unique"],
            cache_hits=taken["num_cache_hits"],
            batches=taken["num_batches"],
            batch_rows=round(rows["mean"] * rows["count"]),
            timeouts=taken["num_expired"],
            failures=taken["num_failed"],
        )

    def save_cache(self, path: str | Path) -> None:
        """Write the cached results to a file next to a checkpoint, whole or not at all."""
        self._check_identity()
        self._batcher.save_cache(str(path))

    def load_cache(self, path: str | Path) -> int:
        """Add a file's results to the cache; returns how many it had. ValueError: damaged, or of another identity."""
        self._check_identity()
        return self._batcher.load_cache(str(path))

    def _check_identity(self) -> None:
        """Refuse an empty identity: two unnamed corpora would pass for one, though their rows mean other passages."""
        if not self.identity:
            raise ValueError("this retriever has no identity, so its cache cannot be told from others; give it one")

    def __enter__(self) -> BatchedRetriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _gather(
    source: PassageSource,
    scores: np.ndarray,  # [Q,k] fp32
    rows: np.ndarray,  # [Q,k] int64
) -> list[list[Passage]]:
    """The passages of each query, read in one call for all, because reading may wait for the disk."""
    is_hit = rows >= 0
    ends = is_hit.sum(axis=1).cumsum().tolist()
    try:
        found = source.passages(rows[is_hit].tolist(), scores[is_hit].tolist())
    except (ValueError, IndexError, OSError) as error:
        raise RetrievalError(f"the passages of what a search found cannot be read: {error}") from error
    return [found[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _close(batcher: _C.Batcher, threads: list[threading.Thread], reading: ThreadPoolExecutor) -> None:
    close_workers(batcher, threads)
    reading.shutdown(wait=False)
