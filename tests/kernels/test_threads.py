"""Work that is shared among threads is all done, and once, whichever threads come in time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from searchr1_kernels import _threads

ROOT = Path(_threads.__file__).parents[1]


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


def run_parts(function, cuts):
    """Call `function(number)` for all numbers of all parts."""

    def run(turns: np.ndarray) -> None:
        for number in _threads.share(turns, np.array(cuts, np.int64)):
            function(number)

    _threads.run_parts(run, len(cuts) - 1)


@pytest.mark.parametrize("cuts", [[], [0], [0, 5], [0, 5, 5, 9], list(range(101)), list(range(0, 100_000, 1000))])
def test_every_number_has_its_turn_once(cuts):
    done = []
    run_parts(done.append, cuts)
    assert sorted(done) == list(range(cuts[-1] if cuts else 0))


def test_within_a_part_they_come_from_the_last_to_the_first(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    done = []
    run_parts(done.append, [0, 3, 5])
    assert done == [2, 1, 0, 4, 3]


def test_parts_run_at_the_same_time():
    """Three parts wait for one another, which no two threads could get past."""
    barrier = threading.Barrier(3, timeout=60)
    threads = set()

    def meet(number: int) -> None:
        barrier.wait()
        threads.add(threading.get_ident())

    run_parts(meet, [0, 1, 2, 3])
    assert len(threads) == 3


@pytest.mark.parametrize("looks", [0, 10**12])
def test_what_others_do_is_waited_for(monkeypatch, looks):
    """Both by looking and asleep."""
    monkeypatch.setattr(_threads, "_LOOKS", looks)
    barrier, caller, done = threading.Barrier(2, timeout=60), threading.get_ident(), []

    def work(number: int) -> None:
        barrier.wait()
        if threading.get_ident() != caller:
            time.sleep(0.2)
        done.append(number)

    run_parts(work, [0, 1, 2])
    assert len(done) == 2


@pytest.fixture
def busy_helpers():
    """Keep all helpers busy until the test is over."""
    asked, release = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        asked.release()
        release.wait(60)

    _threads._HELPERS.ask(hold, 2)
    for _ in range(_threads._HELPERS._number):
        _threads._HELPERS.ask(hold, 1)
    for _ in range(_threads._HELPERS._number):
        asked.acquire()
    yield
    release.set()


def test_nobody_waits_for_helpers_that_do_not_come(busy_helpers):
    """The caller does the work alone, and helpers that come later find it over."""
    done = []
    run_parts(lambda number: done.append(threading.get_ident()), list(range(9)))
    assert done == [threading.get_ident()] * 8


def test_what_is_over_holds_nothing(busy_helpers):
    """Work that helpers have yet to look at has let go of its arrays."""
    array = torch.zeros(9)
    alive = weakref.ref(array)
    run_parts(lambda number, array=array: array[number].add_(1), [0, 4, 9])
    assert array.eq(1).all()
    del array
    assert alive() is None


def test_the_caller_does_all_where_no_thread_can_be_started(monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_threads, "_HELPERS", _threads._Helpers())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    with pytest.warns(UserWarning, match="2 helpers are missing: can't start new thread"):
        run_parts(done.append, list(range(9)))
    assert done == list(range(8)) and _threads._HELPERS._wanted.empty()


def test_an_error_is_raised_when_nobody_is_at_work():
    """The caller's own while a helper is still at work, and a helper's."""
    barrier, caller = threading.Barrier(2, timeout=60), threading.get_ident()
    for fails in (True, False):
        done = []

        def work(number: int, fails: bool = fails, done: list[int] = done) -> None:
            barrier.wait()
            if (threading.get_ident() == caller) == fails:
                raise ValueError(f"number {number}")
            time.sleep(0.2)
            done.append(number)

        with pytest.raises(ValueError, match="number"):
            run_parts(work, [0, 1, 2])
        assert len(done) == 1


def test_an_interrupt_is_raised_though_all_is_done():
    def run(turns: np.ndarray) -> None:
        for _ in _threads.share(turns, np.arange(9)):
            pass
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _threads.run_parts(run, 8)


def test_work_within_work():
    done = []
    run_parts(lambda number: run_parts(lambda inner: done.append((number, inner)), [0, 1, 2]), list(range(6)))
    assert sorted(done) == [(number, inner) for number in range(5) for inner in range(2)]


def test_a_part_has_enough_to_do(monkeypatch):
    assert _threads.num_parts(1 << 20, 1 << 16) == 12  # four a thread
    assert _threads.num_parts(5 << 16, 1 << 16) == 5
    assert _threads.num_parts(1, 1 << 16) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert _threads.num_parts(1 << 20, 1 << 16) == 1


FORK = """
import os, threading, numpy, torch
from searchr1_kernels import _threads
torch.set_num_threads(2)
def meet():
    barrier = threading.Barrier(2, timeout=30)
    _threads.run_parts(lambda turns: [barrier.wait() for _ in _threads.share(turns, numpy.arange(3))], 2)
meet()
child = os.fork()
if child == 0:
    meet()  # with threads of its own, or it would time out
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_forked_child_has_helpers_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=120)


COUNT_THREADS = """
import numba, torch
from searchr1_kernels import cached_attention, rms_norm, rotary_write, silu_mul
x, cache = torch.ones(2, 8), torch.zeros(2, 1, 6, 8)
slots, table = torch.arange(2), torch.arange(2, dtype=torch.int32)[:, None]
heads, angles = x.view(2, 1, 8), torch.ones(2, 1, 8)
calls = (
    lambda: rms_norm(x, x[0], 1e-6),
    lambda: silu_mul(x, x),
    lambda: rotary_write(heads, heads, heads, angles, angles, cache, cache.clone(), slots, slots),
    lambda: cached_attention(heads, cache, cache, slots, slots, table=table),
)
for number in (1, 2, 1):
    torch.set_num_threads(number)
    for call in calls:
        numba.set_num_threads(3 - number)
        torch.set_num_threads(number)
        call()
        assert (torch.get_num_threads(), numba.get_num_threads()) == (number, number)
"""
FIRST_CALL = """
import torch
from searchr1_kernels import silu_mul
silu_mul(torch.ones(2, 8), torch.ones(2, 8))
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""


@pytest.mark.parametrize("code", [COUNT_THREADS, FIRST_CALL])
def test_numba_takes_as_many_threads_as_torch_and_leaves_torchs_alone(code):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
