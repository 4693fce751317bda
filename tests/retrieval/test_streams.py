"""Which device a thread has selected, and on which devices it opens contexts.

Torch's own context managers run over a driver that keeps account. A rank's searches run in threads, and all threads
start with device 0.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")

from searchr1_fast.retrieval.dense import DenseSearch
from searchr1_fast.retrieval.device_rows import DeviceRows
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.recorded_encoder import CudaRecordedForward
from searchr1_fast.retrieval.recorded_search import CudaRecordedSearches
from searchr1_fast.retrieval.rows import HostRows
from searchr1_fast.retrieval.staging import CpuCopies
from searchr1_fast.retrieval.streams import on_stream


class Driver:
    """A stand-in for CUDA: each thread's selected device, and the devices on which the process has a context."""

    def __init__(self, monkeypatch) -> None:
        self.contexts: set[int] = set()
        self.log: list[tuple] = []  # the device and the stream that were current when something was queued
        self._thread = threading.local()
        for name in ("_exchange_device", "_maybe_exchange_device", "current_stream", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "_get_device_index", self._get_device_index)

    def stream(self, device: int | torch.device) -> SimpleNamespace:
        """-> a stream on a device."""
        return SimpleNamespace(device=torch.device("cuda", self._get_device_index(device)), wait_stream=lambda _: None)

    @property
    def device(self) -> int:
        """The selected device of this thread."""
        return getattr(self._thread, "device", 0)

    def select(self, device: int) -> None:
        """Do what cudaSetDevice does."""
        self.contexts.add(device)
        self._thread.device = device

    def queue(self) -> None:
        """Queue a kernel or a copy on the current stream."""
        self.log.append((self.device, self.current_stream()))

    # ---- as torch's C++ does them (c10/cuda/CUDAFunctions.cpp, torch/csrc/cuda/Module.cpp)

    def _get_device_index(self, device, optional=False, allow_cpu=False) -> int:
        if device is None or isinstance(device, int):
            return self.device if device is None else device
        return torch.device(device).index

    def _exchange_device(self, device: int) -> int:
        before = self.device
        if device != before:
            self.select(device)
        return before

    def _maybe_exchange_device(self, device: int) -> int:
        before = self.device
        if device in self.contexts:
            self.select(device)
        self._thread.device = device
        return before

    def current_stream(self, device=None) -> SimpleNamespace:
        device = self._get_device_index(device)
        streams = self._thread.__dict__.setdefault("streams", {})
        return streams.setdefault(device, self.stream(device))

    def set_stream(self, stream) -> None:
        if stream.device.index != self.device:
            self.select(stream.device.index)
        self._thread.__dict__.setdefault("streams", {})[stream.device.index] = stream


@pytest.fixture
def driver(monkeypatch) -> Driver:
    return Driver(monkeypatch)


def in_a_thread(run) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_a_thread_that_leaves_a_stream_opens_no_other_device(driver):
    """With torch's manager it does, which is why we have our own."""
    stream = driver.stream(2)

    def run(manager) -> None:
        with manager(stream):
            driver.queue()
        assert driver.device == 0

    in_a_thread(lambda: run(on_stream))
    assert (driver.contexts, driver.log) == ({2}, [(2, stream)])
    in_a_thread(lambda: run(torch.cuda.stream))
    assert (driver.contexts, driver.log) == ({2, 0}, [(2, stream)] * 2)


def test_the_main_thread_keeps_its_device(driver):
    driver.select(3)
    with on_stream(driver.stream(3)), on_stream(None):
        driver.queue()
    assert driver.device == 3 and driver.contexts == {3} and driver.log[0][0] == 3


def test_a_search_in_a_thread_opens_no_other_device(driver):
    """An encoder's pass, then rows: each on its stream on this rank's device."""
    vectors = np.eye(64, dtype=np.float16)
    encoder = HashingEncoder(64)
    encoder.count([["one two three"]])
    encode = encoder.encode_queries

    def encode_queries(queries):
        driver.queue()
        return encode(queries)

    encoder.encode_queries = encode_queries
    rows = DeviceRows([(0, vectors)], "cpu")
    search = DenseSearch(encoder, rows)
    driver.log.clear()
    search._stream, rows._stream = driver.stream(2), driver.stream(2)
    launch = rows.recorded.launch

    def launch_there(num_queries, k):
        driver.queue()
        launch(num_queries, k)

    rows.recorded.launch = launch_there
    found = []
    in_a_thread(lambda: found.append(search.search_ids(["one two"], 3)))
    assert driver.log == [(2, search._stream), (2, rows._stream)]
    assert driver.contexts == {2}
    expected = HostRows([(0, vectors)]).search(encode(["one two"]), 3)
    for one, other in zip(found[0], expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_encoder_is_recorded_with_its_device_selected(driver, monkeypatch):
    """`torch.cuda.graph` waits for that device, before the next texts are written to where these were staged."""

    @contextmanager
    def graph(recording, *, stream, **options):
        waited.append(driver.device)
        yield

    waited, device = [], torch.device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "Stream", driver.stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("searchr1_fast.retrieval.recorded_encoder.copies_of", lambda device: CpuCopies())
    monkeypatch.setattr(torch, "zeros", lambda *arguments, **options: None)  # on a device that is not there
    recorded = CudaRecordedForward(lambda texts: None, device, 32, 64)
    recorded._record(driver.queue)
    assert waited == [2]
    assert driver.log == [(2, recorded._stream), (2, driver.current_stream(device))]  # the warm-up, the recording
    assert driver.device == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "search"])
def test_what_is_recorded_again_is_recorded_on_its_stream_and_ended_whatever_happens(driver, monkeypatch, kind, fails):
    """Recording runs nothing and waits for nothing: it asks nothing else of `torch.cuda`."""

    class Graph:
        def capture_begin(self, **options):
            driver.log.append((driver.device, driver.current_stream(), options))

        def capture_end(self):
            driver.log.append("end")

        def replay(self):
            driver.log.append("replay")

    def run():
        driver.queue()
        if fails:
            raise torch.OutOfMemoryError("no memory for a pass")
        return "vectors"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    stream, options = driver.stream(2), {"capture_error_mode": "thread_local"}
    if kind == "encoder":
        recorded = CudaRecordedForward.__new__(CudaRecordedForward)
        recorded._stream, recorded._pool, options = stream, "pool", options | {"pool": "pool"}
        around = on_stream(None)
    else:
        recorded, around = CudaRecordedSearches(None, stream), on_stream(stream)
    with around, pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        replay = recorded._record_again(run)
        assert replay() == ("vectors" if kind == "encoder" else None)
    assert driver.log == [(2, stream, options), (2, stream), "end", *([] if fails else ["replay"])]
