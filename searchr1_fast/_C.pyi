"""The C++ extension (csrc/) as seen from Python. Q queries, k hits of each, R rows, S shards."""

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
    """One search. Dropping it while it is pending cancels it."""

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
        """scores [Q,k] fp32, ids [Q,k] int64; where a query has fewer hits, the rest is -inf and -1."""

class Batch:
    """Distinct queries to search together. Dropping it without an answer fails every search."""

    @property
    def depth(self) -> int:
        """Hits to search for."""
    @property
    def queries(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def complete(self, scores: np.ndarray, ids: np.ndarray) -> None:
        """Answer with scores [Q,k'] fp32, descending, and ids [Q,k'] int64, -1 after a row's last hit; k' <= depth."""

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
        """Submit a search; blocks until there is room. `timeout` in seconds."""
    def take(self) -> Batch | None:
        """Wait for the next batch. None: closed, or the backend failed."""
    def fail(self, error: str) -> None:
        """Fail every search, pending or later, with the backend's error. Does nothing once closed or failed."""
    def close(self) -> None: ...
    def statistics(self, reset: bool = False) -> dict[str, Any]: ...
    def save_cache(self, path: str) -> None: ...
    def load_cache(self, path: str) -> int: ...

class Listener:
    """The searches of one event loop, and the descriptor it watches, readable while settled ones are to be drained."""

    def __init__(self, batcher: Batcher) -> None: ...
    def fileno(self) -> int: ...
    def search(
        self, loop: AbstractEventLoop, queries: Sequence[str], k: int, timeout: float | None = None
    ) -> Ticket | AwaitedSearch:
        """Submit a search, without blocking. The ticket if it is settled already, else what a coroutine awaits."""
    def drain(
        self,
    ) -> tuple[list[tuple[list[AwaitedSearch], list[int], np.ndarray, np.ndarray]], list[tuple[AwaitedSearch, Ticket]]]:
        """What settled since the last call: (found, others).

        found: (searches, ends, scores [R,k] fp32, ids [R,k] int64) for each k; the rows of searches[i] end at ends[i].
        others: (search, ticket) of those that have no result.
        """

class AwaitedSearch:
    """A search that one task awaits. It has what a task needs of a future, and none of a future's other methods."""

    def __await__(self) -> Generator[Any, None, Any]: ...
    def cancel(self, msg: object = None) -> bool: ...
    def cancelled(self) -> bool: ...
    def done(self) -> bool: ...
    def result(self) -> Any: ...
    def set_exception(self, error: BaseException) -> None:
        """Resume the task with `error` in the loop's next turn. Does nothing if the search is settled already."""

def deliver(searches: list[AwaitedSearch], ends: list[int], found: Sequence[Any] | tuple[Sequence[Any], ...]) -> None:
    """Complete searches[i] with rows ends[i-1] to ends[i] of `found`, or of each in a tuple, and resume its task at
    once. For the loop to call, not a task. Searches that are settled already (cancelled ones) are skipped."""

class PassageStore:
    def __init__(
        self, contents: str, contents_offsets: str, ids: str | None = None, ids_offsets: str | None = None
    ) -> None: ...
    def __len__(self) -> int: ...
    def gather(self, rows: np.ndarray) -> list[tuple[str, str, str]]:
        """rows [R] int64 -> (id, title, text) of each."""

def merge_topk(scores: list[np.ndarray], ids: list[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """S arrays [Q,k_s] each -> scores [Q,k] fp32, ids [Q,k] int64: score descending, then id ascending."""
