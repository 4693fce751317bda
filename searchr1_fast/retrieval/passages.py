"""The passages of an index folder, read by row: text, or token ids made ready for a tokenizer.

C++ gathers from memory maps (`csrc/passages.h`), so a corpus costs the memory of the pages that are read, and all
passages of a batch are one call. The plain twin is `index_format.TextColumn`.

    passages.bin, passages.u64    contents, and M+1 offsets in bytes     (made when the index is built)
    ids.bin, ids.u64              ids likewise; absent where an id is the number of its row
    tokens.u32, tokens.u64        token ids, and M+1 offsets in tokens   (made by `write_tokens`, where wanted)

Shape legend
    M  rows of the corpus    R  rows asked for    T  tokens of all of them
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from searchr1_fast import _C
from searchr1_fast.types import Passage

_ROWS_AT_A_TIME = 4096


class PassageStore:
    """Rows of a corpus to passages. Safe to call from several threads."""

    def __init__(self, folder: str | Path) -> None:
        """ValueError where a file is missing, cut short, or belongs to another index."""
        folder = Path(folder)
        ids = _column(folder, "ids") if (folder / "ids.bin").exists() else (None, None)
        self._store = _C.PassageStore(*_column(folder, "passages"), *ids)

    def __len__(self) -> int:
        return len(self._store)

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Passage]:
        """The passage of each row, with its score. ValueError for a row that is not there, or a file that was cut."""
        found = self._store.gather(np.asarray(rows, dtype=np.int64).reshape(-1))
        return [Passage(*parts, score) for parts, score in zip(found, scores, strict=True)]


class TokenStore:
    """Rows of a corpus to token ids."""

    def __init__(self, folder: str | Path, tokenizer: str) -> None:
        """`tokenizer`: the name that `write_tokens` was given. ValueError where the tokens are of another one."""
        folder = Path(folder)
        made_for = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))["tokenizer"]
        if made_for != tokenizer:
            raise ValueError(
                f"{folder}/tokens.u32 was made for the tokenizer {made_for}, not {tokenizer}; make it anew"
            )
        self._records = _C.RecordFile(str(folder / "tokens.u32"), str(folder / "tokens.u64"), 4)

    def __len__(self) -> int:
        return len(self._records)

    def tokens(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """token_ids [T] int64 of all rows end to end, cu_seqlens [R+1] int64."""
        items, ends = self._records.gather(np.asarray(rows, dtype=np.int64).reshape(-1))
        return np.frombuffer(items, dtype="<u4").astype(np.int64), np.concatenate(([0], ends))


def write_tokens(
    folder: str | Path, texts: Iterator[str], encode: Callable[[list[str]], list[list[int]]], tokenizer: str
) -> int:
    """Tokenise `texts`, one per row, into the folder; how many tokens. Streaming: a batch at a time is in memory.

    `tokenizer` names the tokenizer, and is checked when the tokens are read. tokens.json is written last.
    """
    folder = Path(folder)
    data, offsets = folder / "tokens.u32", folder / "tokens.u64"
    temporary = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (data, offsets)]
    total = 0
    try:
        with temporary[0].open("wb") as data_file, temporary[1].open("wb") as offsets_file:
            offsets_file.write(np.zeros(1, dtype="<u8").tobytes())
            while batch := list(islice(texts, _ROWS_AT_A_TIME)):
                ids = encode(batch)
                ends = total + np.cumsum([len(one) for one in ids], dtype=np.int64)
                total = int(ends[-1])
                offsets_file.write(ends.astype("<u8").tobytes())
                data_file.write(np.fromiter((token for one in ids for token in one), dtype="<u4").tobytes())
        (folder / "tokens.json").unlink(missing_ok=True)
        os.replace(temporary[0], data)
        os.replace(temporary[1], offsets)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    (folder / "tokens.json").write_text(json.dumps({"tokenizer": tokenizer}), encoding="utf-8")
    return total


def _column(folder: Path, name: str) -> tuple[str, str]:
    return str(folder / f"{name}.bin"), str(folder / f"{name}.u64")
