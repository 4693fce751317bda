"""Dense search: exact against a plain product, the same in every batch and partition, and what hashed vectors find."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")

from searchr1_fast.config import RetrievalConfig, WorldConfig
from searchr1_fast.data import read_corpus, write_corpus
from searchr1_fast.retrieval import BM25Retriever, DenseRetriever, DenseSearch, index_format, open_retriever
from searchr1_fast.retrieval.dense import hash_corpus, open_dense
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.encoders import EncodingSource
from searchr1_fast.retrieval.index_build import build_index
from searchr1_fast.retrieval.rows import HostRows, merge
from searchr1_fast.types import Passage
from searchr1_fast.world import build_world

DATA = Path(os.environ.get("SEARCHR1_DATA", Path(__file__).parents[3] / "shared" / "data"))


class Silent:
    @contextmanager
    def phase(self, name, total=None):
        yield lambda finished, total: None


@pytest.fixture(scope="module")
def world():
    return build_world(WorldConfig(split="train", num_entities=300, num_questions=300, hops=(1.0,)))


@pytest.fixture(scope="module")
def corpus(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_corpus(path, world.passages)
    return path


@pytest.fixture(scope="module")
def index(corpus, tmp_path_factory):
    return build_index(tmp_path_factory.mktemp("index") / "i", corpus, EncodingSource(HashingEncoder(256)), Silent())


@pytest.fixture(scope="module")
def search(index):
    return open_dense(index.folder)[0]


@pytest.fixture(scope="module")
def queries(world):
    return [question.text for question in world.questions[:100]]


def test_results_are_those_of_a_plain_product(index, search, queries):
    vectors = np.concatenate([part for _, part in index.vector_parts()]).astype(np.float64)
    products = search.prepare(queries).astype(np.float64) @ vectors.T
    scores, rows = search.search_ids(queries, 7)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    exact = products.astype(np.float32)
    order = np.array([np.lexsort((np.arange(len(row)), -row))[:7] for row in exact])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, axis=1), rtol=1e-6)
    assert (rows == order).mean() > 0.99  # the plain product's last bit may order two rows differently


def test_a_result_depends_on_its_query_alone(search, queries):
    scores, rows = search.search_ids(queries * 3, 5)
    for place in (0, 3, 99, 205):
        alone = search.search_ids([(queries * 3)[place]], 5)
        assert (alone[0][0] == scores[place]).all()
        assert (alone[1][0] == rows[place]).all()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: search.search_ids(queries, 5), range(4)):
            assert (found[0] == scores[:100]).all()
            assert (found[1] == rows[:100]).all()


@pytest.mark.parametrize("rows_per_part", [1, 37, 75, 299])
def test_results_do_not_depend_on_how_the_rows_are_cut(index, search, queries, rows_per_part):
    vectors = np.concatenate([part for _, part in index.vector_parts()])
    vectors[200:210] = vectors[10]  # equal scores, in different parts
    whole = DenseSearch(search.encoder, HostRows([(0, vectors)]))
    parts = [(begin, vectors[begin : begin + rows_per_part].copy()) for begin in range(0, len(vectors), rows_per_part)]
    cut = DenseSearch(search.encoder, HostRows(parts))
    for k in (1, 5, 300):
        for one, other in zip(whole.search_ids(queries[:20], k), cut.search_ids(queries[:20], k), strict=True):
            assert (one == other).all()


def test_the_order_of_a_merge_is_total():
    left = (np.array([[3.0, 1.0]], np.float32), np.array([[7, 8]]))
    right = (np.array([[3.0, 2.0, 1.0]], np.float32), np.array([[2, 3, 4]]))
    scores, rows = merge([left, right], 4)
    assert scores.tolist() == [[3.0, 3.0, 2.0, 1.0]]
    assert rows.tolist() == [[2, 7, 3, 4]]


def test_several_files_are_one_index(corpus, tmp_path, monkeypatch, search, queries):
    monkeypatch.setattr(index_format, "CHUNK_BYTES", 16 * 2 * 256)
    monkeypatch.setattr(index_format, "FILE_BYTES", 64 * 2 * 256)
    index = build_index(tmp_path / "i", corpus, EncodingSource(HashingEncoder(256)), Silent())
    assert len(list(index.vector_parts())) == 5
    for one, other in zip(
        search.search_ids(queries, 9), open_dense(tmp_path / "i")[0].search_ids(queries, 9), strict=True
    ):
        assert (one == other).all()


def test_edges(search, index):
    assert search.search_ids([], 3)[0].shape == (0, 3)
    assert search.search_ids(["x"], 10**9)[1].shape == (1, len(index))
    assert search.search_ids([""], 2)[1].tolist() == [[0, 1]]  # without words all scores are 0, and equal
    with pytest.raises(ValueError, match="at least 1"):
        search.search_ids(["x"], 0)
    with pytest.raises(ValueError, match="300 vectors for 1 passages"):
        DenseRetriever(search, hash_corpus([Passage("a", "b", "c")], 64)[1])
    with pytest.raises(ValueError, match="the corpus is empty"):
        hash_corpus([], 64)


def test_the_retriever_of_the_configuration_is_its_plain_twin(index, corpus, world, queries):
    plain = DenseRetriever(*open_dense(index.folder))
    expected = plain.search([*queries, queries[0]], 3)
    assert expected[0] == expected[-1]
    assert [len(hits) for hits in expected] == [3] * 101
    for config, corpus_of in (
        (RetrievalConfig(backend="dense", index=str(index.folder)), None),
        (RetrievalConfig(backend="dense", hashing_dimension=256), corpus),
        (RetrievalConfig(backend="dense", hashing_dimension=256), world.passages),
    ):
        with open_retriever(config, corpus_of) as retriever:
            assert retriever.search([*queries, queries[0]], 3) == expected
            assert retriever.search([], 3) == []
            assert len(retriever.search(["x"], 10**6)[0]) == len(index)


def test_configurations_that_make_no_sense(index):
    with pytest.raises(ValueError, match="searches an index"):
        open_retriever(RetrievalConfig(backend="dense"), None)
    with pytest.raises(ValueError, match=r"retrieval\.encoder is for an index"):
        open_retriever(RetrievalConfig(backend="dense", encoder="model"), [])
    with pytest.raises(ValueError, match="has no model; leave the encoder out"):
        open_retriever(RetrievalConfig(backend="dense", index=str(index.folder), encoder="model"), None)
    with pytest.raises(ValueError, match="the corpus given too would not be searched"):
        open_retriever(RetrievalConfig(backend="dense", index=str(index.folder)), [Passage("a", "b", "c")])
    with pytest.raises(ValueError, match="there is no index nowhere"):
        open_retriever(RetrievalConfig(backend="dense", index="nowhere"), None)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no device cuda"):
            open_retriever(RetrievalConfig(backend="dense", device="cuda"), [Passage("a", "b", "c")])


# ------------------------------------------------------------------------------------------------------------- recall


def test_hashed_vectors_find_what_a_world_asks_for(world):
    """One hop: they find the passage of the entity that the question names."""
    chains = world.chains()[:200]
    retriever = DenseRetriever(*hash_corpus(world.passages, 2048))
    results = retriever.search([chain.question.text for chain in chains], 2)
    titles = [[hit.title for hit in hits] for hits in results]
    assert np.mean([chain.entities[0].name == found[0] for chain, found in zip(chains, titles, strict=True)]) >= 0.98
    assert np.mean([chain.entities[0].name in found for chain, found in zip(chains, titles, strict=True)]) >= 0.99


@pytest.fixture(scope="module")
def real():
    paths = DATA / "corpus" / "2wiki.jsonl", DATA / "qa" / "2wiki_dev.jsonl"
    for path in paths:
        if not path.is_file():
            pytest.skip(f"no {path}; set SEARCHR1_DATA to the directory that holds corpus/ and qa/")
    return paths[0], [json.loads(line) for line in paths[1].open(encoding="utf-8")]


def recall(retriever, rows, k):
    results = retriever.search([row["question"] for row in rows], k)
    return np.mean([
        len({hit.title for hit in hits} & set(row["supporting_titles"])) / len(row["supporting_titles"])
        for row, hits in zip(rows, results, strict=True)
    ])  # fmt: skip


def test_recall_on_real_questions(real):
    corpus, rows = real
    passages = list(read_corpus(corpus))
    hashed = recall(DenseRetriever(*hash_corpus(passages, 2048)), rows, 5)
    assert hashed >= 0.66
    assert hashed >= recall(BM25Retriever(passages), rows, 5) - 0.01
