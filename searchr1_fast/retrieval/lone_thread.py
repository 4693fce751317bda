"""Makes a thread run torch and numba without helper threads.

Each thread that runs a parallel OpenMP loop gets a pool of its own, which stays. Once all pools together have more
threads than the machine has cores, GNU's OpenMP no longer spins at the end of a loop but sleeps, in every pool. A
search that takes a millisecond would thus make the trainer's loops wait for the system from then on: the demo's
rollouts took 1.7 times as long (two cores of an Intel Xeon, 2026-11-27).
"""

from __future__ import annotations

import threading

import numba
import torch


def work_alone() -> None:
    """Make the calling thread compute on its own from now on; other threads keep their number of helpers."""
    numba.set_num_threads(1)  # first: numba sets OpenMP's number when it initialises
    others = torch.get_num_threads()
    torch.set_num_threads(1)  # also for threads that have not computed yet; the thread below undoes that
    thread = threading.Thread(target=torch.set_num_threads, args=(others,))
    thread.start()
    thread.join()
