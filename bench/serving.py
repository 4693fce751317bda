"""Send requests of many clients to two search servers, one after the other: `searchr1 serve`, and its plain twin.

It is a closed loop: a number of connections at once, each of which sends its next request, of one query, when it has
its answer. No query comes twice, so nothing is known from before. An answer counts if its status is 200 and it holds k
passages; the passages that both servers give for the same queries are compared.

A server's CPU time per query is reported beside wall time, for machines that others use.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

K = 3
NUM_WARMING = 6  # requests before the clock starts
START_SECONDS = 900.0
NAMES = ("plain", "ours")


@dataclass(slots=True)
class Served:
    """What a server answered, and how fast."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the server
    num_requests: int = 0
    num_failures: int = 0
    latencies: list[float] = field(default_factory=list)
    ids: dict[str, list[str]] = field(default_factory=dict)  # of passages, by query

    def row(self) -> dict[str, Any]:
        """The row that is reported."""
        p50, p99 = np.percentile(self.latencies, [50, 99])
        return {
            "requests": self.num_requests,
            "failures": self.num_failures,
            "queries_per_second": self.num_requests / self.seconds,
            "server_cpu_milliseconds_per_query": self.cpu_seconds / self.num_requests * 1e3,
            "p50_ms": p50 * 1e3,
            "p99_ms": p99 * 1e3,
        }


def measure(name: str, index: Path, queries: Sequence[str], num_clients: int) -> Served:
    """Start the server, warm it up with a few requests, measure it, and end it."""
    with running(name, index) as (process, port):
        asyncio.run(ask(port, queries[:NUM_WARMING], NUM_WARMING))
        before = cpu_seconds(process.pid)
        served = asyncio.run(ask(port, queries[NUM_WARMING:], num_clients))
        served.cpu_seconds = cpu_seconds(process.pid) - before
    return served


def same_passages(one: Served, other: Served) -> float:
    """The share of the queries answered by both that got the same passages in the same order."""
    both = one.ids.keys() & other.ids.keys()
    return float(np.mean([one.ids[query] == other.ids[query] for query in both]))


async def ask(port: int, queries: Sequence[str], num_clients: int) -> Served:
    """Send all queries, by `num_clients` clients."""
    served, remaining = Served(num_requests=len(queries)), iter(queries)
    started = time.perf_counter()
    await asyncio.gather(*(client(port, remaining, served) for _ in range(num_clients)))
    served.seconds = time.perf_counter() - started
    return served


async def client(port: int, queries: Iterator[str], served: Served) -> None:
    """Send one request after the other over one connection, kept alive."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    for query in queries:
        body = json.dumps({"queries": [query], "topk": K, "return_scores": True}).encode()
        head = f"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        started = time.perf_counter()
        writer.write(head.encode() + body)
        answer_head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", answer_head)[1])
        answer = await reader.readexactly(length)
        served.latencies.append(time.perf_counter() - started)
        ids = passage_ids(answer) if answer_head.split(b" ", 2)[1] == b"200" else []
        served.ids[query] = ids
        served.num_failures += len(ids) != K
    writer.close()


def passage_ids(answer: bytes) -> list[str]:
    """Read the ids of the one query's passages; none if it is no such answer."""
    try:
        (hits,) = json.loads(answer)["result"]
        return [hit["document"]["id"] for hit in hits]
    except (ValueError, KeyError, TypeError):
        return []


@contextmanager
def running(name: str, index: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """Start the server, and yield its process and port once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    here = Path(__file__).parent
    command = {
        "ours": [sys.executable, "-m", "searchr1_fast.serve", "--index", str(index), "--port", str(port)],
        "plain": [sys.executable, str(here / "plain_server.py"), "--index", str(index), "--port", str(port)],
    }[name]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                if process.poll() is not None or time.monotonic() > until:
                    raise ValueError(f"the server {name} did not start: {' '.join(command)}") from None
                time.sleep(0.1)
        yield process, port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far, in all threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
