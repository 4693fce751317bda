"""Merges the hits of several parts into the best k: the memory that hits arrive in, and the merge itself.

    HostMerge      in C++ (csrc/merge.cpp): the twin, and the only one without a GPU
    DeviceMerge    by a kernel (csrc/merge.cu) that reads and writes the pinned memory where sockets put the hits
    choose_merge   picks whichever is faster here, if they agree to the bit

Shape legend
    Q  queries    S  parts    W  hits that one part has    k  hits of a query
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from searchr1_fast import _C
from searchr1_fast.retrieval.device_code import Launch, load_kernel
from searchr1_fast.retrieval.staging import Copies, CudaCopies, HostBuffer
from searchr1_fast.retrieval.streams import on_stream

HIT_BYTES = 12  # a row (int64) and a score (fp32)
SHARED_BYTES = 48 * 1024  # what a block may use without opting in, on every GPU
_NUM_THREADS = 128

Hits = tuple[np.ndarray, np.ndarray]


class Merge(Protocol):
    """Merges the hits of one search at a time; called by one thread at a time."""

    def rooms(self, num_queries: int, widths: Sequence[int]) -> list[memoryview]:
        """Memory for each part's hits: bytes of rows [Q,W] int64, then of scores [Q,W] fp32; each query's in order."""
        ...

    def merge(self, k: int) -> Hits:
        """Merge what `rooms` were filled with -> scores [Q,k] fp32, rows [Q,k] int64: score descending, then row
        ascending; where a query has fewer hits, the rest is -inf and -1."""
        ...


class HostMerge:
    """Merges in C++, without the GIL."""

    def __init__(self) -> None:
        self._parts: list[Hits] = []

    def rooms(self, num_queries: int, widths: Sequence[int]) -> list[memoryview]:
        """New memory each time."""
        bodies = [bytearray(HIT_BYTES * num_queries * width) for width in widths]
        self._parts = [hits_in(body, num_queries, width) for body, width in zip(bodies, widths, strict=True)]
        return [memoryview(body) for body in bodies]

    def merge(self, k: int) -> Hits:
        """Merge by `_C.merge_topk`."""
        return _C.merge_topk([scores for scores, _ in self._parts], [rows for _, rows in self._parts], k)


class DeviceMerge:
    """Merges by a kernel, in pinned memory. What does not fit in a block's shared memory is left to the twin."""

    def __init__(self, launch: Launch, copies: Copies, synchronize: Callable[[], None]) -> None:
        """`synchronize` returns when what was launched has run."""
        self._launch, self._synchronize = launch, synchronize
        self._hits, self._widths, self._result = HostBuffer(copies), HostBuffer(copies), HostBuffer(copies)
        self._twin = HostMerge()
        self._shape: tuple[int, list[int]] = (0, [])
        self._stride = 0

    def rooms(self, num_queries: int, widths: Sequence[int]) -> list[memoryview]:
        """Parts of one buffer, each beginning at a multiple of 16 bytes."""
        self._shape = num_queries, list(widths)
        self._stride = -(-HIT_BYTES * num_queries * max(widths, default=0) // 16) * 16
        everything = memoryview(self._hits.view((len(widths) * self._stride,), torch.uint8).numpy())
        return [
            everything[place * self._stride :][: HIT_BYTES * num_queries * width] for place, width in enumerate(widths)
        ]

    def merge(self, k: int) -> Hits:
        """Merge by one launch, and wait for it."""
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        num_queries, widths = self._shape
        shared_bytes = merge_shared_bytes(sum(widths), k)
        if shared_bytes > SHARED_BYTES:
            return self._merge_on_host(k)
        result = self._result.view((HIT_BYTES * num_queries * k,), torch.uint8)
        if num_queries == 0:
            return hits_in(b"", 0, k)
        hits = self._hits.view((len(widths) * self._stride,), torch.uint8)
        places = self._widths.view((len(widths),), torch.int32)
        places.numpy()[...] = widths
        scores = result.data_ptr() + 8 * num_queries * k
        self._launch(num_queries, _NUM_THREADS, shared_bytes, (
            np.uint64(hits.data_ptr()), np.int64(self._stride), np.uint64(places.data_ptr()), np.int32(len(widths)),
            np.int32(num_queries), np.int32(k), np.uint64(result.data_ptr()), np.uint64(scores),
        ))  # fmt: skip
        self._synchronize()
        found = hits_in(result.numpy(), num_queries, k)
        return found[0].copy(), found[1].copy()

    def _merge_on_host(self, k: int) -> Hits:
        num_queries, widths = self._shape
        own = memoryview(self._hits.view((len(widths) * self._stride,), torch.uint8).numpy())
        for place, room in enumerate(self._twin.rooms(num_queries, widths)):
            room[:] = own[place * self._stride :][: len(room)]
        return self._twin.merge(k)


def choose_merge(device: str, num_parts: int, num_queries: int = 256, k: int = 16) -> tuple[Merge, str]:
    """The faster merge for searches of this size on this device, and a sentence on why. RuntimeError if the two do not
    agree to the bit: such a GPU must not be trusted with anything."""
    if torch.device(device).type != "cuda":
        return HostMerge(), "in C++"
    if importlib.util.find_spec("cupy") is None:
        return HostMerge(), "in C++, as CuPy is not installed"
    with torch.cuda.device(device):
        launch = load_kernel("merge", "merge_hits")
        stream = torch.cuda.Stream(device)

    def launch_there(*arguments) -> None:
        with on_stream(stream):
            launch(*arguments)

    merges: list[Merge] = [HostMerge(), DeviceMerge(launch_there, CudaCopies(stream), stream.synchronize)]
    seconds = compare_merges(merges, num_parts, num_queries, k)
    faster = int(seconds[1] < seconds[0])
    where = ("in C++", "on the GPU")
    return merges[faster], f"{where[faster]}: {seconds[faster] * 1e6:.0f} us for {num_queries} queries, " + (
        f"{where[1 - faster]} {seconds[1 - faster] * 1e6:.0f} us"
    )


def compare_merges(
    merges: Sequence[Merge], num_parts: int, num_queries: int, k: int, repetitions: int = 10
) -> list[float]:
    """The median seconds of each merge over the same hits. RuntimeError if the results differ."""
    hits = example_hits(num_parts, num_queries, k)
    expected: Hits | None = None
    seconds = []
    for merge in merges:
        times = []
        for _ in range(repetitions):
            for room, body in zip(merge.rooms(num_queries, [k] * num_parts), hits, strict=True):
                room[:] = body
            started = time.perf_counter()
            found = merge.merge(k)
            times.append(time.perf_counter() - started)
        expected = expected or found
        if any(one.tobytes() != other.tobytes() for one, other in zip(found, expected, strict=True)):
            raise RuntimeError("the merge on the GPU does not find what the merge in C++ finds: a faulty GPU or driver")
        seconds.append(float(np.median(times)))
    return seconds


def example_hits(num_parts: int, num_queries: int, k: int, num_levels: int = 100) -> list[bytes]:
    """Made-up hits of parts, laid out for `Merge.rooms`; few levels of scores make many ties."""
    generator = np.random.default_rng(0)
    bodies = []
    for part in range(num_parts):
        scores = generator.integers(0, num_levels, (num_queries, k)).astype(np.float32)
        rows = generator.permuted(np.tile(np.arange(part * 10 * k, (part + 1) * 10 * k), (num_queries, 1)), axis=1)
        rows = rows[:, :k].astype(np.int64)
        order = np.lexsort((rows, -scores), axis=1)
        rows, scores = (np.take_along_axis(array, order, axis=1) for array in (rows, scores))
        bodies.append(rows.tobytes() + scores.tobytes())
    return bodies


def hits_in(body: bytes | bytearray | np.ndarray, num_queries: int, width: int) -> Hits:
    """Views of a body: scores [Q,W] fp32, rows [Q,W] int64."""
    size = num_queries * width
    rows = np.frombuffer(body, np.int64, size).reshape(num_queries, width)
    return np.frombuffer(body, np.float32, size, rows.nbytes).reshape(num_queries, width), rows


def merge_shared_bytes(num_hits: int, k: int) -> int:
    """The shared memory that a block of csrc/merge.cu needs for a query with this many hits."""
    return HIT_BYTES * num_hits + 4 * k
