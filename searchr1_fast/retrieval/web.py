"""Live web search: services that answer in JSON like Serper and SerpAPI, behind the `Retriever` protocol.

    serper    POST {"q", "num"}, the key in X-API-KEY          -> {"organic": [{"title", "link", "snippet"}, …]}
    serpapi   GET ?engine=google&q=…&num=…&api_key=…           -> {"organic_results": [the same]}

Each query becomes one request, equal queries share one, and results are cached. A passage is a result's title and the
service's snippet, or with `pages` what its page says around that (web_pages.py). No host gets more than `per_host`
requests at once, whatever queries they are for. Errors that can pass are retried as in remote.py; others are a
RetrievalError. A page that cannot be read costs its passage only the longer text, and is counted.

The web changes: what a query finds depends on the day, so runs are not repeatable, and checkpoints keep no results.

Left out: proxies, other services (for one that answers Search-R1's `/retrieve` there is `remote`).
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import urlencode, urlsplit

from searchr1_fast.retrieval.protocol import RetrievalError, check_k
from searchr1_fast.retrieval.statistics import SearchStatistics
from searchr1_fast.retrieval.web_pages import CONNECTION_ERRORS, Answer, excerpt, fetch, page_text
from searchr1_fast.types import Passage

WebEngine = Literal["serper", "serpapi"]

URLS: dict[WebEngine, str] = {"serper": "https://google.serper.dev/search", "serpapi": "https://serpapi.com/search"}
KEY_VARIABLES: dict[WebEngine, str] = {"serper": "SERPER_API_KEY", "serpapi": "SERPAPI_API_KEY"}

_THREADS = 16  # queries at once
_REMEMBERED = 100_000  # queries
_LEAST_RESULTS = 10  # asked for: they cost as much as one
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0  # seconds


class Result(NamedTuple):
    """One result of a service: with its snippet, or with the text of its page."""

    title: str
    link: str
    text: str


@dataclass(slots=True)
class WebCounts:
    """Counts since they were last taken. Written under the lock."""

    queries: int = 0
    requests: int = 0  # queries sent to the service
    remembered: int = 0
    retries: int = 0
    failures: int = 0
    page_failures: int = 0  # pages that could not be read; the service's snippet stands in


class HostLimits:
    """Limits how many requests each host gets at once; further ones wait."""

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._hosts: dict[str, threading.Semaphore] = {}
        self._lock = threading.Lock()

    def of(self, url: str) -> AbstractContextManager[Any]:
        """The semaphore to hold during a request to the host of this address."""
        with self._lock:
            return self._hosts.setdefault(urlsplit(url).netloc, threading.Semaphore(self._per_host))


class WebRetriever:
    """Searches the web through a service. Close it, or leave its threads to program exit."""

    def __init__(
        self,
        engine: WebEngine,
        key: str,
        *,
        url: str | None = None,
        pages: bool = False,
        per_host: int = 4,
        timeout: float = 30.0,
        max_retries: int = 4,
    ) -> None:
        """`url`: replaces the service's own address. `timeout`: seconds for every wait on a host."""
        self._engine, self._key, self._url = engine, key, url or URLS[engine]
        self._pages, self._timeout, self._max_retries = pages, timeout, max_retries
        self._limits = HostLimits(per_host)
        self._remembered: OrderedDict[str, tuple[int, list[Result]]] = OrderedDict()  # with how many were asked for
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="web")
        self._lock, self._is_closed = threading.Lock(), False
        self._jitter, self._sleep = random.Random(), time.sleep
        self.counts = WebCounts()

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The first `k` results of each query in the service's order; fewer if it has fewer. The score of rank r is
        1 / r."""
        check_k(k)
        unique = list(dict.fromkeys(queries))
        with self._lock:
            self.counts.queries += len(queries)
        try:
            results = self._threads.map(lambda query: self._results(query, k), unique)
            found = dict(zip(unique, results, strict=True))
        except (RuntimeError, CancelledError) as error:
            if isinstance(error, RetrievalError) or not self._is_closed:
                raise
            raise RetrievalError("this web search was closed") from error  # before it began, or meanwhile
        return [
            [Passage(one.link, one.title, one.text, 1 / rank) for rank, one in enumerate(found[query][:k], 1)]
            for query in queries
        ]

    def take_statistics(self) -> SearchStatistics:
        """The statistics since they were last taken."""
        with self._lock:
            taken, self.counts = self.counts, WebCounts()
        return SearchStatistics(
            queries=taken.queries, unique=taken.requests, cache_hits=taken.remembered, batches=taken.requests,
            batch_rows=taken.requests, retries=taken.retries, failures=taken.failures,
            page_failures=taken.page_failures,
        )  # fmt: skip

    def close(self) -> None:
        """End the threads. May be called more than once."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _results(self, query: str, k: int) -> list[Result]:
        with self._lock:
            asked_for, results = self._remembered.get(query, (0, []))
            if asked_for >= k:
                self._remembered.move_to_end(query)
                self.counts.remembered += 1
                return results
            self.counts.requests += 1
        asked_for = max(k, _LEAST_RESULTS)
        try:
            results = read_results(self._ask(query, asked_for), self._engine, self._url)
        except RetrievalError:
            self._count("failures")
            raise
        if self._pages:
            results = [self._with_page(result, query) for result in results[:k]] + results[k:]
            asked_for = k  # later results lack their pages
        with self._lock:
            self._remembered[query] = asked_for, results
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return results

    def _ask(self, query: str, count: int) -> bytes:
        """The service's answer, after as many attempts as it takes, within `max_retries` retries."""
        query = query.encode("utf-8", "replace").decode()  # a policy's bytes may not be valid Unicode
        for attempt in range(1, self._max_retries + 2):
            wait = 0.0
            try:
                with self._limits.of(self._url):
                    answer = self._request(query, count)
            except CONNECTION_ERRORS as error:
                cause = f"{type(error).__name__}: {error}"
            else:
                if answer.status == 200:
                    return answer.body
                cause = f"HTTP {answer.status}: {answer.body[:200].decode('utf-8', 'replace').strip()}"
                if answer.status != 429 and answer.status < 500:
                    raise RetrievalError(f"the web search {self._url} refused the request with {cause}")
                wait = min(answer.retry_after, _LONGEST_PAUSE)
            if attempt <= self._max_retries:
                self._count("retries")
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1)) * self._jitter.uniform(0.5, 1.0)
                self._sleep(max(wait, pause))
        tries = "1 attempt" if attempt == 1 else f"{attempt} attempts"
        raise RetrievalError(f"the web search {self._url} gave no answer in {tries}; the last failed with {cause}")

    def _request(self, query: str, count: int) -> Answer:
        if self._engine == "serper":
            headers = {"X-API-KEY": self._key, "Content-Type": "application/json"}
            body = json.dumps({"q": query, "num": count}).encode()
            return fetch("POST", self._url, self._timeout, headers, body)
        asked = urlencode({"engine": "google", "q": query, "num": count, "api_key": self._key})
        return fetch("GET", f"{self._url}?{asked}", self._timeout)

    def _with_page(self, result: Result, query: str) -> Result:
        """The result with what its page says around the snippet; unchanged if the page cannot be read."""
        try:
            with self._limits.of(result.link):
                text = page_text(fetch("GET", result.link, self._timeout))
        except (*CONNECTION_ERRORS, ValueError):
            text = ""
        if not text:
            self._count("page_failures")
            return result
        return result._replace(text=excerpt(text, f"{result.text} {query}"))

    def _count(self, name: str) -> None:
        with self._lock:
            setattr(self.counts, name, getattr(self.counts, name) + 1)


def read_results(answer: bytes, engine: WebEngine, url: str) -> list[Result]:
    """The results in a service's answer. An answer of another shape is an error, not an empty result."""
    try:
        document = json.loads(answer)
    except ValueError as error:
        raise RetrievalError(f"the web search {url} answered something that is not JSON: {error}") from error
    name, sign = ("organic", "searchParameters") if engine == "serper" else ("organic_results", "search_information")
    results = document.get(name) if isinstance(document, dict) else None
    if results is None and isinstance(document, dict) and isinstance(document.get(sign), dict):
        return []  # a service that found nothing leaves the list out
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise RetrievalError(f'the web search {url} answered without a list "{name}"')
    texts = ([result.get(part) for part in ("title", "link", "snippet")] for result in results)
    named = (parts for parts in texts if isinstance(parts[0], str) and isinstance(parts[1], str))
    return [Result(title, link, text if isinstance(text, str) else "") for title, link, text in named]
