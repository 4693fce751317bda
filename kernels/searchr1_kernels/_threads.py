"""Compiled loops that let go of the interpreter's lock, on as many threads as torch uses.

The caller works too, and helpers that stay take what it has not begun. A helper may sleep too deep to come in time (on
a virtual machine 5 ms have been seen): then it finds nothing left, and nobody has waited for it. Threads that are
started for each call, and waited for, took 3.9 ms for a scan of 1.4 (2 cores of an Intel Xeon, 2026-11-27).

Parts are taken in compiled code. Where the interpreter handed them out, threads slept for its lock at every part: the
scan of 1 M tokens took two threads 0.9 ms, as it takes one; now it takes them 0.54 (there too).
"""

from __future__ import annotations

import os
import queue
import threading
import warnings
from collections.abc import Callable

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic

from searchr1_kernels import _vector_code as vectors

# Parts a thread: one that comes late, or is slow, then leaves the others no more than a quarter of its own to do.
_PARTS_PER_THREAD = 4
# Where the counters of a call lie: of parts that somebody has taken, and of those that are over. Apart, so that who
# asks for one does not wait for the other's line of the cache.
_TAKEN, _OVER, _COUNTERS = 0, 8, 16
# How often a thread with nothing left looks whether the others are done before it sleeps: for 0.24 ms. To wake takes
# some 10 us, and 2 ms have been seen (2 cores of an Intel Xeon, 2026-11-27).
_LOOKS = 50_000


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


def run_parts(run: Callable[[np.ndarray], object], number: int) -> None:
    """`run(turns)`, here and in other threads at the same time, which loops over `share(turns, cuts)` of so many parts.
    Returns when all are over. Raises what one of the threads raised, when none is at work any more; parts may be left
    then."""
    if number <= 1:
        run(np.zeros(_COUNTERS, np.int64))
        return
    work = _Work(run, number)
    _HELPERS.ask(work.help, min(torch.get_num_threads(), number) - 1)
    work.do()


@intrinsic
def _add(typing_context, counters, place, number):
    """To one of the counters; -> what it was. No thread comes between."""

    def generate(context, builder, signature, arguments):
        counter = vectors.place(context, builder, signature, arguments, 0, 1)
        return builder.atomic_rmw("add", counter, arguments[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), generate


@numba.njit(nogil=True)
def share(turns, cuts):
    """For a compiled loop: the numbers of one part after the other that nobody has taken, each part's from its last to
    its first. Parts go from one of the cuts, [num_parts+1], to before the next. `turns` [_COUNTERS] int64."""
    part = _add(turns, _TAKEN, 1)
    while part < len(cuts) - 1:
        for number in range(cuts[part + 1] - 1, cuts[part] - 1, -1):  # noqa: UP028 (numba has no `yield from`)
            yield number
        _add(turns, _OVER, 1)
        part = _add(turns, _TAKEN, 1)


@numba.njit(cache=True, nogil=True)
def _all_over(turns, number, looks):
    for _ in range(looks):  # noqa: SIM110 (nor generator expressions)
        if _add(turns, _OVER, 0) == number:
            return True
    return False


class _Work:
    """Parts of one call."""

    def __init__(self, run: Callable[[np.ndarray], object], number: int) -> None:
        self._run: Callable[[np.ndarray], object] | None = run
        self._number, self._turns = number, np.zeros(_COUNTERS, np.int64)
        self._lock, self._num_helpers, self._gone = threading.Lock(), 0, queue.SimpleQueue[None]()
        self._errors: list[BaseException] = []

    def help(self) -> None:
        """Take parts until none is left; for those who may come too late."""
        with self._lock:
            run = self._run
            if run is None:
                return
            self._num_helpers += 1
        self._take_parts(run)
        del run  # before the caller, who may be waiting, goes on
        self._gone.put(None)

    def do(self) -> None:
        """As `help`, and wait for those who came."""
        assert self._run is not None
        self._take_parts(self._run)
        with self._lock:
            # A helper that comes later finds nothing to do. Until then it has this, but not what the function read and
            # wrote: while the one helper was busy, 50 scans of 1 M tokens kept 650 MB (2 cores of an Intel Xeon,
            # 2026-11-27).
            self._run = None
        if not _all_over(self._turns, self._number, _LOOKS):
            for _ in range(self._num_helpers):
                self._gone.get()
        if self._errors:
            raise self._errors[0]
        assert self._turns[_OVER] == self._number, "a loop that leaves parts undone"

    def _take_parts(self, run: Callable[[np.ndarray], object]) -> None:
        try:
            run(self._turns)
        except BaseException as error:  # it is the caller's to raise, whose thread this may not be
            self._errors.append(error)


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
