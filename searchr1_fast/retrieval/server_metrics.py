"""The server's counters, and their page for Prometheus (text exposition format 0.0.4).

Only the event loop's thread counts, so there is no lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last: above every bound
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum!r}"
        yield f"{name}_count {total}"


class ServerMetrics:
    """Counts since the server was made."""

    def __init__(self) -> None:
        self._requests: Counter[int] = Counter()  # by status
        self._queries = 0
        self._waiting = 0
        self._seconds = _Histogram(_SECONDS)
        self._batch_rows = _Histogram(_ROWS)

    def request(self, status: int, num_queries: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests[status] += 1
        self._queries += num_queries
        self._seconds.add(seconds)

    def batch(self, num_queries: int) -> None:
        """Count a batch of queries searched together."""
        self._batch_rows.add(num_queries)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a request as waiting for its search."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def render(self, retriever: Mapping[str, Any]) -> str:
        """The page. `retriever`: the retriever's own numbers, such as the batcher's statistics."""
        lines = ["# HELP searchr1_requests_total Answered POST /retrieve, by status.",
                 "# TYPE searchr1_requests_total counter"]  # fmt: skip
        for status, count in sorted(self._requests.items()):
            lines.append(f'searchr1_requests_total{{status="{status}"}} {count}')
        lines += _single("queries_total", "counter", "Queries in them.", self._queries)
        lines += _single("requests_waiting", "gauge", "Requests whose search is under way.", self._waiting)
        lines += ["# HELP searchr1_request_seconds From the request's headers to its answer.",
                  "# TYPE searchr1_request_seconds histogram", *self._seconds.lines("searchr1_request_seconds"),
                  "# HELP searchr1_batch_rows Different queries searched together by the server's own batching.",
                  "# TYPE searchr1_batch_rows histogram", *self._batch_rows.lines("searchr1_batch_rows")]  # fmt: skip
        for name, value in sorted(_numbers(retriever)):
            lines += _single(f"retriever_{name}", "untyped", "Of the retriever's statistics.", value)
        return "\n".join(lines) + "\n"


def _single(name: str, kind: str, text: str, value: float) -> list[str]:
    return [f"# HELP searchr1_{name} {text}", f"# TYPE searchr1_{name} {kind}", f"searchr1_{name} {value}"]


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers by name, those of nested mappings by joined names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}_{inner}", number) for inner, number in _numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
