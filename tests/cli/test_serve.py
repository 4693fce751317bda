"""`searchr1 serve`."""

from __future__ import annotations

import json
import re
import sys
import threading
import urllib.error
import urllib.request

import pytest
from commands import CORPUS, one_sentence, write_jsonl

from searchr1_fast.config import RetrievalConfig


@pytest.fixture
def serve_once(run, monkeypatch):
    """Arguments of `searchr1 serve` → (exit code, stdout, stderr, the reply to one request)."""
    pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
    from searchr1_fast.retrieval import RetrievalServer

    def run_once(*arguments, headers=None):
        replies = []
        serve_forever = RetrievalServer.serve_forever

        def ask_once(server):
            body = json.dumps({"queries": ["who founded Arden"], "topk": 1, "return_scores": True}).encode()
            try:
                with urllib.request.urlopen(urllib.request.Request(server.url, body, headers or {})) as response:
                    replies.append(json.load(response))
            except urllib.error.HTTPError as error:
                replies.append(error.code)
            server.shutdown()

        def serve(server):
            server._socket.listen()  # so that the client's connection waits rather than fails
            client = threading.Thread(target=ask_once, args=(server,))
            client.start()
            serve_forever(server)
            client.join()

        monkeypatch.setattr(RetrievalServer, "serve_forever", serve)
        result = run("serve", *arguments, "--port", "0")
        monkeypatch.setattr(RetrievalServer, "serve_forever", serve_forever)
        return (*result, replies[0])

    return run_once


def test_serve_answers_the_protocol(serve_once, tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    code, out, error, reply = serve_once("--corpus", corpus)
    assert code == 0, error
    assert re.search(r"serving POST http://127\.0\.0\.1:\d+/retrieve", out)
    assert "whoever reaches" not in out
    assert reply["result"][0][0]["document"] == CORPUS[1]


def test_serve_an_index(run, serve_once, tmp_path):
    pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    assert run("index", "build", "--corpus", corpus, "--output", "made.index")[0] == 0
    code, _, error, reply = serve_once("--index", "made.index")
    assert code == 0, error
    assert reply["result"][0][0]["document"] == CORPUS[1]


def test_serve_wants_the_token_of_its_environment(serve_once, tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    monkeypatch.setenv("SEARCHR1_TOKEN", "s3cret")
    assert serve_once("--corpus", corpus)[3] == 401
    assert "result" in serve_once("--corpus", corpus, headers={"Authorization": "Bearer s3cret"})[3]
    monkeypatch.delenv("SEARCHR1_TOKEN")
    assert "whoever reaches 0.0.0.0 may search" in serve_once("--corpus", corpus, "--host", "0.0.0.0")[1]


def test_serve_says_what_to_install(run, tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    monkeypatch.delitem(sys.modules, "searchr1_fast.retrieval.server_http", raising=False)
    import searchr1_fast.retrieval

    monkeypatch.delattr(searchr1_fast.retrieval, "server_http", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, error = run("serve", "--corpus", corpus, "--port", "0")
    assert code == 2
    assert "needs uvicorn, which is not installed: pip install 'searchr1_fast[serve]'" in one_sentence(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "gone.jsonl", "--port", "0"], "gone.jsonl"),
        (["--corpus", "c.jsonl", "--port", "70000"], "--port 70000: a port is a number from 0 to 65535"),
        (["--corpus", "c.jsonl", "--port", "0", "retrieval.bm25_k=2"], "did you mean `retrieval.bm25_k1`"),
        (["--index", "gone.index", "--port", "0"], "there is no index gone.index"),
    ],
)
def test_serve_mistakes(run, arguments, message):
    code, _, error = run("serve", *arguments)
    assert code == 2
    assert message in one_sentence(error)


def test_help_names_the_variable_of_the_configuration(run):
    default = RetrievalConfig.model_fields["token_variable"].default
    out = " ".join(run("serve", "--help")[1].split())
    assert f"If the environment variable {default} is set (retrieval.token_variable names another)" in out


def test_serve_says_that_a_port_is_taken(run, tmp_path):
    from searchr1_fast.retrieval import RetrievalServer

    corpus = write_jsonl(tmp_path / "corpus.jsonl", CORPUS)
    pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
    with RetrievalServer(None, port=0) as server:
        server._socket.listen()
        port = server.address[1]
        code, _, error = run("serve", "--corpus", corpus, "--port", port)
    assert code == 2
    assert f"port {port}" in one_sentence(error)
