"""Searches of a device's rows, recorded as CUDA graphs once per number of queries, and replayed.

A search is about ten kernels, and launching one takes the host longer than running the smallest takes the device.
Recorded as a CUDA graph they are one launch, which reads queries from and leaves hits in memory at fixed addresses
(`searchr1_kernels.open_search`). A graph has a fixed number of queries, so a search uses the next larger size
(`bucket_size`); rows without a query are zeros, and their hits are ignored. After the replay the host reads whether the
hits are proven, and settles those that are not by kernels launched one by one.

Recording waits for the whole device, so it is done when an index is opened (`record`), for the number of hits that the
batcher asks for. A search for another number runs kernel by kernel; the bits are the same. A graph holds addresses:
when the memory goes (parking.py) the graphs are dropped, and when it is back they are recorded once more, without a
wait, because kernels have been compiled and loaded by then.

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

# A pass over the rows takes as long for 1 query as for 16; beyond that, scoring rows without a query costs time.
SIZES = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, MAX_QUERIES)


def bucket_size(num_queries: int) -> int:
    """The number of queries of the graph to use for `num_queries`, 0 to `MAX_QUERIES`."""
    return next(size for size in (0, *SIZES) if size >= num_queries)


class RecordedSearches:
    """Replays searches; here, by running them again."""

    def __init__(self, search: TopKSearch, stream: torch.cuda.Stream | None = None) -> None:
        self.search = search
        self.enabled = True  # False: launch kernel by kernel, for benchmarks
        self.num_replays = 0
        self._stream = stream
        self._replays: dict[tuple[int, int], Callable[[], object]] = {}
        self._forgotten: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """How many searches are recorded."""
        return len(self._replays)

    def record(self, num_queries: int, k: int) -> None:
        """Record a search on the current stream, which must be the one given; waits for the device. Does nothing if the
        search cannot be launched."""
        if self.search.can_launch(num_queries, k):
            self._replays[num_queries, k] = self._record(lambda: self.search.launch(num_queries, k))

    def forget(self) -> None:
        """Drop the recordings: the memory of the search is about to go, and its addresses with it."""
        self._forgotten += self._replays
        self._replays.clear()

    def record_again(self) -> None:
        """Record what was dropped, at the present addresses, on the current stream as for `record`."""
        while self._forgotten:
            num_queries, k = self._forgotten[0]
            self._replays[num_queries, k] = self._record_again(partial(self.search.launch, num_queries, k))
            del self._forgotten[0]

    def launch(self, num_queries: int, k: int) -> None:
        """Do what `TopKSearch.launch` does, on the current stream."""
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
        """`_record`, for a `launch` that has run before."""
        return launch


class CudaRecordedSearches(RecordedSearches):
    """Records searches as CUDA graphs. Each runs once beforehand, to compile and load its kernels: neither may happen
    during a recording."""

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
