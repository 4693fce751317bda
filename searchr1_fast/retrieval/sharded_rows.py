"""Rows split over the ranks of a machine: each holds one part, and searches it for any rank at any time.

    a rank that searches             writes its queries where all can read them, asks every rank (itself too), waits for
                                     all answers, merges them
    the thread `shard` of each rank  takes whatever requests have come, from one rank or from several, searches its part
                                     for all of them at once, and answers

Why it cannot deadlock: no rank waits for its turn. The thread that answers never waits for another rank's search, and
it runs as long as its process does: while the rank trains, sits in a collective, or has long finished its rollout. So
ranks may search at any time, any number of times, some of them never. When a rank ends, its connections close, and
ranks that need it notice at once; one that hangs is noticed after `timeout` seconds. Either is an error that names the
rank, and final: a search without one part would be a wrong result.

Why it is worth it: besides saving memory, requests of several ranks that come together cost one pass over a part.
Results are exact whatever came together: a score is a function of its query and row, and the order is total, so the k
best of a part are the first of its k + 1 best, and the best of all parts are the best of all rows.

Left out: NCCL. Its collectives need all ranks at once, and a second communicator beside the training's may block both.

Shape legend
    Q  queries    K  hits of a query: k, or all rows if fewer    W  hits that one part has    D  components
"""

from __future__ import annotations

import selectors
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from searchr1_fast.retrieval.hit_merge import HostMerge, Merge
from searchr1_fast.retrieval.memory_plan import MAX_QUERIES
from searchr1_fast.retrieval.protocol import Mode, Parks, RetrievalError
from searchr1_fast.retrieval.rows import RowSearch, share
from searchr1_fast.retrieval.shard_link import Incoming, Link, Peers, meet

_REQUEST = struct.Struct("<qq")  # queries, k
_ANSWER = struct.Struct("<qq")  # outcome; bytes that follow: rows [Q,W] int64, scores [Q,W] fp32, or a sentence
_FOUND, _FAILED = 0, 1
_CLOSING_SECONDS = 10.0  # for this rank's part to finish its current search


def open_sharded(
    peers: Peers,
    num_rows: int,
    dimension: int,
    identity: str,
    open_part: Callable[[int, int], RowSearch],
    timeout: float,
    choose_merge: Callable[[int], Merge] = lambda num_parts: HostMerge(),
) -> RowSearch:
    """Open a search over all rows, which the ranks of a machine share. A collective: every rank calls it, and every
    rank raises if one cannot open its part.

    open_part: (begin, end) -> the search over these rows, which may be none. timeout: seconds that another rank may
    take to link up, and for one search. choose_merge: number of parts -> what merges their hits.
    """
    link = meet(peers, MAX_QUERIES, dimension, identity, timeout)
    own, failure = None, None
    try:
        own = open_part(*share(num_rows, link.place, link.size))
        own.search(np.ones((1, dimension), np.float32), 1)  # the first search compiles: no other rank is to wait for it
    except (ValueError, OSError, RuntimeError) as error:  # does not fit, cannot be read, or an error of CUDA's
        failure = error
    failures = peers.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text is not None:
            raise ValueError(f"rank {rank} could not open its part of the index: {text}")
    assert own is not None
    return own if link.size == 1 else ShardedRows(link, own, num_rows, timeout, choose_merge(link.size))


class ShardedRows:
    """All rows, through the ranks of this machine. Close it, or leave that to the garbage collector or program exit."""

    def __init__(self, link: Link, own: RowSearch, num_rows: int, timeout: float, merge: Merge) -> None:
        self._link = link
        self._merge = merge
        self._num_rows = num_rows
        self._sizes = [end - begin for begin, end in (share(num_rows, place, link.size) for place in range(link.size))]
        assert len(own) == self._sizes[link.place]
        self._timeout = timeout
        self._lock = threading.Lock()
        self._failure: RetrievalError | None = None
        self._own = own
        # The thread holds the link and this rank's rows, never this object.
        thread = threading.Thread(target=_answer_all, args=(link, own, timeout), name="shard", daemon=True)
        self.close = weakref.finalize(self, _close, link, thread)
        thread.start()

    def __len__(self) -> int:
        return self._num_rows

    @property
    def mode(self) -> Mode:
        """The mode of this rank's part; the other parts are of the same kind."""
        return self._own.mode

    @property
    def is_parked(self) -> bool:
        """Whether this rank's part is parked."""
        return isinstance(self._own, Parks) and self._own.is_parked

    def park(self) -> None:
        """Park this rank's part. The searches of other ranks need it too, so call this once all ranks have searched; a
        rank that still searches waits, as long as it would wait for a rank that hangs."""
        if isinstance(self._own, Parks):
            self._own.park()

    def unpark(self) -> None:
        """Unpark this rank's part. Ranks need not do so together: a search waits for parts that are not back yet."""
        if isinstance(self._own, Parks):
            self._own.unpark()

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """vectors [Q,D] fp32 -> (scores [Q,K] fp32, rows [Q,K] int64). RetrievalError if a rank is gone, hangs, or
        failed; every later search then raises it too."""
        k = min(k, len(self))
        scores, rows = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
        with self._lock:
            for begin in range(0, len(vectors), MAX_QUERIES):
                part = slice(begin, begin + MAX_QUERIES)
                scores[part], rows[part] = self._search(vectors[part], k)
        return scores, rows

    def _search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.close.alive:
            raise RetrievalError("this search over several ranks was closed")
        if self._failure is not None:
            raise self._failure
        widths = [min(k, size) for size in self._sizes]
        try:
            self._ask(vectors, k, self._merge.rooms(len(vectors), widths))
        except RetrievalError as error:
            self._failure = error  # answers may still be on their way, which the next search would take for its own
            raise
        return self._merge.merge(k)

    def _ask(self, vectors: np.ndarray, k: int, rooms: list[memoryview]) -> None:
        """Fill the rooms, one for each part."""
        link = self._link
        link.queries[link.place][: len(vectors)] = vectors
        waiting = {}
        for place, connection in enumerate(link.asks):
            try:
                connection.sendall(_REQUEST.pack(len(vectors), k))
            except OSError as error:
                raise self._gone(place) from error
            waiting[place] = Incoming(_ANSWER.size, partial(_room, rooms[place]))
        deadline = time.monotonic() + self._timeout
        # All at once: a rank whose answer is not read could not serve the others that wait for it.
        with selectors.DefaultSelector() as selector:
            for place, connection in enumerate(link.asks):
                selector.register(connection, selectors.EVENT_READ, place)
            while waiting:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    ranks = ", ".join(str(link.ranks[place]) for place in sorted(waiting))
                    raise RetrievalError(
                        f"no answer from rank {ranks} within {self._timeout:g} s: it hangs, or its part is parked"
                    )
                for key, _ in ready:
                    try:
                        if waiting[key.data].read(link.asks[key.data]):
                            selector.unregister(key.fileobj)
                            self._check(waiting.pop(key.data), key.data)
                    except OSError as error:
                        raise self._gone(key.data) from error

    def _check(self, answer: Incoming, place: int) -> None:
        outcome, _ = _ANSWER.unpack(answer.head)
        if outcome == _FAILED:
            sentence = bytes(answer.body).decode(errors="replace")
            raise RetrievalError(f"rank {self._link.ranks[place]} could not search its part: {sentence}")

    def _gone(self, place: int) -> RetrievalError:
        return RetrievalError(
            f"rank {self._link.ranks[place]} is gone, with its part of the index: its process ended or it was closed"
        )


def _room(room: memoryview, head: bytes) -> memoryview:
    """Where the rest of an answer belongs."""
    outcome, num_bytes = _ANSWER.unpack(head)
    if outcome == _FAILED:
        return memoryview(bytearray(num_bytes))
    assert num_bytes == len(room), "every rank computes how many hits a part has"
    return room


# --------------------------------------------------------------------------------------------------------- answering


def _answer_all(link: Link, own: RowSearch, timeout: float) -> None:
    """Answer until this rank closes its own connection. However it ends, all connections close, and others notice."""
    with selectors.DefaultSelector() as selector:
        for place, connection in enumerate(link.answers):
            connection.settimeout(timeout)  # for a rank that does not take its answer
            selector.register(connection, selectors.EVENT_READ, place)
        try:
            while True:
                requests = []
                for key, _ in selector.select():
                    head = _receive(link.answers[key.data])
                    if head is not None:
                        requests.append((key.data, *_REQUEST.unpack(head)))
                    elif key.data == link.place:
                        return
                    else:
                        selector.unregister(key.fileobj)  # it will not ask again
                for batch in _batches(requests):
                    gone = _answer(link, own, batch)
                    if link.place in gone:
                        return
                    for place in gone:
                        selector.unregister(link.answers[place])
        finally:
            for connection in link.answers:
                connection.close()


def _answer(link: Link, own: RowSearch, batch: list[tuple[int, int, int]]) -> list[int]:
    """Answer requests (place, queries, k) by one search; returns the places of ranks that could not be reached."""
    vectors = np.concatenate([link.queries[place][:num_queries] for place, num_queries, _ in batch])
    ends = np.cumsum([num_queries for _, num_queries, _ in batch])
    try:
        scores, rows = own.search(vectors, max(k for _, _, k in batch))
        messages = []
        for (_, num_queries, k), end in zip(batch, ends, strict=True):
            part = slice(end - num_queries, end), slice(0, k)
            body = rows[part].tobytes() + scores[part].tobytes()
            messages.append(_ANSWER.pack(_FOUND, len(body)) + body)
    except Exception as error:  # of any kind: it goes to the ranks that asked
        sentence = f"{type(error).__name__}: {error}".encode()
        messages = [_ANSWER.pack(_FAILED, len(sentence)) + sentence] * len(batch)
    gone = []
    for (place, _, _), message in zip(batch, messages, strict=True):
        try:
            link.answers[place].sendall(message)
        except OSError:  # the rank ended while its search ran, or hangs
            gone.append(place)
    return gone


def _batches(requests: Iterable[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Group requests (place, queries, k), in order of arrival, into searches of at most MAX_QUERIES queries."""
    batch: list[tuple[int, int, int]] = []
    total = 0
    for request in requests:
        if batch and total + request[1] > MAX_QUERIES:
            yield batch
            batch, total = [], 0
        batch.append(request)
        total += request[1]
    if batch:
        yield batch


def _receive(connection: socket.socket) -> bytes | None:
    """One request; None if its sender is gone."""
    head = Incoming(_REQUEST.size, lambda _: memoryview(b""))
    try:
        while not head.read(connection):
            pass
    except OSError:
        return None
    return bytes(head.head)


def _close(link: Link, thread: threading.Thread) -> None:
    """Shut the connections first: this rank's thread notices that on its own one, and ends after its current search."""
    for connection in link.asks:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side has closed it already
            continue
    if threading.current_thread() is not thread:
        thread.join(_CLOSING_SECONDS)
        if thread.is_alive():  # on a device that hangs, or on parked rows that never come back
            sentence = f"a search for another rank did not end within {_CLOSING_SECONDS:g} s of closing; left behind"
            print(f"searchr1: {sentence}", file=sys.stderr, flush=True)
    for connection in link.asks:
        connection.close()
