"""A CUDA stream that work is queued on, from whatever thread.

Searches run in threads, and a thread begins with device 0 for its current one. `torch.cuda.stream` alone selects the
stream's device and goes back to device 0 by `cudaSetDevice`, which since CUDA 12 opens a context there: so every rank
would take memory of the first GPU, for a device on which it has nothing to do. `torch.cuda.device` goes back to a
device only where this process has a context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is queued within is queued there, and its device is the current one. None, as on a CPU: nothing changes."""
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
