"""Indexes on disk: what goes in comes out, damage is found and named, a kill costs little, faiss' files."""

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from searchr1_fast import cli
from searchr1_fast.retrieval import index_build, index_format
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.encoders import EncodingSource
from searchr1_fast.retrieval.index_build import build_index
from searchr1_fast.retrieval.index_faiss import FlatFile, export_flat
from searchr1_fast.retrieval.index_format import TextColumn, open_index

DIMENSION = 64


class Silent:
    @contextmanager
    def phase(self, name, total=None):
        yield lambda finished, total: None


class Given:
    """A `VectorSource` of vectors that are there, which may fail at a row."""

    identity = {"encoder": {"kind": "given"}}

    def __init__(self, vectors, fail_at=None):
        self.vectors, self.dimension = vectors, vectors.shape[1]
        self.fail_at, self.asked = fail_at, []

    def prepare(self, folder, texts, progress):
        return {"kind": "given"}

    def rows(self, begin, end, texts):
        if self.fail_at is not None and end > self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(begin)
        return self.vectors[begin:end]


def write_corpus(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def corpus_rows(count, named=False):
    return [{"id": f"p{row}" if named else str(row), "contents": f'"Title {row}"\nText of {row}, Łódź.\nMore.'}
            for row in range(count)]  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch):
    """Sixteen rows to a chunk, three chunks to a file."""
    monkeypatch.setattr(index_format, "CHUNK_BYTES", 16 * 2 * DIMENSION)
    monkeypatch.setattr(index_format, "FILE_BYTES", 3 * 16 * 2 * DIMENSION)
    monkeypatch.setattr(index_build, "_SECONDS_BETWEEN_SYNCS", 0.0)


def random_vectors(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float16)


def stored(index):
    return np.concatenate([vectors for _, vectors in index.vector_parts()])


@pytest.mark.parametrize(
    ("count", "named", "name"), [(1, False, "c.jsonl"), (100, True, "c.jsonl.gz"), (96, False, "c.jsonl")]
)
def test_what_goes_in_comes_out(tmp_path, small_chunks, count, named, name):
    rows, vectors = corpus_rows(count, named), random_vectors(count)
    index = build_index(tmp_path / "i", write_corpus(tmp_path / name, rows), Given(vectors), Silent())
    assert [index.contents(row) for row in range(count)] == [row["contents"] for row in rows]
    found = index.passages(range(count), [0.5] * count)
    assert [(p.id, p.title, p.score) for p in found] == [(row["id"], f"Title {n}", 0.5) for n, row in enumerate(rows)]
    assert (stored(index) == vectors).all()
    assert [first for first, _ in index.vector_parts()] == list(range(0, count, 48))
    assert index.manifest.lossless
    assert (tmp_path / "i" / "ids.bin").exists() == named
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "i"])
    assert sorted(path.name for path in (tmp_path / "i").iterdir()) == sorted([*index.manifest.files, "manifest.json"])
    index.verify()


def test_contents_are_kept_to_the_letter(tmp_path):
    """Vectors are made of them: quotes that are missing, or spaces at an end, must not be put right."""
    contents = ["No title", "Bare\nText", '"Quoted"\n Text \n', '""\n"', "\n\nx"]
    rows = [{"id": str(row), "contents": text} for row, text in enumerate(contents)]
    index = build_index(tmp_path / "i", write_corpus(tmp_path / "c", rows), Given(random_vectors(5)), Silent())
    assert [index.contents(row) for row in range(5)] == contents


@pytest.fixture
def made(tmp_path, small_chunks):
    corpus = write_corpus(tmp_path / "corpus.jsonl", corpus_rows(100, named=True))
    build_index(tmp_path / "i", corpus, Given(random_vectors(100)), Silent())
    return tmp_path / "i"


FILES = ["vectors-00000.f16", "vectors-00002.f16", "passages.bin", "passages.u64", "ids.bin", "ids.u64"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_flipped_bit_is_found_and_named(made, name, place):
    path = made / name
    data = bytearray(path.read_bytes())
    position = round(place * (len(data) - 1))
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged|disagree") as caught:
        open_index(made).verify()
    assert name.rpartition(".")[0] in str(caught.value)
    if "bytes" in str(caught.value):
        begin, end = (int(word) for word in str(caught.value).partition("bytes ")[2].split(" are")[0].split(" to "))
        assert begin <= position < end <= len(data)
        assert end - begin <= 16 * 2 * DIMENSION


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_a_longer_and_a_missing_file_are_named(made, name):
    path = made / name
    data = path.read_bytes()
    for changed, word in ((data[:-1], "truncated"), (data + b"x", "too long")):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"{name} is {word}"):
            open_index(made)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        open_index(made)


