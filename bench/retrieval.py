"""Measure retrieval: how many searches a second the batcher carries, and how long each of them takes.

    python bench/retrieval.py
    python bench/retrieval.py --callers 1,64,2560 --unique 0.4 --output
    python bench/retrieval.py --parts million,faiss,server --index million.index --questions questions.jsonl --output

bursts    a fake backend takes 2 ms per batch; all else that a search costs is due to the batcher and its callers:
          Python, the C++, the waking of threads and event loops (bursts.py)
million   text in, passages out, over an index (million.py)
faiss     exact search against faiss' IndexFlatIP, same vectors, same process (million.py; needs faiss-cpu)
server    `searchr1 serve` against a plain server in the manner of published ones (serving.py, plain_server.py; needs
          faiss-cpu, fastapi and the extra `serve`)

CPU time is reported beside wall time: on a machine that others use, wall time also counts them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bursts
import harness
import million
import numba
import serving
import torch
from rich import box
from rich.table import Table

from searchr1_fast.console import make_console
from searchr1_fast.data import read_questions
from searchr1_fast.errors import entry_point

PARTS = ("bursts", "million", "faiss", "server")
TWINS = ("plain", "faiss", "behind a lock")  # how their labels end


def burst_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Tabulate the rows, a line per way of calling and number of callers."""
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


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Tabulate any rows, with their keys as columns."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in rows[0]:
        made.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        made.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    return made


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        prog="retrieval.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Closed-loop bursts of searches through the batcher, beside a search behind a lock.",
        epilog="example:\n  python bench/retrieval.py --callers 1,64,2560 --output",
    )  # fmt: skip
    parser.add_argument(
        "--callers", type=numbers, default="1,16,256,2560", help="how many search at once (default: 1,16,256,2560)"
    )
    parser.add_argument("--parts", type=parts, default="bursts", help=f"of {', '.join(PARTS)} (default: bursts)")
    parser.add_argument("--index", type=Path, help="what `searchr1 index build` made, for every part but bursts")
    parser.add_argument("--questions", type=Path, help="JSONL of questions, for every part but bursts")
    parser.add_argument("--clients", type=int, default=256, help="server: connections at once (default: 256)")
    parser.add_argument("--plain-requests", type=int, default=512, help="server: for the plain one (default: 512)")
    parser.add_argument("--requests", type=int, default=8192, help="server and million: for ours (default: 8192)")
    parser.add_argument("--threads", type=int, default=0, help="of every part but bursts (default: torch's)")
    parser.add_argument("--queries", type=int, default=100_000, help="per measurement, about (default: 100000)")
    parser.add_argument("--unique", type=float, default=0.5, help="share of a group that differs (default: 0.5)")
    parser.add_argument("--repetitions", type=int, default=3, help="of everything, in turn (default: 3)")
    harness.add_output_argument(parser, "retrieval")
    parser.add_argument(
        "--plot", metavar="DIR", type=Path, nargs="?", const=harness.RESULTS, help="draw what was measured into DIR"
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.unique <= 1:
        raise ValueError(f"--unique {arguments.unique}: a share lies between 0 and 1")
    if arguments.parts != ["bursts"] and (arguments.index is None or arguments.questions is None):
        raise ValueError("--index and --questions are missing: what is searched, and what for")
    harness.refuse_below_one(arguments, "queries", "repetitions", "clients", "plain_requests", "requests")
    return arguments


def numbers(text: str) -> list[int]:
    """Read the numbers of `--callers`."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of at least 1")
    return found


def parts(text: str) -> list[str]:
    """Read the names of `--parts`."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: the parts are {', '.join(PARTS)}")
    return names


def different_questions(arguments: argparse.Namespace, count: int) -> list[str]:
    """Return `count` texts, no two alike. ValueError if the file holds fewer."""
    texts = list(dict.fromkeys(question.text for question in read_questions(arguments.questions)))
    if len(texts) < count:
        raise ValueError(f"{arguments.questions} holds {len(texts)} different questions; {count} are asked for")
    return texts[:count]


