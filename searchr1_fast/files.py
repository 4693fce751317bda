"""Files that are complete or absent, and errors that name the file when a disk is full or a file is broken."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on exit the file is renamed to `path`, atomically. After a failure
    nothing is left of it, and a file that had the name before is unchanged. An OSError names `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError that names no file, such as that of a write to a full disk, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def of_the_system(failure: BaseException | None) -> BaseException | None:
    """The system's error behind another, if there is one: for a full disk, torch says `unexpected pos 704 vs 598`."""
    behind = failure
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or failure


def said(failure: BaseException) -> str:
    """The message of a failure, or of the system's error behind it, on one line."""
    failure = of_the_system(failure)
    return " ".join(f"{type(failure).__name__}: {failure}".split())


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, as a `whole_file`."""
    with whole_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_object(path: Path, values: Mapping[str, Any]) -> None:
    """Write one JSON object, indented for people."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. ValueError if it is not JSON, or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, not a {type(values).__name__}")
    return values
