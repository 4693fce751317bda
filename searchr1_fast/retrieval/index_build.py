"""Builds an index: passages, then vectors chunk by chunk, then the manifest; a build killed at any point can resume.

Everything is made in `NAME.partial`, which is renamed when complete. Progress is recorded there only once the data is
on the disk:

    settings.json     what is being built from what; resuming with anything else is refused
    passages.json     the texts are complete: how many, and the records of their files
    vectors.log       one line per chunk of vectors that is on the disk, with its digest

A run that finds these files skips what they record; it cuts off a torn last line, and bytes of vectors beyond the last
line. One process at a time: the folder is locked during a build.

Left out: encoding on several GPUs at once. Vectors come from a `VectorSource`, which may do so.

Shape legend
    N  rows of a chunk    D  components
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from searchr1_fast.data import read_corpus_rows
from searchr1_fast.retrieval import index_format
from searchr1_fast.retrieval.index_format import (
    MANIFEST,
    FileRecord,
    Index,
    Manifest,
    Progress,
    TextColumn,
    digest_bytes,
    open_index,
    partial_folder,
    record_file,
    sync,
    vector_file,
)

_ROWS_AT_ONCE = 8192  # of text between two calls of `progress`
_SECONDS_BETWEEN_SYNCS = 2.0  # an fsync per chunk would slow an import down; encoding is slower than this anyway
_SCAFFOLDING = ("settings.json", "passages.json", "vectors.log", "lock")


class VectorSource(Protocol):
    """Where vectors come from: an encoder at work, or a file that holds them already."""

    dimension: int

    @property
    def identity(self) -> dict[str, Any]:
        """What the vectors depend on besides the corpus. Known before `prepare`, and the same when a build resumes."""
        ...

    def prepare(self, folder: Path, texts: TextColumn, progress: Progress) -> dict[str, Any]:
        """See all texts before the first vector. Returns the manifest's `encoder`; may write `encoder-*.bin`."""
        ...

    def rows(self, begin: int, end: int, texts: TextColumn) -> np.ndarray:
        """[N,D] fp32 or fp16: the vectors of rows begin to end."""
        ...


class Phases(Protocol):
    """A `Console`, or anything else that shows phases: `with show.phase("passages", total) as progress`."""

    def phase(self, name: str, total: int | None = None) -> Any: ...


def build_index(target: Path, corpus: Path, source: VectorSource, show: Phases, restart: bool = False) -> Index:
    """Build the index `target` from a JSONL corpus, or resume building it.

    ValueError: the target exists, the corpus is malformed (file and line), or what was begun differs (`restart` begins
    anew).
    """
    target, corpus = Path(target), Path(corpus)
    if target.exists():
        raise ValueError(f"{target} exists already; remove it or give the index another name")
    partial = partial_folder(target)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        _settle(partial, corpus, source, restart)
        num_rows, ids, files = _passages(partial, corpus, show)
        texts = TextColumn(partial, "passages")
        with show.phase("encoder", num_rows) as progress:
            encoder = source.prepare(partial, texts, progress)
        vectors = _VectorWriter(partial, num_rows, source.dimension)
        vectors.write(source, texts, show)
        files |= vectors.records()
        for path in sorted(partial.glob("encoder-*.bin")):
            files[path.name] = record_file(path)
            sync(path)  # before the manifest, which lists it
        manifest = Manifest(
            num_rows=num_rows,
            dimension=source.dimension,
            rows_per_file=vectors.rows_per_file,
            rows_per_chunk=vectors.rows_per_chunk,
            lossless=vectors.lossless,
            ids=ids,
            encoder=encoder,
            source={"corpus": str(corpus.resolve())} | source.identity,
            files=files,
        )
        _write_whole(partial / MANIFEST, manifest.dumps())
        os.rename(partial, target)
        sync(target.resolve().parent)
        for name in _SCAFFOLDING:  # last: a run killed before the rename must find them
            (target / name).unlink(missing_ok=True)
    return open_index(target)


