"""A retriever that misses now and then: for a share of the queries it leaves out the best passage.

Which queries miss depends on their text and a seed alone, not on the batch, the step or the process. So the same query
misses every time, and a policy can learn to ask again in other words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from searchr1_fast.retrieval.protocol import Retriever, check_k
from searchr1_fast.types import Passage


class MissingRetriever:
    """Drops the best passage for a share `rate` of the queries, which get the next `k` instead."""

    def __init__(self, inner: Retriever, rate: float, seed: int = 0) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"the rate of misses is a share between 0 and 1, not {rate}")
        self.inner = inner
        self._rate = rate
        self._seed = seed

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """`k` passages as the inner retriever gives them, without the best where the query misses."""
        check_k(k)
        missed = [self.misses(query) for query in queries]
        # Two calls, so that a query that does not miss gets exactly what it would get without this wrapper.
        kept = [query for query, miss in zip(queries, missed, strict=True) if not miss]
        dropped = [query for query, miss in zip(queries, missed, strict=True) if miss]
        whole = iter(self.inner.search(kept, k) if kept else [])
        beheaded = iter(self.inner.search(dropped, k + 1) if dropped else [])
        return [next(beheaded)[1:] if miss else next(whole) for miss in missed]

    def misses(self, query: str) -> bool:
        """Whether this query loses its best passage."""
        digest = hashlib.blake2b(f"{self._seed}\n{query}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._rate * 2**64
