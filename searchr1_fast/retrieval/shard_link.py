"""How the ranks of one machine reach one another: a socket from each rank to each, and shared memory.

Queries are large and go to every rank: the rank that asks writes them once into shared memory, where the others read
them. Everything else is small and goes through Unix sockets: the request (16 bytes) and the hits (12 bytes each). A
socket wakes its reader without polling, holds any number of hits, and closes by itself however a process ends; a lock
or a counter in shared memory does none of this.

The training's collectives are used once, to exchange addresses. Afterwards ranks need not act in step.

The shared memory is a file without a name, passed through the sockets, so nothing is left over when a process is
killed. Left out: other machines. Every machine holds the whole index.
"""

from __future__ import annotations

import array
import mmap
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from searchr1_fast.retrieval.protocol import RetrievalError

_HELLO_BYTES = 8
_LONGEST_FOLDER = 70  # a socket's path may have about 100 characters


class Peers(Protocol):
    """All ranks of a run, in the form of `distributed.Ranks`."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def gather(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Link:
    """One rank among those of its machine. Lists are by place; a rank is linked with itself as with the others."""

    place: int
    ranks: list[int]
    asks: list[socket.socket]  # this rank sends its requests here
    answers: list[socket.socket]  # and gets the others' requests here
    queries: list[np.ndarray]  # [rows, D] fp32, shared: each rank writes its own

    @property
    def size(self) -> int:
        """How many ranks the machine has."""
        return len(self.ranks)


def meet(peers: Peers, num_queries: int, dimension: int, identity: str, timeout: float) -> Link:
    """Link the ranks of this machine, with room for `num_queries` queries [·, dimension] fp32 each. A collective.

    ValueError, on every rank, if two differ in `identity`: they would search different rows. RetrievalError if a rank
    that gave its address is not heard from again within `timeout` seconds.
    """
    folder = tempfile.mkdtemp(prefix="searchr1-", dir=_temporary_folder())  # nobody else may enter it
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            path = os.path.join(folder, "shard")
            listener.bind(path)
            listener.listen(peers.world_size)
            listener.settimeout(timeout)
            everyone = peers.gather((_machine(), path, identity))
            if len({theirs for _, _, theirs in everyone}) > 1:
                raise ValueError("the ranks have opened different indexes; give all of them the same retrieval.index")
            ranks = [rank for rank, (machine, _, _) in enumerate(everyone) if machine == everyone[peers.rank][0]]
            return _connect(listener, ranks.index(peers.rank), ranks, [everyone[rank][1] for rank in ranks],
                            (num_queries, dimension))  # fmt: skip
    finally:
        shutil.rmtree(folder)


def _connect(listener: socket.socket, place: int, ranks: list[int], paths: list[str], shape: tuple[int, int]) -> Link:
    """Connect to every rank, then accept from every rank. Connecting needs no accept, and hellos fit into buffers, so
    no two live ranks wait for each other."""
    size = 4 * shape[0] * shape[1]
    with _shared_file(size) as file:
        asks = []
        for rank, path in zip(ranks, paths, strict=True):
            asks.append(socket.socket(socket.AF_UNIX))
            handle = array.array("i", [file.fileno()])
            hello = place.to_bytes(_HELLO_BYTES, "little")
            try:
                asks[-1].connect(path)
                asks[-1].sendmsg([hello], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handle)])
            except OSError as error:
                raise RetrievalError(f"rank {rank} ended before it linked up: {error}") from error
    answers: dict[int, socket.socket] = {}
    queries: dict[int, np.ndarray] = {}
    for _ in paths:
        try:
            connection, _ = listener.accept()
        except TimeoutError as error:
            missing = ", ".join(str(rank) for other, rank in enumerate(ranks) if other not in answers)
            raise RetrievalError(
                f"rank {missing} did not link up within {listener.gettimeout():g} s: it is gone, or hangs"
            ) from error
        hello, handles, _, _ = socket.recv_fds(connection, _HELLO_BYTES, 1)
        if not hello:
            missing = ", ".join(str(rank) for other, rank in enumerate(ranks) if other not in (place, *answers))
            raise RetrievalError(f"of rank {missing} one ended while it linked up")
        theirs = int.from_bytes(hello, "little")
        assert len(handles) == 1 and theirs not in answers
        answers[theirs] = connection
        queries[theirs] = np.frombuffer(mmap.mmap(handles[0], size), np.float32).reshape(shape)
        os.close(handles[0])
    places = range(len(paths))
    return Link(place, ranks, asks, [answers[other] for other in places], [queries[other] for other in places])


def _shared_file(size: int) -> IO[bytes]:
    """A file without a name, in memory if the system has that; once closed, it lives on in processes that mapped it."""
    memory = "/dev/shm"
    file = tempfile.TemporaryFile(dir=memory if os.access(memory, os.W_OK) else None)  # noqa: SIM115 (returned)
    if hasattr(os, "posix_fallocate"):  # allocated now: a lack of memory is an error here, not a signal on writing
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)
    return file


def _temporary_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= _LONGEST_FOLDER else "/tmp"


def _machine() -> tuple:
    """Equal for two processes that can reach each other's sockets: one kernel, and one folder for sockets. (Two
    containers on one host may share a kernel, but not the folder.)"""
    boot = Path("/proc/sys/kernel/random/boot_id")
    kernel = boot.read_text().strip() if boot.is_file() else platform.node()
    folder = os.stat(_temporary_folder())
    return kernel, folder.st_dev, folder.st_ino


# -------------------------------------------------------------------------------------------------------- messages


class Incoming:
    """A message with a head of fixed size and a body, read piece by piece as it arrives."""

    def __init__(self, head_bytes: int, room: Callable[[bytes], memoryview]) -> None:
        """`room`: head -> the memory for the whole body."""
        self.head = bytearray(head_bytes)
        self.body: memoryview | None = None
        self._room = room
        self._rest = memoryview(self.head)

    def read(self, source: socket.socket) -> bool:
        """Take what has arrived -> whether the message is complete. ConnectionError if the other side is gone."""
        count = source.recv_into(self._rest)
        if count == 0:
            raise ConnectionResetError("the connection was closed")
        self._rest = self._rest[count:]
        if not self._rest and self.body is None:
            self._rest = self.body = self._room(bytes(self.head))
        return not self._rest
