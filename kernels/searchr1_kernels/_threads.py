"""Compiled loops that let go of the interpreter's lock, on as many threads as torch uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch


def num_parts(size: int, least: int) -> int:
    """Into how many parts of no fewer than `least` to cut so much work; 1 where torch has one thread."""
    return max(1, min(torch.get_num_threads(), size // least))


def run_parts(function: Callable[[int, int], None], cuts: Sequence[int]) -> None:
    """`function(begin, end)` for each two neighbouring cuts, at the same time."""
    parts = [(int(begin), int(end)) for begin, end in pairwise(cuts)]
    if len(parts) == 1:
        function(*parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        for done in [pool.submit(function, *part) for part in parts]:
            done.result()  # raises what the part raised
