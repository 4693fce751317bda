"""Building an index: a kill costs little, and a resume with other inputs is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from index_fakes import DIMENSION, Given, Silent, corpus_rows, random_vectors, stored, write_corpus

from searchr1_fast.retrieval import index_build, index_format
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.encoders import EncodingSource
from searchr1_fast.retrieval.index_build import build_index
from searchr1_fast.retrieval.index_format import open_index


@pytest.mark.parametrize("fail_at", [1, 17, 48, 49, 99])
def test_an_interrupted_build_goes_on_where_it_was(tmp_path, small_chunks, fail_at):
    corpus, vectors = write_corpus(tmp_path / "c.jsonl", corpus_rows(100)), random_vectors(100)
    first = Given(vectors, fail_at)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "i", corpus, first, Silent())
    with pytest.raises(ValueError, match="no manifest|there is no index"):
        open_index(tmp_path / "i")
    second = Given(vectors)
    index = build_index(tmp_path / "i", corpus, second, Silent())
    assert first.asked + second.asked == list(range(0, 100, 16))
    assert (stored(index) == vectors).all()
    index.verify()


@pytest.mark.parametrize("tear", ["log", "vectors", "missing vectors"])
def test_what_a_power_cut_leaves(tmp_path, small_chunks, tear):
    corpus, vectors = write_corpus(tmp_path / "c.jsonl", corpus_rows(100)), random_vectors(100)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "i", corpus, Given(vectors, 80), Silent())
    partial = tmp_path / "i.partial"
    if tear == "log":
        log = (partial / "vectors.log").read_bytes()
        (partial / "vectors.log").write_bytes(log[:-7])
    elif tear == "vectors":
        with (partial / "vectors-00001.f16").open("ab") as file:
            file.write(b"half a chunk")
        (partial / "vectors-00002.f16").write_bytes(b"of a file that was not begun")
    else:
        os.truncate(partial / "vectors-00000.f16", 100)
        with pytest.raises(ValueError, match="vectors-00000.f16 is shorter than what was written"):
            build_index(tmp_path / "i", corpus, Given(vectors), Silent())
        build_index(tmp_path / "i", corpus, Given(vectors), Silent(), restart=True).verify()
        return
    index = build_index(tmp_path / "i", corpus, Given(vectors), Silent())
    assert (stored(index) == vectors).all()
    index.verify()


def test_a_kill_before_the_rename_costs_nothing(tmp_path, small_chunks, monkeypatch):
    corpus, vectors = write_corpus(tmp_path / "c.jsonl", corpus_rows(100)), random_vectors(100)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(index_build.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "i", corpus, Given(vectors), Silent())
    monkeypatch.undo()
    again = Given(vectors)
    monkeypatch.setattr(index_format, "CHUNK_BYTES", 16 * 2 * DIMENSION)
    monkeypatch.setattr(index_format, "FILE_BYTES", 3 * 16 * 2 * DIMENSION)
    assert (stored(build_index(tmp_path / "i", corpus, again, Silent())) == vectors).all()
    assert again.asked == []


def test_going_on_with_something_else_is_refused(tmp_path, small_chunks):
    corpus, vectors = write_corpus(tmp_path / "c.jsonl", corpus_rows(100)), random_vectors(100)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "i", corpus, Given(vectors, 50), Silent())
    other = Given(vectors)
    other.identity = {"encoder": {"kind": "other"}}
    with pytest.raises(ValueError, match="begun with another vectors"):
        build_index(tmp_path / "i", corpus, other, Silent())
    write_corpus(corpus, corpus_rows(101))
    with pytest.raises(ValueError, match="begun with another corpus"):
        build_index(tmp_path / "i", corpus, Given(vectors), Silent())
    index = build_index(tmp_path / "i", corpus, Given(random_vectors(101)), Silent(), restart=True)
    assert len(index) == 101


BUILD = """
import sys, time
from pathlib import Path
from searchr1_fast import cli
from searchr1_fast.retrieval import index_build, index_format
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
index_format.CHUNK_BYTES, index_build._SECONDS_BETWEEN_SYNCS = 16 * 2 * 64, 0.0
encode, calls = HashingEncoder.encode_passages, 0
def stuck(self, texts):
    global calls
    calls += 1
    if calls > int(sys.argv[1]):
        time.sleep(600)
    return encode(self, texts)
HashingEncoder.encode_passages = stuck
sys.exit(cli.main(["index", "build", "--corpus", "c.jsonl", "--dimension", "64", "--output", sys.argv[2]]))
"""


def test_a_killed_process_goes_on_and_makes_the_same_index(tmp_path):
    write_corpus(tmp_path / "c.jsonl", corpus_rows(200))

    def start(num_chunks, name):
        return subprocess.Popen([sys.executable, "-c", BUILD, str(num_chunks), name], cwd=tmp_path)

    log = tmp_path / "a.partial" / "vectors.log"
    process = start(3, "a")
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") == 3):
        time.sleep(0.01)
    other = start(99, "a")
    assert other.wait() == 2  # only one process at a time
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    assert start(10, "a").wait() == 0  # 13 chunks, of which 3 existed
    assert start(13, "b").wait() == 0
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name
    open_index(tmp_path / "a").verify()


def test_everything_is_on_the_disk_before_the_manifest(tmp_path, small_chunks, monkeypatch):
    """Also what the encoder wrote: after a power cut a manifest must not name files that do not exist."""
    synced = []
    sync = index_build.sync
    monkeypatch.setattr(index_build, "sync", lambda path: synced.append(Path(path).name) or sync(path))
    corpus = write_corpus(tmp_path / "c.jsonl", corpus_rows(40, named=True))
    index = build_index(tmp_path / "i", corpus, EncodingSource(HashingEncoder(DIMENSION)), Silent())
    before = synced[: synced.index("manifest.json.tmp")]
    assert "encoder-hashing.bin" in index.manifest.files
    assert set(index.manifest.files) <= set(before)
