"""Exact dense retrieval: encode queries, find the k rows of largest inner product, return their passages.

    DenseSearch      queries -> scores and rows; an encoder, and rows that are searched (rows.py)
    DenseRetriever   passages on top of it, one call after the other: the plain twin of `batcher.BatchedRetriever`
    MemoryStore      a corpus in memory, where no index was built beforehand
    open_dense       opens an index: memory-mapped on a CPU, copied to a GPU; with several ranks, a part on each

The order is total (score descending, then row ascending), so merging files, shards and batches changes no result.

Shape legend
    Q  queries    K  passages per query, at most the rows    M  rows    D  components
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from searchr1_fast.data import passage_contents
from searchr1_fast.retrieval.device_rows import DeviceRows
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.encoders import Encoder, check_device, open_encoder
from searchr1_fast.retrieval.hit_merge import Merge, choose_merge
from searchr1_fast.retrieval.index_format import Index, combine, digest_bytes, open_index
from searchr1_fast.retrieval.memory_plan import MemoryPlan, Scan
from searchr1_fast.retrieval.protocol import Mode, Parks, RetrievalParked, check_k
from searchr1_fast.retrieval.rows import HostRows, Part, RowSearch, cut
from searchr1_fast.retrieval.shard_link import Peers
from searchr1_fast.retrieval.sharded_rows import open_sharded
from searchr1_fast.retrieval.streams import on_stream
from searchr1_fast.types import Passage, Progress

_QUERIES_AT_ONCE = 256
_SMALL_NUMBERS = 2**22  # components in an index: about 10 ms for 64 queries on one thread of an Intel Xeon


class PassageSource(Protocol):
    """Passages by row."""

    def __len__(self) -> int: ...

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Passage]:
        """The passage of each row, with its score."""
        ...


class DenseSearch:
    """Exact search by text, in two stages that a caller may overlap. Safe to call from several threads."""

    def __init__(self, encoder: Encoder, rows: RowSearch, device: str = "cpu") -> None:
        """`device`: where the encoder computes."""
        self.encoder = encoder
        self._rows = rows
        self._news = threading.Condition()  # notified when the encoder is back
        self.num_rows = len(rows)
        if not self.num_rows:
            raise ValueError("dense search needs at least one row of vectors")
        # A stream of its own: the default one is the trainer's; reading a result there waits for all that is queued.
        self._stream = None
        if torch.device(device).type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # where the encoder's weights were made
        self.search_ids(["a first search compiles, which takes seconds that no deadline allows for"], 1)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def is_small(self) -> bool:
        """Whether a search is over before other threads could begin to help."""
        is_hashed, num_numbers = isinstance(self.encoder, HashingEncoder), self.num_rows * self.encoder.dimension
        return isinstance(self._rows, HostRows) and is_hashed and num_numbers <= _SMALL_NUMBERS

    def search_ids(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores [Q,K] fp32, rows [Q,K] int64), best first, equal scores by row; K is `k`, or all rows if fewer.

        A query's result is a function of its text alone: bit for bit the same in every batch. RetrievalParked if
        encoder or rows are parked.
        """
        check_k(k)
        if self.is_parked:
            raise RetrievalParked
        k = min(k, self.num_rows)
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for begin in range(0, len(queries), _QUERIES_AT_ONCE):
            part = slice(begin, begin + _QUERIES_AT_ONCE)
            scores[part], rows[part] = self.search_prepared(self.prepare(queries[part]), k)
        return scores, rows

    @property
    def mode(self) -> Mode:
        """How the rows are searched."""
        return self._rows.mode

    @property
    def is_parked(self) -> bool:
        """Whether memory of the rows or the encoder is lent to others."""
        return any(part.is_parked for part in self._parkable())

    def park(self) -> None:
        """Give the GPU memory of encoder and rows to others. Does nothing if they are on no GPU or parked already.
        ValueError, with nothing parked, if the machine does not lock that much host memory."""
        with self._news, on_stream(self._stream), ExitStack() as undo:
            undo.callback(self._news.notify_all)
            for part in self._parkable():
                part.park()
                undo.callback(part.unpark)
            undo.pop_all()

    def unpark(self) -> None:
        """Take the memory back; searches may begin at once. What finds none (torch.OutOfMemoryError) stays parked."""
        with self._news, on_stream(self._stream):
            try:
                for part in self._parkable():
                    part.unpark()
            finally:  # the encoder may be back even if the rows are not
                self._news.notify_all()

    def prepare(self, queries: Sequence[str]) -> np.ndarray:
        """The first stage: queries -> vectors [Q,D] fp32. Waits while the encoder is parked: an error would end a
        batcher whose search began as another thread parked."""
        with self._news:
            self._news.wait_for(lambda: not (isinstance(self.encoder, Parks) and self.encoder.is_parked))
        with on_stream(self._stream):
            return self.encoder.encode_queries(queries)

    def search_prepared(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The second stage: vectors [Q,D] fp32 -> what `search_ids` returns. Waits while the rows are parked."""
        return self._rows.search(vectors, k)

    def _parkable(self) -> list[Parks]:
        """The encoder comes before the rows: it is the smaller, and easily taken back."""
        return [part for part in (self.encoder, self._rows) if isinstance(part, Parks)]


class DenseRetriever:
    """Finds passages for texts. Every query gets k of them, or all there are: no score means "nothing found"."""

    def __init__(self, search: DenseSearch, store: PassageSource) -> None:
        check_sizes(search, store)
        self._search_ids = search.search_ids
        self._store = store

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The passages of each query, best first, equal scores by row; equal queries are searched once."""
        check_k(k)
        if not queries:
            return []
        places: dict[str, int] = {}
        place_of = [places.setdefault(query, len(places)) for query in queries]
        scores, rows = (array.tolist() for array in self._search_ids(list(places), k))
        return [self._store.passages(rows[place], scores[place]) for place in place_of]


class MemoryStore:
    """The passages of a corpus in memory."""

    def __init__(self, passages: Iterable[Passage]) -> None:
        self._passages = list(passages)

    def __len__(self) -> int:
        return len(self._passages)

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Passage]:
        """The passage of each row, with its score."""
        found = (self._passages[row] for row in rows)
        return [Passage(p.id, p.title, p.text, score) for p, score in zip(found, scores, strict=True)]

    def contents(self) -> list[str]:
        """The text that an encoder reads of each passage."""
        return [passage_contents(passage) for passage in self._passages]

    def digest(self) -> str:
        """A digest of the passages in order: it identifies what each row means."""
        parts = ((passage.id, passage_contents(passage)) for passage in self._passages)
        return combine([digest_bytes(repr(part).encode()) for part in parts])


class Show(Protocol):
    """A `Console`, or anything else that shows notes, and phases that yield `progress(finished, total)`."""

    def note(self, text: str) -> None: ...
    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Progress]: ...


class Silence:
    """A `Show` that shows nothing."""

    def note(self, text: str) -> None:
        """Drop the note."""

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Progress]:
        """Progress that nobody sees."""
        return nullcontext(lambda finished, total: None)


def open_dense(
    folder: str | Path,
    encoder: str | Path | None = None,
    device: str = "cpu",
    *,
    scan: Scan = "float16",
    peers: Peers | None = None,
    timeout: float = 30.0,
    show: Show | None = None,
) -> tuple[DenseSearch, Index]:
    """Open an index for searching; returns the search and the index.

    encoder: its model's folder, if not where the index says. scan: what a pass on a GPU reads. peers: all ranks of the
    run, if the ranks of a machine are to hold a part each; then this is a collective, and `timeout` is how many seconds
    one of them may take over a search. show: where copying to a GPU is reported.
    """
    device, show = check_device(device), show or Silence()
    index = open_index(folder)
    opened = open_encoder(index.manifest.encoder, index.folder, encoder, device)

    def open_part(begin: int, end: int) -> RowSearch:
        return open_rows(cut(index.vector_parts(), begin, end), device, scan, show)

    def choose(num_parts: int) -> Merge:
        merge, reason = choose_merge(device, num_parts)
        show.note(f"{num_parts} ranks hold the index; their hits are merged {reason}")
        return merge

    if peers is None or peers.world_size == 1:
        rows = open_part(0, len(index))
    else:
        identity = index.manifest.digest()
        rows = open_sharded(peers, len(index), index.dimension, identity, open_part, timeout, choose)
    return DenseSearch(opened, rows, device), index


def open_rows(parts: Iterable[Part], device: str, scan: Scan, show: Show) -> RowSearch:
    """A search over consecutive parts on a device. ValueError if they do not fit."""
    parts = list(parts)
    if torch.device(device).type == "cpu" or not parts:
        return HostRows(parts)
    plan = MemoryPlan(sum(len(vectors) for _, vectors in parts), parts[0][1].shape[1], scan)
    show.note(f"index on {device}: {plan}")
    with show.phase(f"index to {device}, MiB", plan.rows >> 20) as progress:
        return DeviceRows(parts, device, scan, progress)


def hash_corpus(
    passages: Iterable[Passage], dimension: int, device: str = "cpu", scan: Scan = "float16"
) -> tuple[DenseSearch, MemoryStore]:
    """A search over passages in memory, by the hashing encoder fitted to them, and their store."""
    device = check_device(device)
    store = MemoryStore(passages)
    if not len(store):
        raise ValueError("dense search needs at least one passage; the corpus is empty")
    encoder = HashingEncoder(dimension)
    contents = store.contents()
    encoder.count([contents])
    vectors = encoder.encode_passages(contents).astype(np.float16)
    return DenseSearch(encoder, open_rows([(0, vectors)], device, scan, Silence()), device), store


def check_sizes(search: Sized, store: PassageSource) -> None:
    """Raise ValueError unless both have equally many rows: row i of one is row i of the other."""
    if len(search) != len(store):
        raise ValueError(f"there are {len(search)} vectors for {len(store)} passages")
