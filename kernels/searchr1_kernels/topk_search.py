"""Searches of one index in memory at fixed addresses: `topk_inner_product`, split where the host would wait.

    search = open_search(index, max_queries=512, max_k=100)
    search.queries[:32] = …                # on the index's device
    hits = search.launch(32, 10)           # queued, without waiting or allocating
    search.settle(32, 10)                  # waits, and proves the results that are not proven yet

On a GPU `launch` is a fixed list of kernels for each number of queries and hits, so it can be recorded as a CUDA graph.
Whoever replays the graph fetches its results: `packed_hits` is all of them in one piece, `Hits.views` gives the tensors
in that piece (or in a copy of it), and `unproven` among them says whether `settle` has work to do.

On a CPU the same calls run the CPU's search, which leaves nothing to settle: the plain twin.

Shape legend: Q queries, D components, K hits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from searchr1_kernels import checks
from searchr1_kernels.topk import TopKIndex, topk_inner_product

_ALIGNMENT = 16  # bytes; where tensors in one piece of memory begin, so that kernels compiled for one piece fit all


class Hits(NamedTuple):
    """The results of a search."""

    ids: torch.Tensor  # [Q, K] int64
    scores: torch.Tensor  # [Q, K] fp32
    unproven: torch.Tensor  # [Q] int32: 1 where a row that was not scored may be better

    @staticmethod
    def nbytes(num_queries: int, k: int) -> int:
        """Bytes of all three tensors in one piece of memory."""
        return sum(_aligned(size) for size in _hit_bytes(num_queries, k))

    @classmethod
    def views(cls, memory: torch.Tensor, num_queries: int, k: int) -> Hits:
        """-> the three tensors as views of `memory` [at least nbytes] uint8, on any device."""
        shapes = ((num_queries, k), (num_queries, k), (num_queries,))
        dtypes = (torch.int64, torch.float32, torch.int32)
        tensors, begin = [], 0
        for size, shape, dtype in zip(_hit_bytes(num_queries, k), shapes, dtypes, strict=True):
            tensors.append(memory[begin : begin + size].view(dtype).view(shape))
            begin += _aligned(size)
        return cls(*tensors)


def _hit_bytes(num_queries: int, k: int) -> tuple[int, int, int]:
    return 8 * num_queries * k, 4 * num_queries * k, 4 * num_queries


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Settled(NamedTuple):
    """What it took to prove some results."""

    num_queries: int = 0  # not proven at first
    num_rescanned: int = 0  # of these, queries for which rows were read as floats
    num_blocks: int = 0  # blocks of 128 rows scored for that, summed over queries

    def __add__(self, other: Settled) -> Settled:
        return Settled(*(one + more for one, more in zip(self, other, strict=True)))


class TopKSearch:
    """Searches of up to `max_queries` queries for up to `max_k` hits, one at a time; made by `open_search`."""

    def __init__(self, index: TopKIndex, max_queries: int, max_k: int) -> None:
        checks.check_whole("max_queries", max_queries)
        checks.check_whole("max_k", max_k)
        if max_queries < 1:
            raise ValueError(f"max_queries: expected at least 1, got {max_queries}")
        if not 1 <= max_k <= len(index):
            raise ValueError(f"max_k: expected from 1 to {len(index)}, the rows of its index, got {max_k}")
        self.index, self.max_queries, self.max_k = index, max_queries, max_k
        corpus = index.corpus
        self.queries = torch.zeros(max_queries, corpus.shape[1], dtype=torch.float32, device=corpus.device)  # [Q, D]
        self._hits = torch.zeros(Hits.nbytes(max_queries, max_k), dtype=torch.uint8, device=corpus.device)

    @property
    def scratch(self) -> list[torch.Tensor]:
        """Memory that is free between fetching the hits of one search and writing the queries of the next."""
        return [self.queries, self._hits]

    def can_launch(self, num_queries: int, k: int) -> bool:
        """Whether `launch` takes this many: up to the limits given, and on a GPU up to some 200 hits."""
        return 0 <= num_queries <= self.max_queries and 1 <= k <= self.max_k

    def launch(self, num_queries: int, k: int) -> Hits:
        """Queue a search for the first `num_queries` of `queries`. -> its hits, which the next launch overwrites."""
        if not self.can_launch(num_queries, k):
            raise ValueError(f"this search has no room for {num_queries} queries and {k} hits; topk_inner_product has")
        hits = Hits.views(self._hits, num_queries, k)
        self._launch(self.queries[:num_queries], k, hits)
        return hits

    def packed_hits(self, num_queries: int, k: int) -> torch.Tensor:
        """The hits of such a search in one piece, [bytes] uint8."""
        return self._hits[: Hits.nbytes(num_queries, k)]

    def settle(self, num_queries: int, k: int, num_asked: int | None = None) -> Settled:
        """Prove what the last launch, of this size, left unproven of its first `num_asked` queries (default: all)."""
        return Settled()

    def bytes_read(self, num_queries: int) -> int:
        """Bytes of the corpus, or of its codes, that a search of this many queries reads in its one pass."""
        return self.index.corpus.numel()

    def tune(self, num_queries: int) -> dict[str, float]:
        """Time the ways to read the corpus for about this many queries -> seconds by name, the fastest first.

        The fastest is used from now on, for every index of this width and type. Results have the same bits with any.
        """
        return {}

    def _launch(self, queries: torch.Tensor, k: int, hits: Hits) -> None:
        hits.scores[:], hits.ids[:] = topk_inner_product(queries, self.index, k)
        hits.unproven[:] = 0


class _DeviceSearch(TopKSearch):
    """A `TopKSearch` on a GPU."""

    def __init__(self, index: TopKIndex, max_queries: int, max_k: int) -> None:
        from searchr1_kernels._topk_passes import Corpus, Passes

        super().__init__(index, max_queries, max_k)
        self._passes = Passes(Corpus(index.corpus, index.scales, index.parts), max_queries, max_k)

    @property
    def scratch(self) -> list[torch.Tensor]:
        return [*super().scratch, *self._passes.scratch]

    def can_launch(self, num_queries: int, k: int) -> bool:
        return super().can_launch(num_queries, k) and self._passes.can_launch(k)

    @torch.no_grad()
    def settle(self, num_queries: int, k: int, num_asked: int | None = None) -> Settled:
        from searchr1_kernels import _topk_cuda

        hits = Hits.views(self._hits, num_queries, k)
        with torch.cuda.device_of(self.queries):
            unproven = hits.unproven[:num_asked].nonzero().squeeze(1)
            return _topk_cuda.settle(self._passes, self.queries[:num_queries], hits, unproven)

    def bytes_read(self, num_queries: int) -> int:
        codes = self._passes.coarse(num_queries) == "int8"
        return self.index.corpus.numel() if codes else self.index.corpus.nbytes

    def tune(self, num_queries: int) -> dict[str, float]:
        with torch.cuda.device_of(self.queries):
            return self._passes.tune(num_queries, _seconds_on_the_device)

    def _launch(self, queries: torch.Tensor, k: int, hits: Hits) -> None:
        with torch.cuda.device_of(queries):
            self._passes.launch(queries, k, hits)


def open_search(index: TopKIndex, max_queries: int, max_k: int) -> TopKSearch:
    """-> a `TopKSearch` of this index, on its device. Raises ValueError for limits that make no sense."""
    if not isinstance(index, TopKIndex):
        raise ValueError(f"index: expected a TopKIndex, which TopKIndex(corpus) makes, got {type(index).__name__}")
    kind = TopKSearch if index.corpus.device.type == "cpu" else _DeviceSearch
    return kind(index, max_queries, max_k)


def _seconds_on_the_device(run: Callable[[], object], repetitions: int = 3) -> float:
    """The shortest of some runs, by events on the current stream, after a first one that compiles."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repetitions + 1):
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[1:])
