"""Retrieval: what the batcher carries, in searches a second, and how long each of them takes.

    python bench/retrieval.py
    python bench/retrieval.py --callers 1,64,2560 --unique 0.4 --output

The backend is a fake that takes 2 ms a batch, so everything else that a search costs is the batcher and its callers:
Python's share of it, the C++, the waking of threads and loops. See bursts.py.

CPU time is reported beside the clock's: on a machine that others use, the clock also counts them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import bursts
import harness
import torch
from rich import box
from rich.table import Table

from searchr1_fast.console import make_console
from searchr1_fast.errors import entry_point


def burst_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line per way of calling and number of callers."""
    title = f"searches in front of a backend of {bursts.BACKEND_SECONDS * 1e3:.0f} ms a batch"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("callers", "as", "queries/s", "p50 ms", "p99 ms", "CPU us/query", "batch", "failures"):
        table.add_column(name, justify="left" if name == "as" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['callers']:,}",
            row["way"],
            f"{row['queries_per_second']:,.0f}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['cpu_microseconds_per_query']:.1f}",
            f"{row['batch_rows_mean']:.0f}" if "batch_rows_mean" in row else "1",
            f"{row['failures']:,}",
        )
    return table


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="retrieval.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Closed-loop bursts of searches through the batcher, beside a search behind a lock.",
        epilog="example:\n  python bench/retrieval.py --callers 1,64,2560 --output",
    )  # fmt: skip
    parser.add_argument(
        "--callers", type=numbers, default="1,16,256,2560", help="how many search at once (default: 1,16,256,2560)"
    )
    parser.add_argument("--queries", type=int, default=100_000, help="per measurement, about (default: 100000)")
    parser.add_argument("--unique", type=float, default=0.5, help="share of a group that differs (default: 0.5)")
    parser.add_argument("--repetitions", type=int, default=3, help="of everything, in turn (default: 3)")
    harness.add_output_argument(parser, "retrieval")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.unique <= 1:
        raise ValueError(f"--unique {arguments.unique}: a share lies between 0 and 1")
    for name in ("queries", "repetitions"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: give at least 1")
    return arguments


def numbers(text: str) -> list[int]:
    """The numbers of `--callers`."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of at least 1")
    return found


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and leave the row as the last line."""
    arguments = parse_arguments(argv)
    rows = bursts.measure_all(arguments.callers, arguments.queries, arguments.unique, arguments.repetitions)
    make_console().print(burst_table(rows))
    row = {"benchmark": "retrieval", "unique": arguments.unique, "repetitions": arguments.repetitions}
    row |= harness.circumstances(torch.device("cpu")) | {"bursts": rows}
    harness.emit(row, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
