"""An index on disk: the files in its folder, opening them as memory maps, and detecting and naming damage.

    manifest.json            written last; the other files count only if it is there
    vectors-00000.f16, …     little-endian fp16 rows [rows_per_file, D], no header: a row's place is arithmetic
    passages.bin, .u64       the corpus' `contents`, UTF-8, end to end; M+1 byte offsets, little-endian
    ids.bin, ids.u64         the ids likewise; absent if the id of every row is its number
    encoder-….bin            what the encoder learned from the corpus, if anything

The manifest holds a digest of itself and, for every file, its size and a BLAKE2b digest per chunk. `open_index`
compares sizes, so a truncated file is found at once; `Index.verify` reads every byte and says which bytes of which file
changed.

Shape legend
    M  rows    D  components
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from searchr1_fast.data import parse_passage
from searchr1_fast.types import Passage, Progress

FORMAT = "searchr1-index"
VERSION = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 2**20  # what one digest covers: 32,000 digests for 32 GB of vectors; a kill costs one chunk
FILE_BYTES = 2**30  # of vectors; a file is mapped whole, and copied to a GPU in one go


@dataclass(frozen=True)
class FileRecord:
    """The size and digests that one file must have."""

    num_bytes: int
    chunk_bytes: int
    digests: tuple[str, ...]  # of consecutive chunks; the last may be shorter


@dataclass(frozen=True)
class Manifest:
    """What an index is. `encoder` says how queries must be encoded; see `encoders.open_encoder`."""

    num_rows: int
    dimension: int
    rows_per_file: int
    rows_per_chunk: int
    lossless: bool  # every component was an fp16 number before it was stored
    ids: Literal["rows", "column"]
    encoder: dict[str, Any]
    source: dict[str, Any]  # where rows and vectors came from, for human readers
    files: dict[str, FileRecord]
    dtype: str = "float16"
    metric: str = "inner_product"

    def dumps(self) -> str:
        """JSON with the format's name, its version and a digest of all the rest."""
        return json.dumps(self._body() | {"digest": self.digest()}, indent=1) + "\n"

    def digest(self) -> str:
        """A digest of everything: indexes that share it hold the same passages and vectors of the same encoder."""
        return digest_bytes(_canonical(self._body()))

    def _body(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION} | asdict(self)


def vector_file(number: int) -> str:
    """The name of a file of vectors."""
    return f"vectors-{number:05d}.f16"


def rows_per_chunk(dimension: int) -> int:
    """Rows that one digest of a file of vectors covers."""
    return max(1, CHUNK_BYTES // (2 * dimension))


def rows_per_file(dimension: int) -> int:
    """Rows in one file of vectors: a whole number of chunks."""
    per_chunk = rows_per_chunk(dimension)
    return per_chunk * max(1, FILE_BYTES // (2 * dimension * per_chunk))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index and check its own digest."""
    path = folder / MANIFEST
    if not path.is_file():
        hint = "; it was not finished, build it again to go on" if partial_folder(folder).is_dir() else ""
        raise ValueError(f"{folder} is not an index: there is no {MANIFEST} in it{hint}")
    try:
        body = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error})") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of an index: `format` must be {FORMAT!r}")
    if body.get("version") != VERSION:
        raise ValueError(
            f"{path}: the index has format version {body.get('version')!r}, this program reads {VERSION}; build it anew"
        )
    digest = body.pop("digest", None)
    if digest != digest_bytes(_canonical(body)):
        raise ValueError(f"{path} is damaged: its digest does not fit what it says")
    known = {field.name for field in fields(Manifest)}
    values = {key: value for key, value in body.items() if key in known}
    values["files"] = {
        name: FileRecord(record["num_bytes"], record["chunk_bytes"], tuple(record["digests"]))
        for name, record in values["files"].items()
    }
    return Manifest(**values)


