"""Measure retrieval on a GPU: build what a rank has there, check it against the CPU, and time it beside plain ways.

    python bench/retrieval_gpu.py                                    8 M rows of 768 on a GPU
    python bench/retrieval_gpu.py --rows 21015324 --output           as many as the published index has
    python bench/retrieval_gpu.py --device cpu --rows 20000          without one: that it runs, not how fast a GPU is

scan     from queries in host memory to hits in host memory, by batch size: 16-bit rows, 8-bit codes, torch's product
         and top-k, faiss where it is installed; GB/s of what a pass reads, beside a copy's on the same device
         (bench/search_parts.py shows where the time goes)
batched  2,560 queries at once through the batcher, texts in, hits out, without an encoder: a text names its vector
upload   a file to the device: through the pinned ring, and as torch copies a memory map
merge    the hits of 8 parts, which are in host memory as the sockets left them: C++, our kernel, torch
link     what asking several ranks costs besides their searches, with parts that answer at once
parking  giving the memory to an update and taking it back (parked_rows.py)
encoder  queries to vectors, by batch size: recorded, launched, by torch, and after parking (encoded_queries.py)

Rows and queries are shaped like E5's: unit vectors around a common direction, cosines about 0.7. The last line is the
row, as always. The exit status is 1 if hits differ from the CPU's or from those before parking, or if a query's vector
depends on how or with what it was encoded.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import harness
import numpy as np
import torch
from encoded_queries import measure_encoder
from parked_rows import measure_parking
from rich import box
from rich.table import Table

from searchr1_fast.console import make_console
from searchr1_fast.errors import entry_point
from searchr1_fast.retrieval.batcher import BatchedRetriever
from searchr1_fast.retrieval.dense import MemoryStore
from searchr1_fast.retrieval.device_code import load_kernel
from searchr1_fast.retrieval.device_rows import DeviceRows
from searchr1_fast.retrieval.hit_merge import DeviceMerge, HostMerge, Merge, compare_merges, example_hits, hits_in
from searchr1_fast.retrieval.memory_plan import MemoryPlan
from searchr1_fast.retrieval.rows import HostRows
from searchr1_fast.retrieval.sharded_rows import open_sharded
from searchr1_fast.retrieval.staging import CudaCopies, StagingRing, copies_of

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]

PUBLISHED_ROWS = 21_015_324  # of wiki-18, whose vectors are the published index
SCALABLE_ROWS = 8_000_000  # from here on a pass is long enough for time to be proportional to rows
CHECKED_ROWS = 100_000  # searched by a CPU too
_MADE_AT_ONCE = 2**17
_BURST = 2560
_TILE = 2**20  # rows of torch's product at a time
_PARTS, _QUERIES, _K = 8, 256, 16  # in a merge: 8 ranks, the batcher's largest batch and its depth


# ------------------------------------------------------------------------------------------------------------- numbers


def make_rows(num_rows: int, dimension: int, device: torch.device, seed: int = 0) -> np.ndarray:
    """Make rows: [num_rows, dimension] fp16."""
    generator = torch.Generator(device).manual_seed(seed)
    direction = torch.ones(dimension, device=device) / dimension**0.5
    rows = np.empty((num_rows, dimension), np.float16)
    for begin in range(0, num_rows, _MADE_AT_ONCE):
        shape = min(_MADE_AT_ONCE, num_rows - begin), dimension
        noise = torch.randn(shape, device=device, generator=generator) / dimension**0.5
        made = torch.nn.functional.normalize(0.85 * direction + 0.53 * noise, dim=1)
        rows[begin : begin + shape[0]] = made.half().cpu().numpy()
    return rows


# ---------------------------------------------------------------------------------------------------------------- scan


def torch_search(rows: np.ndarray, device: torch.device) -> Search:
    """The plain way: products in tiles, top-k of each tile, top-k of those."""
    corpus = torch.from_numpy(rows).to(device)

    def search(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        queries = torch.from_numpy(vectors).to(device, corpus.dtype)
        values, places = [], []
        for begin in range(0, len(corpus), _TILE):
            tile = corpus[begin : begin + _TILE]
            best = torch.topk(queries @ tile.T, min(k, len(tile)), dim=1)
            values.append(best.values)
            places.append(best.indices + begin)
        best = torch.topk(torch.cat(values, 1), k, dim=1)
        return best.values.float().cpu().numpy(), torch.cat(places, 1).gather(1, best.indices).cpu().numpy()

    return search


def faiss_search(rows: np.ndarray, device: torch.device) -> Search | None:
    """faiss' flat index, fp16 on a GPU; None if it is not installed for this device."""
    try:
        import faiss
    except ModuleNotFoundError:
        return None
    if device.type == "cpu":
        index = faiss.IndexFlatIP(rows.shape[1])
    elif hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        options = faiss.GpuIndexFlatConfig()
        options.useFloat16 = True
        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), rows.shape[1], options)
    else:
        return None
    for begin in range(0, len(rows), _MADE_AT_ONCE):
        index.add(rows[begin : begin + _MADE_AT_ONCE].astype(np.float32))
    return index.search


