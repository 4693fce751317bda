"""What searches cost in a training step: how many there were, how many were repeats, how long callers waited.

Counted where the trainer calls (`environment.py`), so that every backend has them; a retriever that batches adds what
it alone knows. Those of several ranks add up, and percentiles are over all waits of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np


@dataclass(slots=True)
class SearchStatistics:
    """Counts since they were last taken."""

    queries: int = 0  # asked for
    unique: int = 0  # that had to be searched: neither a copy of one in flight nor in the cache
    cache_hits: int = 0
    batches: int = 0  # calls of the backend
    batch_rows: int = 0  # different queries in them
    timeouts: int = 0  # searches that passed their deadline
    retries: int = 0  # attempts after the first
    failures: int = 0  # searches that ended in an error
    page_failures: int = 0  # web pages that could not be read; their snippets stand in
    waits: list[tuple[float, int]] = field(default_factory=list)  # (seconds, queries) of every search

    def __add__(self, other: SearchStatistics) -> SearchStatistics:
        return SearchStatistics(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def row(self) -> dict[str, float | None]:
        """As keys of metrics.jsonl; a mean of nothing is None."""
        counts = ("queries", "unique", "cache_hits", "batches", "timeouts", "retries", "failures", "page_failures")
        row: dict[str, float | None] = {f"search/{name}": getattr(self, name) for name in counts}
        row["search/batch_rows_mean"] = self.batch_rows / self.batches if self.batches else None
        for percent in (50, 99):
            row[f"search/wait_p{percent}"] = percentile(self.waits, percent)
        return row


def percentile(waits: Iterable[tuple[float, int]], percent: float) -> float | None:
    """The seconds that `percent` of the queries did not exceed; waits: (seconds, queries). None if there were none."""
    ordered = sorted(waits)
    ends = np.cumsum([count for _, count in ordered])
    if not ordered or not ends[-1]:
        return None
    return ordered[int(np.searchsorted(ends, percent / 100 * ends[-1]))][0]
