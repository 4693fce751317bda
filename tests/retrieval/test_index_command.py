"""`searchr1 index`, from its arguments to its output."""

from __future__ import annotations

from pathlib import Path

import pytest
from index_fakes import corpus_rows, write_corpus

from searchr1_fast import cli
from searchr1_fast.retrieval.index_faiss import FlatFile


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
        (["build", "--corpus", "c.jsonl", "--output", "i", "--device", "cuda"], "--device is for a model"),
        (["build", "--corpus", "c.jsonl", "--output", "i", "--dimension", "9"], "--dimension 9"),
        (
            ["build", "--corpus", "c.jsonl", "--output", "i", "--encoder", "x", "--dimension", "9"],
            "--dimension is of the hashing encoder",
        ),
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
