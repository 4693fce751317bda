"""Searches a faiss file built elsewhere (flat, IVF, HNSW, CAGRA, …), by faiss itself.

Only for `searchr1 serve`, whose process contains no trainer: faiss brings an OpenMP and a BLAS of its own beside
torch's, and its GPU indexes are not safe to search from two threads. Here only the batcher's thread calls it.

Only a flat file is searched exactly. Any other is reported as approximate (`mode`), and its results may differ from an
exact search of the vectors. If you have the vectors, `searchr1 index import` serves you better.

Shape legend
    Q  queries    K  hits of a query: k, or all rows if fewer    D  components
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from searchr1_fast.retrieval.encoders import Encoder
from searchr1_fast.retrieval.protocol import Mode, check_k


class FaissSearch:
    """A backend of two stages for the batcher: queries to vectors, vectors to rows."""

    def __init__(self, path: str | Path, encoder: Encoder, parameters: str = "") -> None:
        """`parameters`: for faiss' ParameterSpace, such as `nprobe=64` or `efSearch=128`. ValueError if the file is no
        index, faiss is not installed, or the encoder's vectors are of another size."""
        self.encoder = encoder
        self._faiss = _import_faiss()
        self._index = self._read(Path(path), parameters)
        self._is_distance = self._index.metric_type == self._faiss.METRIC_L2
        if not self._is_distance and self._index.metric_type != self._faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{path}: only inner products and squared distances can be searched for")
        if self._index.d != encoder.dimension:
            raise ValueError(f"{path} has vectors of {self._index.d} components, the encoder makes {encoder.dimension}")
        if not len(self):
            raise ValueError(f"{path} holds no vectors")
        self._name = str(path)
        self._check_rows(self._named_rows())

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def mode(self) -> Mode:
        """`exact` for a flat file, else `approximate`."""
        is_flat = isinstance(self._faiss.downcast_index(self._index), self._faiss.IndexFlat)
        return "exact" if is_flat else "approximate"

    @property
    def kind(self) -> str:
        """faiss' name for the kind of index."""
        return type(self._faiss.downcast_index(self._index)).__name__

    def search_ids(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores [Q,K] fp32, rows [Q,K] int64), best first, equal scores by row; scores of squared distances are
        negative. Where a query has fewer hits, the rest is -inf and -1."""
        return self.search_prepared(self.prepare(queries), k)

    def prepare(self, queries: Sequence[str]) -> np.ndarray:
        """The first stage: queries -> vectors [Q,D] fp32."""
        return self.encoder.encode_queries(queries)

    def search_prepared(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The second stage: vectors [Q,D] fp32 -> what `search_ids` returns."""
        check_k(k)
        found, rows = self._index.search(np.ascontiguousarray(vectors, np.float32), min(k, len(self)))
        self._check_rows(rows)
        scores = np.where(rows < 0, -np.inf, -found if self._is_distance else found).astype(np.float32)
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows.astype(np.int64), order, axis=1)

    def _named_rows(self) -> np.ndarray:
        """The ids of all vectors [M] if the file stores them together (an IDMap), else an empty array."""
        index = self._faiss.downcast_index(self._index)
        if not isinstance(index, self._faiss.IndexIDMap | self._faiss.IndexIDMap2):
            return np.empty(0, np.int64)
        return self._faiss.vector_to_array(index.id_map)

    def _check_rows(self, rows: np.ndarray) -> None:
        """Raise ValueError for an id that is no row: faiss allows any id, but passages are found by row. -1: no hit."""
        strange = rows[(rows < -1) | (rows >= len(self))]
        if strange.size:
            raise ValueError(
                f"{self._name} has a vector with the id {strange[0]}; the ids of its {len(self)} vectors must be rows "
                "of the corpus, from 0 on: build it without ids of its own"
            )

    def _read(self, path: Path, parameters: str) -> Any:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            index = self._faiss.read_index(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be read as a faiss index: {_first_line(error)}") from error
        if parameters:
            try:
                self._faiss.ParameterSpace().set_index_parameters(index, parameters)
            except RuntimeError as error:
                raise ValueError(f"{parameters!r} cannot be set on {path}: {_first_line(error)}") from error
        return index


def _import_faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ValueError("a faiss file is searched by faiss, which is not installed: pip install faiss-cpu") from error
    return faiss


def _first_line(error: BaseException) -> str:
    """faiss' message without the function, source file and condition that precede it."""
    line = str(error).strip().splitlines()[0]
    return re.sub(r"^Error in .*? at \S+:\d+: ", "", line).rpartition("failed: ")[2]
