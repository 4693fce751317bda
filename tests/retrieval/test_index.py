"""An index on disk: what is written is read back, and damage is found and named."""

from __future__ import annotations

import numpy as np
import pytest
from index_fakes import DIMENSION, Given, Silent, corpus_rows, random_vectors, stored, write_corpus

from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.encoders import EncodingSource
from searchr1_fast.retrieval.index_build import build_index
from searchr1_fast.retrieval.index_format import TextColumn, open_index


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
    """Vectors are made from them, so missing quotes or spaces at an end must not be corrected."""
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


def test_hashed_vectors_need_the_weights_they_were_made_with(tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", corpus_rows(30))
    index = build_index(tmp_path / "i", corpus, EncodingSource(HashingEncoder(64)), Silent())
    encoder = HashingEncoder.open(index.manifest.encoder, index.folder)
    texts = TextColumn(index.folder, "passages").slice(0, 30)
    assert (encoder.encode_passages(texts).astype(np.float16) == stored(index)).all()
    (tmp_path / "i" / "encoder-hashing.bin").write_bytes(bytes(4 << 18))
    with pytest.raises(ValueError, match=r"encoder-hashing\.bin is damaged"):
        HashingEncoder.open(index.manifest.encoder, index.folder)
