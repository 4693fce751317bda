"""BM25 over title and text: bm25s builds the index, a small kernel here searches it.

bm25s scores every posting at build time, so that a query only adds up numbers. Its own top-k breaks ties arbitrarily
and pads with documents of score 0; the kernel here orders by score descending, then row ascending, and returns only
passages that share a word with the query. It holds no lock and releases the GIL, so searches overlap.

Words are letters and digits in lower case without accents, with plurals cut to the singular. Stop words are indexed but
count in a query only if it has nothing else ("It" still finds something).

With `phrases`, two neighbouring words are also a term, unless one is a stop word or anything but blanks is between
them, so word order counts. All names of the generated world are made of the same 512 words; only phrases tell "Zuner
Posus" from "Posus Zuner".

Left out: threads (one core answers thousands of queries a second on a small corpus; bm25s gets slower with them) and
scores that change with the batch: a query's result depends on nothing but the query.

Shape legend
    Z  postings    V  terms    Q  queries    W  terms of all queries
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise

import numba
import numpy as np

from searchr1_fast.retrieval.protocol import check_k
from searchr1_fast.types import Passage

# Where JAX is installed, importing bm25s tries it out, and JAX takes three quarters of a GPU's memory from the trainer
# (and fails the import if another process has that memory). What it would speed up is not used here.
_jax = sys.modules.get("jax")
sys.modules["jax"] = None  # makes importing it an ImportError
try:
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN
finally:
    del sys.modules["jax"]
    if _jax is not None:
        sys.modules["jax"] = _jax

_WORD = re.compile(r"\w[\w\u0300-\u036f]*")  # combining marks belong to the letter before them
_BREAK = re.compile(r"[^\w\u0300-\u036f \t]+")
_UNKNOWN = -1
_ACCENTS = dict.fromkeys(range(0x300, 0x370))


class BM25Retriever:
    """BM25 search in memory. Ids must be unique, which `data.read_corpus` ensures."""

    def __init__(self, passages: Iterable[Passage], k1: float = 0.9, b: float = 0.4, *, phrases: bool = False) -> None:
        self._passages = list(passages)
        if not self._passages:
            raise ValueError("BM25 needs at least one passage; the corpus is empty")
        vocabulary = _Vocabulary()
        runs = [  # per passage
            [[vocabulary[word] for word in run] for run in runs_of(f"{p.title}\n{p.text}")] for p in self._passages
        ]
        self._terms = vocabulary.terms
        if not self._terms:
            raise ValueError("BM25 needs words; no passage of the corpus holds a letter or a digit")
        self._stop_words = frozenset(self._terms[term] for term in STOP_TERMS if term in self._terms)
        self._phrases = _Phrases(len(self._terms)) if phrases else None  # (term, term) -> term of the pair
        documents = [list(chain(*passage)) for passage in runs]
        if phrases:
            for document, passage in zip(documents, runs, strict=True):
                document += [self._phrases[pair] for pair in self._pairs(passage)]
        index = bm25s.BM25(k1=k1, b=b, method="lucene")
        index.index((documents, self._terms | (self._phrases or {})), create_empty_token=False, show_progress=False)
        self._data: np.ndarray = index.scores["data"]  # [Z] fp32: score of the posting
        self._rows: np.ndarray = index.scores["indices"]  # [Z] int32: its passage
        self._offsets: np.ndarray = index.scores["indptr"].astype(np.int64)  # [V+1]: where each term's postings begin

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Passages best first, equal scores by row. Fewer than `k` if fewer of them share a word with the query."""
        check_k(k)
        # Queries with the same known terms are searched once.
        places: dict[tuple[int, ...], int] = {}
        place_of = [places.setdefault(self._query_terms(query), len(places)) for query in queries]
        if not places:
            return []
        lengths = [len(terms) for terms in places]
        terms = np.fromiter((term for query in places for term in query), dtype=np.int64, count=sum(lengths))
        bounds = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        k = min(k, len(self._passages))
        scores, rows, counts = _search(self._data, self._rows, self._offsets, terms, bounds, len(self._passages), k)
        return [self._hits(scores[place], rows[place], counts[place]) for place in place_of]

    def _query_terms(self, query: str) -> tuple[int, ...]:
        """The known terms of a query, without stop words unless it has nothing else."""
        runs = [[self._terms.get(term_of(word), _UNKNOWN) for word in run] for run in runs_of(query)]
        known = [number for run in runs for number in run if number != _UNKNOWN]
        told = [number for number in known if number not in self._stop_words] or known
        if self._phrases is not None:
            told += [self._phrases[pair] for pair in self._pairs(runs) if pair in self._phrases]
        return tuple(told)

    def _pairs(self, runs: Iterable[list[int]]) -> Iterator[tuple[int, int]]:
        """Pairs of neighbours, neither of them a stop word."""
        for pair in chain(*map(pairwise, runs)):
            if pair[0] not in self._stop_words and pair[1] not in self._stop_words:
                yield pair

    def _hits(self, scores: np.ndarray, rows: np.ndarray, count: int) -> list[Passage]:
        """scores [k] fp32, rows [k] int64."""
        hits = []
        for row, score in zip(rows[:count].tolist(), scores[:count].tolist(), strict=True):
            passage = self._passages[row]
            hits.append(Passage(passage.id, passage.title, passage.text, score))
        return hits


