"""Rows of vectors in a GPU's memory: copied there once, searched by `topk_inner_product` on a stream of their own.

All rows are one tensor, however many files they come from: a search is one pass, and there is nothing to merge.

Staying out of the trainer's way: every kernel and copy is queued on one stream that nothing else uses (a thread that
names none gets the default stream, and waits for the decoding and training queued there); queries and results pass
through pinned memory; and one search runs at a time, so working memory is that of one.

Keeping the host's share small: a search's kernels are one launch (`recorded_search.py`), one copy brings the hits
together with whether they are proven, and the tensors that a search of Q queries for K hits reads and writes are made
once (`_Lane`). Making slices and views and entering streams anew took Python 0.45 ms a search; made once, 0.07 ms (32
queries, on the host of an H200, 2026-11-27). The host settles hits that are not proven, counted in `settled`.

Lending out the memory: `park` and `unpark` (parking.py). A search that meets parked rows waits until they are back;
callers that must not wait are refused in batcher.py.

The whole class also runs on a CPU, as the twin that tests compare: ring, row numbers, cutting of batches.

Shape legend
    Q  queries    K  hits of a query    M  rows    D  components
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from searchr1_kernels import Hits, Settled, TopKIndex, open_search, topk_inner_product

from searchr1_fast.retrieval.memory_plan import MAX_QUERIES, MemoryPlan, Scan, free_bytes
from searchr1_fast.retrieval.parking import ParkedMemory, ParkingTimes
from searchr1_fast.retrieval.protocol import Mode
from searchr1_fast.retrieval.recorded_search import SIZES, CudaRecordedSearches, RecordedSearches, bucket_size
from searchr1_fast.retrieval.rows import Part
from searchr1_fast.retrieval.staging import HostBuffer, StagingRing, copies_of
from searchr1_fast.retrieval.streams import on_stream
from searchr1_fast.types import Progress

_BYTES_BETWEEN_SIGNS = 2**28  # of progress
_MAX_HITS = 192  # of a search that can be recorded; a search for more runs unrecorded
_RECORDED_HITS = 16  # what the batcher asks for unless a caller wants more
# Of rows. From this size on, reading them dominates; only then is tuning worth the seconds that it takes.
_TUNED_BYTES = 2**28
_TUNED_QUERIES = (16, 32, 64, 128, 256)


class _Lane(NamedTuple):
    """The buffers of a search of Q queries for K hits, to the device and back. Arrays are views of pinned tensors."""

    staged: torch.Tensor  # [Q, D] fp32, pinned
    vectors: np.ndarray  # of `staged`
    queries: torch.Tensor  # [Q, D] fp32, on the device
    packed: torch.Tensor  # [bytes] uint8, on the device
    landed: torch.Tensor  # [bytes] uint8, pinned
    scores: np.ndarray  # [Q, K] fp32, of `landed`
    rows: np.ndarray  # [Q, K] int64, of `landed`
    unproven: np.ndarray  # [Q] int32, of `landed`


class DeviceRows:
    """Consecutive parts in one device's memory; the first may begin at any row."""

    def __init__(
        self,
        parts: Iterable[Part],
        device: torch.device | str,
        scan: Scan = "float16",
        progress: Progress | None = None,  # (MiB copied, MiB in all)
    ) -> None:
        """ValueError, before anything is allocated, if the device's free memory is too small."""
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
        self._lanes: dict[tuple[int, int], _Lane] = {}  # by queries and hits
        self._lock = threading.Condition()  # one search at a time; notified when the rows are back
        with on_stream(self._stream):
            corpus = torch.empty(shape, dtype=torch.float16, device=self._device)
            self._load(parts, corpus, progress)
            # A CPU is fastest with 8-bit codes, whatever was asked for; the bits are the same.
            coarse = "float" if scan == "float16" and self._device.type == "cuda" else "int8"
            self._index = TopKIndex(corpus, coarse=coarse)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # preparing took gigabytes, which torch would keep for this stream alone
        with on_stream(self._stream):
            self._search = open_search(self._index, MAX_QUERIES, min(_MAX_HITS, len(self._index)))
        kind = CudaRecordedSearches if self._device.type == "cuda" else RecordedSearches
        self.recorded = kind(self._search, self._stream)
        self.settled = Settled()  # of all searches
        self.ways: dict[int, dict[str, float]] = {}  # seconds of each way to read the rows, by number of queries
        self._memory = ParkedMemory(self._index.tensors, self._search.scratch, self._device, self._stream)
        self._warm_up()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def mode(self) -> Mode:
        """`exact_certified` if codes propose rows, else `exact`."""
        return "exact" if self._index.coarse == "float" else "exact_certified"

    @property
    def parking(self) -> ParkingTimes:
        """How often the rows were parked, and what it took."""
        return self._memory.times

    @property
    def is_parked(self) -> bool:
        """Whether searches wait for the rows."""
        return self._memory.is_parked

    def park(self) -> None:
        """Give the memory of rows, codes and work to others once the current search has ended. Does nothing if parked
        already. ValueError, with nothing parked, if the machine does not lock that much host memory."""
        with self._lock:
            if not self.is_parked:
                self.recorded.forget()
                try:
                    self._memory.park()
                except ValueError:  # the rows are where they were
                    with on_stream(self._stream):
                        self.recorded.record_again()
                    raise

    def unpark(self) -> None:
        """Take the memory back and queue the copies, without waiting. Does nothing if not parked. If there is not
        enough memory (torch.OutOfMemoryError), the rows stay parked."""
        with self._lock, on_stream(self._stream):
            if self.is_parked:
                self._memory.unpark()
                self._lock.notify_all()
                self.recorded.record_again()

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """vectors [Q,D] fp32 -> (scores [Q,K] fp32, rows [Q,K] int64). The caller waits without the GIL."""
        k = min(k, len(self))
        scores, rows = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
        with self._lock, on_stream(self._stream):
            self._lock.wait_for(lambda: not self.is_parked)
            for begin in range(0, len(vectors), MAX_QUERIES):
                part = slice(begin, begin + MAX_QUERIES)
                scores[part], rows[part] = self._search_part(vectors[part], k)
        rows += self._first
        return scores, rows

    def bytes_read(self, num_queries: int) -> int:
        """The bytes read by the pass over the rows, or their codes, in a search of this many queries."""
        return self._search.bytes_read(bucket_size(num_queries))

    def _search_part(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search one part; results are views that the next search overwrites, with rows counted from the first."""
        num_queries, size = len(vectors), bucket_size(len(vectors))
        if not self._search.can_launch(size, k):
            queries = torch.tensor(vectors, dtype=torch.float32, device=self._device)
            return tuple(tensor.cpu().numpy() for tensor in topk_inner_product(queries, self._index, k))
        lane = self._lanes.get((size, k)) or self._lane(size, k)
        lane.vectors[:num_queries] = vectors
        lane.vectors[num_queries:] = 0  # rows of the bucket without a query
        lane.queries.copy_(lane.staged, non_blocking=True)
        self.recorded.launch(size, k)
        self._fetch(lane)
        if lane.unproven[:num_queries].any():
            self.settled += self._search.settle(size, k, num_queries)
            self._fetch(lane)
        return lane.scores[:num_queries], lane.rows[:num_queries]

    def _lane(self, size: int, k: int) -> _Lane:
        """Make a lane, once for each size. Lanes share pinned memory, because only one search runs at a time; when it
        has to grow, earlier lanes keep the memory that they have."""
        staged = self._queries.view((size, self._index.corpus.shape[1]), torch.float32)
        packed = self._search.packed_hits(size, k)
        landed = self._results.view((packed.numel(),), torch.uint8)
        hits = Hits.views(landed, size, k)
        arrays = (tensor.numpy() for tensor in (hits.scores, hits.ids, hits.unproven))
        queries = self._search.queries[:size]
        self._lanes[size, k] = _Lane(staged, staged.numpy(), queries, packed, landed, *arrays)
        return self._lanes[size, k]

    def _fetch(self, lane: _Lane) -> None:
        """Copy the hits into pinned memory, and wait."""
        lane.landed.copy_(lane.packed, non_blocking=True)
        self._copies.finish()

    def _warm_up(self) -> None:
        """Compile every kernel that a batch of any size needs, and have torch cache the memory of the largest. No
        deadline allows for either, and a later `cudaMalloc` may wait for whatever else the device is doing."""
        with on_stream(self._stream):
            if self._device.type == "cuda" and self._index.corpus.nbytes >= _TUNED_BYTES:
                self.ways = {size: self._search.tune(size) for size in _TUNED_QUERIES}
            k = min(_RECORDED_HITS, self._search.max_k)
            for size in reversed(SIZES):
                self.recorded.record(size, k)
        vectors = np.random.default_rng(0).standard_normal((MAX_QUERIES, self._index.corpus.shape[1]), np.float32)
        self.search(vectors, _RECORDED_HITS)

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
