"""Search-R1's `POST /retrieve` over any retriever, on Starlette and uvicorn (`pip install 'searchr1_fast[serve]'`).

    {"queries": ["…"], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id", "contents"}, "score"}, …], …]}

Without scores (the protocol's default) the documents stand alone. Errors are answered with `{"error": "…"}`: 400 not
JSON, 401 no token or a wrong one, 404, 405, 413 too large, 422 JSON that is no valid request, 502 the search failed,
504 it took too long. `GET /health` is open to everyone; `GET /metrics` answers in Prometheus' text format.

Requests of all clients are searched together: by the batcher if the retriever is one, otherwise here, where whatever
arrived during one search is the next. On SIGTERM the server finishes what it has accepted.

Left out: TLS and per-client rate limits, which are a proxy's business.
"""

from __future__ import annotations

import hmac
import json
import socket
from collections.abc import Callable, Sequence
from typing import Any

from searchr1_fast.data import passage_contents
from searchr1_fast.retrieval.protocol import Retriever
from searchr1_fast.retrieval.server_metrics import ServerMetrics
from searchr1_fast.types import Passage

LARGEST_TOPK = 2**20  # the batcher's limit
MOST_PASSAGES = 2**20  # per request, all its queries together: hundreds of megabytes of JSON
MAX_BODY_BYTES = 64 * 2**20  # ten thousand queries are a few megabytes


class RequestError(Exception):
    """A request that cannot be answered; the sentence goes back to the client."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class RetrievalServer:
    """Answers in `serve_forever()` until SIGTERM, Ctrl-C or `shutdown()`. Port 0 takes a free one (see `url`).

    The port is bound at once, so that it is known to be free before a corpus is loaded, and refuses connections until
    `serve_forever`. `retriever` may be set until then.
    """

    def __init__(
        self,
        retriever: Retriever | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        topk: int = 3,
        token: str = "",
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        """`topk`: passages per query if a request does not say. `token`: if not empty, requests must carry it as
        `Authorization: Bearer …`. OSError: the port is taken. ValueError: the packages that serve are not installed."""
        try:
            from searchr1_fast.retrieval import server_http
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in ("starlette", "uvicorn"):
                raise
            raise ValueError(
                f"serving over HTTP needs {error.name}, which is not installed: pip install 'searchr1_fast[serve]'"
            ) from error
        self._http = server_http
        self.retriever = retriever
        self.metrics = ServerMetrics()
        self.topk = topk
        self.max_body_bytes = max_body_bytes
        self._token = token
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
        except OSError:
            self._socket.close()
            raise
        self._stopping = False
        self._stop: Callable[[], None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def url(self) -> str:
        """The address of `POST /retrieve` for a client on this machine."""
        host, port = self.address
        return f"http://[{host}]:{port}/retrieve" if ":" in host else f"http://{host}:{port}/retrieve"

    def serve_forever(self) -> None:
        """Answer until told to stop, then finish what was accepted. Ctrl-C raises KeyboardInterrupt afterwards."""
        assert self.retriever is not None, "a server needs a retriever before it serves"
        self._http.serve(self, self._socket)

    def on_start(self, stop: Callable[[], None]) -> None:
        """Called by `server_http` with the function that stops it; a `shutdown` that came before takes effect here."""
        self._stop = stop
        if self._stopping:
            stop()

    def shutdown(self) -> None:
        """Make `serve_forever` return once what was accepted is answered. Callable from any thread."""
        self._stopping = True
        if self._stop is not None:
            self._stop()

    def close(self) -> None:
        """Release the port."""
        self._socket.close()

    def __enter__(self) -> RetrievalServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def authorise(self, header: str) -> None:
        """Raise RequestError unless the Authorization header carries the token, in equal time for every wrong one."""
        if self._token and not hmac.compare_digest(header.encode(), f"Bearer {self._token}".encode()):
            raise RequestError(401, "this server wants its token as `Authorization: Bearer …`")

    def render_metrics(self) -> str:
        """The page for Prometheus, with the retriever's own numbers where it has some."""
        statistics = getattr(self.retriever, "statistics", None)
        return self.metrics.render(statistics() if callable(statistics) else {})


def read_body(body: bytes) -> Any:
    """The JSON of a body."""
    try:
        return json.loads(body)
    except ValueError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise RequestError(400, "the body is not valid JSON: it is nested too deeply") from error


def read_request(request: Any, default_topk: int) -> tuple[list[str], int, bool]:
    """(queries, passages per query, whether with scores) of a decoded body."""
    if not isinstance(request, dict):
        raise RequestError(422, "the body must be an object with `queries`")
    queries = request.get("queries")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise RequestError(422, "`queries` must be a list of texts")
    try:
        "".join(queries).encode()
    except UnicodeEncodeError as error:
        raise RequestError(422, "`queries` must be Unicode text: one holds half of a surrogate pair") from error
    topk = request.get("topk")
    topk = default_topk if topk is None else topk
    if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= LARGEST_TOPK:
        raise RequestError(422, f"`topk` must be a whole number from 1 to {LARGEST_TOPK}, or null for {default_topk}")
    if len(queries) * topk > MOST_PASSAGES:
        raise RequestError(
            422, f"{len(queries)} queries of {topk} passages are more than the {MOST_PASSAGES} a request may ask for"
        )
    return_scores = request.get("return_scores", False)
    if not isinstance(return_scores, bool):
        raise RequestError(422, "`return_scores` must be true or false")
    return queries, topk, return_scores


def render(hits: Sequence[Passage], return_scores: bool) -> list[dict[str, Any]]:
    """The passages of one query, in the protocol's form."""
    documents = [{"id": hit.id, "contents": passage_contents(hit)} for hit in hits]
    if not return_scores:
        return documents
    return [{"document": document, "score": hit.score} for document, hit in zip(documents, hits, strict=True)]
