"""What every retriever is: queries in, passages out, best first. And the one error a failed search raises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from searchr1_fast.retrieval.statistics import SearchStatistics
from searchr1_fast.types import Passage, SearchError

# Of a search over vectors. `exact`: every row is compared. `exact_certified`: 8-bit codes propose, a bound on their
# error proves that no other row is better, and what is not proven is compared: results are the same.
# `approximate`: neither.
Mode = Literal["exact", "exact_certified", "approximate"]


class RetrievalError(SearchError):
    """A search that failed for good: what was asked of whom, how often, and the last cause, in one sentence."""


class RetrievalTimeout(RetrievalError):
    """A search whose deadline passed. What was found by then is not returned: it would change the reward."""


class RetrievalParked(RetrievalError):
    """A search of an index whose GPU memory was given to others. It is refused: to wait would be to hang, where nobody
    else is there to take the memory back."""

    def __init__(self) -> None:
        super().__init__("the index is parked: its GPU memory is others' for now; call unpark() before you search")


class Retriever(Protocol):
    """Safe to call from several threads at once."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """For each query at most `k` passages, best first; fewer where fewer were found, never invented ones.

        Raises RetrievalError when the search failed: an empty list means that nothing was found.
        """
        ...


@runtime_checkable
class Counts(Protocol):
    """A retriever that knows more of its searches than who calls it."""

    def take_statistics(self) -> SearchStatistics:
        """Since they were last taken."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """A retriever whose results can be kept beside a checkpoint."""

    identity: str
    """What is searched, by what; a file of another identity is refused. Empty: it cannot be told from others."""

    def save_cache(self, path: str | Path) -> None: ...

    def load_cache(self, path: str | Path) -> int: ...


@runtime_checkable
class Parks(Protocol):
    """A retriever, or what is below one, whose GPU memory others can have for a time. Both do nothing where it was
    done, and are called by one thread."""

    @property
    def is_parked(self) -> bool: ...
    def park(self) -> None: ...
    def unpark(self) -> None: ...


@runtime_checkable
class Closes(Protocol):
    """A retriever with threads to end."""

    def close(self) -> object: ...


def innermost(retriever: Retriever) -> Retriever:
    """The retriever that searches, below those that only change what it found."""
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
    """Every retriever refuses the same nonsense in the same words."""
    if k < 1:
        raise ValueError(f"k is the number of passages a query gets; it must be at least 1, not {k}")
