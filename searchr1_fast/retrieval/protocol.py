"""The interface of every retriever (queries in, passages out, best first) and the error that a failed search raises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from searchr1_fast.retrieval.statistics import SearchStatistics
from searchr1_fast.types import Passage, SearchError

# How a search over vectors finds its rows. `exact`: every row is compared. `exact_certified`: 8-bit codes propose rows,
# a bound on the codes' error proves that no other row is better, and rows without such a proof are compared: the
# results are those of `exact`. `approximate`: neither.
Mode = Literal["exact", "exact_certified", "approximate"]


class RetrievalError(SearchError):
    """A search that failed for good; one sentence says what was asked of whom, how often, and the last cause."""


class RetrievalTimeout(RetrievalError):
    """A search that missed its deadline. What it had found by then is not returned: it would change the reward."""


class RetrievalParked(RetrievalError):
    """A search of an index whose GPU memory has been lent to others. It is refused rather than left waiting: where
    nobody else is there to take the memory back, waiting would hang."""

    def __init__(self) -> None:
        super().__init__("the index is parked: its GPU memory is others' for now; call unpark() before you search")


class Retriever(Protocol):
    """Finds passages for queries. Safe to call from several threads at once."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Find at most `k` passages for each query, best first; fewer where fewer were found, never made-up ones.

        Raises RetrievalError if the search failed, so an empty list means that nothing was found.
        """
        ...


@runtime_checkable
class Counts(Protocol):
    """A retriever that knows more about its searches than its caller does."""

    def take_statistics(self) -> SearchStatistics:
        """The statistics since they were last taken."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """A retriever whose results can be saved beside a checkpoint."""

    identity: str
    """What is searched, by what; a file of another identity is refused. Empty: it cannot be told from others."""

    def save_cache(self, path: str | Path) -> None: ...

    def load_cache(self, path: str | Path) -> int: ...


@runtime_checkable
class Parks(Protocol):
    """A retriever, or a part of one, whose GPU memory can be lent to others for a time. `park` and `unpark` do nothing
    the second time, and are called by one thread."""

    @property
    def is_parked(self) -> bool: ...
    def park(self) -> None: ...
    def unpark(self) -> None: ...


@runtime_checkable
class Closes(Protocol):
    """A retriever with threads that must be ended."""

    def close(self) -> object: ...


def innermost(retriever: Retriever) -> Retriever:
    """The retriever that searches, beneath any wrappers that only change what it found."""
    while (inner := getattr(retriever, "inner", None)) is not None:
        retriever = inner
    return retriever


class NullRetriever:
    """Finds nothing: the ablation without a search engine."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """An empty list for every query."""
        check_k(k)
        return [[] for _ in queries]


def check_k(k: int) -> None:
    """Raise ValueError if `k` is below 1, in the same words for every retriever."""
    if k < 1:
        raise ValueError(f"k is the number of passages a query gets; it must be at least 1, not {k}")
