"""Measure where the time of a GPU's search goes: each kernel and copy by name, and what is left for the host.

    python bench/search_parts.py                                 8 M rows of 768, both scans, on a GPU
    python bench/search_parts.py --rows 21015324 --scans float16 --output
    python bench/search_parts.py --device cpu --rows 20000       without one: only that it runs, no parts

For each scan and number of queries, from queries in host memory to hits in host memory:

    recorded    milliseconds of a search as it is: one graph, replayed
    launched    the same, kernel by kernel
    busy        how long the device was at work in a recorded search (the profiler's kernels and copies), and on each
    host        the rest: launching, waiting, copying to and from numpy
    of a copy   the scan alone: bytes of rows per second of the kernel that reads them, over the rate of a large copy

For each scan it also gives how long every way to read the rows took when the index was opened (the first is in use),
and what had to be settled because the first answer did not prove it. Hits are compared with the CPU's before anything
is timed, and between recorded and launched searches afterwards; if any differ, the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import harness
import numpy as np
import torch
from retrieval_gpu import CHECKED_ROWS, make_rows
from rich import box
from rich.table import Table

from searchr1_fast.console import make_console
from searchr1_fast.errors import entry_point
from searchr1_fast.retrieval.device_rows import DeviceRows
from searchr1_fast.retrieval.rows import HostRows

SCANS = ("float16", "int8")


def wrong_hits(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> int:
    """Count the scores and rows that differ."""
    return sum(int((one != other).sum()) for one, other in zip(found, wanted, strict=True))


def measure(rows: DeviceRows, vectors: np.ndarray, k: int, repetitions: int, device: torch.device) -> dict[str, Any]:
    """Measure one line, for a number of queries."""
    seconds: dict[str, list[float]] = {"recorded": [], "launched": []}
    found = {}
    before = rows.settled
    for repetition, name in harness.interleaved(list(seconds), repetitions + 1):
        rows.recorded.enabled = name == "recorded"
        started = time.perf_counter()
        found[name] = rows.search(vectors, k)
        if repetition:  # the first may compile
            seconds[name].append(time.perf_counter() - started)
    rows.recorded.enabled = True
    settled = [(now - then) / (2 * (repetitions + 1)) for now, then in zip(rows.settled, before, strict=True)]
    parts = harness.device_parts(lambda: rows.search(vectors, k), device)
    times = {name: float(np.median(values)) * 1e3 for name, values in seconds.items()}
    busy = sum(part["ms"] for part in parts.values())
    return {
        "queries": len(vectors),
        "recorded_ms": times["recorded"],
        "launched_ms": times["launched"],
        "busy_ms": busy,
        "host_ms": times["recorded"] - busy if parts else None,
        "bytes_read": rows.bytes_read(len(vectors)),
        "scan_ms": sum(part["ms"] for name, part in parts.items() if "_bounds" in name) or None,
        "parts": parts,
        "settled_queries": settled[0],
        "rescanned_queries": settled[1],
        "settled_blocks": settled[2],
        "wrong": wrong_hits(found["recorded"], found["launched"]),
    }


def show(scan: str, lines: Sequence[dict[str, Any]], bandwidth: float) -> list[Table]:
    """Tabulate times and parts for a person."""

    def table(title: str, names: Sequence[str]) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for name in names:
            made.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
        return made

    times = table(f"{scan}: ms", ("queries", "recorded", "launched", "busy", "host", "scan", "of a copy", "settled"))
    for line in lines:
        numbers = [line[f"{name}_ms"] for name in ("recorded", "launched", "busy", "host", "scan")]
        share = "" if line["scan_ms"] is None else f"{line['bytes_read'] / line['scan_ms'] * 1e3 / bandwidth:.0%}"
        times.add_row(
            f"{line['queries']:,}", *("" if number is None else f"{number:.3f}" for number in numbers), share,
            f"{line['settled_queries']:.1f}",
        )  # fmt: skip
    parts = table(f"{scan}: parts, us", ("part", *(f"{line['queries']:,}" for line in lines)))
    for name in dict.fromkeys(name for line in lines for name in line["parts"]):
        found = [line["parts"].get(name) for line in lines]
        parts.add_row(name[:60], *("" if part is None else f"{1e3 * part['ms']:,.1f}" for part in found))
    return [times, parts]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        prog="search_parts.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Where the time of a GPU's search goes.",
        epilog="example:\n  python bench/search_parts.py --output",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--rows", type=int, default=8_000_000, help="of the corpus (default: 8000000)")
    parser.add_argument("--dimension", type=int, default=768, help="of a row (default: 768)")
    parser.add_argument("--batches", default="1,16,32,64,128,256,512", help="queries (default: 1,16,32,64,128,256,512)")
    parser.add_argument("--scans", default=",".join(SCANS), help="what is read (default: float16,int8)")
    parser.add_argument("--k", type=int, default=16, help="hits of a query (default: 16, which are recorded)")
    parser.add_argument("--repetitions", type=int, default=20, help="of everything, in turn (default: 20)")
    harness.add_output_argument(parser, "search_parts")
    arguments = parser.parse_args(argv)
    arguments.batches = [int(part) for part in arguments.batches.split(",")]
    arguments.scans = arguments.scans.split(",")
    harness.refuse_below_one(arguments, "rows", "dimension", "k", "repetitions")
    if min(arguments.batches) < 1 or arguments.k > arguments.rows or not set(arguments.scans) <= set(SCANS):
        raise ValueError(f"--batches, --k, --scans: give at least one query, no more hits than rows, and {SCANS}")
    return arguments


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and leave the row as the last line of stdout."""
    arguments = parse_arguments(argv)
    device, console = torch.device(arguments.device), make_console()
    rows = make_rows(arguments.rows, arguments.dimension, device)
    queries = make_rows(max(arguments.batches), arguments.dimension, device, seed=1).astype(np.float32)
    few = [(0, rows[:CHECKED_ROWS])]
    wanted = HostRows(few).search(queries[:64], min(arguments.k, len(few[0][1])))
    bandwidth = harness.copy_bandwidth(device)
    row = {"benchmark": "search_parts", "rows": arguments.rows, "dimension": arguments.dimension, "k": arguments.k}
    row |= harness.circumstances(device) | {"copy_bytes_per_second": bandwidth, "wrong_hits": 0, "scans": {}}
    for scan in arguments.scans:
        row["wrong_hits"] += wrong_hits(DeviceRows(few, device, scan).search(queries[:64], arguments.k), wanted)
        started = time.perf_counter()
        opened = DeviceRows([(0, rows)], device, scan)
        console.print(f"{scan}: opened in {time.perf_counter() - started:.0f} s")
        for size, times in opened.ways.items():
            shown = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in times.items())
            console.print(f"  up to {size} queries: {shown}")
        lines = [
            measure(opened, queries[:size], arguments.k, arguments.repetitions, device) for size in arguments.batches
        ]
        row["wrong_hits"] += sum(line.pop("wrong") for line in lines)
        row["scans"][scan] = {"lines": lines, "ways": {str(size): times for size, times in opened.ways.items()}}
        for table in show(scan, lines, bandwidth):
            console.print(table)
        del opened
    console.print(f"{row['wrong_hits']} hits are wrong")
    harness.emit(row, arguments.output)
    return int(row["wrong_hits"] > 0)


if __name__ == "__main__":
    sys.exit(main())
