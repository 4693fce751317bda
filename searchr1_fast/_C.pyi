"""The C++ extension (csrc/), as Python sees it. Q queries, k hits of each, R rows, S shards."""

from asyncio import AbstractEventLoop
from collections.abc import Generator, Sequence
from enum import Enum
from typing import Any

import numpy as np

class UsedAfterFork(RuntimeError): ...

class Outcome(Enum):
    PENDING = ...
    DONE = ...
    FAILED = ...
    EXPIRED = ...
    CANCELLED = ...

class Ticket:
    """One search. Dropped while it is pending, it is cancelled."""

    @property
    def id(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def outcome(self) -> Outcome: ...
    @property
    def is_pending(self) -> bool: ...
    @property
    def is_done(self) -> bool: ...
    @property
    def error(self) -> str: ...
    def __len__(self) -> int: ...
    def wait(self) -> Outcome: ...
    def cancel(self) -> None: ...
    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """scores [Q,k] fp32, ids [Q,k] int64; -inf and -1 where there were fewer hits."""

class Batch:
    """Different queries to search together. Dropped without an answer, it fails every search."""

    @property
    def depth(self) -> int:
        """Hits to search for."""
    @property
    def queries(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def complete(self, scores: np.ndarray, ids: np.ndarray) -> None:
        """scores [Q,k'] fp32, descending, ids [Q,k'] int64, -1 after the last hit of a row; k' <= depth."""

class Batcher:
    def __init__(
        self,
        *,
        max_batch_rows: int,
        max_batch_bytes: int,
        max_pending_bytes: int,
        max_cache_bytes: int,
        min_depth: int,
        max_batches_in_flight: int,
        identity: str,
    ) -> None: ...
    def submit(self, queries: Sequence[str], k: int, timeout: float | None = None) -> Ticket:
        """Blocks until there is room. `timeout` in seconds."""
    def take(self) -> Batch | None:
        """The next batch, when there is one; None: closed, or the backend failed."""
    def fail(self, error: str) -> None:
        """The backend's error: every search, pending or later, fails with it. Nothing where it is over already."""
    def close(self) -> None: ...
    def statistics(self, reset: bool = False) -> dict[str, Any]: ...
    def save_cache(self, path: str) -> None: ...
    def load_cache(self, path: str) -> int: ...

class Listener:
    """The searches of one event loop, and what it watches: readable while some of them have settled."""

    def __init__(self, batcher: Batcher) -> None: ...
    def fileno(self) -> int: ...
    def search(
        self, loop: AbstractEventLoop, queries: Sequence[str], k: int, timeout: float | None = None
    ) -> Ticket | AwaitedSearch:
        """Never blocks. The ticket if it is settled already, else what a coroutine of the loop awaits."""
    def drain(
        self,
    ) -> tuple[list[tuple[list[AwaitedSearch], list[int], np.ndarray, np.ndarray]], list[tuple[AwaitedSearch, Ticket]]]:
        """What settled since the last call: (found, others).

        found: (searches, ends, scores [R,k] fp32, ids [R,k] int64) for each k; the rows of searches[i] end at ends[i].
        others: (search, ticket) of those that have no result.
        """

class AwaitedSearch:
    """A search that one task awaits. What a task wants of a future it has; a future's other methods it has not."""

    def __await__(self) -> Generator[Any, None, Any]: ...
    def cancel(self, msg: object = None) -> bool: ...
    def cancelled(self) -> bool: ...
    def done(self) -> bool: ...
    def result(self) -> Any: ...
    def set_exception(self, error: BaseException) -> None:
        """The task goes on with it in the loop's next turn. Nothing where it is settled already."""

def deliver(searches: list[AwaitedSearch], ends: list[int], found: Sequence[Any] | tuple[Sequence[Any], ...]) -> None:
    """Rows ends[i-1] to ends[i] of `found`, or of each in a tuple, are what searches[i] found, and its task goes on at
    once: to be called by the loop, not by a task. Those that are settled already, cancelled ones, are passed over."""

class PassageStore:
    def __init__(
        self, contents: str, contents_offsets: str, ids: str | None = None, ids_offsets: str | None = None
    ) -> None: ...
    def __len__(self) -> int: ...
    def gather(self, rows: np.ndarray) -> list[tuple[str, str, str]]:
        """rows [R] int64 -> (id, title, text) of each."""

def merge_topk(scores: list[np.ndarray], ids: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """S arrays [Q,k_s] each -> scores [Q,k] fp32, ids [Q,k] int64: score descending, then id ascending."""