def measure_scans(
    rows: np.ndarray, device: torch.device, batches: Sequence[int], k: int, repetitions: int, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], int]:
    """-> a row per way and batch size, and how many hits differ from the CPU's."""
    half = len(rows) // 2
    parts = [(0, rows[:half]), (half, rows[half:])]
    opened = {scan: DeviceRows(parts, device, scan) for scan in ("float16", "int8")}
    ways: dict[str, tuple[Search | None, Callable[[int], int]]] = {  # the search, and the bytes a pass must read
        **{scan: (found.search, found.bytes_read) for scan, found in opened.items()},
        "torch": (torch_search(rows, device), lambda num_queries: rows.nbytes),
        "faiss": (faiss_search(rows, device), lambda num_queries: rows.nbytes),
    }
    say("rows are on the device, and kernels compiled")
    queries = make_rows(max(batches), rows.shape[1], device, seed=1).astype(np.float32)
    few = rows[:CHECKED_ROWS]
    wanted = HostRows([(0, few)]).search(queries[:64], k)
    found = (DeviceRows([(0, few)], device, scan).search(queries[:64], k) for scan in ("float16", "int8"))
    wrong = sum(int((one != other).sum()) for hits in found for one, other in zip(hits, wanted, strict=True))
    say(f"{wrong} hits differ from the CPU's, of {len(few):,} rows")
    table = []
    for num_queries in batches:
        batch = queries[:num_queries]
        names = [name for name, (search, _) in ways.items() if search is not None]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repetition, name in harness.interleaved(names, repetitions + 1):
            search = functools.partial(ways[name][0], batch, k)
            elapsed = harness.timed(search, device)
            if repetition:  # the first compiles and allocates
                seconds[name].append(elapsed)
        for name, times in seconds.items():
            median = float(np.median(times))
            table.append({
                "way": name, "queries": num_queries, "ms": median * 1e3, "queries_per_second": num_queries / median,
                "bytes_per_second": ways[name][1](num_queries) / median,
            })  # fmt: skip
        shown = ", ".join(f"{row['way']} {row['ms']:.2f} ms" for row in table[-len(names) :])
        say(f"{num_queries} queries: {shown}")
    for scan, found in opened.items():
        say(f"{scan}: {found.settled.num_queries} queries of all these searches were not proven at first")
    return table, wrong


# ------------------------------------------------------------------------------------------------------------- batched


