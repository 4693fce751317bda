"""The server over real sockets on 127.0.0.1, spoken to as any HTTP client would."""

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from searchr1_fast.retrieval import BM25Retriever, RemoteRetriever, RetrievalError, RetrievalServer
from searchr1_fast.types import Passage

CORPUS = [
    Passage("a", "Paris", "A city in France.\nOn the Seine."),
    Passage("b", "Rome", "A city in Italy."),
    Passage("c", "Café „Łódź“", "A café in the city of Łódź."),
    Passage("d", "Oslo", "A city in Norway."),
]


class Broken:
    def search(self, queries, k):
        raise RetrievalError("the index is gone")


@contextmanager
def serving(retriever, **options):
    server = RetrievalServer(retriever, port=0, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server():
    with serving(BM25Retriever(CORPUS)) as running:
        yield running


def request(server, body, path="/retrieve", method="POST", headers=None):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    try:
        body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        assert response.getheader("Content-Type") == "application/json"
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_with_scores(server):
    status, reply = request(server, {"queries": ["seine", "nothing known"], "topk": 2, "return_scores": True})
    score = BM25Retriever(CORPUS).search(["seine"], 1)[0][0].score
    document = {"id": "a", "contents": '"Paris"\nA city in France.\nOn the Seine.'}
    assert (status, reply) == (200, {"result": [[{"document": document, "score": score}], []]})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_without_scores(server, count):
    """The original breaks here: it fails, or with exactly two queries answers something else."""
    status, reply = request(server, {"queries": ["italy"] * count})
    assert (status, reply) == (200, {"result": [[{"id": "b", "contents": '"Rome"\nA city in Italy.'}]] * count})


@pytest.mark.parametrize("topk", [{}, {"topk": None}])
def test_default_topk(server, topk):
    _, reply = request(server, {"queries": ["city"], "extra": 1} | topk)
    assert len(reply["result"][0]) == 3
    _, reply = request(server, {"queries": ["city"], "topk": 4})
    assert len(reply["result"][0]) == 4


def test_no_queries(server):
    assert request(server, {"queries": [], "topk": 3, "return_scores": True}) == (200, {"result": []})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ([], "must be an object"),
        ({}, "`queries` must be a list"),
        ({"queries": "x"}, "`queries` must be a list"),
        ({"queries": ["x", 1]}, "`queries` must be a list"),
        ({"queries": ["x"], "topk": 0}, "`topk` must be"),
        ({"queries": ["x"], "topk": True}, "`topk` must be"),
        ({"queries": ["x"], "topk": "3"}, "`topk` must be"),
        ({"queries": ["x"], "return_scores": 1}, "`return_scores` must be"),
    ],
)
def test_bad_requests(server, body, message):
    status, reply = request(server, body)
    assert status == 400
    assert message in reply["error"]


def test_bad_places(server):
    assert request(server, {"queries": ["x"]}, path="/search")[0] == 404
    assert request(server, None, path="/", method="GET")[0] == 404
    assert request(server, None, path="/retrieve", method="GET")[0] == 405
    assert request(server, None, path="/health", method="GET") == (200, {"status": "ok"})
    assert request(server, b"", headers={"Content-Length": str(10**12)})[0] == 413


def test_a_failed_search_is_told():
    with serving(Broken()) as server:
        assert request(server, {"queries": ["x"]}) == (502, {"error": "the index is gone"})
        assert request(server, {"queries": []}) == (200, {"result": []})


def test_one_connection_serves_many_requests(server):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.connect()
    first_socket = connection.sock
    for body, status in ((b'{"queries": ["rome"]}', 200), (b"{", 400), (b'{"queries": ["rome"]}', 200)):
        connection.request("POST", "/retrieve", body)
        response = connection.getresponse()
        assert (response.status, response.getheader("Connection")) == (status, None)
        assert response.read()
        assert connection.sock is first_socket
    connection.close()


def test_client_and_server_agree_with_the_retriever_itself(server):
    local = BM25Retriever(CORPUS)
    remote = RemoteRetriever(server.url, timeout=10, max_retries=0)
    queries = ["city", "łódź CAFÉ", "nothing known", "city", "france italy"]
    assert remote.search(queries, 3) == local.search(queries, 3)
    assert remote.search([], 3) == []


def test_many_at_once(server):
    remote = RemoteRetriever(server.url, timeout=10, max_retries=0)
    queries = ["city", "rome", "paris seine", "norway"] * 25
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda query: remote.search([query], 2)[0], queries))
    assert results == BM25Retriever(CORPUS).search(queries, 2)
