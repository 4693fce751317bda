"""Client of a search server that speaks Search-R1's `POST /retrieve`.

The original sends a request without timeout, retry or a check of the status, so one hiccup of the server ends the run.
Here a request is retried after a pause that doubles, with jitter, but only where a retry can help: the connection
failed or timed out, or the server answered 429 or 5xx. Every other answer is an error at once.

Left out: proxies (`http_proxy` is not read: the server is part of the run) and redirects.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from searchr1_fast.data import parse_passage
from searchr1_fast.retrieval.protocol import RetrievalError, check_k
from searchr1_fast.retrieval.statistics import SearchStatistics
from searchr1_fast.types import Passage

_FIRST_PAUSE = 0.25  # seconds
_LONGEST_PAUSE = 30.0
_CONNECTION_ERRORS = (OSError, http.client.HTTPException)  # refused, reset, timed out, closed in the middle


@dataclass(slots=True)
class RemoteStatistics:
    """Counts since the client was made. Written under the client's lock."""

    requests: int = 0  # searches sent, however often each was tried
    queries: int = 0  # queries in them, equal ones counted once
    retries: int = 0  # attempts after the first
    failures: int = 0  # searches that raised


class RemoteRetriever:
    """Searches over HTTP, with one kept-alive connection per thread. `timeout` is for connecting and for every wait on
    the server; `token` goes into every request, for servers that want one."""

    def __init__(self, url: str, timeout: float = 30.0, max_retries: int = 4, token: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"retrieval.url must look like http://host:8000/retrieve, not {url!r}")
        assert max_retries >= 0
        self.url = url
        self.statistics = RemoteStatistics()
        self._connection_type = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._address = (parts.hostname, parts.port)
        self._target = (parts.path or "/retrieve") + (f"?{parts.query}" if parts.query else "")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._timeout = timeout
        self._max_retries = max_retries
        self._jitter = random.Random()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._sleep = time.sleep
        self._retries_taken = 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Send one request for the whole batch, equal queries once; more than `k` results of a query are cut to `k`."""
        check_k(k)
        if not queries:
            return []
        unique = list(dict.fromkeys(queries))
        body = json.dumps({"queries": unique, "topk": k, "return_scores": True}).encode()
        with self._lock:
            self.statistics.requests += 1
            self.statistics.queries += len(unique)
        try:
            results = _read_results(self._post(body), unique, k, self.url)
        except RetrievalError:
            with self._lock:
                self.statistics.failures += 1
            raise
        found = dict(zip(unique, results, strict=True))
        return [list(found[query]) for query in queries]

    def take_statistics(self) -> SearchStatistics:
        """The retries since this was last called; everything else the caller knows."""
        with self._lock:
            retries, self._retries_taken = self.statistics.retries - self._retries_taken, self.statistics.retries
        return SearchStatistics(retries=retries)

    def _post(self, body: bytes) -> bytes:
        """The body of the 200 answer, after as many attempts as it takes, within `max_retries` retries."""
        for attempt in range(1, self._max_retries + 2):
            wait = 0.0
            try:
                status, wait, answer = self._exchange(body)
            except _CONNECTION_ERRORS as error:
                cause = f"{type(error).__name__}: {error}"
            else:
                if status == 200:
                    return answer
                cause = f"HTTP {status}: {answer[:200].decode('utf-8', 'replace').strip()}"
                if status != 429 and status < 500:
                    raise RetrievalError(f"the search server {self.url} refused the request with {cause}")
            if attempt <= self._max_retries:
                with self._lock:
                    self.statistics.retries += 1
                self._sleep(max(wait, self._pause(attempt)))
        tries = "1 attempt" if attempt == 1 else f"{attempt} attempts"
        raise RetrievalError(f"the search server {self.url} gave no answer in {tries}; the last failed with {cause}")

    def _pause(self, attempt: int) -> float:
        """The seconds to wait, doubled by every attempt; jitter keeps ranks that failed together from returning so."""
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1)) * self._jitter.uniform(0.5, 1.0)

    def _exchange(self, body: bytes) -> tuple[int, float, bytes]:
        """Make one request -> (status, seconds the server asks to wait, body).

        The server may have closed a kept-alive connection in the meantime, which shows only now and says nothing about
        its health: the connection is then reopened, and no failed attempt is counted.
        """
        kept: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if kept is not None:
            try:
                return self._send(kept, body)
            except (ConnectionError, http.client.BadStatusLine):  # reset, broken pipe, closed before an answer
                pass
        host, port = self._address
        return self._send(self._connection_type(host, port, timeout=self._timeout), body)

    def _send(self, connection: http.client.HTTPConnection, body: bytes) -> tuple[int, float, bytes]:
        self._local.connection = None
        try:
            connection.request("POST", self._target, body, self._headers)
            response = connection.getresponse()
            answer = response.read()
        except _CONNECTION_ERRORS:
            connection.close()
            raise
        self._local.connection = connection  # http.client reopens it by itself if the server said `close`
        return response.status, _seconds(response.getheader("Retry-After")), answer


def _seconds(retry_after: str | None) -> float:
    """The seconds of a Retry-After header, bounded; its date form is not read."""
    if retry_after is None or not retry_after.strip().isdigit():
        return 0.0
    return min(_LONGEST_PAUSE, float(retry_after))


def _read_results(answer: bytes, queries: Sequence[str], k: int, url: str) -> list[list[Passage]]:
    """Check the answer's shape all the way down: a server that is wrong must not look like one that found nothing."""
    try:
        document = json.loads(answer)
    except ValueError as error:
        raise RetrievalError(f"the search server {url} answered something that is not JSON: {error}") from error
    results = document.get("result") if isinstance(document, dict) else None
    if not isinstance(results, list):
        raise RetrievalError(f'the search server {url} answered without a list "result"')
    if len(results) != len(queries):
        raise RetrievalError(f"the search server {url} answered {len(queries)} queries with {len(results)} results")
    for query, hits in zip(queries, results, strict=True):
        if not isinstance(hits, list):
            raise RetrievalError(f"the search server {url} gave no list of passages for the query {query!r}")
    return [[_read_hit(hit, url) for hit in hits[:k]] for hits in results]


def _read_hit(hit: Any, url: str) -> Passage:
    """`{"document": {"id", "contents"}, "score"}`; web search servers leave `id` and `score` out."""
    document = hit.get("document") if isinstance(hit, dict) else None
    contents = document.get("contents") if isinstance(document, dict) else None
    score = hit.get("score", 0.0) if isinstance(hit, dict) else None
    if not isinstance(contents, str):
        raise RetrievalError(
            f'the search server {url} gave a passage without "document" and "contents": {str(hit)[:200]}'
        )
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise RetrievalError(f"the search server {url} gave a score that is no number: {score!r}")
    return parse_passage(str(document.get("id", "")), contents, float(score))
