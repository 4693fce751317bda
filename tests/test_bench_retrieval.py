"""The retrieval benchmark: that it measures what it says. How fast anything is, is not tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """name -> a module of the folder bench, imported as `python bench/…` does it."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_the_workload_repeats_within_groups_only(bench):
    bursts = bench("bursts")
    queries = bursts.workload(100, 4, unique=0.5)
    assert queries.shape == (4, 100)
    for number, row in enumerate(queries):
        assert row.min() >= 100 * number and row.max() < 100 * (number + 1)  # no query comes back in another round
        places = row - 100 * number
        assert set(places - np.arange(100)[places]) == {0}
        assert all(places[i] in (i, i - i % bursts.GROUP) for i in range(100))
    assert 0.5 < np.unique(queries).size / queries.size < 0.7  # the first of a group always differs
    assert np.unique(bursts.workload(100, 4, unique=1.0)).size == 400


@pytest.mark.parametrize("way", ["coroutines", "threads", "one list", "behind a lock"])
def test_every_way_of_calling_finds_what_it_asks_for(bench, way):
    bursts = bench("bursts")
    measured = bursts.measure(way, 10, 2, 0.5)
    row = measured.row()
    assert (row["queries"], row["failures"], len(measured.latencies)) == (20, 0, 20)
    if way != "behind a lock":
        assert measured.statistics["num_queries"] == 20
        assert row["unique_fraction"] == np.unique(bursts.workload(10, 2, 0.5)).size / 20


@pytest.mark.parametrize("way", ["coroutines", "threads", "one list", "behind a lock"])
def test_wrong_results_are_failures(bench, way, monkeypatch):
    bursts = bench("bursts")
    search_ids = bursts.FakeBackend.search_ids

    def search_wrongly(self, queries, k):
        scores, rows = search_ids(self, queries, k)
        return scores, np.where(rows[:, :1] < 3, rows + 1000, rows)

    monkeypatch.setattr(bursts.FakeBackend, "search_ids", search_wrongly)
    assert bursts.measure(way, 10, 2, 1.0).row()["failures"] == 3


def test_main_prints_a_row_last_and_appends_it(bench, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    arguments = ["--callers", "1,300", "--queries", "600", "--repetitions", "1", "--output", str(output)]
    assert bench("retrieval").main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert output.read_text().splitlines() == printed[-1:]
    row = json.loads(printed[-1])
    assert [(one["callers"], one["way"]) for one in row["bursts"]] == [
        *((1, way) for way in ("coroutines", "threads", "one list", "behind a lock")),
        (300, "coroutines"),
        (300, "one list"),
    ]
    assert all(one["failures"] == 0 for one in row["bursts"])


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(["--unique", "2"], "--unique 2.0"), (["--queries", "0"], "--queries 0")]
)
def test_what_cannot_be_measured_is_one_sentence(bench, capsys, arguments, sentence):
    assert bench("retrieval").main(arguments) == 2
    assert sentence in capsys.readouterr().err
