"""Retrieval: the `Retriever` protocol and its implementations. Start with `open_retriever`.

    protocol.py    Retriever, RetrievalError    bm25.py          in memory, lexical
    remote.py      Search-R1's HTTP, client     dense.py         exact search over vectors
    server.py      Search-R1's HTTP, server     batcher.py       many searches into few, in C++
    *_rows.py      vectors: host, GPU, ranks    shard_link.py    how ranks reach one another
    web.py         live web search              faiss_search.py  faiss files, in a server
    index_*.py     indexes on disk              passages.py      their passages, in C++
    encode*.py     text to vectors              missing.py       a retriever that misses now and then
    statistics.py  what searches cost per step

The names are resolved on first use: importing numba and bm25s takes a second that a remote client need not spend.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchr1_fast.retrieval.protocol import NullRetriever, RetrievalError, Retriever

if TYPE_CHECKING:
    from searchr1_fast.config import RetrievalConfig
    from searchr1_fast.retrieval.bm25 import BM25Retriever
    from searchr1_fast.retrieval.dense import DenseRetriever, DenseSearch, Show
    from searchr1_fast.retrieval.missing import MissingRetriever
    from searchr1_fast.retrieval.remote import RemoteRetriever
    from searchr1_fast.retrieval.server import RetrievalServer
    from searchr1_fast.retrieval.shard_link import Peers
    from searchr1_fast.types import Passage

__all__ = [
    "BM25Retriever",
    "DenseRetriever",
    "DenseSearch",
    "MissingRetriever",
    "NullRetriever",
    "RemoteRetriever",
    "RetrievalError",
    "RetrievalServer",
    "Retriever",
    "open_retriever",
]

_HOMES = {
    "BM25Retriever": "bm25",
    "DenseRetriever": "dense",
    "DenseSearch": "dense",
    "MissingRetriever": "missing",
    "RemoteRetriever": "remote",
    "RetrievalServer": "server",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def open_retriever(
    config: RetrievalConfig,
    corpus: str | Path | Sequence[Passage] | None,
    peers: Peers | None = None,
    show: Show | None = None,
) -> Retriever:
    """Open the retriever that `config` asks for.

    corpus: a JSONL file or passages, for `bm25` and for `dense` without an index. peers: all ranks of the run, which
    must then all call this: an index is split among the ranks of a machine (`retrieval.sharded`). show: where slow
    steps are reported.
    """
    retriever: Retriever
    if config.backend == "bm25":
        retriever = _open_bm25(config, corpus)
    elif config.backend == "remote":
        from searchr1_fast.retrieval.remote import RemoteRetriever

        token = os.environ.get(config.token_variable, "")
        retriever = RemoteRetriever(config.url, config.timeout_seconds, config.max_retries, token)
    elif config.backend == "web":
        retriever = _open_web(config)
    elif config.backend == "dense":
        retriever = _open_dense(config, corpus, peers, show)
    else:
        return NullRetriever()
    if config.miss_rate > 0:
        from searchr1_fast.retrieval.missing import MissingRetriever

        retriever = MissingRetriever(retriever, config.miss_rate, config.miss_seed)
    return retriever


def _open_bm25(config: RetrievalConfig, corpus: str | Path | Sequence[Passage] | None) -> Retriever:
    from searchr1_fast.data import read_corpus
    from searchr1_fast.retrieval.bm25 import BM25Retriever

    if corpus is None:
        raise ValueError("retrieval.backend bm25 searches a corpus; give one (data.corpus), or choose remote or none")
    passages = read_corpus(corpus) if isinstance(corpus, str | Path) else corpus
    return BM25Retriever(passages, k1=config.bm25_k1, b=config.bm25_b, phrases=config.bm25_phrases)


def _open_web(config: RetrievalConfig) -> Retriever:
    from searchr1_fast.retrieval.web import KEY_VARIABLES, WebRetriever

    variable = KEY_VARIABLES[config.web_engine]
    key = os.environ.get(variable, "").strip()  # a key from a file may end in a newline, which no header accepts
    if not key:
        raise ValueError(f"retrieval.web_engine={config.web_engine} wants the service's key in {variable}")
    return WebRetriever(
        config.web_engine, key, url=config.web_url, pages=config.web_pages, per_host=config.web_per_host,
        timeout=config.timeout_seconds, max_retries=config.max_retries,
    )  # fmt: skip


def _open_dense(
    config: RetrievalConfig, corpus: str | Path | Sequence[Passage] | None, peers: Peers | None, show: Show | None
) -> Retriever:
    from searchr1_fast.data import read_corpus
    from searchr1_fast.retrieval.batcher import BatchedRetriever
    from searchr1_fast.retrieval.dense import hash_corpus, open_dense
    from searchr1_fast.retrieval.passages import PassageStore

    if config.index is not None:
        if corpus is not None:
            raise ValueError(
                f"retrieval.index {config.index} brings its passages, so the corpus given too would not be searched; "
                "drop one of them"
            )
        search, index = open_dense(
            config.index, config.encoder, config.device,
            scan=config.scan, peers=peers if config.sharded else None, timeout=config.timeout_seconds, show=show,
        )  # fmt: skip
        identity = index.manifest.digest()
        return BatchedRetriever(search, PassageStore(index.folder), timeout=config.timeout_seconds, identity=identity)
    if config.encoder is not None:
        raise ValueError("retrieval.encoder is for an index; build one (`searchr1 index build`), give retrieval.index")
    if corpus is None:
        raise ValueError("retrieval.backend dense searches an index (retrieval.index) or a corpus (data.corpus)")
    passages = read_corpus(corpus) if isinstance(corpus, str | Path) else corpus
    search, store = hash_corpus(passages, config.hashing_dimension, config.device, config.scan)
    identity = f"hashed in memory, {config.hashing_dimension} components, {store.digest()}"
    return BatchedRetriever(search, store, timeout=config.timeout_seconds, identity=identity)
