"""The passage store returns what the corpus holds, and damage is an error that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from searchr1_fast.data import parse_passage
from searchr1_fast.retrieval.passages import PassageStore

CONTENTS = [
    '"Title"\nText.',
    '"Ünïcode — 東京"\nä\nö 🎈',
    '""Heroes" (song)"\nTwo pairs of quotes.',
    "no quotes\ntext",
    '"only a title"',
    '"\n"',
    "\ntext without a title",
    '"empty text"\n',
]


def write_column(folder: Path, name: str, texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    (folder / f"{name}.bin").write_bytes(b"".join(encoded))
    offsets = np.concatenate(([0], np.cumsum([len(one) for one in encoded])))
    (folder / f"{name}.u64").write_bytes(offsets.astype("<u8").tobytes())


@pytest.mark.parametrize("with_ids", [False, True])
def test_passages_are_the_corpus(tmp_path, with_ids):
    """Any rows, in any order, and repeated; titles are parsed as by `data.parse_passage`."""
    write_column(tmp_path, "passages", CONTENTS)
    ids = [f"doc ü{row}" for row in range(len(CONTENTS))] if with_ids else [str(row) for row in range(len(CONTENTS))]
    if with_ids:
        write_column(tmp_path, "ids", ids)
    store = PassageStore(tmp_path)
    assert len(store) == len(CONTENTS)
    rows = [7, 0, 3, 3, 1, 2, 4, 5, 6]
    scores = [row / 2 for row in rows]
    wanted = [parse_passage(ids[row], CONTENTS[row], score) for row, score in zip(rows, scores, strict=True)]
    assert store.passages(rows, scores) == wanted
    assert store.passages([], []) == []


@pytest.mark.parametrize("row", [-1, len(CONTENTS), 2**40])
def test_a_row_that_is_not_there_is_an_error(tmp_path, row):
    write_column(tmp_path, "passages", CONTENTS)
    with pytest.raises(ValueError, match=rf"row {row} of .*passages.bin, which has 8 records"):
        PassageStore(tmp_path).passages([0, row], [0.0, 0.0])


def test_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot open .*passages.bin: No such file"):
        PassageStore(tmp_path)
    write_column(tmp_path, "passages", CONTENTS)
    whole = {name: (tmp_path / name).read_bytes() for name in ("passages.bin", "passages.u64")}
    for name, kept, sentence in (
        ("passages.bin", -1, r"passages.bin has \d+ bytes, but .*passages.u64 ends at"),
        ("passages.bin", 0, r"passages.bin has 0 bytes, but"),
        ("passages.u64", -1, r"passages.u64 has 71 bytes"),
        ("passages.u64", -8, r"passages.bin has \d+ bytes, but .*passages.u64 ends at"),
        ("passages.u64", 0, r"passages.u64 has 0 bytes"),
    ):
        (tmp_path / name).write_bytes(whole[name][:kept])
        with pytest.raises(ValueError, match=sentence):
            PassageStore(tmp_path)
        (tmp_path / name).write_bytes(whole[name])
    write_column(tmp_path, "ids", ["a", "b"])
    with pytest.raises(ValueError, match=r"ids.bin has 2 ids, but .*passages.bin has 8 passages"):
        PassageStore(tmp_path)


def test_offsets_that_go_back_are_named(tmp_path):
    write_column(tmp_path, "passages", CONTENTS)
    offsets = np.fromfile(tmp_path / "passages.u64", dtype="<u8")
    offsets[3] = 10**12
    offsets.tofile(tmp_path / "passages.u64")
    store = PassageStore(tmp_path)
    assert store.passages([0], [0.0])[0].text == "Text."
    for row in (2, 3):
        with pytest.raises(ValueError, match=rf"passages.u64 is damaged: record {row}"):
            store.passages([row], [0.0])


@pytest.mark.parametrize("name", ["passages.bin", "passages.u64"])
def test_a_file_cut_while_it_is_open_is_an_error_not_a_crash(tmp_path, name):
    """Touching a page past the new end would end the process by SIGBUS."""
    write_column(tmp_path, "passages", ['"t"\n' + "x" * 10000] * 3000)
    store = PassageStore(tmp_path)
    os.truncate(tmp_path / name, 5000)
    with pytest.raises(ValueError, match=f"{name} was cut short while it was open"):
        store.passages([2999], [0.0])


def test_text_that_is_not_utf8_is_an_error(tmp_path):
    write_column(tmp_path, "passages", ['"t"\nabc'])
    data = (tmp_path / "passages.bin").read_bytes()
    (tmp_path / "passages.bin").write_bytes(data[:-1] + b"\xff")
    with pytest.raises(UnicodeDecodeError):
        PassageStore(tmp_path).passages([0], [0.0])
