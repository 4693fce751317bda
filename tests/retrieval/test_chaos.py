"""Things break during many searches; each search finds what it should, or ends in an error that names the cause."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from batcher_fakes import PATIENCE, Backend, Rows, eventually, expected, ids_of
from index_fakes import Silent, corpus_rows, write_corpus

from searchr1_fast.retrieval import RemoteRetriever, RetrievalError
from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.dense import open_dense
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.encoders import EncodingSource
from searchr1_fast.retrieval.index_build import build_index
from searchr1_fast.retrieval.passages import PassageStore
from searchr1_fast.retrieval.protocol import RetrievalTimeout

NUM_CALLERS = 16


def outcomes(search, is_enough, callers=NUM_CALLERS):
    """search(number) -> its results or errors, from callers that go on until `is_enough(all so far)`."""
    found: list[tuple[int, object]] = []

    def call(caller):
        number = caller
        while not is_enough(found):
            try:
                found.append((number, search(number)))
            except RetrievalError as error:
                found.append((number, error))
            number += callers

    with ThreadPoolExecutor(callers) as pool:
        for future in [pool.submit(call, caller) for caller in range(callers)]:
            future.result(PATIENCE)
    return found


def errors_of(found):
    return [result for _, result in found if isinstance(result, RetrievalError)]


# ---------------------------------------------------------------------------------------------- a backend is killed


def answer(connection):
    """Run a backend's process: (numbers, k) -> what `expected` says."""
    while True:
        numbers, k = connection.recv()
        connection.send(expected(numbers, k))


class Elsewhere:
    """A backend in a process of its own."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=answer, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def search_ids(self, queries, k):
        self._connection.send(([int(query) for query in queries], k))
        return self._connection.recv()


def test_a_backend_that_is_killed(pool):
    backend = Elsewhere()
    with BatchedRetriever(backend, Rows()) as retriever:
        retriever.search(["0"], 1)

        def kill(found):
            if len(found) == 300:
                os.kill(backend.process.pid, signal.SIGKILL)
            return len(errors_of(found)) >= 3 * NUM_CALLERS

        found = outcomes(lambda number: ids_of(retriever.search([str(number), str(number + 1)], 2)), kill)
        with pytest.raises(RetrievalError, match="EOFError|ConnectionResetError|BrokenPipeError"):
            asyncio.run(retriever.search_async(["1"], 2))
    good = [(number, rows) for number, rows in found if not isinstance(rows, RetrievalError)]
    assert len(good) >= 290
    for number, rows in good:
        assert rows == [[10 * number, 10 * number + 1], [10 * number + 10, 10 * number + 11]]
    causes = ("EOFError", "ConnectionResetError", "BrokenPipeError")
    assert all(any(cause in str(error) for cause in causes) for error in errors_of(found))


# ------------------------------------------------------------------------------------------------ a file is damaged


@pytest.fixture
def dense(tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", corpus_rows(200))
    index = build_index(tmp_path / "i", corpus, EncodingSource(HashingEncoder(64)), Silent())
    search, _ = open_dense(index.folder)
    with BatchedRetriever(search, PassageStore(index.folder), cache_bytes=0) as retriever:
        yield index.folder, search, retriever


def cut(path):
    os.truncate(path, 100)


def write_over(path):
    """Write other bytes over the first half, in place."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size // 2))


@pytest.mark.parametrize("damage", [cut, write_over])
@pytest.mark.parametrize("name", ["vectors-00000.f16", "passages.bin", "passages.u64"])
def test_a_file_that_is_damaged_while_it_is_open(dense, name, damage):
    folder, search, retriever = dense
    wanted = [hits[0].id for hits in retriever.search([f"Title {number}" for number in range(200)], 1)]
    broken = threading.Event()

    def break_it(found):
        if len(found) > 100 and not broken.is_set():
            with search._rows._lock:  # between two scans: the kernel would kill one that is under way (SIGBUS)
                if not broken.is_set():
                    broken.set()
                    damage(folder / name)
        return len(errors_of(found)) >= 3 * NUM_CALLERS

    found = outcomes(lambda number: retriever.search([f"Title {number % 200}"], 1)[0][0], break_it)
    good = [(number, hit) for number, hit in found if not isinstance(hit, RetrievalError)]
    assert len(good) >= 90
    for number, hit in good:
        assert hit.id == wanted[number % 200]
        assert (hit.title, hit.text) == (f"Title {hit.id}", f"Text of {hit.id}, Łódź.\nMore.")
    how = "was cut short|was written to" if damage is cut else "was written to"
    for error in errors_of(found):
        assert name in str(error) and any(word in str(error) for word in how.split("|"))


