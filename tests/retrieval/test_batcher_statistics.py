"""The batcher's counters against what was done."""

from __future__ import annotations

import numpy as np
import pytest


def test_statistics_add_up_and_can_be_reset(make, backend):
    retriever = make(max_batch_rows=10)
    assert np.isnan(retriever.statistics()["unique_fraction"])
    for _ in range(3):
        retriever.search([str(number % 20) for number in range(40)], 2)
    statistics = retriever.statistics(reset=True)
    assert (statistics["num_searches"], statistics["num_queries"]) == (3, 120)
    assert (statistics["num_unique"], statistics["num_coalesced"], statistics["num_cache_hits"]) == (20, 20, 80)
    assert statistics["unique_fraction"] == pytest.approx(1 / 6)
    assert statistics["cache_hit_fraction"] == pytest.approx(2 / 3)
    assert statistics["latency_seconds"]["count"] == 120
    assert statistics["batch_seconds"]["count"] == statistics["num_batches"] == len(backend.batches)
    assert statistics["batch_rows"]["mean"] == pytest.approx(20 / len(backend.batches))
    assert statistics["batch_rows"]["max"] == max(map(len, backend.batches))
    after = retriever.statistics()
    assert (after["num_queries"], after["latency_seconds"]["count"]) == (0, 0)
    assert after["cache_entries"] == 20  # a gauge, not a counter


def test_percentiles_of_batch_sizes(make, backend):
    """Against numpy's: no lower, and at most a sixteenth higher."""
    retriever = make(max_batch_rows=1000, max_batch_bytes=2**20, cache_bytes=0)
    sizes = np.random.default_rng(0).integers(1, 1000, 300)
    for size in sizes:
        retriever.search([str(number) for number in range(size)], 1)
    assert [len(batch) for batch in backend.batches] == sizes.tolist()
    found = retriever.statistics()["batch_rows"]
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        true = np.percentile(sizes, percent, method="inverted_cdf")
        assert true <= found[name] <= true * 17 / 16
    assert (found["mean"], found["max"]) == (pytest.approx(sizes.mean()), sizes.max())
