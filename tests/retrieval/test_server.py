"""The server over real sockets on 127.0.0.1, spoken to as any HTTP client would."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("starlette", reason="the server needs the extra `serve`")
pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")

from searchr1_fast.retrieval import BM25Retriever, RemoteRetriever, RetrievalError, RetrievalServer
from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.dense import hash_corpus
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
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        wait_until_up(server.address)
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.close()


def wait_until_up(address):
    for _ in range(500):
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise AssertionError(f"nothing listens on {address}")


@pytest.fixture(scope="module")
def server():
    with serving(BM25Retriever(CORPUS)) as running:
        yield running


def request(server, body, path="/retrieve", method="POST", headers=None):
    connection = http.client.HTTPConnection(*server.address, timeout=120)
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
    """The original fails here or, with exactly two queries, answers something else."""
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
        ([], "must be an object"),
        ({}, "`queries` must be a list"),
        ({"queries": "x"}, "`queries` must be a list"),
        ({"queries": ["x", 1]}, "`queries` must be a list"),
        ({"queries": ["x"], "topk": 0}, "`topk` must be"),
        ({"queries": ["x"], "topk": -1}, "`topk` must be"),
        ({"queries": ["x"], "topk": True}, "`topk` must be"),
        ({"queries": ["x"], "topk": "3"}, "`topk` must be"),
        ({"queries": ["x"], "return_scores": 1}, "`return_scores` must be"),
    ],
)
def test_bad_requests(server, body, message):
    status, reply = request(server, body)
    assert status == 422
    assert message in reply["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_bodies_that_are_not_json(server, body):
    status, reply = request(server, body)
    assert status == 400
    assert "not valid JSON" in reply["error"]


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
    connection = http.client.HTTPConnection(*server.address, timeout=120)
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
    remote = RemoteRetriever(server.url, timeout=120, max_retries=0)
    queries = ["city", "łódź CAFÉ", "nothing known", "city", "france italy"]
    assert remote.search(queries, 3) == local.search(queries, 3)
    assert remote.search([], 3) == []


def test_many_at_once(server):
    remote = RemoteRetriever(server.url, timeout=120, max_retries=0)
    queries = ["city", "rome", "paris seine", "norway"] * 25
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda query: remote.search([query], 2)[0], queries))
    assert results == BM25Retriever(CORPUS).search(queries, 2)


def test_more_than_there_is_gives_all_there_is(server):
    _, reply = request(server, {"queries": ["city"], "topk": 2**20})
    assert [document["id"] for document in reply["result"][0]] == ["b", "d", "a", "c"]


def test_what_the_batcher_does_not_take_is_the_clients_mistake():
    search, store = hash_corpus(CORPUS, 64)
    with BatchedRetriever(search, store) as retriever, serving(retriever) as server:
        for topk in (2**20 + 1, 2**40):
            status, reply = request(server, {"queries": ["city"], "topk": topk})
            assert status == 422 and "from 1 to 1048576" in reply["error"]
        status, reply = request(server, {"queries": ["\ud800"]})
        assert status == 422 and "surrogate" in reply["error"]
        assert len(request(server, {"queries": ["city"], "topk": 2**20})[1]["result"][0]) == len(CORPUS)


def test_a_request_for_more_passages_than_it_may_ask_for(server):
    """Queries times passages each, whatever the corpus holds, because memory is allocated for all of them."""
    status, reply = request(server, {"queries": ["city"] * 1025, "topk": 1024})
    sentence = "1025 queries of 1024 passages are more than the 1048576 a request may ask for"
    assert (status, reply) == (422, {"error": sentence})
    assert request(server, {"queries": ["city"] * 1024, "topk": 1024})[0] == 200


class Slow:
    """Answers with the query once `release` is set, and records the queries."""

    def __init__(self):
        self.release = threading.Event()
        self.calls = []

    def search(self, queries, k):
        self.calls.append((sorted(queries), k))
        assert self.release.wait(30)
        return [[Passage(query, "", "", 1.0)] * min(k, 2) for query in queries]


def wait_for(condition):
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def waiting_requests(server):
    return int(re.search(r"^searchr1_requests_waiting (\d+)$", server.render_metrics(), re.MULTILINE)[1])


def test_requests_of_all_clients_are_searched_together():
    slow = Slow()
    with serving(slow) as server, ThreadPoolExecutor(24) as pool:
        first = pool.submit(request, server, {"queries": ["first"], "topk": 1})
        wait_for(lambda: slow.calls)
        bodies = [{"queries": [f"q{number % 10}", "same"], "topk": 1} for number in range(20)]
        rest = [pool.submit(request, server, body) for body in bodies]
        other = pool.submit(request, server, {"queries": ["same"], "topk": 2})
        wait_for(lambda: waiting_requests(server) == 22)
        slow.release.set()
        assert first.result()[1] == {"result": [[{"id": "first", "contents": '""\n'}]]}
        for body, future in zip(bodies, rest, strict=True):
            assert [hits[0]["id"] for hits in future.result()[1]["result"]] == body["queries"]
        assert len(other.result()[1]["result"][0]) == 2
    together = sorted(["same", *(f"q{number}" for number in range(10))])
    assert slow.calls[0] == (["first"], 1)
    assert sorted(slow.calls[1:]) == sorted([(together, 1), (["same"], 2)])


class Moody:
    """Fails for one query, and for another with an error that is no RetrievalError."""

    def search(self, queries, k):
        if "bad" in queries:
            raise RetrievalError("the index is gone")
        if "worse" in queries:
            raise ZeroDivisionError("a bug")
        if "short" in queries:
            return []
        return [[Passage(query, "", "", 1.0)] for query in queries]


def test_after_a_failure_the_server_goes_on():
    with serving(Moody()) as server:
        assert request(server, {"queries": ["bad"]}) == (502, {"error": "the index is gone"})
        assert request(server, {"queries": ["worse"]}) == (500, {"error": "the server failed: ZeroDivisionError"})
        assert request(server, {"queries": ["short"]}) == (500, {"error": "the server failed: ValueError"})
        assert request(server, {"queries": ["good"]})[0] == 200
        page = server.render_metrics()
    assert 'searchr1_requests_total{status="200"} 1' in page
    assert 'searchr1_requests_total{status="500"} 2' in page
    assert 'searchr1_requests_total{status="502"} 1' in page


def test_long_bodies_are_refused_with_and_without_a_length():
    with serving(BM25Retriever(CORPUS), max_body_bytes=1000) as server:
        long = {"queries": ["x" * 1000]}
        assert request(server, long)[0] == 413
        connection = http.client.HTTPConnection(*server.address, timeout=120)
        connection.request("POST", "/retrieve", iter([b"x" * 600, b"x" * 600]), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert connection.getresponse().status == 413
        connection.close()
        assert request(server, {"queries": ["rome"]})[0] == 200


def test_a_token_is_asked_for():
    with serving(BM25Retriever(CORPUS), token="s3cret") as server:
        body = {"queries": ["rome"]}
        assert request(server, body)[0] == 401
        assert request(server, body, headers={"Authorization": "Bearer s3cre"})[0] == 401
        assert request(server, body, headers={"Authorization": "Bearer s3cret"})[0] == 200
        assert request(server, None, path="/metrics", method="GET")[0] == 401
        assert request(server, None, path="/health", method="GET")[0] == 200
        with pytest.raises(RetrievalError, match="401"):
            RemoteRetriever(server.url, max_retries=0).search(["rome"], 1)
        assert RemoteRetriever(server.url, max_retries=0, token="s3cret").search(["rome"], 1)[0][0].title == "Rome"


def test_metrics_are_what_prometheus_reads():
    with serving(BM25Retriever(CORPUS)) as server:
        for queries in (["rome"], ["rome", "oslo"], []):
            request(server, {"queries": queries})
        connection = http.client.HTTPConnection(*server.address, timeout=120)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        page = response.read().decode()
        connection.close()
    assert response.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    assert all(re.fullmatch(r"#.*|[a-z_0-9]+(\{[a-z]+=\"[^\"]*\"\})? [-+0-9.e]+", line) for line in page.splitlines())
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert values["searchr1_queries_total"] == "3"
    assert values['searchr1_requests_total{status="200"}'] == "3"
    assert values["searchr1_request_seconds_count"] == "3"
    assert values['searchr1_request_seconds_bucket{le="+Inf"}'] == "3"
    assert values['searchr1_batch_rows_bucket{le="1"}'] == "1"
    assert values['searchr1_batch_rows_bucket{le="2"}'] == "2"


def test_a_port_that_is_taken_is_an_error_at_once(server):
    with pytest.raises(OSError, match="in use"):
        RetrievalServer(None, port=server.address[1])


SLOW_SERVER = """
import sys, time
from searchr1_fast.retrieval import RetrievalServer
from searchr1_fast.types import Passage
class Slow:
    def search(self, queries, k):
        print("searching", flush=True)
        time.sleep(1.5)
        return [[Passage(query, "", "", 1.0)] for query in queries]
with RetrievalServer(Slow(), port=0) as server:
    print(server.address[1], flush=True)
    server.serve_forever()
print("drained", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_lets_what_was_accepted_finish(number, code):
    process = subprocess.Popen([sys.executable, "-c", SLOW_SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ)  # fmt: skip
    try:
        address = ("127.0.0.1", int(process.stdout.readline()))
        wait_until_up(address)
        with ThreadPoolExecutor(1) as pool:
            url = f"http://127.0.0.1:{address[1]}/retrieve"
            future = pool.submit(RemoteRetriever(url, max_retries=0).search, ["slow"], 1)
            assert process.stdout.readline() == "searching\n"
            process.send_signal(number)
            assert future.result()[0][0].id == "slow"
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (code or 0) or process.returncode == -number, error
    assert ("drained" in out) == (number == signal.SIGTERM)
    assert ("KeyboardInterrupt" in error) == (number == signal.SIGINT)
