"""Queueing work on a CUDA stream from any thread, and recording it there.

Searches run in threads, and a thread starts with device 0 as its current one. `torch.cuda.stream` alone selects the
stream's device and then returns to device 0 by `cudaSetDevice`, which since CUDA 12 opens a context there: every rank
would take memory of the first GPU, on which it has nothing to do. `torch.cuda.device` returns to a device only if this
process has a context there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Make `stream` and its device the current ones in a `with` block. None, as on a CPU, changes nothing."""
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


@contextmanager
def recording_again(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Record what a `with` block queues on the current stream, without running it; it has run before. `options`: of
    `CUDAGraph.capture_begin`.

    `torch.cuda.graph` waits for the device and empties torch's cache. Neither is needed here: copies still on their way
    to what the graph reads were queued before every replay.
    """
    # thread_local: a trainer in another thread may use the device while this one records
    graph.capture_begin(capture_error_mode="thread_local", **options)
    try:
        yield
    finally:
        graph.capture_end()
