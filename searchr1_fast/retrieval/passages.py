"""The passages of an index folder, read by row.

C++ gathers from memory maps (`csrc/passages.h`), so a corpus costs only the memory of the pages that are read, and all
passages of a batch are one call. The plain twin is `index_format.TextColumn`.

    passages.bin, passages.u64    contents, and M+1 offsets in bytes     (made when the index is built)
    ids.bin, ids.u64              ids likewise; absent where an id is the number of its row

Left out: passages tokenised in advance. An observation is tokenised whole, titles and numbers included, because its
pieces encoded one by one give other tokens.

Shape legend
    M  rows of the corpus
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from searchr1_fast import _C
from searchr1_fast.types import Passage


class PassageStore:
    """Maps rows of a corpus to passages. Safe to call from several threads."""

    def __init__(self, folder: str | Path) -> None:
        """ValueError if a file is missing, cut short, or belongs to another index."""
        folder = Path(folder)
        ids = _column(folder, "ids") if (folder / "ids.bin").exists() else (None, None)
        self._store = _C.PassageStore(*_column(folder, "passages"), *ids)

    def __len__(self) -> int:
        return len(self._store)

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Passage]:
        """The passage of each row, with its score. ValueError for a row out of range, or a file that was cut short."""
        found = self._store.gather(np.asarray(rows, dtype=np.int64).reshape(-1))
        return [Passage(*parts, score) for parts, score in zip(found, scores, strict=True)]


def _column(folder: Path, name: str) -> tuple[str, str]:
    return str(folder / f"{name}.bin"), str(folder / f"{name}.u64")
