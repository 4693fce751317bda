"""Search-R1's `POST /retrieve` over any retriever, on the standard library's HTTP server.

    {"queries": ["…"], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id", "contents"}, "score"}, …], …]}

Without scores (the protocol's default) the documents stand alone. A bad request is answered `{"error": "…"}` with 4xx,
a failed search with 502. Connections have a thread each, so the retriever must be safe to call from several.

Left out: authentication. Whoever reaches the port may search.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from searchr1_fast.data import passage_contents
from searchr1_fast.retrieval.protocol import RetrievalError, Retriever
from searchr1_fast.types import Passage

MAX_BODY_BYTES = 64 * 2**20  # ten thousand queries are a few megabytes


class RequestError(Exception):
    """A request that cannot be answered; the sentence goes back to who sent it."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class RetrievalServer(ThreadingHTTPServer):
    """`serve_forever()` answers until `shutdown()`; port 0 takes a free one, see `url`."""

    daemon_threads = True
    request_queue_size = 1024  # every rank of a run may connect at the same moment; the default is 5

    def __init__(self, retriever: Retriever, host: str = "127.0.0.1", port: int = 8000, topk: int = 3) -> None:
        self.retriever = retriever
        self.topk = topk
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where a client on this machine finds it."""
        return f"http://{self.server_address[0]}:{self.server_address[1]}/retrieve"

    def answer(self, request: Any) -> dict[str, Any]:
        """The reply to one decoded request body."""
        queries, topk, return_scores = _read_request(request, self.topk)
        try:
            results = self.retriever.search(queries, topk) if queries else []
        except RetrievalError as error:
            raise RequestError(502, str(error)) from error
        return {"result": [_render(hits, return_scores) for hits in results]}


class _Handler(BaseHTTPRequestHandler):
    server: RetrievalServer
    protocol_version = "HTTP/1.1"  # keeps connections alive
    disable_nagle_algorithm = True  # else a reply's body waits for the client's delayed acknowledgement of its headers

    def do_POST(self) -> None:
        try:
            self._reply(200, self.server.answer(self._read_body()))
        except RequestError as error:
            self._reply(error.status, {"error": str(error)})

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, {"status": "ok"})
        else:
            self._reply(405 if self.path == "/retrieve" else 404, {"error": "searches are POST /retrieve"})

    def _read_body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True  # the body stays unread, so nothing after it on this connection makes sense
            status = 413 if length.isdigit() else 411
            raise RequestError(status, f"Content-Length must be given and at most {MAX_BODY_BYTES}")
        body = self.rfile.read(int(length))
        if self.path != "/retrieve":
            raise RequestError(404, f"nothing is served at {self.path}; searches are POST /retrieve")
        try:
            return json.loads(body)
        except ValueError as error:
            raise RequestError(400, f"the body is not valid JSON: {error}") from error

    def _reply(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """A line per request would be most of what the server does."""


def _read_request(request: Any, default_topk: int) -> tuple[list[str], int, bool]:
    if not isinstance(request, dict):
        raise RequestError(400, "the body must be an object with `queries`")
    queries = request.get("queries")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RequestError(400, "`queries` must be a list of texts")
    topk = request.get("topk")
    topk = default_topk if topk is None else topk
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise RequestError(400, f"`topk` must be a whole number of at least 1, or null for {default_topk}")
    return_scores = request.get("return_scores", False)
    if not isinstance(return_scores, bool):
        raise RequestError(400, "`return_scores` must be true or false")
    return queries, topk, return_scores


def _render(hits: Sequence[Passage], return_scores: bool) -> list[dict[str, Any]]:
    documents = [{"id": hit.id, "contents": passage_contents(hit)} for hit in hits]
    if not return_scores:
        return documents
    return [{"document": document, "score": hit.score} for document, hit in zip(documents, hits, strict=True)]
