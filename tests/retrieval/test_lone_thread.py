"""Searches that end in a moment start no thread pool beside the trainer's."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")

from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.dense import _SMALL_NUMBERS, hash_corpus
from searchr1_fast.retrieval.lone_thread import work_alone
from searchr1_fast.types import Passage


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def counted(before=lambda: None) -> int:
    """-> torch's number of threads in a new thread, after it has called `before`."""
    counts: list[int] = []

    def run() -> None:
        before()
        counts.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return counts[0]


def test_a_thread_alone_leaves_others_theirs(two_threads):
    assert (counted(work_alone), torch.get_num_threads(), counted()) == (1, 2, 2)


def passages(count: int) -> list[Passage]:
    return [Passage(str(i), f"title {i}", f"word{i} of some") for i in range(count)]


class Counting:
    """A backend that records how many threads torch has in its caller."""

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self.found: list[int] = []

    def search_ids(self, queries, k):
        self.found.append(torch.get_num_threads())
        return np.zeros((len(queries), 1), np.float32), np.zeros((len(queries), 1), np.int64)


@pytest.mark.parametrize(("is_small", "num_threads"), [(True, 1), (False, 2)])
def test_the_threads_of_a_batcher_are_alone_where_searches_are_small(two_threads, is_small, num_threads):
    backend, (_, store) = Counting(is_small), hash_corpus(passages(3), 64)
    with BatchedRetriever(backend, store) as retriever:
        retriever.search(["a"], 1)
    assert backend.found == [num_threads]


def test_what_is_small():
    most = _SMALL_NUMBERS // 64
    assert hash_corpus(passages(3), 64)[0].is_small
    search, _ = hash_corpus(passages(3), 64)
    search.num_rows = most
    assert search.is_small
    search.num_rows = most + 1
    assert not search.is_small
