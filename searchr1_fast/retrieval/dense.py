"""Dense retrieval, exact: queries to vectors, the k rows of largest inner product, their passages.

    DenseSearch      queries -> scores and rows; an encoder and `searchr1_kernels.TopKIndex` over the vectors
    DenseRetriever   passages on top of it, one call after the other: the plain twin of `batcher.BatchedRetriever`
    MemoryStore      a corpus in memory, where no index was built beforehand

On a CPU the vectors stay memory-mapped, one `TopKIndex` per file; on a GPU they are copied there once. The order is
total (score descending, then row ascending), so files, shards and batches are merged without changing a result.

Shape legend
    Q  queries    K  passages per query, at most the rows    M  rows    D  components
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from searchr1_kernels import TopKIndex, topk_inner_product

from searchr1_fast.data import passage_contents
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.encoders import Encoder, check_device, open_encoder
from searchr1_fast.retrieval.index_format import Index, OpenFile, combine, digest_bytes, open_index
from searchr1_fast.retrieval.protocol import check_k
from searchr1_fast.types import Passage

_QUERIES_AT_ONCE = 256


class PassageSource(Protocol):
    """Passages by row."""

    def __len__(self) -> int: ...

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Passage]:
        """The passage of each row, with its score."""
        ...


class DenseSearch:
    """Exact search by text, in two stages for who overlaps them. Safe to call from several threads: one batch at a time
    is searched."""

    def __init__(
        self,
        encoder: Encoder,
        parts: Iterable[tuple[int, np.ndarray]],  # (first row, vectors [rows, D] fp16), consecutive
        device: str = "cpu",
    ) -> None:
        self.encoder = encoder
        self._device = torch.device(check_device(device))
        self._parts: list[tuple[int, TopKIndex]] = []
        self._mapped: list[OpenFile] = []
        self.num_rows = 0
        for first, vectors in parts:
            assert first == self.num_rows, "the parts of an index follow one another"
            if self._device.type == "cpu" and isinstance(vectors, np.memmap):
                self._mapped.append(OpenFile(vectors.filename))
            rows = torch.from_numpy(vectors).to(self._device)
            # On a GPU the vectors themselves propose candidates: 8-bit codes would take half as much memory again.
            coarse = "int8" if self._device.type == "cpu" else "float"
            self._parts.append((first, TopKIndex(rows, coarse=coarse)))
            self.num_rows += len(vectors)
        if not self._parts:
            raise ValueError("dense search needs at least one row of vectors")
        self._lock = threading.Lock()
        self.search_ids(["a first search compiles, which takes seconds that no deadline allows for"], 1)

    def __len__(self) -> int:
        return self.num_rows

    def search_ids(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores [Q,K] fp32, rows [Q,K] int64), best first, equal scores by row; K is `k`, or all rows if fewer.

        A query's result is a function of its text alone: bit for bit the same in every batch.
        """
        check_k(k)
        k = min(k, self.num_rows)
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for begin in range(0, len(queries), _QUERIES_AT_ONCE):
            part = slice(begin, begin + _QUERIES_AT_ONCE)
            scores[part], rows[part] = self.search_prepared(self.prepare(queries[part]), k)
        return scores, rows

    def prepare(self, queries: Sequence[str]) -> np.ndarray:
        """The first stage: vectors [Q,D] fp32."""
        return self.encoder.encode_queries(queries)

    def search_prepared(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The second: vectors [Q,D] fp32 -> what `search_ids` gives. ValueError where a mapped file has changed."""
        queries, k = torch.from_numpy(vectors).to(self._device), min(k, self.num_rows)
        found = []
        with self._lock:
            for file in self._mapped:  # here, when its turn has come: what changed while it waited counts
                file.check()
            for first, part in self._parts:
                scores, rows = topk_inner_product(queries, part, min(k, len(part)))
                found.append((scores.cpu().numpy(), rows.cpu().numpy() + first))
        return merge(found, k)


def merge(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k of several results (scores [Q,·] fp32, rows [Q,·] int64), by score descending, then row ascending."""
    if len(found) == 1:
        return found[0]
    scores, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


class DenseRetriever:
    """Passages for texts. Every query gets k passages, or all there are: no score means "nothing"."""

    def __init__(self, search: DenseSearch, store: PassageSource) -> None:
        check_sizes(search, store)
        self._search_ids = search.search_ids
        self._store = store

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Best first, equal scores by row; equal queries are searched once."""
        check_k(k)
        if not queries:
            return []
        places: dict[str, int] = {}
        place_of = [places.setdefault(query, len(places)) for query in queries]
        scores, rows = (array.tolist() for array in self._search_ids(list(places), k))
        return [self._store.passages(rows[place], scores[place]) for place in place_of]


class MemoryStore:
    """Passages of a corpus that is in memory."""

    def __init__(self, passages: Iterable[Passage]) -> None:
        self._passages = list(passages)

    def __len__(self) -> int:
        return len(self._passages)

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Passage]:
        """The passage of each row, with its score."""
        found = (self._passages[row] for row in rows)
        return [Passage(p.id, p.title, p.text, score) for p, score in zip(found, scores, strict=True)]

    def contents(self) -> list[str]:
        """What an encoder reads of each passage."""
        return [passage_contents(passage) for passage in self._passages]

    def digest(self) -> str:
        """Of the passages in their order: what a row means."""
        parts = ((passage.id, passage_contents(passage)) for passage in self._passages)
        return combine([digest_bytes(repr(part).encode()) for part in parts])


def open_dense(folder: str | Path, encoder: str | Path | None = None, device: str = "cpu") -> tuple[DenseSearch, Index]:
    """Search over an index, and the index. `encoder`: its model's folder, if not where the index says."""
    index = open_index(folder)
    opened = open_encoder(index.manifest.encoder, index.folder, encoder, device)
    return DenseSearch(opened, index.vector_parts(), device), index


def hash_corpus(passages: Iterable[Passage], dimension: int, device: str = "cpu") -> tuple[DenseSearch, MemoryStore]:
    """Search over passages in memory with the hashing encoder fitted to them, and their store."""
    store = MemoryStore(passages)
    if not len(store):
        raise ValueError("dense search needs at least one passage; the corpus is empty")
    encoder = HashingEncoder(dimension)
    contents = store.contents()
    encoder.count([contents])
    vectors = encoder.encode_passages(contents).astype(np.float16)
    return DenseSearch(encoder, [(0, vectors)], device), store


def check_sizes(search: DenseSearch, store: PassageSource) -> None:
    """Row i of one is row i of the other, so they have equally many."""
    if len(search) != len(store):
        raise ValueError(f"there are {len(search)} vectors for {len(store)} passages")