class _Vocabulary(dict[str, int]):
    """Word as written -> number of its term. A term is computed once per word, not once per occurrence."""

    def __init__(self) -> None:
        self.terms: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        self[word] = number = self.terms.setdefault(term_of(word), len(self.terms))
        return number


class _Phrases(dict[tuple[int, int], int]):
    """Pair of terms -> number of the pair's own term, after the numbers of the words."""

    def __init__(self, num_words: int) -> None:
        self._num_words = num_words

    def __missing__(self, pair: tuple[int, int]) -> int:
        self[pair] = number = self._num_words + len(self)
        return number


def words_of(text: str) -> list[str]:
    """The words of a text in order, as written except for case."""
    return _WORD.findall(text.lower())


def runs_of(text: str) -> list[list[str]]:
    """The words of a text, in runs that end where anything but blanks stands between two words."""
    return [words for part in _BREAK.split(text) if (words := words_of(part))]


def term_of(word: str) -> str:
    """The term that a word is indexed as."""
    if not word.isascii():
        word = unicodedata.normalize("NFKD", word).translate(_ACCENTS)
    return _singular(word)


def _singular(word: str) -> str:
    """Cities -> city, cars -> car; glass, gas and its stay. Rough, but the same for queries and passages."""
    if len(word) <= 3 or not word.endswith("s") or word.endswith("ss"):
        return word
    return f"{word[:-3]}y" if len(word) > 4 and word.endswith("ies") else word[:-1]


STOP_TERMS = frozenset(map(term_of, STOPWORDS_EN))


@numba.njit(nogil=True, cache=True)
def _search(
    data: np.ndarray,  # [Z] fp32
    posting_rows: np.ndarray,  # [Z] int32
    offsets: np.ndarray,  # [V+1] int64
    terms: np.ndarray,  # [W] int64
    bounds: np.ndarray,  # [Q+1] int64: where each query's terms begin
    num_passages: int,
    k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scores [Q,k] fp32, rows [Q,k] int64, counts [Q] int64: how many of the k are hits."""
    num_queries = len(bounds) - 1
    top_scores = np.zeros((num_queries, k), dtype=np.float32)
    top_rows = np.zeros((num_queries, k), dtype=np.int64)
    counts = np.zeros(num_queries, dtype=np.int64)
    total = np.zeros(num_passages, dtype=np.float32)
    for query in range(num_queries):
        total[:] = 0
        for term in terms[bounds[query] : bounds[query + 1]]:
            for posting in range(offsets[term], offsets[term + 1]):
                total[posting_rows[posting]] += data[posting]
        count = 0
        floor = np.float32(0)  # a score must exceed it to enter: 0 is no hit, and an equal later row loses
        for row in range(num_passages):
            score = total[row]
            if score <= floor:
                continue
            place = count if count < k else k - 1
            while place > 0 and top_scores[query, place - 1] < score:
                top_scores[query, place] = top_scores[query, place - 1]
                top_rows[query, place] = top_rows[query, place - 1]
                place -= 1
            top_scores[query, place] = score
            top_rows[query, place] = row
            if count < k:
                count += 1
            if count == k:
                floor = top_scores[query, k - 1]
        counts[query] = count
    return top_scores, top_rows, counts
