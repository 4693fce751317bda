"""Lends out device memory for a time, keeping its contents in page-locked host memory.

    memory = ParkedMemory(kept, scratch, device, stream)
    memory.park()      # nothing may read the tensors from here …
    memory.unpark()    # … to here; kernels on the stream may be queued at once, and find what was there

The tensor objects survive: the memory under them is taken away and given back (`UntypedStorage.resize_`), perhaps at
other addresses, so whatever was recorded with the old ones (CUDA graphs) must be recorded again. What is `kept` never
changes, so it is copied to the host only the first time; after that, its memory is only freed, and copied back.
`scratch` holds nothing between its uses, and is not copied.

Parking returns the memory to the driver, with all that torch's allocator held unused: memory freed on one stream would
otherwise serve that stream alone. Addresses are not kept: that would take memory that torch's allocator does not know
of (CUDA's virtual memory), only to save recording again, and a search is a small recording, of ten kernels.

On a CPU the same code copies from host to host, for tests; there memory is overwritten instead of freed, because torch
does not let go of memory that numpy has seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from searchr1_fast.host_memory import host_memory
from searchr1_fast.retrieval.streams import on_stream

SETTING = "retrieval.park_during_update"


@dataclass(slots=True)
class ParkingTimes:
    """The time that parking has taken so far. Copies back run asynchronously, and are in no number here."""

    num_parks: int = 0
    num_unparks: int = 0
    park_seconds: float = 0.0  # the first park includes the copy to the host
    unpark_seconds: float = 0.0  # until the copies back were queued, and searches recorded


class ParkedMemory:
    """Storages that leave a device together. Not safe to call from several threads: the owner holds a lock."""

    def __init__(
        self,
        kept: Iterable[torch.Tensor],
        scratch: Iterable[torch.Tensor],
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """`stream`: where everything that reads or writes the tensors is queued; None means the stream that is current
        at each call. On a CPU there is none."""
        self._kept, self._scratch = _storages(kept), _storages(scratch)
        assert not self._kept.keys() & self._scratch.keys(), "what is kept is no scratch"
        self._device, self._stream = device, stream
        self._host: torch.Tensor | None = None  # [bytes] uint8: a copy of what is kept
        self._away: list[tuple[torch.UntypedStorage, int]] = []  # with their bytes
        self.is_parked = False  # parked, and not unparked since
        self.times = ParkingTimes()

    @property
    def nbytes(self) -> int:
        """The bytes that parking frees, or has freed."""
        if self.is_parked:
            return sum(num_bytes for _, num_bytes in self._away)
        return sum(storage.nbytes() for storage in self._all())

    @torch.no_grad()
    def park(self) -> None:
        """Free the memory, after waiting for what is queued on the stream. Does nothing if parked already. ValueError,
        before anything has changed, if the machine does not lock that much host memory."""
        if self.is_parked:
            return
        started = time.perf_counter()
        with on_stream(self._stream):
            if self._host is None:
                self._host = host_memory(self._kept_bytes(), self._device, SETTING)
                for storage, part in zip(self._kept.values(), self._parts(), strict=True):
                    part.copy_(_bytes_of(storage), non_blocking=True)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            self._away = [(storage, storage.nbytes()) for storage in self._all()]
            for storage, _ in self._away:
                self._let_go(storage)
        self.is_parked = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.times.num_parks += 1
        self.times.park_seconds += time.perf_counter() - started

    @torch.no_grad()
    def unpark(self) -> None:
        """Allocate the memory again, and queue the copies back. Does nothing if not parked. If the device does not have
        that much (torch.OutOfMemoryError), everything stays parked."""
        if not self.is_parked:
            return
        started = time.perf_counter()
        with on_stream(self._stream):
            try:
                for storage, num_bytes in self._away:
                    if storage.nbytes() != num_bytes:
                        storage.resize_(num_bytes)
            except RuntimeError:
                for storage, _ in self._away:
                    self._let_go(storage)
                raise
            self._away, self.is_parked = [], False
            for storage, part in zip(self._kept.values(), self._parts(), strict=True):
                _bytes_of(storage).copy_(part, non_blocking=True)
        self.times.num_unparks += 1
        self.times.unpark_seconds += time.perf_counter() - started

    def _let_go(self, storage: torch.UntypedStorage) -> None:
        if self._device.type == "cuda":
            storage.resize_(0)
        else:
            _bytes_of(storage).fill_(0xFF)

    def _all(self) -> list[torch.UntypedStorage]:
        return [*self._kept.values(), *self._scratch.values()]

    def _kept_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())

    def _parts(self) -> tuple[torch.Tensor, ...]:
        """The host's copy in parts, one for each kept storage. Call only while the memory is there."""
        assert self._host is not None
        return self._host.split([storage.nbytes() for storage in self._kept.values()])


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages of the tensors by address, each once, without empty ones."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:  # [bytes] uint8
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
