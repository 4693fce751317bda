"""BM25 against the formula written out, its promises (ties, counts, batches), and recall on real questions."""

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.config import RetrievalConfig
from searchr1_fast.data import write_corpus
from searchr1_fast.retrieval import BM25Retriever, MissingRetriever, NullRetriever, RemoteRetriever, open_retriever
from searchr1_fast.types import Passage

DATA = Path(os.environ.get("SEARCHR1_DATA", Path(__file__).parents[3] / "shared" / "data"))


def passages(*texts: str) -> list[Passage]:
    return [Passage(f"p{row}", "", text) for row, text in enumerate(texts)]


def ids(hits: list[Passage]) -> list[str]:
    return [hit.id for hit in hits]


@pytest.mark.parametrize(
    ("corpus", "questions", "at_2", "at_5"),
    [("2wiki", "2wiki_dev", 0.54, 0.64), ("hotpotqa_dev100", "hotpotqa_dev100", 0.525, 0.70)],
)
def test_recall_on_real_questions(corpus, questions, at_2, at_5):
    corpus_path, questions_path = DATA / "corpus" / f"{corpus}.jsonl", DATA / "qa" / f"{questions}.jsonl"
    for path in (corpus_path, questions_path):
        if not path.is_file():
            pytest.skip(f"no {path}; set SEARCHR1_DATA to the directory that holds corpus/ and qa/")
    rows = [json.loads(line) for line in questions_path.open(encoding="utf-8")]
    retriever = open_retriever(RetrievalConfig(), corpus_path)
    results = retriever.search([row["question"] for row in rows], 5)

    def recall(k: int) -> float:
        shares = [
            len({hit.title for hit in hits[:k]} & set(row["supporting_titles"])) / len(row["supporting_titles"])
            for row, hits in zip(rows, results, strict=True)
        ]
        return sum(shares) / len(shares)

    assert recall(2) >= at_2
    assert recall(5) >= at_5


def reference_scores(documents: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for word in query:
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(document) / mean_length))
        scores.append(score)
    return scores


documents_strategy = st.lists(
    st.lists(st.sampled_from(["red", "blue", "green", "pink", "gold"]), max_size=8), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(
    documents_strategy.filter(any),
    st.lists(st.sampled_from(["red", "blue", "gold", "none"]), max_size=4),
    st.integers(1, 15),
)
def test_scores_and_order_follow_the_formula(documents, query, k):
    retriever = BM25Retriever(passages(*map(" ".join, documents)), k1=1.2, b=0.75)
    (hits,) = retriever.search([" ".join(query)], k)
    expected = reference_scores(documents, query, k1=1.2, b=0.75)
    assert len(hits) == min(k, sum(score > 0 for score in expected))
    for hit in hits:
        assert hit.score == pytest.approx(expected[int(hit.id[1:])], rel=1e-5)
    order = [(-hit.score, int(hit.id[1:])) for hit in hits]
    assert order == sorted(order)
    left_out = [score for row, score in enumerate(expected) if f"p{row}" not in ids(hits)]
    assert not hits or max(left_out, default=0) <= hits[-1].score * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=4), st.lists(st.text(), max_size=3))
def test_any_text_can_be_indexed_and_searched(texts, queries):
    retriever = BM25Retriever(passages("word", *texts))
    for query, hits in zip([*texts, *queries], retriever.search([*texts, *queries], 9), strict=True):
        assert all(hit.score > 0 for hit in hits)
        assert hits or not any(character.isalnum() for character in query) or query not in texts


def test_ties_go_by_row_also_at_the_cut():
    retriever = BM25Retriever(passages(*["same words"] * 40, "others"))
    for k in (1, 3, 7, 40):
        assert ids(retriever.search(["same"], k)[0]) == [f"p{row}" for row in range(k)]


def test_never_more_than_there_is():
    retriever = BM25Retriever(passages("red fox", "red dog", "blue dog"))
    assert ids(retriever.search(["red"], 10)[0]) == ["p0", "p1"]
    assert retriever.search(["unknown words", "", "?!"], 3) == [[], [], []]
    assert retriever.search([], 3) == []


def test_title_counts_and_comes_back():
    corpus = [Passage("a", "Paris", "A city."), Passage("b", "Rome", "A city.\nIn Italy.")]
    (hits,) = BM25Retriever(corpus).search(["rome"], 3)
    assert [(hit.id, hit.title, hit.text) for hit in hits] == [("b", "Rome", "A city.\nIn Italy.")]
    assert hits[0].score > 0


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("CITIES", "a city"),
        ("car", "cars"),
        ("bruckner", "Brückner"),
        ("Bru\u0308ckner", "BRÜCKNER"),
        ("Zoë's", "zoe"),
        ("glass", "glass"),
    ],
)
def test_words_meet(query, text):
    assert ids(BM25Retriever(passages("nothing here", text)).search([query], 1)[0]) == ["p1"]


def test_stop_words_count_only_alone():
    retriever = BM25Retriever(passages("the and the of", "fox", "dog"))
    assert ids(retriever.search(["the fox"], 3)[0]) == ["p1"]
    assert ids(retriever.search(["The And"], 3)[0]) == ["p0"]
    assert ids(retriever.search(["the unheard"], 3)[0]) == ["p0"]


