"""A CUDA stream that work is queued on, from whatever thread, or recorded on.

Searches run in threads, and a thread begins with device 0 for its current one. `torch.cuda.stream` alone selects the
stream's device and goes back to device 0 by `cudaSetDevice`, which since CUDA 12 opens a context there: so every rank
would take memory of the first GPU, for a device on which it has nothing to do. `torch.cuda.device` goes back to a
device only where this process has a context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is queued within is queued there, and its device is the current one. None, as on a CPU: nothing changes."""
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


@contextmanager
def recording_again(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """What is queued within, on the current stream, is recorded and does not run; it has run before. `options`: of
    `CUDAGraph.capture_begin`.

    `torch.cuda.graph` waits for the device and empties torch's cache, and for neither is there a reason here: copies
    that are on their way to what the graph reads were queued before every replay.
    """
    # thread_local: a trainer in another thread may use the device while this one records
    graph.capture_begin(capture_error_mode="thread_local", **options)
    try:
        yield
    finally:
        graph.capture_end()