# --------------------------------------------------------------------------------------------- a server is restarted

SERVER = """
import sys
from searchr1_fast.retrieval import BM25Retriever, RetrievalServer
from searchr1_fast.types import Passage
corpus = [Passage(str(n), f"title{n}", f"text{n}") for n in range(100)]
with RetrievalServer(BM25Retriever(corpus), port=int(sys.argv[1])) as server:
    server.serve_forever()
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


def start_server(port):
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], env=os.environ)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process
        except ConnectionRefusedError:
            assert process.poll() is None
            time.sleep(0.05)
    raise AssertionError("the server did not come up")


def test_a_server_that_is_killed_and_started_again():
    pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
    port = free_port()
    processes = [start_server(port)]
    url = f"http://127.0.0.1:{port}/retrieve"
    patient = RemoteRetriever(url, timeout=PATIENCE, max_retries=12)
    killed = threading.Event()

    def restart():
        eventually(lambda: patient.statistics.requests > 100)
        processes[0].kill()
        processes[0].wait()
        killed.set()
        impatient = RemoteRetriever(url, timeout=PATIENCE, max_retries=0)
        with pytest.raises(RetrievalError, match=rf"the search server {url} gave no answer in 1 attempt"):
            impatient.search(["title1"], 1)
        processes.append(start_server(port))

    try:
        with ThreadPoolExecutor(1) as pool:
            restarting = pool.submit(restart)
            found = outcomes(
                lambda number: patient.search([f"title{number % 100}"], 1)[0][0].id,
                lambda found: restarting.done() and len(found) > 300,
                callers=4,
            )
            restarting.result(PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert killed.is_set() and patient.statistics.retries > 0
    assert [number for number, identifier in found if identifier != str(number % 100)] == []


# ------------------------------------------------------------------------------------------- three in ten are late


def test_searches_that_pass_their_deadline(pool):
    """The searches of a batch are late together; another search finds what they asked for."""

    class Late(Backend):
        def search_ids(self, queries, k):
            if any(int(query) % 10 < 3 for query in queries):
                time.sleep(0.06)
            return super().search_ids(queries, k)

    async def search_all(retriever):
        async def search(number):
            await asyncio.sleep(number / 400)
            try:
                return ids_of(await retriever.search_async([str(number)], 2, timeout=0.04))
            except RetrievalTimeout as error:
                return error

        return await asyncio.gather(*(search(number) for number in range(400)))

    with BatchedRetriever(Late(), Rows(), max_batch_rows=4) as retriever:
        found = asyncio.run(asyncio.wait_for(search_all(retriever), PATIENCE))
        late = [number for number, result in enumerate(found) if isinstance(result, RetrievalTimeout)]
        assert 0 < len(late) < 400
        assert retriever.statistics()["num_expired"] == len(late)
        for number, result in enumerate(found):
            if number not in late:
                assert result == [[10 * number, 10 * number + 1]]
        again = retriever.search([str(number) for number in late], 2)
        assert ids_of(again) == [[10 * number, 10 * number + 1] for number in late]
        eventually(lambda: retriever.statistics()["pending_bytes"] == 0)


class Shaky(BaseHTTPRequestHandler):
    """Three answers in ten come later than the client waits."""

    protocol_version = "HTTP/1.1"
    generator = np.random.default_rng(0)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.generator.random() < 0.3:
            time.sleep(1.0)
        hits = [[{"document": {"id": query, "contents": '"t"\nx'}, "score": 1.0}] for query in request["queries"]]
        body = json.dumps({"result": hits}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Standing(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # clients that hung up


def test_a_server_that_is_late_three_times_in_ten():
    server = Standing(("127.0.0.1", 0), Shaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/retrieve"
    try:
        remote = RemoteRetriever(url, timeout=0.4, max_retries=30)
        remote._sleep = lambda seconds: None
        found = outcomes(lambda number: remote.search([str(number)], 1)[0][0].id, lambda found: len(found) >= 80)
        assert [number for number, identifier in found if identifier != str(number)] == []
        assert remote.statistics.retries > 0 and remote.statistics.failures == 0
        once = RemoteRetriever(url, timeout=0.4, max_retries=0)
        found = outcomes(lambda number: once.search([str(number)], 1)[0][0].id, lambda found: len(found) >= 60)
        assert errors_of(found)
        assert all("gave no answer in 1 attempt; the last failed with TimeoutError" in str(e) for e in errors_of(found))
        assert [number for number, result in found
                if not isinstance(result, RetrievalError) and result != str(number)] == []  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
