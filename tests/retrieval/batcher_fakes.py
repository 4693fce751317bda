"""Shared by the tests of the batcher: a backend that a test holds and releases, to see what happens in between."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import numpy as np

from searchr1_fast.types import Passage

PATIENCE = 60.0  # seconds until a hanging test fails


class Rows:
    """A passage store in which row r is passage r."""

    def passages(self, rows, scores):
        pairs = zip(rows, scores, strict=True)
        return [Passage(str(row), f"title {row}", f"text {row}", score) for row, score in pairs]


class Backend:
    """Query "n" finds rows 10n, 10n+1, …, at most `num_hits` of them. When held, it waits in the middle of a batch."""

    def __init__(self, num_hits: int = 100) -> None:
        self.num_hits = num_hits
        self.batches: list[list[str]] = []
        self.depths: list[int] = []
        self.error: Exception | None = None
        self._go = threading.Event()
        self._go.set()
        self.entered = threading.Semaphore(0)

    def hold(self) -> None:
        self._go.clear()

    def let_go(self) -> None:
        self._go.set()

    def search_ids(self, queries, k):
        self.batches.append(queries)
        self.depths.append(k)
        self.entered.release()
        assert self._go.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return expected([int(query) for query in queries], k, self.num_hits)

    @property
    def searched(self) -> list[str]:
        return [query for batch in self.batches for query in batch]


def expected(numbers, k, num_hits=100):
    ranks = np.arange(k)
    ids = 10 * np.array(numbers, dtype=np.int64)[:, None] + ranks
    scores = np.tile(-ranks.astype(np.float32), (len(numbers), 1))
    return np.where(ranks < num_hits, scores, -np.inf).astype(np.float32), np.where(ranks < num_hits, ids, -1)


def eventually(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.001)


def ids_of(results: list[list[Passage]]) -> list[list[int]]:
    return [[int(passage.id) for passage in passages] for passages in results]


def hold_with_one(retriever, backend, pool, query="999"):
    """-> the future of a batch of one query, which is in the backend and stays there."""
    backend.hold()
    future = pool.submit(retriever.search, [query], 2)
    assert backend.entered.acquire(timeout=PATIENCE)
    return future


class TwoStages(Backend):
    """A backend whose `prepare` doubles the numbers and records batches as they are prepared."""

    def __init__(self):
        super().__init__()
        self.prepared: list[list[str]] = []

    def prepare(self, queries):
        self.prepared.append(queries)
        return [2 * int(query) for query in queries]

    def search_prepared(self, prepared, k):
        return super().search_ids([str(number) for number in prepared], k)


def run(code: str, **names: object) -> str:
    """-> the output of a program that must exit cleanly."""
    tests = os.path.dirname(__file__)
    program = textwrap.dedent(code).format(tests=tests, **names)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=2 * PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout
