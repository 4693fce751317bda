"""Live web search against stand-ins on 127.0.0.1: the service, and the pages it finds."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from batcher_fakes import PATIENCE

from searchr1_fast.config import load_config
from searchr1_fast.environment import Environment, build_environment
from searchr1_fast.retrieval import RetrievalError, open_retriever
from searchr1_fast.retrieval.protocol import Closes, Counts
from searchr1_fast.retrieval.web import WebRetriever
from searchr1_fast.retrieval.web_pages import Answer, excerpt, page_text
from searchr1_fast.types import Passage

KEY = "secret"


class Web(ThreadingHTTPServer):
    """Serper at /serper, SerpAPI at /serpapi, pages at /page/…; the steps of `script` come before correct answers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.pages = [], [], {}
        self.under_way = self.most = 0
        self.lock, self.gate = threading.Lock(), threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # clients that hung up are part of the play

    def results(self, query, count):
        return [
            {"title": f"{query} {place}", "link": f"{self.url}/page/{place}", "snippet": f"about {query} {place}"}
            for place in range(min(count, 6))
        ]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.service("/serper", self.headers["X-API-KEY"], body["q"], body["num"], "organic")

    def do_GET(self):
        parts = urlsplit(self.path)
        if parts.path.startswith("/page/"):
            with self.counted():
                page = self.server.pages.get(parts.path.removeprefix("/page/"))
                self.answer(*(page or (404, "not here", {})))
            return
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        assert asked.pop("engine") == "google"
        self.service("/serpapi", asked["api_key"], asked["q"], int(asked["num"]), "organic_results")

    def service(self, path, key, query, count, name):
        server = self.server
        with self.counted():
            with server.lock:
                server.asked.append(query)
                step = server.script.pop(0) if server.script else None
            if step is not None:
                self.answer(*step)
            elif urlsplit(self.path).path != path or key != KEY:
                self.answer(403, '{"message": "Unauthorized."}', {})
            else:
                self.answer(200, json.dumps({name: server.results(query, count)}), {})

    @contextmanager
    def counted(self):
        server = self.server
        with server.lock:
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        assert server.gate.wait(PATIENCE)
        with server.lock:
            server.under_way -= 1
        yield

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else body.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web():
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def open_web(web):
    made = []

    def build(engine="serper", key=KEY, **options):
        retriever = WebRetriever(engine, key, url=f"{web.url}/{engine}", timeout=PATIENCE, **options)
        retriever.pauses = []
        retriever._sleep = retriever.pauses.append
        made.append(retriever)
        return retriever

    yield build
    for retriever in made:
        retriever.close()


@pytest.mark.parametrize("engine", ["serper", "serpapi"])
def test_results_are_passages_in_the_order_of_the_service(web, open_web, engine):
    retriever = open_web(engine)
    found = retriever.search(["rome", "paris", "rome", "\ud800"], 2)
    wanted = [
        [
            Passage(f"{web.url}/page/{place}", f"{query} {place}", f"about {query} {place}", 1 / (place + 1))
            for place in (0, 1)
        ]
        for query in ("rome", "paris", "rome", "?")
    ]
    assert found == wanted
    assert sorted(web.asked) == ["?", "paris", "rome"]  # equal queries once
    assert [len(hits) for hits in retriever.search(["rome"], 10)] == [6]  # all there are, though ten were requested
    assert retriever.search(["paris"], 1) == [wanted[1][:1]]
    assert len(web.asked) == 3
    taken = retriever.take_statistics()
    assert (taken.queries, taken.unique, taken.cache_hits, taken.retries) == (6, 3, 2, 0)
    assert retriever.take_statistics().queries == 0
    assert retriever.search([], 1) == []
    assert isinstance(retriever, Counts) and isinstance(retriever, Closes)


def test_more_than_was_asked_for_is_asked_again(web, open_web):
    retriever = open_web()
    retriever.search(["rome"], 3)
    retriever.search(["rome"], 10)
    assert web.asked == ["rome"]
    retriever.search(["rome"], 11)
    assert web.asked == ["rome", "rome"]


def test_what_can_pass_is_tried_again_and_counted(web, open_web):
    retriever = open_web(max_retries=3)
    web.script = [(429, "", {"Retry-After": "7"}), (500, "broken", {})]
    assert len(retriever.search(["rome"], 1)[0]) == 1
    assert retriever.pauses[0] == 7.0 and 0.2 < retriever.pauses[1] <= 0.5
    assert retriever.take_statistics().retries == 2
    web.script = [(503, "busy", {})] * 4
    with pytest.raises(
        RetrievalError, match=r"/serper gave no answer in 4 attempts; the last failed with HTTP 503: busy"
    ):
        retriever.search(["oslo"], 1)
    taken = retriever.take_statistics()
    assert (taken.retries, taken.failures) == (3, 1)
    assert len(retriever.search(["oslo"], 1)[0]) == 1  # no result of it was cached


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ((401, "who are you", {}), "refused the request with HTTP 401: who are you"),
        ((200, "<html>", {}), "not JSON"),
        ((200, "[]", {}), 'without a list "organic"'),
        ((200, '{"organic": [3]}', {}), 'without a list "organic"'),
        ((200, '{"message": "no"}', {}), 'without a list "organic"'),
    ],
)
def test_what_cannot_pass_is_an_error_at_once(web, open_web, step, sentence):
    retriever = open_web()
    web.script = [step]
    with pytest.raises(RetrievalError, match=sentence):
        retriever.search(["rome"], 1)
    assert retriever.pauses == [] and len(web.asked) == 1


@pytest.mark.parametrize(
    ("engine", "answer"),
    [("serper", {"searchParameters": {"q": "x"}}), ("serpapi", {"search_information": {}, "error": "nothing"})],
)
def test_nothing_found_is_no_error(web, open_web, engine, answer):
    web.script = [(200, json.dumps(answer), {})]
    assert open_web(engine).search(["rome"], 3) == [[]]


def test_a_wrong_key_and_a_closed_search_are_errors_that_do_not_tell_the_key(open_web):
    with pytest.raises(RetrievalError, match="HTTP 403") as error:
        open_web("serpapi", key="hunter2").search(["rome"], 1)
    assert "hunter2" not in str(error.value)
    retriever = open_web()
    retriever.close()
    retriever.close()
    with pytest.raises(RetrievalError, match="closed"):
        retriever.search(["rome"], 1)


def test_a_search_that_is_closed_meanwhile_is_a_named_error(web, open_web, monkeypatch):
    """There are more queries than threads, so some have not begun."""
    retriever = open_web(per_host=64)
    begun, go = threading.Semaphore(0), threading.Event()
    results = retriever._results

    def slow(query, k):
        begun.release()
        assert go.wait(30)
        return results(query, k)

    monkeypatch.setattr(retriever, "_results", slow)
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(retriever.search, [f"q{number}" for number in range(40)], 1)
        for _ in range(16):
            assert begun.acquire(timeout=30)
        retriever.close()
        go.set()
        with pytest.raises(RetrievalError, match="this web search was closed"):
            search.result(30)


def test_a_mistake_of_ours_is_not_called_a_closed_search(open_web, monkeypatch):
    retriever = open_web()

    def mistaken(query, k):
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(retriever, "_results", mistaken)
    with pytest.raises(RuntimeError, match="changed size") as failure:
        retriever.search(["rome"], 1)
    assert not isinstance(failure.value, RetrievalError)


