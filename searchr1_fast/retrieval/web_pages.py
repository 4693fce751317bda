"""Fetches web pages within bounds, strips their markup, and finds the part that a snippet was taken from."""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

CONNECTION_ERRORS = (OSError, http.client.HTTPException)  # refused, reset, timed out, closed in the middle

_MOST_BYTES = 2**20  # read of an answer
_MOST_REDIRECTS = 3
_EXCERPT_WORDS = 150
_STEP_WORDS = 25
_WITHOUT_TEXT = {"script", "style", "noscript", "template", "head", "nav", "svg"}
_BLOCKS = {"p", "div", "br", "li", "tr", "td", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "table", "ul"}
_AGENT = "searchr1_fast"


class Answer(NamedTuple):
    """The answer to one request."""

    status: int
    body: bytes  # the first `_MOST_BYTES` of it
    kind: str  # Content-Type, without parameters
    charset: str
    retry_after: float  # seconds


def fetch(
    method: str, url: str, timeout: float, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> Answer:
    """Make one request; a GET follows a few redirects. ValueError for an address that is not of the web or too many
    redirects, and one of `CONNECTION_ERRORS` if there is no answer."""
    for _ in range(_MOST_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of the web")
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout, context=context)
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request(method, target, body, {"User-Agent": _AGENT, **(headers or {})})
            response = connection.getresponse()
            answer = _read(response)
            moved = response.getheader("Location") if 300 <= answer.status < 400 else None
        finally:
            connection.close()
        if method != "GET" or moved is None:
            return answer
        url = urljoin(url, moved)
    raise ValueError(f"{url} is behind more than {_MOST_REDIRECTS} redirects")


def _read(response: http.client.HTTPResponse) -> Answer:
    seconds = (response.getheader("Retry-After") or "").strip()
    return Answer(
        response.status,
        response.read(_MOST_BYTES),
        response.headers.get_content_type(),
        response.headers.get_content_charset() or "utf-8",
        float(seconds) if seconds.isdigit() else 0.0,
    )


def page_text(answer: Answer) -> str:
    """The text that a reader sees of a page, on one line; empty if it is no page, or not text."""
    if answer.status != 200 or answer.kind not in ("text/html", "application/xhtml+xml", "text/plain"):
        return ""
    try:
        text = answer.body.decode(answer.charset, "replace")
    except LookupError:  # an unknown charset
        text = answer.body.decode("utf-8", "replace")
    if answer.kind != "text/plain":
        reader = _Reader()
        reader.feed(text)
        reader.close()
        text = "".join(reader.parts)
    return " ".join(text.split())


def excerpt(text: str, wanted: str) -> str:
    """The part of `text`, at most `_EXCERPT_WORDS` words, with the most of the words wanted; of equals the first."""
    words, sought = text.split(), set(_words(wanted))
    begins = range(0, max(1, len(words) - _EXCERPT_WORDS + _STEP_WORDS), _STEP_WORDS)
    parts = [" ".join(words[begin : begin + _EXCERPT_WORDS]) for begin in begins]
    return max(parts, key=lambda part: len(sought.intersection(_words(part))))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class _Reader(HTMLParser):
    """Collects text outside of elements that show none."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0  # open elements that show no text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _WITHOUT_TEXT
        if tag in _BLOCKS:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _WITHOUT_TEXT and self._hidden > 0
        if tag in _BLOCKS:
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
