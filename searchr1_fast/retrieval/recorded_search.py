"""Searches of a device's rows, recorded once per number of queries, and replayed.

A search is about ten kernels, whose launches take the host longer than the smallest of them the device. Recorded as a
CUDA graph they are one launch, which reads queries from memory that stays where it is and leaves hits in memory that
stays (`searchr1_kernels.open_search`). A graph has a fixed number of queries, so a search takes the next larger of some
(`bucket_size`); the rows without a query are zeros, and their hits are not looked at. Whether a hit is proven is for
the host to read after the replay; what is not, is settled by kernels that are launched one by one.

Recording waits for the whole device, so it is done when an index is opened (`record`), for the number of hits that the
batcher asks for. A search for another number runs kernel by kernel; the bits are the same. A graph holds addresses:
where the memory goes (parking.py) the graphs are forgotten, and when it is there again they are recorded once more,
without a wait, as kernels have been compiled and loaded by then.

`RecordedSearches` replays by calling the function that would be recorded: the plain twin, for tests on a CPU.
`CudaRecordedSearches` records it.

Shape legend
    Q  queries of a bucket    K  hits of a query
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from searchr1_kernels import TopKSearch

from searchr1_fast.retrieval.memory_plan import MAX_QUERIES
from searchr1_fast.retrieval.streams import recording_again

# A pass over the rows takes as long for 1 query as for 16; beyond, what is scored for a query that nobody asks counts.
SIZES = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, MAX_QUERIES)


def bucket_size(num_queries: int) -> int:
    """The queries of the graph for so many, 0 to `MAX_QUERIES`."""
    return next(size for size in (0, *SIZES) if size >= num_queries)


class RecordedSearches:
    """Here a search is replayed by running it again."""

    def __init__(self, search: TopKSearch, stream: torch.cuda.Stream | None = None) -> None:
        self.search = search
        self.enabled = True  # False: launch kernel by kernel, as a benchmark wants to see it
        self.num_replays = 0
        self._stream = stream
        self._replays: dict[tuple[int, int], Callable[[], object]] = {}
        self._forgotten: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """How many were recorded."""
        return len(self._replays)

    def record(self, num_queries: int, k: int) -> None:
        """On the current stream, which must be the one given; waits for the device. Without effect for what cannot be
        launched."""
        if self.search.can_launch(num_queries, k):
            self._replays[num_queries, k] = self._record(lambda: self.search.launch(num_queries, k))

    def forget(self) -> None:
        """The memory of the search is about to go, and addresses with it."""
        self._forgotten += self._replays
        self._replays.clear()

    def record_again(self) -> None:
        """What was forgotten, with the memory as it lies now; on the current stream, as `record`."""
        while self._forgotten:
            num_queries, k = self._forgotten[0]
            self._replays[num_queries, k] = self._record_again(partial(self.search.launch, num_queries, k))
            del self._forgotten[0]

    def launch(self, num_queries: int, k: int) -> None:
        """As `TopKSearch.launch`, on the current stream."""
        replay = self._replays.get((num_queries, k)) if self.enabled else None
        if replay is None:
            self.search.launch(num_queries, k)
            return
        replay()
        self.num_replays += 1

    def _record(self, launch: Callable[[], object]) -> Callable[[], object]:
        """A function that does what `launch` does, from and to the same memory."""
        return launch

    def _record_again(self, launch: Callable[[], object]) -> Callable[[], object]:
        """The same, where `launch` has run before."""
        return launch


class CudaRecordedSearches(RecordedSearches):
    """Records searches as CUDA graphs. Each runs once before: kernels are compiled and loaded then, neither of which
    may happen in a recording."""

    def _record(self, launch: Callable[[], object]) -> Callable[[], object]:
        launch()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a trainer in another thread may use the device while this one records
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        return graph.replay

    def _record_again(self, launch: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with recording_again(graph):
            launch()
        return graph.replay
