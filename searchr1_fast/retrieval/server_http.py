"""The HTTP side of server.py: a Starlette application, run by uvicorn. Only this module needs the `serve` extra."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from searchr1_fast.retrieval.coalescer import Coalescer
from searchr1_fast.retrieval.protocol import RetrievalError, RetrievalTimeout
from searchr1_fast.retrieval.server import RequestError, RetrievalServer, read_body, read_request, render
from searchr1_fast.types import Passage

_DRAIN_SECONDS = 60  # for requests in flight once the server is told to stop
_BACKLOG = 2048  # every rank of a run may connect at the same moment
_KEEP_ALIVE_SECONDS = 75  # longer than the usual pause between the searches of two steps
_CLIENT_GONE = 499  # nobody reads it, but it is counted


def serve(server: RetrievalServer, bound: socket.socket) -> None:
    """Answer on a bound socket until told to stop, then drain."""
    config = uvicorn.Config(
        application(server),
        log_level="warning",
        access_log=False,  # a line per request would be most of what the server does
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        backlog=_BACKLOG,
    )
    running = _Server(config)

    def stop() -> None:
        running.should_exit = True

    server.on_start(stop)
    running.run(sockets=[bound])
    if running.interrupted:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal that ended it is not raised again: draining on SIGTERM is what was asked."""

    interrupted = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Called by uvicorn around all of its work."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal drains; a second Ctrl-C does not wait."""
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)


def application(server: RetrievalServer) -> Starlette:
    """The ASGI application, for use in another server."""
    endpoints = _Endpoints(server)
    routes = [
        Route("/retrieve", endpoints.retrieve, methods=["POST"]),
        Route("/health", endpoints.health, methods=["GET"]),
        Route("/metrics", endpoints.metrics, methods=["GET"]),
    ]
    handlers = {404: _not_found, 405: _not_allowed, Exception: _broken}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=endpoints.lifespan)


class _Endpoints:
    """The handlers of the routes."""

    def __init__(self, server: RetrievalServer) -> None:
        self._server = server
        self._search: Callable[[list[str], int], Awaitable[list[list[Passage]]]]

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Choose how to search: a batcher serves coroutines itself; for other retrievers a Coalescer gathers them."""
        retriever = self._server.retriever
        assert retriever is not None
        if hasattr(retriever, "search_async"):
            self._search = retriever.search_async
            yield
            return
        coalescer = Coalescer(retriever, self._server.metrics.batch)
        self._search = coalescer.search
        yield
        await coalescer.close()

    async def retrieve(self, request: Request) -> Response:
        """POST /retrieve."""
        begin, num_queries = time.perf_counter(), 0
        content: dict[str, Any]
        try:
            self._authorise(request)
            body = read_body(await self._read(request))
            queries, topk, return_scores = read_request(body, self._server.topk)
            num_queries = len(queries)
            with self._server.metrics.waiting():
                results = await self._found(queries, topk)
            status, content = 200, {"result": [render(hits, return_scores) for hits in results]}
        except RequestError as error:
            status, content = error.status, {"error": str(error)}
        except ClientDisconnect:
            status, content = _CLIENT_GONE, {}
        except BaseException:
            self._server.metrics.request(500, num_queries, time.perf_counter() - begin)
            raise
        self._server.metrics.request(status, num_queries, time.perf_counter() - begin)
        return _json(content, status)

    async def health(self, _: Request) -> Response:
        """GET /health, with how vectors are searched."""
        mode = getattr(self._server.retriever, "mode", "")
        return _json({"status": "ok"} | ({"mode": mode} if mode else {}))

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        try:
            self._authorise(request)
        except RequestError as error:
            return _json({"error": str(error)}, error.status)
        return PlainTextResponse(self._server.render_metrics(), media_type="text/plain; version=0.0.4")

    async def _found(self, queries: list[str], topk: int) -> list[list[Passage]]:
        if not queries:
            return []
        try:
            return await self._search(queries, topk)
        except RetrievalTimeout as error:
            raise RequestError(504, str(error)) from error
        except RetrievalError as error:
            raise RequestError(502, str(error)) from error

    def _authorise(self, request: Request) -> None:
        self._server.authorise(request.headers.get("authorization", ""))

    async def _read(self, request: Request) -> bytes:
        """Read the body. One that is too long is not read to its end, whatever its headers say."""
        most = self._server.max_body_bytes
        sentence = f"the body is longer than the {most} bytes that this server reads"
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise RequestError(413, sentence)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise RequestError(413, sentence)
        return bytes(body)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    """A JSON response in ASCII: a corpus may hold lone surrogates, which JSON can write and UTF-8 cannot."""
    return Response(json.dumps(content).encode(), status, media_type="application/json")


async def _not_found(request: Request, _: Exception) -> Response:
    sentence = f"nothing is served at {request.url.path}; searches are POST /retrieve"
    return _json({"error": sentence}, 404)


async def _not_allowed(request: Request, _: Exception) -> Response:
    return _json({"error": f"{request.url.path} does not answer {request.method}"}, 405)


async def _broken(_: Request, error: Exception) -> Response:
    """Answer 500. Starlette raises the exception again after this, so that uvicorn logs its traceback."""
    return _json({"error": f"the server failed: {type(error).__name__}"}, 500)
