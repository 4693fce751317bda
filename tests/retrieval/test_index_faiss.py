"""faiss' flat files, made by hand and against faiss itself."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from index_fakes import DIMENSION, Given, Silent, corpus_rows, random_vectors, write_corpus

from searchr1_fast.retrieval.index_build import build_index
from searchr1_fast.retrieval.index_faiss import FlatFile, export_flat


def flat_bytes(vectors, fourcc=b"IxFI", metric=0):
    """-> the bytes of a file, made from the format's description."""
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