@settings(max_examples=60, deadline=None)
@given(documents_strategy.filter(any), st.lists(st.sampled_from(["red", "blue", "gold", "none"]), max_size=4))
def test_phrases_are_words_that_stand_behind_the_others(documents, query):
    """Neighbouring pairs, joined into words and appended, give the same scores."""

    def with_pairs(words: list[str]) -> str:
        return " ".join([*words, *(f"{first}{second}" for first, second in zip(words, words[1:], strict=False))])

    phrased = BM25Retriever(passages(*map(" ".join, documents)), phrases=True)
    joined = BM25Retriever(passages(*map(with_pairs, documents)))
    (hits,), (expected,) = phrased.search([" ".join(query)], 12), joined.search([with_pairs(query)], 12)
    assert ids(hits) == ids(expected)
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], rel=1e-5)


def test_phrases_tell_an_order_of_words():
    corpus = passages("zuner posus is a city", "posus zuner is a city")
    for query, best in (("zuner posus", "p0"), ("posus zuner", "p1"), ("where is Posus Zuner?", "p1")):
        assert ids(BM25Retriever(corpus, phrases=True).search([query], 2)[0])[0] == best
        assert ids(BM25Retriever(corpus).search([query], 2)[0]) == ["p0", "p1"]  # a tie


@pytest.mark.parametrize("between", [". ", ", ", "\n", "-", " the ", " unheard "])
def test_no_phrase_goes_over_what_stands_between(between):
    first = "red fox" if between == " unheard " else f"red{between}fox"
    retriever = BM25Retriever(passages(first, "fox red", "red fox"), phrases=True)
    red, fox, both = (
        {hit.id: hit.score for hit in hits} for hits in retriever.search(["red", "fox", f"red{between}fox"], 3)
    )
    for row in both:
        assert both[row] == pytest.approx(red[row] + fox[row], rel=1e-6)  # no more than the words' scores
    if between != " unheard ":
        joined = {hit.id: hit.score for hit in retriever.search(["red fox"], 3)[0]}
        assert joined["p0"] == pytest.approx(red["p0"] + fox["p0"], rel=1e-6)
        assert joined["p2"] > joined["p0"] + 0.1


def test_a_result_depends_on_its_query_alone():
    chooser = random.Random(0)
    words = [f"word{number}" for number in range(60)]
    retriever = BM25Retriever(passages(*(" ".join(chooser.choices(words, k=12)) for _ in range(300))))
    queries = [" ".join(chooser.choices(words, k=4)) for _ in range(40)]
    alone = [retriever.search([query], 5)[0] for query in queries]
    assert retriever.search(queries, 5) == alone
    doubled = retriever.search([*queries, *reversed(queries)], 5)
    assert doubled == [*alone, *reversed(alone)]
    assert doubled[0] is not doubled[-1]  # callers may modify their list
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda query: retriever.search([query], 5)[0], queries)) == alone


def test_bad_input():
    with pytest.raises(ValueError, match="corpus is empty"):
        BM25Retriever([])
    with pytest.raises(ValueError, match="needs words"):
        BM25Retriever(passages("?!", ""))
    with pytest.raises(ValueError, match="at least 1, not 0"):
        BM25Retriever(passages("x")).search(["x"], 0)


def test_open_retriever(tmp_path):
    corpus = passages("red fox", "blue dog", "red dog")
    path = tmp_path / "corpus.jsonl"
    write_corpus(path, corpus)
    config = RetrievalConfig(bm25_k1=1.5, bm25_b=0.1)
    expected = BM25Retriever(corpus, k1=1.5, b=0.1).search(["red dog"], 3)
    assert open_retriever(config, path).search(["red dog"], 3) == expected
    assert open_retriever(config, corpus).search(["red dog"], 3) == expected
    phrases = open_retriever(RetrievalConfig(bm25_phrases=True), corpus).search(["red dog"], 3)
    assert phrases == BM25Retriever(corpus, phrases=True).search(["red dog"], 3) != expected
    missing = open_retriever(RetrievalConfig(miss_rate=1.0), corpus)
    assert isinstance(missing, MissingRetriever)
    assert ids(missing.search(["red dog"], 3)[0]) == ids(expected[0])[1:]
    assert isinstance(open_retriever(RetrievalConfig(backend="remote"), None), RemoteRetriever)
    nothing = open_retriever(RetrievalConfig(backend="none", miss_rate=0.5), None)
    assert isinstance(nothing, NullRetriever)
    assert nothing.search(["red", "dog"], 3) == [[], []]
    with pytest.raises(ValueError, match="searches a corpus"):
        open_retriever(RetrievalConfig(), None)


def test_jax_is_left_alone(tmp_path):
    """Trying out JAX, as bm25s does, takes most of a GPU's memory."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("print('imported')")
    (tmp_path / "jax" / "lax.py").write_text("raise RuntimeError('no supported devices found')")
    code = "import searchr1_fast.retrieval.bm25, bm25s; print(bm25s.selection.JAX_IS_AVAILABLE); import jax"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["False", "imported"]  # code that wants JAX still gets it
