"""Rows on a device: how they are copied there, the memory they take, and that a search finds what the host's finds.

All of it runs on a CPU, where `DeviceRows` is its own twin. The `cuda` cases do the same on a GPU, where there is one.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import Hits, Settled

pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")

from searchr1_fast.retrieval import device_rows
from searchr1_fast.retrieval.dense import open_rows
from searchr1_fast.retrieval.device_rows import DeviceRows
from searchr1_fast.retrieval.encoders import check_device
from searchr1_fast.retrieval.memory_plan import MAX_QUERIES, MemoryPlan
from searchr1_fast.retrieval.recorded_search import SIZES, bucket_size
from searchr1_fast.retrieval.rows import HostRows, cut, share
from searchr1_fast.retrieval.staging import CpuCopies, HostBuffer, StagingRing

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


class LateCopies(CpuCopies):
    """A device that copies only when it is waited for, and then what the buffer holds by that time."""

    def __init__(self) -> None:
        self.queue: list[tuple] = []
        self.most = 0

    def start(self, target, source):
        self.queue.append((target, source))
        self.most = max(self.most, len(self.queue))
        return self.queue[-1]

    def wait(self, handle) -> None:
        while any(waiting is handle for waiting in self.queue):
            target, source = self.queue.pop(0)
            target.copy_(source)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    num_bytes=st.integers(1, 30),
    num_buffers=st.integers(1, 4),
)
def test_a_ring_copies_everything_and_no_buffer_is_filled_before_it_is_empty(sizes, num_bytes, num_buffers):
    copies = LateCopies()
    ring = StagingRing(copies, num_bytes, num_buffers)
    generator = np.random.default_rng(0)
    sources = [generator.standard_normal((size, 3)).astype(np.float16) for size in sizes]
    targets = [torch.zeros(size, 3, dtype=torch.float16) for size in sizes]
    for source, target in zip(sources, targets, strict=True):
        ring.upload(source, target)
    assert copies.most <= num_buffers
    ring.flush()
    assert copies.queue == []
    for source, target in zip(sources, targets, strict=True):
        assert (target.numpy() == source).all()


def test_what_a_ring_cannot_copy_is_refused():
    ring = StagingRing(CpuCopies(), 8)
    with pytest.raises(ValueError, match="the source has 16 bytes, the target 12"):
        ring.upload(np.zeros(8, np.float16), torch.zeros(6, dtype=torch.float16))
    with pytest.raises(ValueError, match="must be contiguous"):
        ring.upload(np.zeros((4, 4), np.float16)[:, :2], torch.zeros(8, dtype=torch.float16))
    with pytest.raises(ValueError, match="a ring needs buffers"):
        StagingRing(CpuCopies(), 0)


def test_a_buffer_grows_and_stays():
    class Counting(CpuCopies):
        made = 0

        def buffer(self, num_bytes):
            self.made += 1
            return super().buffer(num_bytes)

    copies = Counting()
    buffer = HostBuffer(copies)
    assert buffer.view((3, 4), torch.float32).shape == (3, 4)
    address = buffer.view((3, 4), torch.float32).data_ptr()
    assert buffer.view((6,), torch.int32).data_ptr() == address
    assert copies.made == 2
    buffer.view((1000,), torch.int64)
    assert copies.made == 3


# --------------------------------------------------------------------------------------------------------------- plan


def test_the_plan_of_the_published_index():
    """21,015,324 rows of 768: 32.28 GB as fp16, 30.1 GiB."""
    plan = MemoryPlan(21_015_324, 768, "float16")
    assert plan.rows == 21_015_324 * 1536
    assert (plan.codes, plan.bounds) == (0, 4 * 164_183)
    assert "21,015,324 rows of 768 components: 30.1 GiB as float16, " in str(plan)
    codes = MemoryPlan(21_015_324, 768, "int8")
    assert codes.codes == 21_015_324 * 776 + 3072
    assert codes.rows + codes.codes + codes.bounds < 1.51 * plan.rows
    assert ", codes 15.2 GiB, " in str(codes)


def test_what_does_not_fit_is_refused():
    plan = MemoryPlan(1_000_000, 768, "int8")
    plan.check(plan.total, "cuda:0")
    with pytest.raises(ValueError, match=r"does not fit on cuda:0: 1,000,000 rows .* and 1\.0 GiB are free; .*float16"):
        plan.check(2**30, "cuda:0")
    with pytest.raises(ValueError, match="more GPUs") as error:
        MemoryPlan(1_000_000, 768, "float16").check(2**30, "cuda:0")
    assert "retrieval.scan" not in str(error.value)


@pytest.mark.parametrize("scan", ["float16", "int8"])
@pytest.mark.parametrize("shape", [(1, 64), (128, 16), (1000, 48)])
def test_a_plan_is_what_the_kernels_hold(scan, shape):
    """To the byte: a GPU's search prepares the same arrays, which are prepared here on a CPU."""
    pytest.importorskip("triton", reason="a GPU's search needs Triton")
    from searchr1_kernels import _topk_cuda

    rows = torch.randn(shape).half()
    parts = _topk_cuda.prepare(rows, None, "float" if scan == "float16" else "int8")
    plan = MemoryPlan(*shape, scan)
    assert plan.rows == rows.nbytes
    assert plan.codes + plan.bounds == sum(part.nbytes for part in parts)


