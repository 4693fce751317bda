"""A thread that calls torch and numba and keeps others out of it.

Each thread that runs a parallel loop of OpenMP gets a pool of its own, which stays. As soon as all pools together have
more threads than the machine has cores, GNU's OpenMP no longer spins at the end of a loop but sleeps, in every pool: so
a search that takes a millisecond makes the trainer's loops wait for the system from then on. The demo's rollouts took
1.7 times as long with it (two cores of an Intel Xeon, 2026-11-27).
"""

from __future__ import annotations

import threading

import numba
import torch


def work_alone() -> None:
    """From now on this thread computes by itself; others have the threads that they had."""
    numba.set_num_threads(1)  # first: numba sets OpenMP's number when it begins
    others = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread, and for those that have not computed yet, which is taken back by one
    thread = threading.Thread(target=torch.set_num_threads, args=(others,))
    thread.start()
    thread.join()
