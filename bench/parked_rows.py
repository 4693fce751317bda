"""Measure giving an index's GPU memory to an update and taking it back (`retrieval.park_during_update`).

This is a part of retrieval_gpu.py. It gives the seconds of the first `park`, which copies to the host, and of later
ones, which give memory away; of `unpark`, which takes memory, queues the copies back and records the searches
again; and from the call of `unpark` to the hits of a first search, which waits for the copies. Hits are compared with
those from before.
"""

from __future__ import annotations

import time

import harness
import numpy as np
import torch

from searchr1_fast.retrieval.device_rows import DeviceRows


def measure_parking(
    rows: np.ndarray,  # [M,D] fp16
    queries: np.ndarray,  # [Q,D] fp32
    device: torch.device,
    repetitions: int,
) -> tuple[dict[str, float], int]:
    """-> seconds and the copy back's bytes a second, and how many hits differed afterwards."""
    opened = DeviceRows([(0, rows)], device)
    wanted, wrong = opened.search(queries, 16), 0
    first = harness.timed(opened.park, device)
    parks, unparks, backs = [], [], []
    for repetition in range(repetitions + 1):
        if repetition:
            parks.append(harness.timed(opened.park, device))
        started = time.perf_counter()
        opened.unpark()
        unparks.append(time.perf_counter() - started)
        found = opened.search(queries, 16)
        backs.append(time.perf_counter() - started)
        wrong += sum(int((one != other).sum()) for one, other in zip(found, wanted, strict=True))
    search = float(np.median([harness.timed(lambda: opened.search(queries, 16), device) for _ in range(repetitions)]))
    back = float(np.median(backs))
    return {
        "first_park": first,
        "park": float(np.median(parks)),
        "unpark": float(np.median(unparks)),
        "unpark_to_hits": back,
        "search": search,
        "bytes_per_second": rows.nbytes / max(back - search, 1e-9),
    }, wrong
