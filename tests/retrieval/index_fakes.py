"""Shared by the tests of indexes: a small corpus, given vectors, and chunks of sixteen rows."""

from __future__ import annotations

import gzip
import json
from contextlib import contextmanager

import numpy as np

DIMENSION = 64


class Silent:
    @contextmanager
    def phase(self, name, total=None):
        yield lambda finished, total: None


class Given:
    """A `VectorSource` of existing vectors, which can be made to fail at a row."""

    identity = {"encoder": {"kind": "given"}}

    def __init__(self, vectors, fail_at=None):
        self.vectors, self.dimension = vectors, vectors.shape[1]
        self.fail_at, self.asked = fail_at, []

    def prepare(self, folder, texts, progress):
        return {"kind": "given"}

    def rows(self, begin, end, texts):
        if self.fail_at is not None and end > self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(begin)
        return self.vectors[begin:end]


def write_corpus(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def corpus_rows(count, named=False):
    return [{"id": f"p{row}" if named else str(row), "contents": f'"Title {row}"\nText of {row}, Łódź.\nMore.'}
            for row in range(count)]  # fmt: skip


def random_vectors(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float16)


def stored(index):
    return np.concatenate([vectors for _, vectors in index.vector_parts()])
