"""faiss files of every kind, searched by faiss behind the batcher and the server."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from batcher_fakes import PATIENCE, eventually
from test_encoders import GIVEN, make_model, texts

from searchr1_fast import serve
from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.dense import DenseSearch, MemoryStore
from searchr1_fast.retrieval.encoder_bert import BertEncoder
from searchr1_fast.retrieval.protocol import RetrievalError
from searchr1_fast.retrieval.rows import HostRows
from searchr1_fast.types import Passage

faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")

from searchr1_fast.retrieval.faiss_search import FaissSearch  # noqa: E402 (after the skip)

CONTENTS = [f"z{text}" for text in texts(300, seed=3)]
QUERIES = texts(20, seed=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> folder, encoder, and vectors of CONTENTS [300,48] as fp16 holds them."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    encoder = BertEncoder(folder, GIVEN)
    return folder, encoder, encoder.encode_passages(CONTENTS).astype(np.float16).astype(np.float32)


def write(folder, kind, vectors, metric=None):
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT if metric is None else metric)
    index.train(vectors)
    index.add(vectors)
    path = folder / f"{kind.replace(',', '_')}.{index.metric_type}.faiss"
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize(("kind", "mode"), [("Flat", "exact"), ("IVF4,Flat", "approximate"), ("HNSW8", "approximate")])
def test_a_file_of_any_kind_is_searched_and_says_how(made, kind, mode, tmp_path):
    """With enough probes all kinds find the best vectors."""
    _, encoder, vectors = made
    parameters = {"IVF4,Flat": "nprobe=4", "HNSW8": "efSearch=300"}.get(kind, "")
    search = FaissSearch(write(tmp_path, kind, vectors), encoder, parameters)
    assert (search.mode, len(search)) == (mode, 300) and search.kind.startswith("Index")
    exact = DenseSearch(encoder, HostRows([(0, vectors.astype(np.float16))]))
    assert exact.mode == "exact_certified"
    scores, rows = search.search_ids(QUERIES, 5)
    wanted, best = exact.search_ids(QUERIES, 5)
    np.testing.assert_allclose(scores, wanted, atol=1e-5)
    assert ((rows == best) | np.isclose(scores, wanted, atol=1e-6)).all()
    assert scores.dtype == np.float32 and rows.dtype == np.int64
    assert search.search_ids(QUERIES, 1000)[1].shape == (20, 300)  # all that there are


def test_a_squared_distance_is_a_score_that_falls(made, tmp_path):
    _, encoder, vectors = made
    search = FaissSearch(write(tmp_path, "Flat", vectors, faiss.METRIC_L2), encoder)
    scores, rows = search.search_ids(QUERIES, 4)
    queries = encoder.encode_queries(QUERIES)
    distances = ((queries[:, None] - vectors[rows]) ** 2).sum(-1)
    np.testing.assert_allclose(-scores, distances, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_where_fewer_are_found_the_rest_is_empty_and_the_batcher_gives_fewer_passages(made, tmp_path):
    """One of the four lists has only some of the rows."""
    _, encoder, vectors = made
    search = FaissSearch(write(tmp_path, "IVF4,Flat", vectors), encoder, "nprobe=1")
    scores, rows = search.search_ids(QUERIES, 300)
    missing = rows == -1
    assert missing.any() and (scores[missing] == -np.inf).all() and np.isfinite(scores[~missing]).all()
    assert not (np.diff(missing.astype(int), axis=1) < 0).any()  # after what was found
    store = MemoryStore(Passage(str(row), "", text) for row, text in enumerate(CONTENTS))
    with BatchedRetriever(search, store) as retriever:
        assert retriever.mode == "approximate"
        for found, own in zip(retriever.search(QUERIES, 300), rows, strict=True):
            assert [int(passage.id) for passage in found] == own[own >= 0].tolist()


def cagra(folder, vectors):
    """Write what faiss writes of a graph made by cuVS on a GPU, here of a graph that faiss makes itself."""
    index = faiss.IndexHNSWCagra(vectors.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.base_level_only = False  # like a graph of cuVS, which has no upper levels
    index.add(vectors)
    path = folder / "cagra.faiss"
    faiss.write_index(index, str(path))
    return path


def test_a_cagra_file_is_searched(made, tmp_path):
    _, encoder, vectors = made
    path = cagra(tmp_path, vectors)
    assert path.read_bytes()[:4] in (b"IHc2", b"IHNc")  # written by faiss since 1.12, and before
    search = FaissSearch(path, encoder, "efSearch=300")
    assert (search.kind, search.mode) == ("IndexHNSWCagra", "approximate")
    wanted, best = DenseSearch(encoder, HostRows([(0, vectors.astype(np.float16))])).search_ids(QUERIES, 5)
    scores, rows = search.search_ids(QUERIES, 5)
    assert ((rows == best) | np.isclose(scores, wanted, atol=1e-6)).all()


@pytest.mark.parametrize("kind", ["IDMap,Flat", "IDMap2,HNSW8"])
def test_ids_that_are_no_rows_are_refused_when_the_file_is_opened(made, kind, tmp_path):
    """Ids that are rows in another order are taken at their word."""
    _, encoder, vectors = made

    def named(ids):
        index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        index.add_with_ids(vectors, ids)
        faiss.write_index(index, str(tmp_path / "named"))
        return FaissSearch(tmp_path / "named", encoder, "efSearch=300" if "HNSW" in kind else "")

    for ids, worst in ((np.arange(300) + 1, "300"), (np.arange(300) - 2, "-2")):
        with pytest.raises(ValueError, match=f"named has a vector with the id {worst}; the ids of its 300 vectors"):
            named(ids)
    turned = named(np.arange(300)[::-1].copy())
    plain = FaissSearch(write(tmp_path, "Flat", vectors), encoder)
    assert (turned.search_ids(QUERIES, 1)[1] == 299 - plain.search_ids(QUERIES, 1)[1]).all()


def test_ids_that_show_in_a_search_only_end_it_with_their_name(made, tmp_path):
    """Lists of an IVF keep their ids beside their vectors."""
    _, encoder, vectors = made
    index = faiss.index_factory(vectors.shape[1], "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(300) + 1000)
    faiss.write_index(index, str(tmp_path / "ivf"))
    store = MemoryStore(Passage(str(row), "", text) for row, text in enumerate(CONTENTS))
    with (
        BatchedRetriever(FaissSearch(tmp_path / "ivf", encoder), store) as retriever,
        pytest.raises(RetrievalError, match=r"ivf has a vector with the id 1\d\d\d"),
    ):
        retriever.search(QUERIES, 3)


def test_what_cannot_be_searched_is_one_sentence(made, tmp_path):
    _, encoder, vectors = made
    with pytest.raises(ValueError, match="there is no file"):
        FaissSearch(tmp_path / "nothing", encoder)
    (tmp_path / "broken").write_bytes(b"IxFI" + bytes(10))
    with pytest.raises(ValueError, match="broken cannot be read as a faiss index"):
        FaissSearch(tmp_path / "broken", encoder)
    (tmp_path / "unknown").write_bytes(b"IHc9" + bytes(100))  # what a kind from a later faiss is to this one
    with pytest.raises(ValueError, match=r"unknown cannot be read as a faiss index: Index type .* not recognized$"):
        FaissSearch(tmp_path / "unknown", encoder)
    whole = cagra(tmp_path, vectors).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut cannot be read as a faiss index: read error in"):
        FaissSearch(tmp_path / "cut", encoder)
    with pytest.raises(ValueError, match="'speed=9' cannot be set on"):
        FaissSearch(write(tmp_path, "Flat", vectors), encoder, "speed=9")
    with pytest.raises(ValueError, match="vectors of 24 components, the encoder makes 48"):
        FaissSearch(write(tmp_path, "Flat", np.ascontiguousarray(vectors[:, :24])), encoder)
    other = faiss.index_factory(48, "Flat", faiss.METRIC_L1)
    faiss.write_index(other, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="only inner products and squared distances"):
        FaissSearch(tmp_path / "other", encoder)


def listens(host, port):
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def test_it_is_served_over_http_and_drains(made, tmp_path):
    pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
    folder, encoder, vectors = made
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"id": f"p{row}", "contents": text} for row, text in enumerate(CONTENTS)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "searchr1_fast.serve", "--corpus", str(corpus), "--port", "0"]
    command += ["--faiss", str(write(tmp_path, "Flat", vectors)), "--encoder", str(folder), "--pooling", "mean"]
    command += ["--normalize", "--max-length", "32", "--query-prefix", "query: ", "--passage-prefix", "passage: "]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
    try:
        said = ""
        while "serving POST" not in said:
            line = server.stdout.readline()
            assert line, said
            said += line
        said = " ".join(said.split())
        assert "300 vectors, IndexFlat" in said and "searched by faiss: exact" in said
        host, port = re.search(r"http://(\S+?):(\d+)/retrieve", said).groups()
        eventually(lambda: listens(host, int(port)))
        connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        body = json.dumps({"queries": QUERIES[:3], "topk": 2, "return_scores": True})
        connection.request("POST", "/retrieve", body)
        results = json.loads(connection.getresponse().read())["result"]
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok", "mode": "exact"}
        connection.close()
        server.terminate()
        assert server.wait(PATIENCE) == 0, server.stdout.read()
    finally:
        server.kill()
        server.wait()
    best = np.argsort(-(encoder.encode_queries(QUERIES[:3]) @ vectors.T), axis=1)[:, :2]
    assert [[hit["document"]["id"] for hit in hits] for hits in results] == [[f"p{row}" for row in own] for own in best]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--corpus", "x", "--faiss-parameters", "nprobe=1"], "--faiss-parameters goes with --faiss"),
        (["--corpus", "x", "--pooling", "cls"], "--pooling goes with --faiss"),
        (["--index", "x", "--faiss", "y", "--query-prefix", "q: "], "--query-prefix is recorded in the index"),
    ],
)
def test_options_that_nothing_would_read_are_refused(arguments, sentence, capsys):
    assert serve.main(arguments) == 2
    assert sentence in capsys.readouterr().err
