"""Measure text in, passages out, over an index of a million passages or more: through the batcher, and beside faiss.

The first part searches as a rollout does: one caller with a list, and coroutines. The second leaves out the encoder and
the passages, and gives the same vectors to faiss' `IndexFlatIP` in the same process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.dense import DenseSearch, open_dense
from searchr1_fast.retrieval.passages import PassageStore

K = 3
BATCHES = (32, 64, 128, 256)
ROUNDS = 64  # searches per caller, at most: each may take a tenth of a second


def end_to_end(
    search: DenseSearch, folder: Path, queries: Sequence[str], callers: Sequence[int], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Make a row per number of callers, as far as there are queries for them, and way of calling. No query comes twice
    in one row. Each row is reported as soon as it is there."""
    rows = []
    store = PassageStore(folder)
    for count in sorted({min(count, len(queries)) for count in callers}):
        for way in ("one list", "coroutines"):
            with BatchedRetriever(search, store, cache_bytes=0) as retriever:
                asked = queries[: min(len(queries) // count, ROUNDS) * count]
                rows.append({"callers": count, "way": way} | _measure(retriever, way, count, asked))
                say(f"{count:,} callers, {way}: {rows[-1]['queries_per_second']:,.1f} queries/s")
    return rows


def _measure(retriever: BatchedRetriever, way: str, count: int, queries: Sequence[str]) -> dict[str, Any]:
    latencies: list[float] = []
    failures = 0
    cpu, started = time.process_time(), time.perf_counter()
    if way == "one list":
        for begin in range(0, len(queries), count):
            before = time.perf_counter()
            found = retriever.search(queries[begin : begin + count], K)
            latencies += [time.perf_counter() - before] * count
            failures += sum(len(hits) != K for hits in found)
    else:

        async def caller(own: Sequence[str]) -> int:
            bad = 0
            for query in own:
                before = time.perf_counter()
                (hits,) = await retriever.search_async([query], K)
                latencies.append(time.perf_counter() - before)
                bad += len(hits) != K
            return bad

        async def all_callers() -> int:
            return sum(await asyncio.gather(*(caller(queries[place::count]) for place in range(count))))

        failures = asyncio.run(all_callers())
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "queries": len(queries),
        "failures": failures,
        "queries_per_second": len(queries) / seconds,
        "cpu_milliseconds_per_query": cpu_seconds / len(queries) * 1e3,
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
    }


def beside_faiss(search: DenseSearch, folder: Path, queries: Sequence[str], repetitions: int) -> list[dict[str, Any]]:
    """Make a row per batch size: queries a second of both, and whether they found the same rows.

    Rows are the same "up to ties" if the scores at a rank differ by no more than the rounding of faiss' fp32 sums.
    """
    import faiss
    from plain_server import flat_index

    flat = flat_index(folder)
    faiss.omp_set_num_threads(torch.get_num_threads())
    vectors = search.prepare(queries[: max(BATCHES)])
    rows = []
    for size in BATCHES:
        batch = np.ascontiguousarray(vectors[:size])
        calls = {"ours": partial(search.search_prepared, batch, K), "faiss": partial(flat.search, batch, K)}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        found: dict[str, Any] = {}
        for _, name in harness.interleaved(list(calls), repetitions):
            started = time.perf_counter()
            found[name] = calls[name]()
            seconds[name].append(time.perf_counter() - started)
        ours, theirs = (size / float(np.median(seconds[name])) for name in ("ours", "faiss"))
        same = found["ours"][1] == found["faiss"][1]
        is_tie = np.abs(found["ours"][0] - found["faiss"][0]) <= 1e-5 * np.abs(found["ours"][0]).max()
        rows.append(
            {
                "batch": size,
                "ours_queries_per_second": ours,
                "faiss_queries_per_second": theirs,
                "ratio": ours / theirs,
                "same_rows": float(same.mean()),
                "same_up_to_ties": bool((same | is_tie).all()),
            }
        )
    return rows


def open_search(folder: Path) -> DenseSearch:
    """Open a search over the index."""
    return open_dense(folder)[0]
