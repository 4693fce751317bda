"""Reads faiss' flat files without faiss and without a copy in memory: `e5_Flat.index`, whole or in pieces.

A flat file is a header and then raw fp32 rows (faiss, impl/index_write.cpp):

    0   4 bytes   "IxFI" inner product, "IxF2" squared distance, "IxFl" another metric
    4   int32     D                      8   int64     M
    16  int64     unused, twice          32  uint8     is trained
    33  int32     metric (0 inner product, 1 squared distance)
    37  uint64    M * D                  45  float32   rows

The published index comes as pieces (`part_aa`, `part_ab`) that are meant to be joined; they are read as they are, which
saves another 65 GB of disk.

Left out: every file that is not flat. Squared distance is accepted if all rows have the same length, because its order
is then that of the inner product.

Shape legend
    M  rows    N  rows of a chunk    D  components
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from searchr1_fast.retrieval.index_format import Index, sync
from searchr1_fast.types import Progress

_HEADER = struct.Struct("<4siqqqBiQ")
_INNER_PRODUCT, _SQUARED_DISTANCE = 0, 1
_LENGTH_TOLERANCE = 2e-3  # of rows under squared distance: fp16 arithmetic leaves unit vectors within 4e-4 of 1


class FlatFile:
    """A flat file in one piece, or in several given in order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [Path(path) for path in paths]
        for path in self.paths:
            if not path.is_file():
                raise ValueError(f"there is no file {path}")
        sizes = [path.stat().st_size for path in self.paths]
        self._begins = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        name = ", ".join(map(str, self.paths))
        if self._begins[-1] < _HEADER.size:
            raise ValueError(f"{name} is too short to be a faiss index")
        fourcc, dimension, num_rows, _, _, _, metric, count = _HEADER.unpack(self._read(0, _HEADER.size))
        if fourcc not in (b"IxFI", b"IxF2", b"IxFl") or metric not in (_INNER_PRODUCT, _SQUARED_DISTANCE):
            kind = fourcc.decode("ascii", "replace")
            raise ValueError(
                f"{name} is not a flat faiss index over inner products (it begins with {kind!r}, metric {metric}); "
                "only flat ones hold the vectors themselves"
            )
        if dimension < 1 or num_rows < 1 or count != num_rows * dimension:
            raise ValueError(f"{name} is damaged: its header says {num_rows} rows of {dimension} and {count} numbers")
        expected = _HEADER.size + 4 * count
        if self._begins[-1] != expected:
            hint = "; give all its pieces, in order" if self._begins[-1] < expected else ""
            raise ValueError(f"{name} has {self._begins[-1]} bytes where its header asks for {expected}{hint}")
        self.name = name
        self.dimension: int = dimension
        self.num_rows: int = num_rows
        self.metric = "inner_product" if metric == _INNER_PRODUCT else "squared_distance"
        self._shortest, self._longest = np.inf, 0.0

    def rows(self, begin: int, end: int) -> np.ndarray:
        """[N,D] fp32: rows begin to end."""
        row_bytes = 4 * self.dimension
        data = self._read(_HEADER.size + begin * row_bytes, (end - begin) * row_bytes)
        rows = np.frombuffer(data, dtype="<f4").reshape(end - begin, self.dimension)
        if self.metric == "squared_distance":
            self._check_lengths(rows)
        return rows

    def _check_lengths(self, rows: np.ndarray) -> None:
        lengths = np.linalg.norm(rows, axis=1)
        self._shortest = min(self._shortest, float(lengths.min()))
        self._longest = max(self._longest, float(lengths.max()))
        if self._longest - self._shortest > _LENGTH_TOLERANCE * self._longest:
            raise ValueError(
                f"{self.name} was built for squared distance over vectors of different lengths "
                f"({self._shortest:.4g} to {self._longest:.4g}); search by inner product would order them otherwise"
            )

    def _read(self, begin: int, count: int) -> bytearray:
        """Read bytes of the pieces as if they were joined."""
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            piece = int(np.searchsorted(self._begins, begin + done, side="right")) - 1
            with self.paths[piece].open("rb", buffering=0) as file:
                file.seek(begin + done - int(self._begins[piece]))
                read = file.readinto(view[done:])
            if not read:
                raise ValueError(f"{self.paths[piece]} became shorter while it was read")
            done += read
        return data


def export_flat(index: Index, path: Path, progress: Progress) -> None:
    """Write an index as a flat faiss file over inner products, under a temporary name first."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    num_rows, dimension = len(index), index.dimension
    try:
        with temporary.open("wb") as file:
            unused = 1 << 20  # what faiss writes there
            count = num_rows * dimension
            file.write(_HEADER.pack(b"IxFI", dimension, num_rows, unused, unused, 1, _INNER_PRODUCT, count))
            for first, vectors in index.vector_parts():
                step = index.manifest.rows_per_chunk
                for begin in range(0, len(vectors), step):
                    file.write(vectors[begin : begin + step].astype("<f4").data)
                    progress(min(first + begin + step, num_rows), num_rows)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
