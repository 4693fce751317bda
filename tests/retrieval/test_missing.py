"""Which queries miss, and what they get instead."""

import subprocess
import sys

import pytest

from searchr1_fast.retrieval import MissingRetriever
from searchr1_fast.types import Passage


class Recorder:
    """Ten passages for every query, and a record of the queries."""

    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        self.asked.append((tuple(queries), k))
        return [[Passage(f"{query}/{place}", "", "", 10 - place) for place in range(min(k, 10))] for query in queries]


QUERIES = [f"query {number}" for number in range(2000)]


def ids(hits):
    return [hit.id for hit in hits]


def test_a_miss_drops_the_best_and_nothing_else_changes():
    retriever = MissingRetriever(Recorder(), 0.3, seed=5)
    for query, hits in zip(QUERIES, retriever.search(QUERIES, 3), strict=True):
        first = 1 if retriever.misses(query) else 0
        assert ids(hits) == [f"{query}/{place}" for place in range(first, first + 3)]


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_share_is_about_the_rate(rate):
    share = sum(map(MissingRetriever(Recorder(), rate).misses, QUERIES)) / len(QUERIES)
    assert abs(share - rate) < 4 * (rate * (1 - rate) / len(QUERIES)) ** 0.5


def test_misses_depend_on_text_and_seed_alone():
    retriever = MissingRetriever(Recorder(), 0.5, seed=1)
    first = retriever.search(QUERIES[:50], 2)
    assert [retriever.search([query], 2)[0] for query in QUERIES[:50]] == first
    missed = {seed: [MissingRetriever(Recorder(), 0.5, seed).misses(query) for query in QUERIES] for seed in (1, 2)}
    assert missed[1] != missed[2]
    larger = [MissingRetriever(Recorder(), 0.7, 1).misses(query) for query in QUERIES]
    assert all(after or not before for before, after in zip(missed[1], larger, strict=True))


def test_misses_are_the_same_in_another_process():
    code = (
        "from searchr1_fast.retrieval import MissingRetriever\n"
        "print([MissingRetriever(None, 0.5, 1).misses(f'query {n}') for n in range(64)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    retriever = MissingRetriever(Recorder(), 0.5, 1)
    assert printed.strip() == str([retriever.misses(query) for query in QUERIES[:64]])


def test_extremes_ask_once():
    never, always = Recorder(), Recorder()
    assert ids(MissingRetriever(never, 0.0).search(["a", "b"], 2)[1]) == ["b/0", "b/1"]
    assert ids(MissingRetriever(always, 1.0).search(["a", "b"], 2)[1]) == ["b/1", "b/2"]
    assert never.asked == [(("a", "b"), 2)]
    assert always.asked == [(("a", "b"), 3)]
    assert MissingRetriever(Recorder(), 0.5).search([], 2) == []


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_is_a_share(rate):
    with pytest.raises(ValueError, match="between 0 and 1"):
        MissingRetriever(Recorder(), rate)
