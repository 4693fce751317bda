"""Pinned memory for copies to a device: a ring of buffers for large ones, a single growing buffer for small ones.

A copy from pageable memory, such as a memory map, makes CUDA stage it piece by piece while the host waits; a copy from
pinned memory runs asynchronously. So the host fills one buffer of the ring while the device empties the other, on a
stream of its own. Nothing on the training stream waits, and never more than the ring is in memory twice.

There is no CUDA C++ here: the driver copies, and a kernel that copied would only displace others.

On a CPU the same ring runs with synchronous copies: the twin that tests use.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from searchr1_fast.retrieval.streams import on_stream

RING_BYTES = 2**26  # of one buffer: some milliseconds of PCIe, so that starting a copy costs nothing beside it
NUM_BUFFERS = 2


class Copies(Protocol):
    """How a device copies."""

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Host memory that copies start from, [num_bytes] uint8."""
        ...

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begin to copy from one of these buffers, or a part of it; returns the handle for `wait`."""
        ...

    def wait(self, handle: Any) -> None:
        """Wait until that copy is done."""
        ...

    def finish(self) -> None:
        """Wait until everything queued where copies are queued is done, copies or not."""
        ...


class CpuCopies:
    """Copies synchronously."""

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def wait(self, handle: None) -> None:
        """Do nothing: the copy is done."""

    def finish(self) -> None:
        """Do nothing, likewise."""


class CudaCopies:
    """Copies from pinned memory, on a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, pinned."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        """Queue the copy."""
        with on_stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, handle: torch.cuda.Event) -> None:
        """Wait without the GIL, which an event's `synchronize` releases."""
        handle.synchronize()

    def finish(self) -> None:
        """Wait without the GIL, likewise."""
        self._stream.synchronize()


def copies_of(device: torch.device, stream: torch.cuda.Stream | None = None) -> Copies:
    """The `Copies` of a device; `stream`: where they are queued on a GPU, None for a new one."""
    if device.type == "cpu":
        return CpuCopies()
    return CudaCopies(torch.cuda.Stream(device) if stream is None else stream)


class StagingRing:
    """Copies host arrays to device tensors through pinned buffers, used in turn."""

    def __init__(self, copies: Copies, num_bytes: int = RING_BYTES, num_buffers: int = NUM_BUFFERS) -> None:
        if num_bytes < 1 or num_buffers < 1:
            raise ValueError(f"a ring needs buffers, and bytes in them; got {num_buffers} of {num_bytes} bytes")
        self._copies = copies
        self._buffers = [copies.buffer(num_bytes) for _ in range(num_buffers)]
        self._handles: list[Any] = [None] * num_buffers  # of the copy that reads each buffer
        self._next = 0

    def upload(self, source: np.ndarray, target: torch.Tensor) -> None:
        """Copy `source` into `target`, both contiguous, of as many bytes. `flush` waits until all has arrived."""
        if not source.flags.c_contiguous or not target.is_contiguous():
            raise ValueError("upload: source and target must be contiguous")
        if source.nbytes != target.nbytes:
            raise ValueError(f"upload: the source has {source.nbytes} bytes, the target {target.nbytes}")
        if source.nbytes == 0:
            return
        origin = source.reshape(-1).view(np.uint8)
        end = target.view(-1).view(torch.uint8)
        step = self._buffers[0].nbytes
        for begin in range(0, len(origin), step):
            part = origin[begin : begin + step]
            buffer = self._free_buffer()
            np.copyto(buffer.numpy()[: len(part)], part)  # the disk is read here, without the GIL
            self._started(self._copies.start(end[begin : begin + len(part)], buffer[: len(part)]))

    def flush(self) -> None:
        """Wait until every upload has arrived."""
        for number, handle in enumerate(self._handles):
            if handle is not None:
                self._copies.wait(handle)
                self._handles[number] = None

    def _free_buffer(self) -> torch.Tensor:
        handle = self._handles[self._next]
        if handle is not None:
            self._copies.wait(handle)
        return self._buffers[self._next]

    def _started(self, handle: Any) -> None:
        self._handles[self._next] = handle
        self._next = (self._next + 1) % len(self._buffers)


class HostBuffer:
    """Pinned memory that is reused and grows: pinning memory stops the whole device for a while."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._bytes = copies.buffer(0)

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in this memory, which the next call overwrites."""
        size = int(np.prod(shape)) * dtype.itemsize
        if size > self._bytes.nbytes:
            self._bytes = self._copies.buffer(2 * size)
        return self._bytes[:size].view(dtype).view(shape)
