"""The retrieval benchmark measures what it says. No durations are tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from searchr1_fast.console import Console

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


# --------------------------------------------------------------------------------------------------- over an index


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder of an index, JSONL of questions) about a small world."""
    from searchr1_fast.config import WorldConfig
    from searchr1_fast.data import write_corpus, write_questions
    from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
    from searchr1_fast.retrieval.encoders import EncodingSource
    from searchr1_fast.retrieval.index_build import build_index
    from searchr1_fast.world import build_world

    folder = tmp_path_factory.mktemp("small")
    world = build_world(WorldConfig(num_entities=80, num_questions=40))
    write_corpus(folder / "corpus.jsonl", world.passages)
    write_questions(folder / "questions.jsonl", world.questions)
    source = EncodingSource(HashingEncoder(128))
    build_index(folder / "index", folder / "corpus.jsonl", source, Console(quiet=True))
    return folder / "index", folder / "questions.jsonl"


def test_text_in_passages_out(bench, small, tmp_path, capsys):
    arguments = ["--parts", "million", "--index", str(small[0]), "--questions", str(small[1])]
    arguments += ["--requests", "24", "--repetitions", "1", "--output", str(tmp_path / "rows.jsonl")]
    arguments += ["--plot", str(tmp_path / "plots")]
    assert bench("retrieval").main(arguments) == 0, capsys.readouterr().err
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["passages"] == 80 and "bursts" not in row
    assert [(one["callers"], one["way"]) for one in row["million"]][:2] == [(1, "one list"), (1, "coroutines")]
    assert {one["failures"] for one in row["million"]} == {0}
    assert {one["queries"] for one in row["million"]} == {24}
    assert (tmp_path / "plots" / "retrieval_million.png").read_bytes().startswith(b"\x89PNG")


def test_an_index_and_enough_questions_are_asked_for(bench, small, capsys):
    assert bench("retrieval").main(["--parts", "million"]) == 2
    assert "--index and --questions are missing" in capsys.readouterr().err
    arguments = ["--parts", "million", "--index", str(small[0]), "--questions", str(small[1])]
    assert bench("retrieval").main(arguments) == 2
    assert "different questions; 8192 are asked for" in capsys.readouterr().err


def test_requests_to_our_server_are_measured(bench, small):
    pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
    serving = bench("serving")
    queries = [f"who is number {number}" for number in range(30)]
    served = serving.measure("ours", small[0], queries, 6)
    row = served.row()
    assert (row["requests"], row["failures"], len(served.latencies)) == (24, 0, 24)
    assert served.ids.keys() == set(queries[6:])
    assert serving.same_passages(served, served) == 1.0
    changed = serving.Served(ids=served.ids | {queries[6]: ["1", "2", "3"]})
    assert serving.same_passages(served, changed) == pytest.approx(23 / 24)


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"error": "x"}', b'{"result": []}', b'{"result": [[1]]}'])
def test_an_answer_that_is_none_is_a_failure(bench, answer):
    assert bench("serving").passage_ids(answer) == []


def test_beside_faiss_and_its_server(bench, small):
    for package in ("faiss", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"the peers need {package}")
    million, serving = bench("million"), bench("serving")
    queries = [f"who is number {number}" for number in range(256)]
    for row in million.beside_faiss(million.open_search(small[0]), small[0], queries, 1):
        assert row["same_up_to_ties"]
    plain, ours = (serving.measure(name, small[0], queries[:40], 4) for name in serving.NAMES)
    assert (plain.num_failures, ours.num_failures) == (0, 0)
    assert serving.same_passages(plain, ours) > 0.5  # faiss orders equal scores differently
