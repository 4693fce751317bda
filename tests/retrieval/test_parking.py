"""Rows that leave a device and return: their memory is free meanwhile, and searches find the same bits afterwards.

All of it runs on a CPU, from host memory to host memory, and with `cuda` on a GPU, where there is one.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from batcher_fakes import PATIENCE, Backend, Rows, eventually, ids_of
from test_sharded_rows import QUERIES, ROWS, check_same, open_part, open_ranks

from searchr1_fast.retrieval import RetrievalError, parking
from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.dense import DenseSearch
from searchr1_fast.retrieval.device_rows import DeviceRows
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.memory_plan import MAX_QUERIES
from searchr1_fast.retrieval.parking import ParkedMemory
from searchr1_fast.retrieval.protocol import Parks, RetrievalParked, RetrievalTimeout
from searchr1_fast.retrieval.recorded_search import SIZES
from searchr1_fast.retrieval.rows import HostRows, cut

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def device_part(begin: int, end: int) -> DeviceRows:
    return DeviceRows(cut([(0, ROWS)], begin, end), "cpu")


class ParkableBackend(Backend):
    """Records its calls of `park` and `unpark`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_parked, self.calls = False, []

    def park(self) -> None:
        self.calls.append("park")
        self.is_parked = True

    def unpark(self) -> None:
        self.calls.append("unpark")
        self.is_parked = False

    def search_ids(self, queries, k):
        assert not self.is_parked
        return super().search_ids(queries, k)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_what_is_kept_comes_back_and_scratch_only_its_room(device):
    device = torch.device(device)
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    kept = torch.arange(1000, device=device)
    views = [kept[:10], kept.view(10, 100)]
    wanted = kept.clone()
    scratch = torch.ones(77, device=device)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    memory = ParkedMemory([kept, *views, torch.empty(0, device=device)], [scratch], device, stream)
    for times in (1, 2, 3):
        assert memory.nbytes == kept.nbytes + scratch.nbytes
        memory.park()
        memory.park()
        assert memory.is_parked and memory.nbytes == 8 * 1000 + 4 * 77
        if stream is not None:
            assert kept.untyped_storage().nbytes() == scratch.untyped_storage().nbytes() == 0
        else:
            assert set(kept.tolist()) == {-1} and bool(scratch.isnan().all())
        memory.unpark()
        memory.unpark()
        if stream is not None:
            stream.synchronize()
        assert torch.equal(kept, wanted) and torch.equal(views[1], wanted.view(10, 100))
        assert scratch.untyped_storage().nbytes() == scratch.nbytes
        assert (memory.times.num_parks, memory.times.num_unparks) == (times, times)
    assert memory.times.park_seconds > 0 and memory.times.unpark_seconds > 0


def test_without_host_memory_nothing_changes(monkeypatch):
    kept = torch.arange(10)
    memory = ParkedMemory([kept], [], torch.device("cpu"))

    def refuse(num_bytes, device, setting):
        raise ValueError(f"{setting}: {num_bytes} bytes could not be page-locked")

    monkeypatch.setattr(parking, "host_memory", refuse)
    with pytest.raises(ValueError, match="retrieval.park_during_update: 80 bytes"):
        memory.park()
    assert not memory.is_parked and kept.tolist() == list(range(10))


def test_rows_that_could_not_be_parked_are_searched_as_before(monkeypatch):
    rows, host = device_part(0, len(ROWS)), HostRows([(0, ROWS)])

    def refuse(num_bytes, device, setting):
        raise ValueError(f"{setting}: {num_bytes} bytes could not be page-locked")

    monkeypatch.setattr(parking, "host_memory", refuse)
    with pytest.raises(ValueError, match="could not be page-locked"):
        rows.park()
    assert not rows.is_parked and len(rows.recorded) == len(SIZES)
    before = rows.recorded.num_replays
    check_same(rows.search(QUERIES[:3], 16), host.search(QUERIES[:3], 16))
    assert rows.recorded.num_replays == before + 1


def test_where_there_is_no_room_to_come_back_it_stays_parked(monkeypatch):
    first, second = torch.arange(10), torch.arange(20)
    memory = ParkedMemory([first, second], [], torch.device("cpu"))
    memory.park()
    real = memory._away
    full = [(torch.UntypedStorage(0), 2**60)]  # more than exists
    memory._away = real[:1] + full + real[1:]
    with pytest.raises(RuntimeError):
        memory.unpark()
    assert memory.is_parked and set(first.tolist() + second.tolist()) == {-1}
    memory._away = real
    memory.unpark()
    assert first.tolist() == list(range(10)) and second.tolist() == list(range(20))


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("scan", ["float16", "int8"])
def test_rows_that_were_parked_find_the_same_bits(device, scan):
    """With and without a recording, in every bucket."""
    rows, host = DeviceRows([(0, ROWS)], device, scan), HostRows([(0, ROWS)])
    assert isinstance(rows, Parks) and not isinstance(host, Parks)
    for _ in range(2):
        rows.park()
        rows.park()
        assert rows.is_parked and len(rows.recorded) == 0
        rows.unpark()
        rows.unpark()
        assert not rows.is_parked and len(rows.recorded) == len(SIZES)
        for num_queries, k in ((MAX_QUERIES, 16), (1, 16), (30, 16), (7, 3), (0, 16), (2, len(ROWS))):
            check_same(rows.search(QUERIES[:num_queries], k), host.search(QUERIES[:num_queries], k))
        before = rows.recorded.num_replays
        rows.search(QUERIES[:1], 16)
        assert rows.recorded.num_replays == before + 1
    assert (rows.parking.num_parks, rows.parking.num_unparks) == (2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_memory_back():
    """This process holds less memory by the size of the rows, and recorded searches find the rows where they are now.

    The driver's free memory is not compared, as other processes change it.
    """
    vectors = np.random.default_rng(0).standard_normal((400_000, 256), np.float32).astype(np.float16)  # 195 MiB
    rows, host = DeviceRows([(0, vectors)], "cuda"), HostRows([(0, vectors[:1000])])
    wanted = rows.search(vectors[:40].astype(np.float32), 16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    address = rows._index.corpus.data_ptr()
    rows.park()
    assert before - torch.cuda.memory_reserved() >= 0.9 * vectors.nbytes
    others = torch.zeros(300 << 20, dtype=torch.uint8, device="cuda")  # perhaps where the rows were
    rows.unpark()
    check_same(rows.search(vectors[:40].astype(np.float32), 16), wanted)
    assert rows._index.corpus.data_ptr() != address or others.data_ptr() != address
    assert host.search(vectors[:1].astype(np.float32), 1)[1].tolist() == [[0]] == wanted[1][:1, :1].tolist()


def test_a_search_of_parked_rows_waits_until_they_are_back():
    rows, host = device_part(0, len(ROWS)), HostRows([(0, ROWS)])
    rows.park()
    found = []
    thread = threading.Thread(target=lambda: found.append(rows.search(QUERIES[:3], 4)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive() and not found
    rows.unpark()
    thread.join(PATIENCE)
    check_same(found[0], host.search(QUERIES[:3], 4))


def test_a_rank_that_is_back_first_waits_for_the_others():
    alone = open_part(0, len(ROWS))
    ranks = open_ranks(2, device_part)
    for rank in ranks:
        rank.park()
        assert rank.is_parked
    ranks[0].unpark()
    found = []
    thread = threading.Thread(target=lambda: found.append(ranks[0].search(QUERIES[:5], 4)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    ranks[1].unpark()
    thread.join(PATIENCE)
    check_same(found[0], alone.search(QUERIES[:5], 4))
    for rank in ranks:
        rank.close()


def test_a_rank_that_stays_parked_is_named():
    ranks = open_ranks(2, device_part)
    ranks[1].park()
    ranks[0]._timeout = 0.2
    with pytest.raises(RetrievalError, match=r"no answer from rank 1 within 0\.2 s: it hangs, or its part is parked"):
        ranks[0].search(QUERIES[:3], 4)
    ranks[1].unpark()
    for rank in ranks:
        rank.close()


def test_ranks_without_a_gpu_have_nothing_to_park():
    ranks = open_ranks(2)
    for rank in ranks:
        rank.park()
        assert not rank.is_parked
    check_same(ranks[0].search(QUERIES[:5], 4), open_part(0, len(ROWS)).search(QUERIES[:5], 4))
    for rank in ranks:
        rank.close()


# ------------------------------------------------------------------------------------------------------------ retriever


def test_a_search_by_text_of_parked_rows_is_refused():
    encoder = HashingEncoder(64)
    encoder.count([["one two three"]])
    vectors = np.tile(ROWS, (1, 4))
    search = DenseSearch(encoder, DeviceRows([(0, vectors)], "cpu"))
    wanted = search.search_ids(["one two"], 3)
    search.park()
    with pytest.raises(RetrievalParked, match=r"call unpark\(\) before you search"):
        search.search_ids(["one two"], 3)
    search.unpark()
    check_same(search.search_ids(["one two"], 3), wanted)
    held_by_a_cpu = DenseSearch(encoder, HostRows([(0, vectors)]))
    held_by_a_cpu.park()
    check_same(held_by_a_cpu.search_ids(["one two"], 3), wanted)


class ParkableEncoder(HashingEncoder):
    """Stands for an encoder with weights on a GPU."""

    def __init__(self, dimension: int) -> None:
        super().__init__(dimension)
        self.is_parked = False

    def park(self) -> None:
        self.is_parked = True

    def unpark(self) -> None:
        self.is_parked = False


def test_an_encoder_is_parked_with_the_rows_or_neither(monkeypatch):
    encoder = ParkableEncoder(64)
    encoder.count([["one two three"]])
    rows = DeviceRows([(0, np.tile(ROWS, (1, 4)))], "cpu")
    search = DenseSearch(encoder, rows)
    wanted = search.search_ids(["one two"], 3)
    search.park()
    assert encoder.is_parked and rows.is_parked
    with pytest.raises(RetrievalParked):
        search.search_ids(["one"], 3)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(search.prepare, ["one two"])  # a batcher's thread, which has not noticed the parking
        with pytest.raises(TimeoutError):
            early.result(0.05)
        search.unpark()
        assert (early.result(30) == encoder.encode_queries(["one two"])).all()
    assert not encoder.is_parked and not rows.is_parked
    check_same(search.search_ids(["one two"], 3), wanted)

    def refuse():
        raise ValueError("could not be page-locked")

    monkeypatch.setattr(rows, "park", refuse)
    with pytest.raises(ValueError, match="page-locked"):
        search.park()
    assert not search.is_parked and not encoder.is_parked
    check_same(search.search_ids(["one two"], 3), wanted)
    beside_a_cpu_s_rows = DenseSearch(encoder, HostRows([(0, np.tile(ROWS, (1, 4)))]))
    beside_a_cpu_s_rows.park()
    assert encoder.is_parked and beside_a_cpu_s_rows.is_parked
    beside_a_cpu_s_rows.unpark()


def test_a_batcher_refuses_searches_while_it_is_parked_and_goes_on_after():
    backend = ParkableBackend()
    with BatchedRetriever(backend, Rows()) as retriever:
        retriever.search(["1"], 2)
        retriever.park()
        retriever.park()
        for search in (retriever.search, retriever.search_ids):
            with pytest.raises(RetrievalParked):
                search(["1"], 2)  # whether or not it is in the cache
        for search in (retriever.search_async, retriever.search_ids_async):
            with pytest.raises(RetrievalParked):
                asyncio.run(search(["2"], 2))
        retriever.unpark()
        retriever.unpark()
        assert ids_of(retriever.search(["2"], 2)) == [[20, 21]]
    assert backend.calls == ["park", "unpark"]
    assert issubclass(RetrievalParked, RetrievalError)


def test_a_batcher_parks_when_what_is_under_way_has_ended(pool):
    backend = ParkableBackend()
    with BatchedRetriever(backend, Rows()) as retriever:
        backend.hold()
        searches = [pool.submit(retriever.search, [str(number)], 1) for number in range(3)]
        eventually(lambda: retriever.statistics()["num_searches"] == 3)
        parked = pool.submit(retriever.park)
        eventually(lambda: retriever.is_parked)
        assert backend.calls == [] and not parked.done()
        with pytest.raises(RetrievalParked):
            retriever.search(["9"], 1)
        backend.let_go()
        parked.result(PATIENCE)
        assert [ids_of(search.result(PATIENCE)) for search in searches] == [[[0]], [[10]], [[20]]]
    assert backend.calls == ["park"]


def test_what_is_under_way_too_long_is_not_parked(pool):
    backend = ParkableBackend()
    with BatchedRetriever(backend, Rows(), timeout=0.05) as retriever:
        backend.hold()
        search = pool.submit(retriever.search, ["1"], 1, PATIENCE)
        assert backend.entered.acquire(timeout=PATIENCE)
        with pytest.raises(RetrievalTimeout, match=r"under way for 0\.05 s, so the index was not parked"):
            retriever.park()
        assert not retriever.is_parked and backend.calls == []
        backend.let_go()
        assert ids_of(search.result(PATIENCE)) == [[10]]


def test_a_backend_without_memory_of_its_own_is_searched_on(make):
    retriever = make()
    retriever.park()
    assert not retriever.is_parked
    assert ids_of(retriever.search(["1"], 1)) == [[10]]
    retriever.unpark()
