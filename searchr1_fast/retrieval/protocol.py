"""What every retriever is: queries in, passages out, best first. And the one error a failed search raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from searchr1_fast.types import Passage


class RetrievalError(RuntimeError):
    """A search that failed for good: what was asked of whom, how often, and the last cause, in one sentence."""


class RetrievalTimeout(RetrievalError):
    """A search whose deadline passed. What was found by then is not returned: it would change the reward."""


class Retriever(Protocol):
    """Safe to call from several threads at once."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """For each query at most `k` passages, best first; fewer where fewer were found, never invented ones.

        Raises RetrievalError when the search failed: an empty list means that nothing was found.
        """
        ...


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
