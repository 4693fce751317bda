"""The benchmark of retrieval on a GPU, run on a CPU: it works and compares results. No durations are tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")

SMALL = ["--device", "cpu", "--rows", "700", "--dimension", "64", "--batches", "1,3", "--repetitions", "1"]


@pytest.fixture
def bench(monkeypatch):
    """bench/retrieval_gpu.py, imported as `python bench/…` does it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("retrieval_gpu")


def test_it_measures_everything_and_finds_no_difference(bench, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    assert bench.main([*SMALL, "--output", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert output.read_text().splitlines() == printed[-1:]
    row = json.loads(printed[-1])
    scans = {(scan["way"], scan["queries"]) for scan in row["scans"]}
    assert scans >= {(way, queries) for way in ("float16", "int8", "torch") for queries in (1, 3)}
    assert (row["wrong_hits"], row["rows"]) == (0, 700) and row["batched_queries_per_second"] > 0
    assert set(row["merge_seconds"]) >= {"c++", "torch"} and set(row["link_seconds"]) == {"2", "4", "8"}
    assert set(row["parking_seconds"]) == {"first_park", "park", "unpark", "unpark_to_hits", "search"}
    assert {(one["way"], one["queries"]) for one in row["encoder"]} == {
        (way, queries) for way in ("recorded", "launched", "by length", "unparked") for queries in (1, 3)
    }
    assert row["wrong_vectors"] == 0
    assert not any("arithmetic" in key for key in row)  # nothing is extrapolated from so small a corpus


def test_a_difference_is_counted_and_fails(bench, monkeypatch, capsys):
    search = bench.DeviceRows.search

    def search_wrongly(self, vectors, k):
        scores, rows = search(self, vectors, k)
        rows[:1, :2] = rows[:1, 1::-1]
        return scores, rows

    monkeypatch.setattr(bench.DeviceRows, "search", search_wrongly)
    assert bench.main(SMALL) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["wrong_hits"] == 4  # two places, in two ways


@pytest.mark.parametrize(("arguments", "sentence"), [(["--rows", "0"], "--rows 0"), (["--k", "400"], "--batches, --k")])
def test_what_cannot_be_measured_is_one_sentence(bench, capsys, arguments, sentence):
    assert bench.main([*SMALL, *arguments]) == 2
    assert sentence in capsys.readouterr().err
