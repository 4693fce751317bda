"""An encoder without a model: hashes every word to a few signed components, weighted as in BM25.

    passage component of a word   idf * tf / (tf + k1 * (1 - b + b * length / mean length))
    query component of a word     idf * tf

Each word adds its weight, divided by the square root of four, to four components; its hash chooses the components and
their signs. In expectation the inner product is the sum over shared words of the product of their weights (feature
hashing, Weinberger et al. 2009, equation 5); collisions add noise that falls with the square root of the dimension. idf
on both sides, rather than once as in BM25, keeps frequent words from making that noise.

Document frequencies are counted in 2^18 buckets by hash, so that what is kept of the corpus is 1 MiB whatever its
vocabulary; a rare word that shares a bucket with another counts as a little less rare. Words are those of bm25.py.

Measured on 2WikiMultihopQA (605 questions, 6,119 passages), R@2 / R@5: 512 components 47.9 / 58.4 %, 1,024 55.0 / 64.7,
2,048 57.0 / 67.4, 4,096 57.5 / 68.0. Tried at 1,024 and rejected: one component per word 44.3 / 56.4, eight 55.5 /
64.6; vectors of length 1 43.5 / 57.3; word pairs added 43.0 / 50.4, character 4-grams added 53.8 / 63.1.

Shape legend
    N  texts    Z  words of all texts    D  components    B  buckets
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np

from searchr1_fast.retrieval.bm25 import STOP_TERMS, term_of, words_of
from searchr1_fast.retrieval.index_format import TextColumn, digest_bytes
from searchr1_fast.types import Progress

FILE = "encoder-hashing.bin"
_SCHEME = 1  # of words, hashes and weights; vectors of different schemes must not be compared
_NUM_BUCKETS = 1 << 18
_COPIES = 4  # components that a word adds to
_K1, _B = 0.9, 0.4
_TEXTS_AT_ONCE = 4096
_MAX_CACHED_WORDS = 1 << 20  # about 150 MB; a corpus of numbers would otherwise fill memory with words seen once


class HashingEncoder:
    """Encodes by hashed words. Call `fit` (or `count`) first: weights come from the corpus."""

    def __init__(self, dimension: int = 2048) -> None:
        if dimension < 64:
            raise ValueError(f"--dimension {dimension}: hashed words need at least 64 components to keep apart in")
        self.dimension = dimension
        self._hashes: dict[str, tuple[int, bool]] = {}
        self._idf = np.zeros(_NUM_BUCKETS, dtype=np.float32)  # [B]
        self._mean_length = 1.0
        self._digest = ""

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, scheme and dimension; the weights follow from the corpus."""
        return {"kind": "hashing", "scheme": _SCHEME, "dimension": self.dimension}

    @classmethod
    def open(cls, record: dict[str, Any], folder: Path) -> HashingEncoder:
        """The encoder as an index recorded it."""
        encoder = cls(record["dimension"])
        if record.get("scheme") != _SCHEME:
            raise ValueError(f"{folder} holds hashed vectors of another version of this program; build the index again")
        counts = np.fromfile(folder / FILE, dtype="<u4")
        if digest_bytes(counts.tobytes()) != record["digest"] or len(counts) != _NUM_BUCKETS:
            raise ValueError(f"{folder / FILE} is damaged: its digest does not fit the manifest")
        encoder._set(counts, record["num_texts"], record["num_words"])
        return encoder

    def fit(self, folder: Path, texts: TextColumn, progress: Progress) -> dict[str, Any]:
        """Count the texts in which each bucket's words occur, and keep the counts in `folder`."""
        counts, num_words = self.count((texts.slice(begin, min(begin + _TEXTS_AT_ONCE, len(texts)))
                                        for begin in range(0, len(texts), _TEXTS_AT_ONCE)),
                                       lambda done: progress(done, len(texts)))  # fmt: skip
        counts.astype("<u4").tofile(folder / FILE)
        return self.identity | {"num_texts": len(texts), "num_words": num_words, "digest": self._digest}

    def count(self, batches: Iterable[Sequence[str]], progress: Any = lambda done: None) -> tuple[np.ndarray, int]:
        """Learn from texts in memory -> (document frequencies [B] uint32, number of words)."""
        counts = np.zeros(_NUM_BUCKETS, dtype=np.uint32)
        num_texts = num_words = 0
        for batch in batches:
            words, bounds = self._words(batch)
            _count(words, bounds, counts)
            num_texts += len(batch)
            num_words += len(words)
            progress(num_texts)
        self._set(counts, num_texts, num_words)
        return counts, num_words

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """[N,D] fp32. A query of unknown words only still has a vector; that of a query without words is zero."""
        return self._encode(queries, True)

    def encode_passages(self, contents: Sequence[str]) -> np.ndarray:
        """[N,D] fp32."""
        return self._encode(contents, False)

    def _set(self, counts: np.ndarray, num_texts: int, num_words: int) -> None:
        """counts [B] uint32."""
        self._digest = digest_bytes(counts.astype("<u4").tobytes())
        # fp64, then rounded to fp32: libraries differ in the last bit of a logarithm, after rounding hardly ever.
        ratio = (num_texts - counts.astype(np.float64) + 0.5) / (counts + 0.5)
        self._idf = np.log1p(np.maximum(ratio, 0.0)).astype(np.float32)
        self._mean_length = max(1.0, num_words / max(1, num_texts))

    def _encode(self, texts: Sequence[str], is_query: bool) -> np.ndarray:
        words, bounds = self._words(texts)
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        _project(words, bounds, self._idf, self._mean_length, is_query, vectors)
        return vectors

    def _words(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(hashes of words [Z] uint64, where each text's begin [N+1] int64), without stop words if there are others."""
        if len(self._hashes) > _MAX_CACHED_WORDS:
            self._hashes.clear()
        hashes: list[int] = []
        bounds = np.zeros(len(texts) + 1, dtype=np.int64)
        for number, text in enumerate(texts, start=1):
            known = [self._hashes.get(word) or self._hash(word) for word in words_of(text)]
            hashes += [code for code, is_stop in known if not is_stop] or [code for code, _ in known]
            bounds[number] = len(hashes)
        return np.array(hashes, dtype=np.uint64), bounds

    def _hash(self, word: str) -> tuple[int, bool]:
        """(hash of the word's term, whether that is a stop word). Computed once per word, not per occurrence."""
        term = term_of(word)
        digest = hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._hashes[word] = known = (int.from_bytes(digest, "little"), term in STOP_TERMS)
        return known


@numba.njit(nogil=True, cache=True)
def _count(words: np.ndarray, bounds: np.ndarray, counts: np.ndarray) -> None:
    """Add one to the bucket of every word of a text, once per text. words [Z] uint64, bounds [N+1], counts [B]."""
    mask = np.uint64(len(counts) - 1)
    for text in range(len(bounds) - 1):
        own = np.sort(words[bounds[text] : bounds[text + 1]])
        for place in range(len(own)):
            if place == 0 or own[place] != own[place - 1]:
                counts[own[place] & mask] += np.uint32(1)


@numba.njit(nogil=True, cache=True)
def _project(
    words: np.ndarray,  # [Z] uint64
    bounds: np.ndarray,  # [N+1] int64
    idf: np.ndarray,  # [B] fp32
    mean_length: float,
    is_query: bool,
    vectors: np.ndarray,  # [N,D] fp32, zero
) -> None:
    """Add up words in the order of their hashes, so that a component's sum does not depend on the text's order."""
    mask = np.uint64(len(idf) - 1)
    dimension = np.uint64(vectors.shape[1])
    for text in range(len(bounds) - 1):
        own = np.sort(words[bounds[text] : bounds[text + 1]])
        saturation = _K1 * (1 - _B + _B * len(own) / mean_length)
        place = 0
        while place < len(own):
            word, first = own[place], place
            while place < len(own) and own[place] == word:
                place += 1
            count = place - first
            weight = idf[word & mask] * (count if is_query else count / (count + saturation)) / np.sqrt(_COPIES)
            state = word
            for _ in range(_COPIES):
                state = _next(state)
                component = (state >> np.uint64(1)) % dimension
                vectors[text, component] += np.float32(weight if state & np.uint64(1) else -weight)


@numba.njit(nogil=True, inline="always")
def _next(state: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014): the next in a sequence of well-mixed 64-bit numbers."""
    state += np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
