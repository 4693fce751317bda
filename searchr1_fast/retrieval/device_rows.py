"""Rows of vectors in the memory of a GPU: copied there once, searched by `topk_inner_product` on a stream of their own.

One tensor for all rows, however many files they come from: a search is one pass, and there is nothing to merge.

What keeps out of the trainer's way: every kernel and copy is queued on one stream that nobody else uses (a thread that
names none would get the default one, and wait for the decoding and training that is queued there); queries and results
pass through pinned memory; and one search at a time is under way, so memory is that of one.

The whole class runs on a CPU too, where it is the twin that tests compare: ring, row numbers, cutting of batches.

Shape legend
    Q  queries    K  hits of a query    M  rows    D  components
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from searchr1_kernels import TopKIndex, topk_inner_product

from searchr1_fast.retrieval.index_format import Progress
from searchr1_fast.retrieval.memory_plan import MAX_QUERIES, MemoryPlan, Scan, free_bytes
from searchr1_fast.retrieval.rows import Part
from searchr1_fast.retrieval.staging import HostBuffer, StagingRing, copies_of

_BYTES_BETWEEN_SIGNS = 2**28  # of progress


class DeviceRows:
    """Consecutive parts, of which the first may begin at any row."""

    def __init__(
        self,
        parts: Iterable[Part],
        device: torch.device | str,
        scan: Scan = "float16",
        progress: Progress | None = None,  # (MiB copied, MiB in all)
    ) -> None:
        """ValueError where the device's free memory is too small; nothing was allocated then."""
        parts = list(parts)
        if not parts:
            raise ValueError("a device is given at least one row of vectors")
        self._device = torch.device(device)
        self._first = parts[0][0]
        shape = (sum(len(vectors) for _, vectors in parts), parts[0][1].shape[1])
        self.plan = MemoryPlan(*shape, scan)
        self._stream = None
        if self._device.type == "cuda":
            self.plan.check(free_bytes(self._device), self._device)
            self._stream = torch.cuda.Stream(self._device)
        self._copies = copies_of(self._device, self._stream)
        self._queries, self._results = HostBuffer(self._copies), HostBuffer(self._copies)
        self._lock = threading.Lock()
        with self._on_stream():
            corpus = torch.empty(shape, dtype=torch.float16, device=self._device)
            self._load(parts, corpus, progress)
            # A CPU multiplies 8-bit codes fastest, whatever was asked for; the bits are the same.
            coarse = "float" if scan == "float16" and self._device.type == "cuda" else "int8"
            self._index = TopKIndex(corpus, coarse=coarse)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # preparing took gigabytes, which torch would keep for this stream alone
        self._warm_up()

    def __len__(self) -> int:
        return len(self._index)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """vectors [Q,D] fp32 -> (scores [Q,K] fp32, rows [Q,K] int64). The caller waits without the GIL."""
        k = min(k, len(self))
        scores, rows = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
        with self._lock, self._on_stream():
            for begin in range(0, len(vectors), MAX_QUERIES):
                part = slice(begin, begin + MAX_QUERIES)
                scores[part], rows[part] = self._search(vectors[part], k)
        return scores, rows

    def _search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The results are views of memory that the next search overwrites."""
        staged = self._queries.view(vectors.shape, torch.float32)
        staged.numpy()[...] = vectors
        queries = torch.empty(vectors.shape, dtype=torch.float32, device=self._device)
        self._copies.start(queries, staged)
        scores, rows = topk_inner_product(queries, self._index, k)
        rows += self._first
        # One copy for both: to start one is what costs.
        hits = torch.cat([rows.view(-1).view(torch.int32), scores.view(-1).view(torch.int32)])
        landed = self._results.view((hits.numel(),), torch.int32)
        self._copies.wait(self._copies.start(landed, hits))
        numbers, values = np.split(landed.numpy(), [2 * scores.numel()])
        return values.view(np.float32).reshape(scores.shape), numbers.view(np.int64).reshape(rows.shape)

    def _warm_up(self) -> None:
        """Every kernel that batches of any size want is compiled, and the memory of the largest is torch's to keep. A
        deadline allows for neither, and a later `cudaMalloc` may wait for whatever else the device is doing."""
        vectors = np.random.default_rng(0).standard_normal((MAX_QUERIES, self._index.corpus.shape[1]), np.float32)
        for num_queries in (1, 32, 128, MAX_QUERIES):
            self.search(vectors[:num_queries], 16)

    def _load(self, parts: list[Part], corpus: torch.Tensor, progress: Progress | None) -> None:
        ring = StagingRing(self._copies)
        total = self.plan.rows >> 20
        row_bytes = 2 * corpus.shape[1]
        step = max(1, _BYTES_BETWEEN_SIGNS // row_bytes)
        for first, vectors in parts:
            place = first - self._first
            for begin in range(0, len(vectors), step):
                part = vectors[begin : begin + step]
                ring.upload(part, corpus[place + begin : place + begin + len(part)])
                if progress is not None:
                    progress((place + begin + len(part)) * row_bytes >> 20, total)
        ring.flush()

    def _on_stream(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