# ------------------------------------------------------------------------------------------------------- beginning


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    with (partial / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is working on {partial}; wait for it or end it") from error
        yield


def _settle(partial: Path, corpus: Path, source: VectorSource, restart: bool) -> None:
    """Begin a build, or make sure that the one to resume is the same."""
    if not corpus.is_file():
        raise ValueError(f"there is no file {corpus}")
    state = corpus.stat()
    settings = {
        "corpus": {"path": str(corpus.resolve()), "num_bytes": state.st_size, "modified_ns": state.st_mtime_ns},
        "vectors": {"dimension": source.dimension} | source.identity,
        "chunk_bytes": index_format.CHUNK_BYTES,
    }
    path = partial / "settings.json"
    if path.is_file() and not restart:
        begun = json.loads(path.read_text())
        changed = [key for key in settings if begun.get(key) != json.loads(json.dumps(settings[key]))]
        if changed:
            raise ValueError(
                f"{partial} was begun with another {changed[0]}; give what it was begun with, or --restart"
            )
        return
    for stale in partial.iterdir():
        if stale.name != "lock":
            stale.unlink()
    _write_whole(path, json.dumps(settings, indent=1))


def _write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


# -------------------------------------------------------------------------------------------------------- passages


def _passages(partial: Path, corpus: Path, show: Phases) -> tuple[int, str, dict[str, FileRecord]]:
    """Write the passages -> (number of rows, how ids are kept, records). After a kill the corpus is read from the
    beginning again."""
    done = partial / "passages.json"
    if done.is_file():
        state = json.loads(done.read_text())
        files = {name: _record(values) for name, values in state["files"].items()}
        for name, record in files.items():
            if (partial / name).stat().st_size != record.num_bytes:
                raise ValueError(f"{partial / name} has changed since it was written; give --restart to begin anew")
        return state["num_rows"], state["ids"], files
    num_rows, ids_are_rows = 0, True
    with show.phase("passages", None) as progress, ExitStack() as stack:
        texts = stack.enter_context(_ColumnWriter(partial, "passages"))
        ids = stack.enter_context(_ColumnWriter(partial, "ids"))
        rows = read_corpus_rows(corpus)
        while part := list(islice(rows, _ROWS_AT_ONCE)):
            texts.add([_encoded(contents, number) for number, (_, contents) in enumerate(part, start=num_rows)])
            ids.add([_encoded(identifier, number) for number, (identifier, _) in enumerate(part, start=num_rows)])
            ids_are_rows &= all(identifier == str(number) for number, (identifier, _) in enumerate(part, num_rows))
            num_rows += len(part)
            progress(num_rows, num_rows)
    if ids_are_rows:
        for suffix in ("bin", "u64"):
            (partial / f"ids.{suffix}").unlink()
    names = [f"{column}.{suffix}" for column in ("passages", "ids") for suffix in ("bin", "u64")]
    files = {name: record_file(partial / name) for name in names if (partial / name).is_file()}
    for name in files:
        sync(partial / name)
    state = {"num_rows": num_rows, "ids": "rows" if ids_are_rows else "column"}
    _write_whole(done, json.dumps(state | {"files": {name: asdict(record) for name, record in files.items()}}))
    return num_rows, state["ids"], files


def _encoded(text: str, row: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate: JSON can write it, UTF-8 cannot
        raise ValueError(f"row {row} of the corpus holds text that is not valid Unicode: {error.reason}") from error


def _record(values: dict[str, Any]) -> FileRecord:
    return FileRecord(values["num_bytes"], values["chunk_bytes"], tuple(values["digests"]))


class _ColumnWriter:
    """Writes one text column, a batch of rows at a time; offsets are written as they come."""

    def __init__(self, folder: Path, name: str) -> None:
        self._bytes = (folder / f"{name}.bin").open("wb")
        self._offsets = (folder / f"{name}.u64").open("wb")
        self._size = 0

    def __enter__(self) -> _ColumnWriter:
        self._offsets.write(np.zeros(1, dtype="<u8").tobytes())
        return self

    def add(self, texts: list[bytes]) -> None:
        ends = self._size + np.cumsum([len(text) for text in texts], dtype=np.uint64)
        self._bytes.write(b"".join(texts))
        self._offsets.write(ends.astype("<u8").tobytes())
        self._size = int(ends[-1])

    def __exit__(self, *_: object) -> None:
        self._bytes.close()
        self._offsets.close()


# --------------------------------------------------------------------------------------------------------- vectors


@dataclass(frozen=True)
class _Chunk:
    """A finished chunk, as recorded in vectors.log."""

    digest: str
    lossless: bool


class _VectorWriter:
    """Writes the files of vectors, from the first missing chunk on."""

    def __init__(self, partial: Path, num_rows: int, dimension: int) -> None:
        self.rows_per_chunk = index_format.rows_per_chunk(dimension)
        self.rows_per_file = index_format.rows_per_file(dimension)
        self._partial = partial
        self._num_rows = num_rows
        self._dimension = dimension
        self._log_path = partial / "vectors.log"
        self._chunks = self._read_log()
        self._cut()

    @property
    def lossless(self) -> bool:
        return all(chunk.lossless for chunk in self._chunks)

    def write(self, source: VectorSource, texts: TextColumn, show: Phases) -> None:
        """Write every missing chunk."""
        pending: list[_Chunk] = []
        last_sync = time.monotonic()
        with show.phase("vectors", self._num_rows) as progress, self._log_path.open("a") as log:
            for begin in range(len(self._chunks) * self.rows_per_chunk, self._num_rows, self.rows_per_chunk):
                end = min(begin + self.rows_per_chunk, self._num_rows)
                vectors, lossless = _to_fp16(source.rows(begin, end, texts), begin)
                assert vectors.shape == (end - begin, self._dimension)
                data = np.ascontiguousarray(vectors, dtype="<f2")
                path = self._partial / vector_file(begin // self.rows_per_file)
                with path.open("ab") as file:
                    file.write(data.data)
                pending.append(_Chunk(digest_bytes(data.data), lossless))
                end_of_file = end % self.rows_per_file == 0 or end == self._num_rows
                if end_of_file or time.monotonic() - last_sync >= _SECONDS_BETWEEN_SYNCS:
                    sync(path)  # the vectors first, then the lines that record them
                    log.writelines(json.dumps(asdict(chunk)) + "\n" for chunk in pending)
                    log.flush()
                    os.fsync(log.fileno())
                    self._chunks += pending
                    pending, last_sync = [], time.monotonic()
                progress(end, self._num_rows)

    def records(self) -> dict[str, FileRecord]:
        """The records of all files of vectors."""
        chunks_per_file = self.rows_per_file // self.rows_per_chunk
        row_bytes = 2 * self._dimension
        records = {}
        for number, begin in enumerate(range(0, self._num_rows, self.rows_per_file)):
            num_bytes = min(self.rows_per_file, self._num_rows - begin) * row_bytes
            chunks = self._chunks[number * chunks_per_file : (number + 1) * chunks_per_file]
            digests = tuple(chunk.digest for chunk in chunks)
            records[vector_file(number)] = FileRecord(num_bytes, self.rows_per_chunk * row_bytes, digests)
        return records

    def _read_log(self) -> list[_Chunk]:
        if not self._log_path.is_file():
            return []
        whole, _, torn = self._log_path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self._log_path, len(whole) + 1 if whole else 0)
        return [_Chunk(**json.loads(line)) for line in whole.splitlines()]

    def _cut(self) -> None:
        """Truncate the files of vectors to what the log records."""
        done = min(len(self._chunks) * self.rows_per_chunk, self._num_rows)
        for number, begin in enumerate(range(0, self._num_rows, self.rows_per_file)):
            path = self._partial / vector_file(number)
            expected = max(0, min(self.rows_per_file, done - begin)) * 2 * self._dimension
            size = path.stat().st_size if path.is_file() else 0
            if size < expected:
                raise ValueError(f"{path} is shorter than what was written; give --restart to begin anew")
            if size > expected:
                os.truncate(path, expected)


def _to_fp16(vectors: np.ndarray, first: int) -> tuple[np.ndarray, bool]:
    """(vectors [N,D] fp16, whether the conversion changed nothing)."""
    if vectors.dtype == np.float16:
        stored, lossless = vectors, True
    else:
        with np.errstate(over="ignore"):
            stored = vectors.astype(np.float16)
        lossless = bool((stored == vectors).all())
    finite = np.isfinite(stored).all(axis=1)
    if not finite.all():
        row = first + int(np.argmin(finite))
        raise ValueError(f"the vector of row {row} holds numbers that are not finite in fp16 (above 65504, or NaN)")
    return stored, lossless
