"""Send bursts of searches through the batcher, to a backend that takes 2 ms per batch, whatever is in it.

It is a closed loop: a number of callers at once, each of which searches again as soon as it has its result, as a
rollout does with its retriever. Every result is checked; a wrong one counts as a failure, and an exception ends the
benchmark.

The callers are coroutines, threads, or one caller with a list (as the rollout's own loop searches). The plain twin is
what published search servers do: one query per request, one request at a time behind a lock.

Queries come in groups, as the samples of a question do, and a share of them is equal within the group. No query comes
back in a later round, so here the cache is only a cost. Among many coroutines only every eighth is timed: reading the
clock twice took more than a microsecond where this was first measured, a tenth of what a search costs.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import harness
import numpy as np

from searchr1_fast.retrieval.batcher import BatchedRetriever

K = 3
GROUP = 5  # samples of a question
BACKEND_SECONDS = 0.002
MANY, EVERY = 256, 8  # from MANY coroutines on, one of EVERY is timed


class FakeBackend:
    """Sleeps, then finds row n for query n."""

    def __init__(self, numbers: dict[str, int]) -> None:
        self._numbers = numbers

    def search_ids(self, queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """-> scores [Q,k] fp32, rows [Q,k] int64."""
        time.sleep(BACKEND_SECONDS)
        first = np.fromiter((self._numbers[query] for query in queries), dtype=np.int64, count=len(queries))
        scores = np.broadcast_to(-np.arange(k, dtype=np.float32), (len(queries), k))
        return scores, first[:, None] + np.arange(k)


class NoPassages:
    """Stands in for passages: this part measures searches, not texts."""

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Any]:
        """Return nothing: no passages are asked for."""
        raise AssertionError("only ids are searched for here")


@dataclass(slots=True)
class Measured:
    """One way of calling at one number of callers."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    num_queries: int = 0
    num_failures: int = 0
    latencies: list[float] = field(default_factory=list)  # seconds, of every search
    statistics: dict[str, Any] = field(default_factory=dict)

    def add(self, started: float, ids: np.ndarray, number: int) -> None:
        """Add a search for query `number` that was started at `started` and ends now; ids [1,k]."""
        self.latencies.append(time.perf_counter() - started)
        self.num_failures += ids.item(0) != number

    def check(self, ids: np.ndarray, number: int) -> None:
        """Check a search that is not timed."""
        self.num_failures += ids.item(0) != number

    def row(self) -> dict[str, Any]:
        """The row that is reported."""
        p50, p99 = np.percentile(self.latencies, [50, 99]) if self.latencies else (float("nan"),) * 2
        row = {
            "queries": self.num_queries,
            "failures": int(self.num_failures),
            "queries_per_second": self.num_queries / self.seconds,
            "cpu_microseconds_per_query": self.cpu_seconds / self.num_queries * 1e6,
            "p50_ms": p50 * 1e3,
            "p99_ms": p99 * 1e3,
        }
        if self.statistics:
            row["unique_fraction"] = self.statistics["unique_fraction"]
            row["batch_rows_mean"] = self.statistics["batch_rows"]["mean"]
        return row


def workload(num_callers: int, num_rounds: int, unique: float, seed: int = 0) -> np.ndarray:
    """-> [rounds, callers] int64: the query of each search. In a group, a share `unique` differs; the others repeat."""
    generator = np.random.default_rng(seed)
    places = np.arange(num_callers)
    leader = places - places % GROUP
    repeats = generator.random((num_rounds, num_callers)) >= unique
    numbers = np.where(repeats & (places > leader), leader, places)
    return numbers + num_callers * np.arange(num_rounds)[:, None]


def text(number: int) -> str:
    """Make a text about as long as a model's query."""
    return f"when was the mayor of township {number} born"


# ------------------------------------------------------------------------------------------------------------ callers


