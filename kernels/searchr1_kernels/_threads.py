"""Compiled loops that let go of the interpreter's lock, on as many threads as torch uses.

The caller works too, and helpers that stay take what it has not begun. A helper may sleep too deep to come in time (on
a virtual machine 5 ms have been seen): then it finds nothing left, and nobody has waited for it. Threads that are
started for each call, and waited for, took 3.9 ms for a scan of 1.4 (2 cores of an Intel Xeon, 2026-11-27).
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import warnings
from collections.abc import Callable, Sequence

import numba
import torch

# Parts a thread: one that comes late, or is slow, then leaves the others no more than a quarter of its own to do.
_PARTS_PER_THREAD = 4


def num_parts(size: int, least: int) -> int:
    """Into how many parts of no fewer than `least` to cut so much work; 1 where torch has one thread."""
    threads = torch.get_num_threads()
    return max(1, min(_PARTS_PER_THREAD * threads, size // least)) if threads > 1 else 1


def numba_as_torch() -> None:
    """Numba's parallel loops that this thread calls next take as many threads as torch does: numba alone takes every
    core, whatever OMP_NUM_THREADS says, and where others are at work two threads on two cores then wait for each other
    at every loop (`rms_norm` of 8 rows 3 to 10 ms instead of 0.03, 2 cores of an Intel Xeon, 2026-11-27). As it starts,
    numba's OpenMP layer sets the number of threads of the runtime, which may be torch's as well: that is set back."""
    wanted = torch.get_num_threads()
    possible = min(wanted, numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != possible:
        numba.set_num_threads(possible)
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


def run_parts(function: Callable[[int, int], None], cuts: Sequence[int]) -> None:
    """`function(begin, end)` for each two neighbouring cuts, in any order and some at the same time. Raises what a part
    raised, the first in order, when all are over."""
    parts = [(int(begin), int(end)) for begin, end in itertools.pairwise(cuts)]
    if len(parts) <= 1:
        for part in parts:
            function(*part)
        return
    work = _Work(function, parts)
    _HELPERS.ask(work.run, min(torch.get_num_threads(), len(parts)) - 1)
    work.run()
    work.finish()


class _Work:
    """Parts of one call, each for who takes it first."""

    def __init__(self, function: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
        self._function: Callable[[int, int], None] | None = function
        self._parts = parts
        self._taken = itertools.count()  # to count on is one step of the interpreter, which no thread comes between
        self._over = threading.Semaphore(0)
        self._errors: dict[int, BaseException] = {}

    def run(self) -> None:
        """Take parts until none is left."""
        while (number := next(self._taken)) < len(self._parts):
            try:
                assert self._function is not None  # while a part is not over
                self._function(*self._parts[number])
            except BaseException as error:  # it is the caller's to raise, whose thread this may not be
                self._errors[number] = error
            finally:
                self._over.release()

    def finish(self) -> None:
        """Wait for the parts that others have taken."""
        for _ in self._parts:
            self._over.acquire()
        # A helper that comes later finds nothing to do. Until then it has this, but not what the function read and
        # wrote: while the one helper was busy, 50 scans of 1 M tokens kept 650 MB (2 cores of an Intel Xeon,
        # 2026-11-27).
        self._function = None
        if self._errors:
            raise self._errors[min(self._errors)]


class _Helpers:
    """Threads that wait for work as long as the process lives."""

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._number = 0
        self._growing = threading.Lock()

    def ask(self, run: Callable[[], None], number: int) -> None:
        """`run` in so many threads, soon; in as many as there are where no more can be started."""
        with self._growing:
            try:
                for _ in range(self._number, number):
                    threading.Thread(target=self._serve, name="searchr1-kernels", daemon=True).start()
                    self._number += 1
            except RuntimeError as error:  # at a limit of threads, and from Python 3.12 on while the interpreter ends
                warnings.warn(f"searchr1_kernels: {number - self._number} helpers are missing: {error}", stacklevel=2)
        for _ in range(min(number, self._number)):
            self._wanted.put(run)

    def _serve(self) -> None:
        while True:
            self._wanted.get()()


_HELPERS = _Helpers()


def _forget() -> None:
    """A forked child has none of its parent's threads, and would ask them for ever."""
    global _HELPERS
    _HELPERS = _Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