def test_a_host_is_not_asked_more_at_once_than_allowed(web, open_web):
    """Whoever the queries belong to, and for requests to the service and pages alike."""
    retriever = open_web(per_host=3, pages=True)
    with ThreadPoolExecutor(4) as pool:
        searches = [pool.submit(retriever.search, [f"{name}{n}" for n in range(5)], 2) for name in "abcd"]
        assert all(len(hits) == 2 for search in searches for hits in search.result(PATIENCE))
    assert 1 <= web.most <= 3 and len(web.asked) == 20
    web.gate.clear()
    busy = threading.Thread(target=retriever.search, args=([str(n) for n in range(12)], 1))
    busy.start()
    while web.under_way < 3:
        pass
    busy.join(0.05)
    assert web.under_way == web.most == 3
    web.gate.set()
    busy.join(PATIENCE)


def test_pages_give_more_than_snippets_and_those_that_cannot_be_read_nothing(web, open_web):
    filler = "word " * 400
    page = f"<html><head><title>no</title></head><body><script>about rome 0</script><p>{filler}</p><h1>About Rome</h1>"
    page += f"<p>Rome 0 was founded by the she-wolf&#39;s sons.</p><p>{filler}</p></body></html>"
    web.pages = {
        "0": (302, "", {"Location": "/page/moved"}),
        "moved": (200, page, {"Content-Type": "text/html; charset=utf-8"}),
        "1": (200, b"\x00\x01", {"Content-Type": "application/pdf"}),
        "2": (200, "Caf\xe9 about rome 2".encode("latin-1"), {"Content-Type": "text/plain; charset=latin-1"}),
        "4": (302, "", {"Location": "/page/4"}),
    }
    retriever = open_web(pages=True)
    (found,) = retriever.search(["rome"], 5)
    assert "About Rome Rome 0 was founded by the she-wolf's sons." in found[0].text
    assert len(found[0].text.split()) <= 150 and "script" not in found[0].text
    assert [passage.text for passage in found[1:]] == [
        "about rome 1",
        "Café about rome 2",
        "about rome 3",
        "about rome 4",
    ]
    environment = Environment([], retriever)
    assert environment.take_statistics().row()["search/page_failures"] == 3  # of five
    assert retriever.search(["rome"], 4) == [found[:4]]
    assert len(web.asked) == 1


def test_an_excerpt_is_the_part_with_the_most_words():
    words = [f"w{number}" for number in range(1000)]
    assert excerpt(" ".join(words), "W500 w510 w999").split() == words[375:525]
    assert excerpt(" ".join(words), "nothing").split() == words[:150]
    assert excerpt("short text", "text") == "short text"
    assert excerpt(" ".join(words), "w999").endswith("w999")


def test_a_page_of_a_charset_that_nobody_knows_is_read():
    assert page_text(Answer(200, b"<p>one<p>two", "text/html", "klingon", 0.0)) == "one two"
    assert page_text(Answer(500, b"x", "text/html", "utf-8", 0.0)) == ""


def test_a_run_is_configured_with_it_and_the_key_comes_from_the_environment(web, monkeypatch, tmp_path):
    settings = ["retrieval.backend=web", "retrieval.web_engine=serpapi", f"retrieval.web_url={web.url}/serpapi"]
    monkeypatch.delenv("SERPAPI_API_KEY", raising=False)
    config = load_config(None, settings)
    with pytest.raises(ValueError, match="wants the service's key in SERPAPI_API_KEY"):
        open_retriever(config.retrieval, None)
    monkeypatch.setenv("SERPAPI_API_KEY", f"{KEY}\n")  # as from `cat` of a file
    (tmp_path / "questions.jsonl").write_text('{"id": "1", "question": "rome?", "golden_answers": ["x"]}\n')
    data = load_config(None, [*settings, f"data={{questions: {tmp_path / 'questions.jsonl'}}}", "eval.sets={}"]).data
    environment = build_environment(data, config.retrieval)
    assert [passage.title for passage in environment.search(["rome"])[0]] == ["rome 0", "rome 1", "rome 2"]
    taken = environment.take_statistics()
    assert (taken.queries, taken.unique) == (1, 1)
    environment.close()