# --------------------------------------------------------------------------------------------------------------- rows


def vectors_of(num_rows: int, dimension: int = 24, seed: int = 0) -> np.ndarray:
    """-> vectors of few levels, so that many scores are equal."""
    return np.random.default_rng(seed).integers(-2, 3, (num_rows, dimension)).astype(np.float16)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("scan", ["float16", "int8"])
def test_a_device_finds_what_the_host_finds(device, scan, monkeypatch):
    monkeypatch.setattr(device_rows, "_BYTES_BETWEEN_SIGNS", 100 * 48)
    vectors = vectors_of(700)
    parts = [(0, vectors[:300]), (300, vectors[300:301]), (301, vectors[301:])]
    host = HostRows(parts)
    signs = []
    rows = DeviceRows(parts, device, scan, lambda finished, total: signs.append((finished, total)))
    assert len(rows) == 700 and len(signs) == 3 + 1 + 4
    queries = np.random.default_rng(1).standard_normal((MAX_QUERIES + 9, 24)).astype(np.float32)
    queries[::3] = vectors[: len(queries[::3])]
    for num_queries, k in ((0, 3), (1, 5), (MAX_QUERIES + 9, 16), (3, 700), (2, 10**6)):
        for one, other in zip(
            host.search(queries[:num_queries], k), rows.search(queries[:num_queries], k), strict=True
        ):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_recorded_searches_find_the_same_bits(device):
    """Replayed or launched, whatever the bucket held before, and for recorded and other numbers of hits."""
    vectors = vectors_of(700)
    rows, host = DeviceRows([(0, vectors)], device), HostRows([(0, vectors)])
    assert len(rows.recorded) == len(SIZES)
    queries = np.random.default_rng(2).standard_normal((MAX_QUERIES, 24)).astype(np.float32)
    for num_queries, k, replayed in ((MAX_QUERIES, 16, 1), (1, 16, 1), (5, 16, 1), (5, 3, 0), (0, 16, 0)):
        for enabled in (True, False):
            rows.recorded.enabled, before = enabled, rows.recorded.num_replays
            found = rows.search(queries[:num_queries], k)
            assert rows.recorded.num_replays - before == (replayed if enabled else 0)
            for one, other in zip(host.search(queries[:num_queries], k), found, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_hits_that_are_not_proven_are_settled(device, monkeypatch):
    """Only those of queries that were asked; the zeros beside them are never proven, and need not be."""
    vectors = vectors_of(700)
    rows, host = DeviceRows([(0, vectors)], device), HostRows([(0, vectors)])
    queries = np.random.default_rng(3).standard_normal((5, 24)).astype(np.float32)
    search, launch = rows._search, rows.recorded.launch
    left, asked, waits, finish = [4], [], [], rows._copies.finish

    def leave_unproven(num_queries, k):
        launch(num_queries, k)
        hits = Hits.views(search.packed_hits(num_queries, k), num_queries, k)
        hits.unproven[left], hits.scores[left], hits.ids[left] = 1, 7.0, 7

    def settle(num_queries, k, num_asked):
        asked.append((num_queries, k, num_asked))
        search.launch(num_queries, k)
        return Settled(1, 0, 3)

    monkeypatch.setattr(rows.recorded, "launch", leave_unproven)
    monkeypatch.setattr(search, "settle", settle)
    monkeypatch.setattr(rows._copies, "finish", lambda: waits.append(finish()))
    for one, other in zip(host.search(queries, 16), rows.search(queries, 16), strict=True):
        np.testing.assert_array_equal(one, other)
    assert asked == [(8, 16, 5)] and rows.settled == Settled(1, 0, 3) and len(waits) == 2
    left[0] = 6
    rows.search(queries, 16)
    assert len(asked) == 1 and len(waits) == 3


KINDS = ((3, 2), (1, 192), (MAX_QUERIES, 192), (3, 2), (5, 193), (1, 192), (MAX_QUERIES + 1, 2), (3, 2))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_searches_of_many_kinds_in_turn(device):
    """A search's hits are those of its own queries, and remain when other searches follow.

    The views that a search writes and reads are made once, and memory grows meanwhile. 193 hits are more than can be
    recorded. Queries may be read-only, and of another type.
    """
    vectors = vectors_of(700)
    rows, host = DeviceRows([(0, vectors)], device), HostRows([(0, vectors)])
    found, wanted = [], []
    for number, (num_queries, k) in enumerate(KINDS):
        queries = np.random.default_rng(number).integers(-2, 3, (num_queries, 24)).astype(np.float32)
        wanted += host.search(queries, k)
        queries = queries.astype(np.float64) if number % 2 else queries
        queries.setflags(write=False)
        with warnings.catch_warnings(action="error"):
            found += rows.search(queries, k)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_threads_take_turns(device):
    vectors = vectors_of(700)
    rows, host = DeviceRows([(0, vectors)], device), HostRows([(0, vectors)])

    def search(number):
        num_queries, k = KINDS[number % len(KINDS)]
        queries = np.random.default_rng(number).standard_normal((num_queries, 24)).astype(np.float32)
        return zip(host.search(queries, k), rows.search(queries, k), strict=True)

    with ThreadPoolExecutor(4) as pool:
        for pairs in pool.map(search, range(24)):
            for one, other in pairs:
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("scan", ["float16", "int8"])
def test_hits_in_more_blocks_than_are_scored_at_first(device, scan):
    """100 rows, 600 times each: every block of 128 has a copy of the best row, and the lowest numbers win."""
    vectors = np.tile(vectors_of(100), (600, 1))
    rows, host = DeviceRows([(0, vectors)], device, scan), HostRows([(0, vectors)])
    queries = np.random.default_rng(4).standard_normal((5, 24)).astype(np.float32)
    for one, other in zip(host.search(queries, 16), rows.search(queries, 16), strict=True):
        np.testing.assert_array_equal(one, other)
    if device == "cuda":
        assert rows.settled.num_queries >= 5  # preceded by those of the warm-up


def test_a_bucket_has_room_and_is_not_much_larger():
    assert [bucket_size(number) for number in (0, 1, 2, 16, 17, MAX_QUERIES)] == [0, 1, 4, 16, 24, MAX_QUERIES]
    for number in range(1, MAX_QUERIES + 1):
        assert number <= bucket_size(number) <= max(4, 2 * number)


def test_rows_keep_their_numbers():
    vectors = vectors_of(100)
    queries = vectors[:7].astype(np.float32)
    whole = HostRows([(0, vectors)]).search(queries, 100)
    for begin, end in ((0, 100), (13, 57), (99, 100)):
        inside = (whole[1] >= begin) & (whole[1] < end)
        wanted = [hits[inside].reshape(7, end - begin) for hits in whole]
        for kind in (HostRows, lambda parts: DeviceRows(parts, "cpu")):
            found = kind(cut([(0, vectors[:40]), (40, vectors[40:])], begin, end)).search(queries, 100)
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 10, 1001])
@pytest.mark.parametrize("num_shares", [1, 2, 3, 8])
def test_shares_are_even_and_whole(num_rows, num_shares):
    shares = [share(num_rows, place, num_shares) for place in range(num_shares)]
    assert [begin for begin, _ in shares] == [0, *(end for _, end in shares[:-1])]
    assert shares[-1][1] == num_rows
    sizes = {end - begin for begin, end in shares}
    assert max(sizes) - min(sizes) <= 1


def test_a_device_has_a_number(monkeypatch):
    """`cuda` means the thread's current GPU; the one that counts is that of the thread which opened the rows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [check_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:3", "cuda:1"]
    with pytest.raises(ValueError, match="there is no device cuda:4 on this machine: its GPUs are 4"):
        check_device("cuda:4")


def test_of_no_rows_there_are_no_hits():
    scores, rows = open_rows([], "cpu", "float16", SimpleNamespace()).search(np.zeros((3, 4), np.float32), 5)
    assert scores.shape == rows.shape == (3, 0)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    with pytest.raises(ValueError, match="at least one row"):
        DeviceRows([], "cpu")
