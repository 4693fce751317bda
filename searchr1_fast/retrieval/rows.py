"""Searchable rows of vectors: the interface of every kind, and the kind for a CPU.

    HostRows      memory-mapped, one `TopKIndex` per file                                this file
    DeviceRows    copied to a GPU once, one `TopKIndex` for all                          device_rows.py
    ShardedRows   split over the ranks of a machine, which search for one another        sharded_rows.py

The last two can be parked (`protocol.Parks`): `park()` gives the memory of a GPU to others, `unpark()` takes it back,
and a search in between waits. `HostRows` are on no GPU and have neither method.

They nest: what a rank of `ShardedRows` holds is one of the other two. The order is total (score descending, then row
ascending), so cutting and merging files, shards and batches changes no bit of a result.

Shape legend
    Q  queries    K  hits of a query: k, or all rows if fewer    D  components
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from searchr1_kernels import TopKIndex, topk_inner_product

from searchr1_fast.retrieval.index_format import OpenFile
from searchr1_fast.retrieval.protocol import Mode

Part = tuple[int, np.ndarray]  # (first row, vectors [rows, D] fp16)


class RowSearch(Protocol):
    """Rows that can be searched. Safe to call from several threads."""

    @property
    def mode(self) -> Mode: ...

    def __len__(self) -> int: ...

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """vectors [Q,D] fp32 -> (scores [Q,K] fp32, rows [Q,K] int64), best first, equal scores by row."""
        ...


class HostRows:
    """Consecutive parts, the first of which may begin at any row. They stay where they are; memory holds, in addition,
    the 8-bit codes that propose candidates, one byte per component."""

    mode: Mode = "exact_certified"

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts: list[tuple[int, TopKIndex]] = []
        self._mapped: dict[str, OpenFile] = {}
        self._num_rows = 0
        for first, vectors in parts:
            assert not self._parts or first == self._parts[0][0] + self._num_rows, "the parts follow one another"
            if isinstance(vectors, np.memmap):
                self._mapped.setdefault(str(vectors.filename), OpenFile(vectors.filename))
            self._parts.append((first, TopKIndex(torch.from_numpy(vectors))))
            self._num_rows += len(vectors)
        self._lock = threading.Lock()  # a search uses every core there is

    def __len__(self) -> int:
        return self._num_rows

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search part by part. ValueError if a mapped file has changed."""
        queries, k = torch.from_numpy(vectors), min(k, len(self))
        found = [(np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64))]  # of no rows
        with self._lock:
            for file in self._mapped.values():  # checked under the lock, so that a change while it waited is noticed
                file.check()
            for first, part in self._parts:
                scores, rows = topk_inner_product(queries, part, min(k, len(part)))
                found.append((scores.numpy(), rows.numpy() + first))
        return merge(found[1:] or found, k)


def merge(found: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best k of several results (scores [Q,·] fp32, rows [Q,·] int64), by score descending, then row ascending.

    The plain twin of `_C.merge_topk`, except that the result is no wider than there are hits.
    """
    if len(found) == 1:
        return found[0]
    scores, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def cut(parts: Iterable[Part], begin: int, end: int) -> Iterator[Part]:
    """The parts of rows begin to end, as views; rows keep their numbers."""
    for first, vectors in parts:
        low, high = max(begin - first, 0), min(end - first, len(vectors))
        if low < high:
            yield first + low, vectors[low:high]


def share(num_rows: int, place: int, num_shares: int) -> tuple[int, int]:
    """(begin, end): the rows of one of several shares, whose sizes differ by one row at most."""
    return num_rows * place // num_shares, num_rows * (place + 1) // num_shares