def plot(row: dict[str, Any], folder: Path) -> Path:
    """Plot queries a second, a panel for each part that was measured, with what ours is compared with in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, list[str], list[float]]] = []
    for key, title, label in (
        ("servers", f"servers, {row.get('clients')} clients", lambda one: one["server"]),
        ("million", f"text to passages, {row.get('passages', 0):,}", lambda one: f"{one['callers']} {one['way']}"),
        ("bursts", "2 ms backend", lambda one: f"{one['callers']} {one['way']}"),
    ):
        if key in row:
            panels.append((title, [label(one) for one in row[key]], [one["queries_per_second"] for one in row[key]]))
    if "faiss" in row:
        pairs = [(name, one) for one in row["faiss"] for name in ("faiss", "ours")]
        labels = [f"{one['batch']} {name}" for name, one in pairs]
        panels.append(("exact search, by batch", labels, [one[f"{name}_queries_per_second"] for name, one in pairs]))
    widths = [1.2 + 0.42 * len(labels) for _, labels, _ in panels]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(sum(widths), 4.5), layout="constrained", squeeze=False, width_ratios=widths
    )
    for panel, (title, labels, rates) in zip(axes[0], panels, strict=True):
        bars = panel.bar(labels, rates, color=["#999999" if label.endswith(TWINS) else "#0072B2" for label in labels])
        panel.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=7)
        panel.set_yscale("log" if max(rates) > 100 * min(rates) else "linear")
        panel.set_title(title, loc="left", fontsize=10)
        panel.tick_params(axis="x", rotation=90, labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("queries a second")
    figure.suptitle(f"{row['device']}, threads: {row['threads']}, {row['date'][:10]}", fontsize=10)
    path = folder / f"retrieval_{'_'.join(key for key in ('servers', 'million', 'faiss', 'bursts') if key in row)}.png"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def measure_million(arguments: argparse.Namespace, console: Any) -> dict[str, Any]:
    """Measure the parts that search an index in this process."""
    found: dict[str, Any] = {}
    search = million.open_search(arguments.index)
    if "million" in arguments.parts:
        queries = different_questions(arguments, arguments.requests)
        found["million"] = million.end_to_end(search, arguments.index, queries, (1, 32, 256, 2560), console.print)
        console.print(table(f"text in, passages out, {len(search):,} passages", found["million"]))
    if "faiss" in arguments.parts:
        queries = different_questions(arguments, max(million.BATCHES))
        found["faiss"] = million.beside_faiss(search, arguments.index, queries, arguments.repetitions)
        console.print(table(f"beside faiss IndexFlatIP, {len(search):,} vectors", found["faiss"]))
    return found | {"passages": len(search)}


def measure_servers(arguments: argparse.Namespace, console: Any) -> dict[str, Any]:
    """Measure both servers, and the ratio."""
    num_warming = serving.NUM_WARMING
    queries = different_questions(arguments, num_warming + max(arguments.requests, arguments.plain_requests))
    counts = {"plain": arguments.plain_requests, "ours": arguments.requests}
    served = {
        name: serving.measure(name, arguments.index, queries[: num_warming + counts[name]], arguments.clients)
        for name in serving.NAMES
    }
    rows = [{"server": name} | served[name].row() for name in serving.NAMES]
    console.print(table(f"{arguments.clients} clients at once", rows))
    ratio = rows[1]["queries_per_second"] / rows[0]["queries_per_second"]
    same = serving.same_passages(served["plain"], served["ours"])
    console.print(f"{ratio:.1f} times the queries a second; the same passages for {same:.2%} of the queries")
    return {"servers": rows, "clients": arguments.clients, "ratio": ratio, "same_passages": same}


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and leave the row as the last line of stdout."""
    arguments, console = parse_arguments(argv), make_console()
    row: dict[str, Any] = {"benchmark": "retrieval", "repetitions": arguments.repetitions}
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        numba.set_num_threads(arguments.threads)
        os.environ |= {"OMP_NUM_THREADS": str(arguments.threads)}  # for the servers, which are other processes
    row |= harness.circumstances(torch.device("cpu"))
    if "server" in arguments.parts:  # first, while this process holds no index
        row |= measure_servers(arguments, console)
    if {"million", "faiss"} & set(arguments.parts):
        row |= measure_million(arguments, console)
    if "bursts" in arguments.parts:
        rows = bursts.measure_all(arguments.callers, arguments.queries, arguments.unique, arguments.repetitions)
        console.print(burst_table(rows))
        row |= {"unique": arguments.unique, "bursts": rows}
    if arguments.plot is not None:
        console.print(f"drawn in {plot(row, arguments.plot)}")
    harness.emit(row, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
