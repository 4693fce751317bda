"""Fixtures for the tests of batcher and index, built from batcher_fakes.py and index_fakes.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from batcher_fakes import Backend, Rows
from index_fakes import DIMENSION

from searchr1_fast.retrieval import index_build, index_format
from searchr1_fast.retrieval.batcher import BatchedRetriever


@pytest.fixture
def backend():
    backend = Backend()
    yield backend
    backend.let_go()


@pytest.fixture
def make(backend):
    """Options -> a batched retriever over `backend` (or another backend), closed at the end."""
    made = []

    def build(other=None, **options) -> BatchedRetriever:
        retriever = BatchedRetriever(other or backend, Rows(), **options)
        made.append(retriever)
        return retriever

    yield build
    backend.let_go()
    for retriever in made:
        retriever.close()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def small_chunks(monkeypatch):
    """Use sixteen rows per chunk and three chunks per file."""
    monkeypatch.setattr(index_format, "CHUNK_BYTES", 16 * 2 * DIMENSION)
    monkeypatch.setattr(index_format, "FILE_BYTES", 3 * 16 * 2 * DIMENSION)
    monkeypatch.setattr(index_build, "_SECONDS_BETWEEN_SYNCS", 0.0)
