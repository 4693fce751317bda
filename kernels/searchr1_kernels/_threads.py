"""Run compiled loops that release the interpreter's lock, on as many threads as torch uses.

The caller works too, and persistent helper threads take parts that nobody has begun. A helper may wake too late (5 ms
have been seen on a virtual machine): then it finds nothing left, and nobody has waited for it. Starting threads for
each call and waiting for them took 3.9 ms for a scan of 1.4 ms (2 cores of an Intel Xeon, 2026-11-27).

Parts are taken in compiled code. When the interpreter handed them out, threads slept for its lock at every part: the
scan of 1 M tokens took two threads 0.9 ms, the same as one; it now takes them 0.54 ms (on the same machine).
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

# Parts per thread. At the end, the others wait for at most one part of a late or slow thread, a quarter of its share.
_PARTS_PER_THREAD = 4
# Indices of a call's counters of parts taken and of parts done, and their array's size. They lie apart so that a thread
# that reads one does not wait for the cache line of the other.
_TAKEN, _OVER, _COUNTERS = 0, 8, 16
# How often a thread with nothing left checks whether the others are done before it sleeps: 0.24 ms. Waking takes some
# 10 us, and 2 ms have been seen (2 cores of an Intel Xeon, 2026-11-27).
_LOOKS = 50_000


def num_parts(size: int, least: int) -> int:
    """-> into how many parts to cut `size` units of work, at least `least` in each; 1 where torch has one thread."""
    threads = torch.get_num_threads()
    return max(1, min(_PARTS_PER_THREAD * threads, size // least)) if threads > 1 else 1


def numba_as_torch() -> None:
    """Make the numba parallel loops that this thread calls next use as many threads as torch does.

    By itself numba takes every core, whatever OMP_NUM_THREADS says; where the cores have other work, two threads on two
    cores then wait for each other at every loop (`rms_norm` of 8 rows 3 to 10 ms instead of 0.03, 2 cores of an Intel
    Xeon, 2026-11-27). When it starts, numba's OpenMP layer sets the thread count of the OpenMP runtime, which torch may
    share; that is undone."""
    wanted = torch.get_num_threads()
    possible = min(wanted, numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != possible:
        numba.set_num_threads(possible)
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


def run_parts(run: Callable[[np.ndarray], object], number: int) -> None:
    """Call `run(turns)`, which loops over `share(turns, cuts)` of `number` parts, here and in other threads at once.

    Returns when all parts are done. If a thread raises, raises that error once no thread is at work; parts may then be
    left undone."""
    if number <= 1:
        run(np.zeros(_COUNTERS, np.int64))
        return
    work = _Work(run, number)
    _HELPERS.ask(work.help, min(torch.get_num_threads(), number) - 1)
    work.do()


@intrinsic
def _add(typing_context, counters, place, number):
    """Atomically add a number to one of the counters; -> its previous value."""

    def generate(context, builder, signature, arguments):
        counter = vectors.place(context, builder, signature, arguments, 0, 1)
        return builder.atomic_rmw("add", counter, arguments[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), generate


@numba.njit(nogil=True)
def share(turns, cuts):
    """Yield, to a compiled loop, the indices of one untaken part after the other, each part from its last to its first.

    A part goes from one of the cuts, [num_parts+1], to before the next. `turns` [_COUNTERS] int64."""
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
    """The work of one call."""

    def __init__(self, run: Callable[[np.ndarray], object], number: int) -> None:
        self._run: Callable[[np.ndarray], object] | None = run
        self._number, self._turns = number, np.zeros(_COUNTERS, np.int64)
        self._lock, self._num_helpers, self._gone = threading.Lock(), 0, queue.SimpleQueue[None]()
        self._errors: list[BaseException] = []

    def help(self) -> None:
        """Take parts until none is left. Called by helpers, which may come too late."""
        with self._lock:
            run = self._run
            if run is None:
                return
            self._num_helpers += 1
        self._take_parts(run)
        del run  # before the caller, which may be waiting, goes on
        self._gone.put(None)

    def do(self) -> None:
        """Take parts until none is left, and wait for the helpers that came. Called by the caller's thread."""
        assert self._run is not None
        self._take_parts(self._run)
        with self._lock:
            # A helper that comes later finds nothing to do. Until then it holds this object, but not what the function
            # read and wrote: while the one helper was busy, 50 scans of 1 M tokens kept 650 MB (2 cores of an Intel
            # Xeon, 2026-11-27).
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
        except BaseException as error:  # raised in the caller's thread, which this may not be
            self._errors.append(error)


class _Helpers:
    """Threads that wait for work for the life of the process."""

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._number = 0
        self._growing = threading.Lock()

    def ask(self, run: Callable[[], None], number: int) -> None:
        """Run `run` in `number` threads soon; if no more can be started, in those that exist."""
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
    """Start over in a forked child: it has none of its parent's threads, and would go on asking them forever."""
    global _HELPERS
    _HELPERS = _Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