def test_a_manifest_that_is_not_ours(made):
    path = made / "manifest.json"
    text = path.read_text()
    for changed, word in (
        (text.replace('"version": 1', '"version": 2'), "format version 2, this program reads 1"),
        (text.replace('"num_rows": 100', '"num_rows": 101'), "digest does not fit"),
        (text[: len(text) // 2], "not valid JSON"),
        ("{}", "`format` must be"),
        ("[]", "`format` must be"),
    ):
        path.write_text(changed)
        with pytest.raises(ValueError, match=word):
            open_index(made)
    path.unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        open_index(made)
    with pytest.raises(ValueError, match="there is no index"):
        open_index(made / "nowhere")


def test_an_index_is_never_overwritten(made, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        build_index(made, tmp_path / "corpus.jsonl", Given(random_vectors(100)), Silent())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 3 is not valid JSON"),
        ("[]", "line 3 must be an object"),
        ('{"id": "2"}', "line 3: the key `contents` is missing"),
        ('{"id": "1", "contents": "x"}', "line 3: the id '1' is already taken"),
        ('{"id": "2", "contents": "\\ud800"}', "row 2 of the corpus .* not valid Unicode"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path, line, message):
    corpus = write_corpus(tmp_path / "c.jsonl", corpus_rows(2))
    with corpus.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        build_index(tmp_path / "i", corpus, Given(random_vectors(3)), Silent())
    assert not (tmp_path / "i").exists()


def test_vectors_that_fp16_cannot_hold_are_refused(tmp_path, small_chunks):
    corpus = write_corpus(tmp_path / "c.jsonl", corpus_rows(40))
    for bad in (7e4, np.nan, np.inf):
        vectors = random_vectors(40).astype(np.float32)
        vectors[33, 5] = bad
        with pytest.raises(ValueError, match="vector of row 33"):
            build_index(tmp_path / "i", corpus, Given(vectors), Silent(), restart=True)


# ---------------------------------------------------------------------------------------------------------- resuming


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
    assert other.wait() == 2  # one process at a time
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    assert start(10, "a").wait() == 0  # 13 chunks, of which 3 were there
    assert start(13, "b").wait() == 0
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name
    open_index(tmp_path / "a").verify()


# ------------------------------------------------------------------------------------------------------------- faiss


def flat_bytes(vectors, fourcc=b"IxFI", metric=0):
    """By the format, from nothing."""
    count, dimension = vectors.shape
    header = fourcc + struct.pack("<iqqqBiQ", dimension, count, 1 << 20, 1 << 20, 1, metric, count * dimension)
    assert len(header) == 45
    return header + vectors.astype("<f4").tobytes()


def test_a_flat_file_by_hand_comes_in_and_goes_out(tmp_path, small_chunks):
    vectors = random_vectors(100).astype(np.float32)
    data = flat_bytes(vectors)
    (tmp_path / "e.index").write_bytes(data)
    flat = FlatFile([tmp_path / "e.index"])
    assert (flat.num_rows, flat.dimension, flat.metric) == (100, DIMENSION, "inner_product")
    assert (flat.rows(0, 100) == vectors).all()
    index = build_index(tmp_path / "i", write_corpus(tmp_path / "c", corpus_rows(100)), Given(vectors), Silent())
    export_flat(index, tmp_path / "out.index", lambda finished, total: None)
    assert (tmp_path / "out.index").read_bytes() == data


@pytest.mark.parametrize("cuts", [(20, 44, 45, 46), (1000,), (45 + 4 * DIMENSION,), (7, 7, 25_000)])
def test_pieces_are_read_as_if_they_were_joined(tmp_path, cuts):
    vectors = random_vectors(100).astype(np.float32)
    data = flat_bytes(vectors)
    paths = [tmp_path / f"part_{number}" for number in range(len(cuts) + 1)]
    for path, begin, end in zip(paths, (0, *cuts), (*cuts, len(data)), strict=True):
        path.write_bytes(data[begin:end])
    flat = FlatFile(paths)
    for begin, end in ((0, 100), (0, 1), (3, 50), (99, 100)):
        assert (flat.rows(begin, end) == vectors[begin:end]).all()
    with pytest.raises(ValueError, match="give all its pieces|too short"):
        FlatFile(paths[:-1])


def test_squared_distance_needs_rows_of_one_length(tmp_path):
    vectors = random_vectors(50).astype(np.float32)
    (tmp_path / "f").write_bytes(flat_bytes(vectors, b"IxF2", 1))
    with pytest.raises(ValueError, match="different lengths"):
        FlatFile([tmp_path / "f"]).rows(0, 50)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    (tmp_path / "f").write_bytes(flat_bytes(unit, b"IxF2", 1))
    assert (FlatFile([tmp_path / "f"]).rows(0, 50) == unit).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"IwFl" + data[4:], "not a flat faiss index"),
        (lambda data: data[:33] + struct.pack("<i", 4) + data[37:], "metric 4"),
        (lambda data: data[:37] + struct.pack("<Q", 9) + data[45:], "its header says"),
        (lambda data: data[:-1], "bytes where its header asks for"),
        (lambda data: data + b"x", "bytes where its header asks for"),
        (lambda data: data[:30], "too short"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    (tmp_path / "f").write_bytes(change(flat_bytes(random_vectors(9))))
    with pytest.raises(ValueError, match=message):
        FlatFile([tmp_path / "f"])


def test_faiss_itself_reads_and_writes_the_same(tmp_path, small_chunks):
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    vectors = random_vectors(100).astype(np.float32)
    theirs = faiss.IndexFlatIP(DIMENSION)
    theirs.add(vectors)
    faiss.write_index(theirs, str(tmp_path / "theirs"))
    assert (tmp_path / "theirs").read_bytes() == flat_bytes(vectors)
    index = build_index(tmp_path / "i", write_corpus(tmp_path / "c", corpus_rows(100)), Given(vectors), Silent())
    export_flat(index, tmp_path / "ours", lambda finished, total: None)
    read = faiss.read_index(str(tmp_path / "ours"))
    assert (read.reconstruct_n(0, 100) == vectors).all()
    distance = faiss.IndexFlatL2(DIMENSION)
    distance.add(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    faiss.write_index(distance, str(tmp_path / "distance"))
    assert FlatFile([tmp_path / "distance"]).metric == "squared_distance"
    ivf = faiss.index_factory(DIMENSION, "IVF2,Flat", faiss.METRIC_INNER_PRODUCT)
    ivf.train(vectors)
    ivf.add(vectors)
    faiss.write_index(ivf, str(tmp_path / "ivf"))
    with pytest.raises(ValueError, match="not a flat faiss index"):
        FlatFile([tmp_path / "ivf"])


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        try:
            code = cli.main(["index", *map(str, argv)])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command_from_end_to_end(run, tmp_path):
    write_corpus(tmp_path / "c.jsonl", corpus_rows(30))
    code, out, error = run("build", "--corpus", "c.jsonl", "--output", "i", "--dimension", 128)
    assert (code, out) == (0, "i: 30 passages, 128 components\n"), error
    assert run("verify", "i")[:2] == (0, "i is whole: 30 passages, 4 files\n")
    code, out, _ = run("info", "i")
    assert code == 0
    assert "passages           30" in out
    assert "encoder kind       'hashing'" in out
    assert run("export", "i", "out.index")[0] == 0
    assert FlatFile([Path("out.index")]).num_rows == 30
    code, _, error = run("export", "i", "out.index")
    assert (code, "exists already" in error) == (2, True)
    data = bytearray((tmp_path / "i" / "passages.bin").read_bytes())
    data[3] ^= 64
    (tmp_path / "i" / "passages.bin").write_bytes(data)
    code, _, error = run("verify", "i")
    assert code == 2
    assert "passages.bin is damaged: bytes 0 to" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--corpus", "gone.jsonl", "--output", "i"], "there is no file gone.jsonl"),
        (["build", "--corpus", "c.jsonl", "--output", "i", "--encoder", "nowhere"], "there is no model folder nowhere"),
        (["build", "--corpus", "c.jsonl", "--output", "i", "--query-prefix", "q"], "--query-prefix is for a model"),
        (["build", "--corpus", "c.jsonl", "--output", "i", "--dimension", "9"], "--dimension 9"),
        (["import", "x.index", "--corpus", "c.jsonl", "--output", "i"], "--encoder is missing"),
        (["import", "x.index", "--corpus", "c.jsonl", "--output", "i", "--encoder", "."], "there is no file x.index"),
        (["info", "c.jsonl"], "there is no index c.jsonl"),
        (["verify", "."], "is not an index"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, arguments, message):
    write_corpus(tmp_path / "c.jsonl", corpus_rows(3))
    code, _, error = run(*arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_hashed_vectors_need_the_weights_they_were_made_with(tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", corpus_rows(30))
    index = build_index(tmp_path / "i", corpus, EncodingSource(HashingEncoder(64)), Silent())
    encoder = HashingEncoder.open(index.manifest.encoder, index.folder)
    texts = TextColumn(index.folder, "passages").slice(0, 30)
    assert (encoder.encode_passages(texts).astype(np.float16) == stored(index)).all()
    (tmp_path / "i" / "encoder-hashing.bin").write_bytes(bytes(4 << 18))
    with pytest.raises(ValueError, match=r"encoder-hashing\.bin is damaged"):
        HashingEncoder.open(index.manifest.encoder, index.folder)