def partial_folder(folder: Path) -> Path:
    """The folder in which an index is built before it is renamed."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}.partial")


class TextColumn:
    """The texts of all rows, memory-mapped: `column[row]` decodes one. Only the rows asked for are read."""

    def __init__(self, folder: Path, name: str) -> None:
        self.offsets = np.memmap(folder / f"{name}.u64", dtype="<u8", mode="r")  # [M+1]
        self._path = folder / f"{name}.bin"
        size = self._path.stat().st_size
        self._bytes = np.memmap(self._path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        if len(self.offsets) == 0 or int(self.offsets[0]) != 0 or int(self.offsets[-1]) != size:
            raise ValueError(f"{folder / name}.u64 does not fit {self._path.name}: their sizes disagree")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        begin, end = int(self.offsets[row]), int(self.offsets[row + 1])
        if not begin <= end <= len(self._bytes):
            raise ValueError(f"{self._path.with_suffix('.u64')} is damaged: row {row} ends before it begins")
        return self._bytes[begin:end].tobytes().decode()

    def slice(self, begin: int, end: int) -> list[str]:
        """The texts of rows begin to end."""
        return [self[row] for row in range(begin, end)]


class Index:
    """An open index. Maps are private and copy-on-write, so that torch accepts them; nothing writes to them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._texts = TextColumn(folder, "passages")
        self._ids = TextColumn(folder, "ids") if manifest.ids == "column" else None
        for column in filter(None, (self._texts, self._ids)):
            if len(column) != len(self):
                raise ValueError(f"{folder}: {len(column)} texts for {len(self)} rows of vectors")

    def __len__(self) -> int:
        return self.manifest.num_rows

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return self.manifest.dimension

    def vector_parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, vectors [rows, D] fp16) for each file, without reading it."""
        for number, begin in enumerate(range(0, len(self), self.manifest.rows_per_file)):
            num_rows = min(self.manifest.rows_per_file, len(self) - begin)
            path = self.folder / vector_file(number)
            yield begin, np.memmap(path, dtype="<f2", mode="c", shape=(num_rows, self.dimension))

    def contents(self, row: int) -> str:
        """The corpus' `contents`, unchanged."""
        return self._texts[row]

    def passages(self, rows: Sequence[int], scores: Sequence[float]) -> list[Passage]:
        """The passage of each row, with its score. `passages.PassageStore` is the fast twin."""
        ids = map(str, rows) if self._ids is None else (self._ids[row] for row in rows)
        return [parse_passage(*parts) for parts in zip(ids, map(self.contents, rows), scores, strict=True)]

    def verify(self, progress: Progress | None = None) -> None:
        """Read everything and compare digests; ValueError names the first file and the bytes that differ."""
        total = sum(record.num_bytes for record in self.manifest.files.values())
        finished = 0
        for name, record in self.manifest.files.items():
            for number, digest in enumerate(file_digests(self.folder / name, record.chunk_bytes)):
                if number >= len(record.digests) or digest != record.digests[number]:
                    begin = number * record.chunk_bytes
                    end = min(begin + record.chunk_bytes, record.num_bytes)
                    raise ValueError(
                        f"{self.folder / name} is damaged: bytes {begin} to {end} are not those that were written; "
                        "copy the file anew or build the index again"
                    )
                finished += min(record.chunk_bytes, record.num_bytes - number * record.chunk_bytes)
                if progress is not None:
                    progress(finished, total)


def open_index(folder: str | Path) -> Index:
    """Open an index, after checking that every file of the manifest exists and has the right size."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no index {folder}")
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy the index anew or build it again")
        size = path.stat().st_size
        if size != record.num_bytes:
            how = "truncated" if size < record.num_bytes else "too long"
            raise ValueError(f"{path} is {how}: {size} bytes where {record.num_bytes} were written")
    return Index(folder, manifest)


class OpenFile:
    """The state of a mapped file when it was opened, to notice changes: reading one that was cut short ends the process
    (SIGBUS), and other bytes would be other rows."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._state = self._look()

    def check(self) -> None:
        """ValueError if the file was cut short, written to or replaced since. A deleted file is still there for a
        process that has it open."""
        try:
            num_bytes, modified = self._look()
        except FileNotFoundError:
            return
        if num_bytes < self._state[0]:
            raise ValueError(f"{self.path} was cut short while it was open; it had {self._state[0]} bytes")
        if (num_bytes, modified) != self._state:
            raise ValueError(f"{self.path} was written to while it was open")

    def _look(self) -> tuple[int, int]:
        state = self.path.stat()
        return state.st_size, state.st_mtime_ns


def file_digests(path: Path, chunk_bytes: int) -> Iterator[str]:
    """The digest of each chunk of a file."""
    with path.open("rb") as file:
        while chunk := file.read(chunk_bytes):
            yield digest_bytes(chunk)


def record_file(path: Path) -> FileRecord:
    """The record of a finished file."""
    return FileRecord(path.stat().st_size, CHUNK_BYTES, tuple(file_digests(path, CHUNK_BYTES)))


def combine(digests: Sequence[str]) -> str:
    """One digest of many."""
    return digest_bytes("\n".join(digests).encode())


def sync(path: Path) -> None:
    """Make the present state of a file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def digest_bytes(data: bytes | memoryview | np.ndarray) -> str:
    """BLAKE2b of 128 bits, in hexadecimal: in the standard library, and about 1 GB/s per core."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
