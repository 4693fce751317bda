"""The threads that take a batcher's batches to its backend, and how they end.

An unanswered batch would leave searches waiting forever, so whatever ends a worker ends the batcher: the first error is
final, and every search, pending or later, fails with it.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Queue
from typing import Any, Protocol

import numpy as np

from searchr1_fast import _C
from searchr1_fast.retrieval.protocol import RetrievalError, RetrievalTimeout

CLOSING_SECONDS = 10.0  # for a backend to return from its last batch


class SearchBackend(Protocol):
    """Finds rows. Called from one thread at a time, with distinct queries, at most `max_batch_rows` of them.

    A backend that also has `prepare(queries) -> prepared` and `search_prepared(prepared, k)` works in two stages, each
    in a thread: the next batch is prepared (tokenised, encoded) while the last is searched. A backend whose `is_small`
    is true is called from threads that compute without helpers (`lone_thread.py`).
    """

    def search_ids(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """scores [Q,k'] fp32, descending, and rows [Q,k'] int64; k' <= k. A query with fewer hits ends in row -1."""
        ...


class Failure:
    """The exception that ended the backend, kept as the cause of every search that fails with it."""

    def __init__(self) -> None:
        self.error: BaseException | None = None


def error_of(ticket: _C.Ticket, failure: Failure) -> RetrievalError:
    """The error of a settled search that has no result."""
    outcome = ticket.outcome
    count = "1 query" if len(ticket) == 1 else f"{len(ticket)} queries"
    if outcome is _C.Outcome.EXPIRED:
        return RetrievalTimeout(f"a search for {count} did not end before its deadline; nothing was returned")
    if outcome is _C.Outcome.CANCELLED:
        return RetrievalError(f"a search for {count} was cancelled")
    error = RetrievalError(f"a search for {count} failed: {ticket.error}")
    error.__cause__ = failure.error
    return error


def forked(error: _C.UsedAfterFork) -> RetrievalError:
    """The error of a search in a forked child process, which has none of the batcher's threads."""
    return RetrievalError(f"a search in a forked process: {error}")


def start_workers(batcher: _C.Batcher, backend: Any, failure: Failure) -> list[threading.Thread]:
    """Start the thread that searches and, if the backend has two stages, the one before it that prepares.

    They are daemons, so that a program that forgets to close still ends; the finalizer joins them before the
    interpreter exits.
    """
    steps: list[Callable[[], None]]
    if not hasattr(backend, "prepare"):
        steps = [lambda: _search_batches(batcher, backend, failure)]
    else:
        prepared: Queue[tuple[_C.Batch, Any] | None] = Queue()  # the batcher gives out at most two batches at a time
        steps = [
            lambda: _prepare_batches(batcher, backend, failure, prepared),
            lambda: _search_prepared(batcher, backend, failure, prepared),
        ]
    if getattr(backend, "is_small", False):
        steps = [partial(_run_alone, step) for step in steps]
    threads = [threading.Thread(target=step, name="retrieval", daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    return threads


def close_workers(batcher: _C.Batcher, threads: list[threading.Thread]) -> None:
    """Fail what is pending, then let each thread finish its batch and end.

    A thread whose backend does not return is left behind, with a message: a run must not hang on what it gave up on.
    """
    batcher.close()
    if threading.current_thread() in threads:
        return  # the garbage collector can call this in a worker; the other one may be waiting for it
    for thread in threads:
        thread.join(CLOSING_SECONDS)
        if thread.is_alive():
            sentence = f"the search backend did not come back within {CLOSING_SECONDS:g} s of closing; left behind"
            print(f"searchr1: {sentence}", file=sys.stderr, flush=True)
            return  # the other thread waits for this one


def _run_alone(step: Callable[[], None]) -> None:
    from searchr1_fast.retrieval.lone_thread import work_alone  # imports torch, which not every backend needs

    work_alone()
    step()


def _search_batches(batcher: _C.Batcher, backend: SearchBackend, failure: Failure) -> None:
    with _final(batcher, failure):
        while (batch := batcher.take()) is not None:
            batch.complete(*_checked(backend.search_ids(batch.queries, batch.depth)))


def _prepare_batches(batcher: _C.Batcher, backend: Any, failure: Failure, prepared: Queue) -> None:
    try:
        with _final(batcher, failure):
            while (batch := batcher.take()) is not None:
                prepared.put((batch, backend.prepare(batch.queries)))
    finally:
        prepared.put(None)


def _search_prepared(batcher: _C.Batcher, backend: Any, failure: Failure, prepared: Queue) -> None:
    with _final(batcher, failure):
        while (item := prepared.get()) is not None:
            if failure.error is not None:
                return  # every search has failed already
            batch, inputs = item
            batch.complete(*_checked(backend.search_prepared(inputs, batch.depth)))


@contextmanager
def _final(batcher: _C.Batcher, failure: Failure) -> Iterator[None]:
    """Fail the batcher however the worker ends, so that no search is left waiting."""
    sentence = "the thread that searches has ended"
    try:
        yield
    except BaseException as error:  # of any kind: it must reach the waiting callers, who raise it
        failure.error = failure.error or error
        # Formatted by traceback, which does not fail even if the error's own __str__ does.
        sentence = f"the backend raised {''.join(traceback.format_exception_only(error)).strip()}"
    finally:
        batcher.fail(sentence)


def _checked(found: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Check dtypes and make the arrays C-contiguous; C++ checks shapes and values."""
    scores, rows = found
    if scores.dtype != np.float32 or rows.dtype != np.int64:
        raise TypeError(f"a backend gives scores as float32 and rows as int64, not {scores.dtype} and {rows.dtype}")
    return np.ascontiguousarray(scores), np.ascontiguousarray(rows)
