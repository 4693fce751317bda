"""The benchmark of a search's parts, run on a CPU, where there are none: it works and compares results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")

SMALL = ["--device", "cpu", "--rows", "700", "--dimension", "64", "--batches", "1,3", "--repetitions", "1"]


@pytest.fixture
def bench(monkeypatch):
    """bench/search_parts.py, imported as `python bench/…` does it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    return importlib.import_module("search_parts")


def test_it_measures_both_scans_and_finds_no_difference(bench, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    assert bench.main([*SMALL, "--output", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert output.read_text().splitlines() == printed[-1:]
    row = json.loads(printed[-1])
    assert (row["wrong_hits"], list(row["scans"])) == (0, ["float16", "int8"])
    for scan in row["scans"].values():
        assert [line["queries"] for line in scan["lines"]] == [1, 3]
        for line in scan["lines"]:
            assert line["recorded_ms"] > 0 and line["launched_ms"] > 0
            assert line["parts"] == {} and line["host_ms"] is None and line["settled_queries"] == 0


def test_a_recording_that_differs_is_counted_and_fails(bench, monkeypatch, capsys):
    search = bench.DeviceRows.search

    def search_wrongly(self, vectors, k):
        scores, rows = search(self, vectors, k)
        if self.recorded.enabled and len(vectors) < 64:
            rows[:1, :2] = rows[:1, 1::-1]
        return scores, rows

    monkeypatch.setattr(bench.DeviceRows, "search", search_wrongly)
    assert bench.main([*SMALL, "--batches", "3,70", "--scans", "int8"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["wrong_hits"] == 2


@pytest.mark.parametrize(("arguments", "sentence"), [(["--k", "0"], "--k 0"), (["--scans", "fp8"], "--scans: give")])
def test_what_cannot_be_measured_is_one_sentence(bench, capsys, arguments, sentence):
    assert bench.main([*SMALL, *arguments]) == 2
    assert sentence in capsys.readouterr().err