def call_by_coroutines(retriever: BatchedRetriever, queries: np.ndarray, texts: list[str], measured: Measured) -> None:
    """One coroutine per caller, all on one loop."""

    async def timed_caller(own: list[int]) -> None:
        for number in own:
            started = time.perf_counter()
            _, ids = await retriever.search_ids_async([texts[number]], K)
            measured.add(started, ids, number)

    async def caller(own: list[int]) -> None:
        for number in own:
            _, ids = await retriever.search_ids_async([texts[number]], K)
            measured.check(ids, number)

    async def all_callers() -> None:
        every = EVERY if queries.shape[1] >= MANY else 1
        callers = ((caller if place % every else timed_caller)(own) for place, own in enumerate(queries.T.tolist()))
        await asyncio.gather(*callers)

    asyncio.run(all_callers())


def call_by_threads(retriever: BatchedRetriever, queries: np.ndarray, texts: list[str], measured: Measured) -> None:
    """One thread per caller."""
    _in_threads(lambda query: retriever.search_ids([query], K)[1], queries, texts, measured)


def call_with_lists(retriever: BatchedRetriever, queries: np.ndarray, texts: list[str], measured: Measured) -> None:
    """One caller, which searches for all at once."""
    for numbers in queries.tolist():
        started = time.perf_counter()
        _, ids = retriever.search_ids([texts[number] for number in numbers], K)
        measured.latencies += [time.perf_counter() - started] * len(numbers)
        measured.num_failures += int((ids[:, 0] != numbers).sum())


def call_behind_a_lock(backend: FakeBackend, queries: np.ndarray, texts: list[str], measured: Measured) -> None:
    """The plain twin: one query at a time."""
    lock = threading.Lock()

    def search(query: str) -> np.ndarray:
        with lock:
            return backend.search_ids([query], K)[1]

    _in_threads(search, queries, texts, measured)


def _in_threads(search: Callable[[str], np.ndarray], queries: np.ndarray, texts: list[str], measured: Measured) -> None:
    def caller(own: list[int]) -> None:
        for number in own:
            started = time.perf_counter()
            measured.add(started, search(texts[number]), number)

    with ThreadPoolExecutor(queries.shape[1]) as pool:
        for future in [pool.submit(caller, own) for own in queries.T.tolist()]:
            future.result()


WAYS = {
    "coroutines": call_by_coroutines,
    "threads": call_by_threads,
    "one list": call_with_lists,
    "behind a lock": call_behind_a_lock,
}
MOST_THREADS = 256


def measure(way: str, num_callers: int, num_rounds: int, unique: float) -> Measured:
    """Measure one run, with a batcher of its own."""
    queries = workload(num_callers, num_rounds, unique)
    texts = [text(number) for number in range(num_callers * num_rounds)]
    backend = FakeBackend({query: number for number, query in enumerate(texts)})
    measured = Measured(num_queries=queries.size)
    if way == "behind a lock":
        _timed(lambda: call_behind_a_lock(backend, queries, texts, measured), measured)
        return measured
    with BatchedRetriever(backend, NoPassages(), max_batch_rows=4096, max_batch_bytes=2**22) as retriever:
        _timed(lambda: WAYS[way](retriever, queries, texts, measured), measured)
        measured.statistics = retriever.statistics()
    return measured


def _timed(run: Callable[[], None], measured: Measured) -> None:
    gc.freeze()  # the collector need not walk over a hundred thousand waiting texts
    started, cpu_started = time.perf_counter(), time.process_time()
    run()
    measured.seconds = time.perf_counter() - started
    measured.cpu_seconds = time.process_time() - cpu_started
    gc.unfreeze()


def measure_all(
    concurrencies: Sequence[int], num_queries: int, unique: float, repetitions: int
) -> list[dict[str, Any]]:
    """Make a row per way and number of callers: the median of the repetitions, and the failures of all together."""
    cases = []
    for callers in concurrencies:
        for way in WAYS:
            if way in ("coroutines", "one list") or callers <= MOST_THREADS:
                cases.append((way, callers))
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for _, (way, callers) in harness.interleaved(cases, repetitions):
        # The lock takes 2 ms a query, and a single caller 2 ms a round, so they get fewer queries.
        wanted = num_queries if way != "behind a lock" else num_queries // 200
        num_rounds = max(2, min(wanted // callers, 200))
        rows[way, callers].append(measure(way, callers, num_rounds, unique).row())
    return [
        {"way": way, "callers": callers}
        | harness.medians(rows[way, callers])
        | {"failures": sum(row["failures"] for row in rows[way, callers])}
        for way, callers in cases
    ]
