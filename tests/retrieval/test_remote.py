"""The client against a stand-in server on 127.0.0.1 that fails as instructed."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from searchr1_fast.retrieval import RemoteRetriever, RetrievalError
from searchr1_fast.types import Passage


def good(request, results=None):
    hits = [
        [
            {"document": {"id": f"{query}{place}", "contents": f'"T{place}"\n{query}'}, "score": 1.5 - place}
            for place in range(request["topk"])
        ]
        for query in request["queries"]
    ]
    return 200, json.dumps({"result": hits if results is None else results})


class StandIn(ThreadingHTTPServer):
    """Answers by the steps of `script` in turn, and correctly once they are used up.

    A step is (status, body), (status, body, headers), "close" (hang up without an answer), "cut" (hang up within an
    answer), "drop" (a good answer, then hang up although the connection was to be kept) or "hang" (say nothing until
    the end).
    """

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.requests, self.connections = [], set()
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/retrieve"

    def handle_error(self, request, client_address):
        pass  # clients that hung up are part of the play


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append((self.path, request))
        server.connections.add(self.client_address)
        step = server.script.pop(0) if server.script else good(request)
        if step == "hang":
            server.over.wait(10)
        if step in ("close", "hang"):
            self.close_connection = True
            return
        if step in ("cut", "drop"):
            status, body, headers = *good(request), {}
            self.close_connection = True
        else:
            status, body, headers = (*step, {})[:3]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body.encode()) + (100 if step == "cut" else 0)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments):
        pass


@contextmanager
def stand_in(*script):
    server = StandIn(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def client(url, max_retries=2, timeout=10.0):
    """-> a client that records its pauses instead of waiting."""
    retriever = RemoteRetriever(url, timeout=timeout, max_retries=max_retries)
    pauses = []
    retriever._sleep = pauses.append
    return retriever, pauses


def test_a_batch_is_one_request_and_equal_queries_are_sent_once():
    with stand_in() as server:
        retriever, _ = client(server.url)
        results = retriever.search(["b", "a", "b"], 2)
    expected = {query: [Passage(f"{query}{p}", f"T{p}", query, 1.5 - p) for p in (0, 1)] for query in "ab"}
    assert results == [expected["b"], expected["a"], expected["b"]]
    assert server.requests == [("/retrieve", {"queries": ["b", "a"], "topk": 2, "return_scores": True})]
    assert (retriever.statistics.requests, retriever.statistics.queries, retriever.statistics.retries) == (1, 2, 0)


def test_the_connection_is_kept():
    with stand_in() as server:
        retriever, _ = client(server.url)
        for _ in range(5):
            retriever.search(["a"], 1)
        assert (len(server.requests), len(server.connections)) == (5, 1)


def test_a_kept_connection_that_the_server_closed_costs_no_retry():
    with stand_in("drop", "drop") as server:
        retriever, pauses = client(server.url, max_retries=0)
        for _ in range(3):
            assert retriever.search(["a"], 1)[0][0].id == "a0"
            time.sleep(0.02)  # the client must know that the server has closed its end
        assert (retriever.statistics.retries, retriever.statistics.failures, pauses) == (0, 0, [])


@pytest.mark.parametrize("failure", [(500, "oops"), (503, ""), (429, "slow down"), "close", "cut"])
def test_failures_that_pass_are_tried_again(failure):
    with stand_in(failure, failure) as server:
        retriever, pauses = client(server.url)
        assert retriever.search(["a"], 1) == [[Passage("a0", "T0", "a", 1.5)]]
        assert retriever.statistics.retries == len(pauses) == 2
        assert retriever.statistics.failures == 0


def test_a_server_that_hangs_is_left_after_the_timeout():
    with stand_in("hang") as server:
        retriever, _ = client(server.url, timeout=0.1)
        assert retriever.search(["a"], 1)[0][0].id == "a0"
        assert retriever.statistics.retries == 1


@pytest.mark.parametrize(
    ("failure", "cause"), [((500, "oops"), "HTTP 500: oops"), ("close", "closed connection"), ("hang", "timed out")]
)
def test_giving_up_names_url_attempts_and_cause(failure, cause):
    with stand_in(*[failure] * 3) as server:
        retriever, pauses = client(server.url, timeout=0.1 if failure == "hang" else 10)
        with pytest.raises(RetrievalError, match=rf"{server.url} gave no answer in 3 attempts.*{cause}"):
            retriever.search(["a"], 1)
        assert (retriever.statistics.retries, retriever.statistics.failures, len(pauses)) == (2, 1, 2)
        assert len(server.requests) == 3


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/retrieve"
        retriever, _ = client(url, max_retries=0)
        with pytest.raises(RetrievalError, match=rf"{url} gave no answer in 1 attempt; .*ConnectionRefusedError"):
            retriever.search(["a"], 1)


@pytest.mark.parametrize("status", [400, 404, 422, 301])
def test_refusals_are_not_tried_again(status):
    with stand_in((status, "no such thing")) as server:
        retriever, pauses = client(server.url)
        with pytest.raises(RetrievalError, match=rf"{server.url} refused .*HTTP {status}: no such thing"):
            retriever.search(["a"], 1)
        assert (len(server.requests), pauses, retriever.statistics.failures) == (1, [], 1)


HIT = {"document": {"id": "0", "contents": "x"}, "score": 1.0}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>", "not JSON"),
        ("[]", 'without a list "result"'),
        ('{"result": null}', 'without a list "result"'),
        (json.dumps({"result": [[HIT]]}), "2 queries with 1 results"),
        (json.dumps({"result": [[HIT], [HIT], [HIT]]}), "2 queries with 3 results"),
        (json.dumps({"result": [[HIT], None]}), "no list of passages for the query 'b'"),
        (json.dumps({"result": [[HIT], [{"score": 1.0}]]}), 'without "document" and "contents"'),
        (json.dumps({"result": [[HIT], [{"document": "x", "score": 1.0}]]}), 'without "document" and "contents"'),
        (json.dumps({"result": [[HIT], ["x"]]}), 'without "document" and "contents"'),
        (json.dumps({"result": [[HIT], [HIT | {"score": "high"}]]}), "score that is no number"),
        (json.dumps({"result": [[HIT], [HIT | {"score": float("nan")}]]}), "score that is no number"),
    ],
)
def test_answers_of_the_wrong_shape_are_errors_at_once(body, message):
    with stand_in((200, body)) as server:
        retriever, pauses = client(server.url)
        with pytest.raises(RetrievalError, match=message) as caught:
            retriever.search(["a", "b"], 2)
        assert server.url in str(caught.value)
        assert (len(server.requests), pauses) == (1, [])


def test_servers_of_web_searches_ignore_topk_and_have_no_scores():
    hits = [{"document": {"contents": f'"T{place}"\nx'}} for place in range(5)]
    with stand_in((200, json.dumps({"result": [hits]}))) as server:
        retriever, _ = client(server.url)
        assert retriever.search(["a"], 2) == [[Passage("", "T0", "x"), Passage("", "T1", "x")]]


def test_pauses_double_with_jitter_and_stay_bounded():
    with stand_in(*[(500, "")] * 12) as server:
        retriever, pauses = client(server.url, max_retries=12)
        retriever.search(["a"], 1)
    for attempt, pause in enumerate(pauses):
        longest = min(30.0, 0.25 * 2**attempt)
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == 12


@pytest.mark.parametrize(("header", "pause"), [("7", 7.0), ("9999", 30.0), ("Fri, 01 Jan 2027 00:00:00 GMT", None)])
def test_the_server_may_ask_for_a_longer_pause(header, pause):
    with stand_in((429, "", {"Retry-After": header})) as server:
        retriever, pauses = client(server.url)
        retriever.search(["a"], 1)
    assert pauses == [pause] if pause else 0 < pauses[0] < 1


def test_no_queries_no_request():
    retriever, _ = client("http://127.0.0.1:9/retrieve")
    assert retriever.search([], 3) == []
    assert retriever.statistics.requests == 0


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/retrieve", "http:///retrieve"])
def test_bad_urls(url):
    with pytest.raises(ValueError, match=r"retrieval\.url"):
        RemoteRetriever(url)


def test_bad_k():
    retriever, _ = client("http://127.0.0.1:9/retrieve")
    with pytest.raises(ValueError, match="at least 1"):
        retriever.search(["a"], 0)