class NamedVectors:
    """A backend of two stages, whose queries are the numbers of vectors."""

    def __init__(self, rows: DeviceRows, vectors: np.ndarray) -> None:
        self._rows, self._vectors = rows, vectors

    def prepare(self, queries: Sequence[str]) -> np.ndarray:
        """Look up the vectors, where an encoder would be."""
        return self._vectors[np.fromiter(map(int, queries), np.int64, len(queries))]

    def search_prepared(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `batcher.SearchBackend`."""
        return self._rows.search(vectors, k)


def measure_batched(rows: np.ndarray, device: torch.device, repetitions: int) -> float:
    """Measure queries a second."""
    vectors = make_rows(_BURST, rows.shape[1], device, seed=2).astype(np.float32)
    backend = NamedVectors(DeviceRows([(0, rows)], device), vectors)
    texts = [str(number) for number in range(_BURST)]
    with BatchedRetriever(backend, MemoryStore(()), cache_bytes=0) as retriever:
        seconds = [harness.timed(lambda: retriever.search_ids(texts, 3), device) for _ in range(repetitions + 1)]
    return _BURST / float(np.median(seconds[1:]))


# -------------------------------------------------------------------------------------------------- upload, merge, link


def measure_upload(rows: np.ndarray, device: torch.device, repetitions: int) -> dict[str, float]:
    """Measure bytes a second from a mapped file to the device."""
    target = torch.empty(rows.shape, dtype=torch.float16, device=device)
    with tempfile.NamedTemporaryFile() as file:
        rows.tofile(file)
        mapped = np.memmap(file.name, dtype=np.float16, mode="c", shape=rows.shape)
        ring = StagingRing(copies_of(device))

        def through_ring() -> None:
            ring.upload(mapped, target)
            ring.flush()

        ways = {"ring": through_ring, "torch": lambda: target.copy_(torch.from_numpy(mapped))}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _, name in harness.interleaved(list(ways), repetitions + 1):
            seconds[name].append(harness.timed(ways[name], device))
            if not np.array_equal(target[-1].cpu().numpy(), rows[-1]):
                raise RuntimeError(f"upload by {name}: what arrived is not what was sent")
            target.zero_()
    return {name: rows.nbytes / float(np.median(times[1:])) for name, times in seconds.items()}


class TorchMerge:
    """The plain way: to the device, two stable sorts, and back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bodies: list[bytearray] = []
        self._shape: tuple[int, Sequence[int]] = (0, ())

    def rooms(self, num_queries: int, widths: Sequence[int]) -> list[memoryview]:
        """See `hit_merge.Merge`."""
        self._shape = num_queries, widths
        self._bodies = [bytearray(12 * num_queries * width) for width in widths]
        return [memoryview(body) for body in self._bodies]

    def merge(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `hit_merge.Merge`; k must not exceed the number of hits."""
        parts = [hits_in(body, self._shape[0], width) for body, width in zip(self._bodies, self._shape[1], strict=True)]
        scores, rows = (
            torch.cat([torch.from_numpy(part[which]).to(self._device, non_blocking=True) for part in parts], 1)
            for which in range(2)
        )
        rows, order = torch.sort(rows, dim=1)
        scores, places = torch.sort(scores.gather(1, order), dim=1, descending=True, stable=True)
        return scores[:, :k].cpu().numpy(), rows.gather(1, places[:, :k]).cpu().numpy()


def measure_merges(device: torch.device, repetitions: int) -> dict[str, float]:
    """Measure the seconds of each merge, by name; a difference raises."""
    merges: dict[str, Merge] = {"c++": HostMerge(), "torch": TorchMerge(device)}
    if device.type == "cuda" and importlib.util.find_spec("cupy") is not None:
        stream = torch.cuda.current_stream(device)
        merges["kernel"] = DeviceMerge(load_kernel("merge", "merge_hits"), CudaCopies(stream), stream.synchronize)
    seconds = compare_merges(list(merges.values()), _PARTS, _QUERIES, _K, repetitions + 1)
    return dict(zip(merges, seconds, strict=True))


class Ready:
    """A part that answers at once."""

    def __init__(self, num_rows: int, part: int) -> None:
        self._num_rows = num_rows
        self._hits = hits_in(example_hits(part + 1, _QUERIES, _K)[part], _QUERIES, _K)

    def __len__(self) -> int:
        return self._num_rows

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the same hits for any query."""
        return self._hits[0][: len(vectors), :k], self._hits[1][: len(vectors), :k]


class Threads:
    """Ranks that are threads of one process and so share its GIL: a real rank would answer sooner."""

    def __init__(self, rank: int, barrier: threading.Barrier, values: list[Any]) -> None:
        self.rank, self.world_size = rank, len(values)
        self._barrier, self._values = barrier, values

    def gather(self, value: Any) -> list[Any]:
        """See `shard_link.Peers`."""
        self._values[self.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


def measure_link(sizes: Iterable[int], dimension: int, repetitions: int) -> dict[str, float]:
    """Measure the seconds of a search of 256 queries, by number of ranks."""
    vectors = np.zeros((_QUERIES, dimension), np.float32)
    seconds = {}
    for size in sizes:
        barrier, values = threading.Barrier(size), [None] * size

        def open_one(rank: int, peers: tuple = (barrier, values), size: int = size) -> Any:
            return open_sharded(Threads(rank, *peers), size * 1000, dimension, "", lambda begin, end:
                                Ready(end - begin, begin // 1000), 60.0)  # fmt: skip

        with ThreadPoolExecutor(size) as pool:
            ranks = list(pool.map(open_one, range(size)))
        times = []
        for _ in range(20 * repetitions):
            started = time.perf_counter()
            ranks[0].search(vectors, _K)
            times.append(time.perf_counter() - started)
        seconds[str(size)] = float(np.median(times))
        for rows in ranks:
            rows.close()
    return seconds


# ---------------------------------------------------------------------------------------------------------------- main


def scan_table(scans: Sequence[dict[str, Any]], bandwidth: float) -> Table:
    """Tabulate the scans, a line per way and batch size."""
    table = Table(title="scan", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("queries", "way", "ms", "queries/s", "GB/s", "of a copy"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for row in scans:
        table.add_row(
            f"{row['queries']:,}", row["way"], f"{row['ms']:.3f}", f"{row['queries_per_second']:,.0f}",
            f"{row['bytes_per_second'] / 1e9:,.0f}", f"{row['bytes_per_second'] / bandwidth:.0%}",
        )  # fmt: skip
    return table


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        prog="retrieval_gpu.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Exact search on a GPU, checked against the CPU and timed beside the plain ways.",
        epilog="example:\n  python bench/retrieval_gpu.py --rows 21015324 --output",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--rows", type=int, default=8_000_000, help="of the corpus (default: 8000000)")
    parser.add_argument("--dimension", type=int, default=768, help="of a row (default: 768)")
    parser.add_argument("--batches", default="1,8,32,64,128,256,512", help="queries (default: 1,8,32,64,128,256,512)")
    parser.add_argument("--k", type=int, default=16, help="hits of a query (default: 16)")
    parser.add_argument("--repetitions", type=int, default=10, help="of everything, in turn (default: 10)")
    harness.add_output_argument(parser, "retrieval_gpu")
    arguments = parser.parse_args(argv)
    arguments.batches = [int(part) for part in arguments.batches.split(",")]
    harness.refuse_below_one(arguments, "rows", "dimension", "k", "repetitions")
    if min(arguments.batches) < 1 or arguments.k > arguments.rows // 2:
        raise ValueError("--batches, --k: give at least one query, and rows for more than twice the hits")
    return arguments


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and leave the row as the last line of stdout."""
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device)
    console = make_console()
    started = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"{time.perf_counter() - started:5.0f} s  {text}")

    console.print(str(MemoryPlan(arguments.rows, arguments.dimension, "float16")))
    rows = make_rows(arguments.rows, arguments.dimension, device)
    say("rows made")
    bandwidth = harness.copy_bandwidth(device)
    scans, wrong = measure_scans(rows, device, arguments.batches, arguments.k, arguments.repetitions, say)
    console.print(scan_table(scans, bandwidth))
    row = {"benchmark": "retrieval_gpu", "rows": arguments.rows, "dimension": arguments.dimension, "k": arguments.k}
    row |= harness.circumstances(device) | {"copy_bytes_per_second": bandwidth, "wrong_hits": wrong, "scans": scans}
    row["batched_queries_per_second"] = measure_batched(rows, device, arguments.repetitions)
    console.print(f"batched, queries/s: {row['batched_queries_per_second']:,.0f}")
    row["upload_bytes_per_second"] = measure_upload(rows[: 2**30 // rows[:1].nbytes], device, 3)
    row["merge_seconds"] = measure_merges(device, arguments.repetitions)
    row["link_seconds"] = measure_link((2, 4, 8), arguments.dimension, arguments.repetitions)
    queries = make_rows(64, arguments.dimension, device, seed=1).astype(np.float32)
    few = rows[: 2**31 // rows[:1].nbytes]  # locking much host memory takes seconds
    row["parking_seconds"], others = measure_parking(few, queries, device, min(arguments.repetitions, 3))
    row["wrong_hits"] = wrong = wrong + others
    row["encoder"], row["wrong_vectors"] = measure_encoder(device, arguments.batches, arguments.repetitions)
    for one in row["encoder"]:
        console.print(f"encoder, {one['queries']} queries of {one['tokens']} tokens, {one['way']}: {one['ms']:.3f} ms")
    if SCALABLE_ROWS <= arguments.rows < PUBLISHED_ROWS:
        factor = PUBLISHED_ROWS / arguments.rows  # arithmetic, not a measurement
        row["ms_by_arithmetic_for_21015324_rows"] = {
            f"{scan['way']} {scan['queries']}": scan["ms"] * factor for scan in scans
        }
    rate = row["parking_seconds"].pop("bytes_per_second")
    row["unpark_bytes_per_second"] = {"rows": rate}
    for name, factor, unit in (("upload_bytes_per_second", 1e-9, "GB/s"), ("merge_seconds", 1e6, "us"),
                               ("link_seconds", 1e6, "us"), ("parking_seconds", 1e3, "ms"),
                               ("unpark_bytes_per_second", 1e-9, "GB/s")):  # fmt: skip
        shown = ", ".join(f"{key} {value * factor:.1f}" for key, value in row[name].items())
        console.print(f"{name.partition('_')[0]}, {unit}: {shown}")
    if row["wrong_vectors"]:
        console.print(f"{row['wrong_vectors']} vectors depend on how or with what they were encoded")
    if wrong:
        console.print(f"{wrong} hits differ from the CPU's, or from those before parking")
    harness.emit(row, arguments.output)
    return int(wrong > 0 or row["wrong_vectors"] > 0)


if __name__ == "__main__":
    sys.exit(main())
