"""Measure each kernel beside other ways to the same result: eager and compiled torch, installed peers, and the floor.

    python bench/kernels.py                                 all kernels, on a GPU where there is one
    python bench/kernels.py gae topk --repetitions 7 --output --plot
    taskset -c 0 env OMP_NUM_THREADS=1 python bench/kernels.py topk      one thread each

Kernels: head (loss and gradients from hidden states), score (log-probabilities without gradients), gae, group, kl,
cached (attention over the KV cache), generation (norm, rotation and SwiGLU of a decoding step), sample (its next
tokens), topk. Problems and providers are defined in kernel_cases.py. A GPU also runs head_ways and gae_ways: ours with
each of its switches turned (way_cases.py).

Where the time can go. The head is matrix products, so its floor is the bare products of the rows that count; anything
above that goes to row passes, chunking, and products of rows that do not count. Scans, group statistics and KL move a
few bytes per token and are bound by launches or by Python. Search reads the corpus once per batch, which bounds it
until the batch is so large that the products take longer.

Every provider's result is compared with ours before the provider is timed. The row holds the largest relative
difference, which may be large where a provider rounds to 16 bits.

Times are medians of interleaved repetitions. A repetition makes as many calls as fill 2 ms on a GPU or 20 ms on a CPU;
what takes more than a second is measured once.

- On a CPU the first call of a repetition has a column of its own and does not count towards the time: other providers
  have evicted its code and data from the caches. On a virtual machine it mostly shows what other machines do.
- On a GPU events time a repetition, so short kernels show what a loop of calls costs. A call that fills the 2 ms alone
  starts behind as long a wait, to have a full queue as in a training step. `device_seconds` is how long the device
  itself was busy (from the profiler).

`cpu_seconds` is the process's CPU time: on one thread, what a quiet machine would take. "roofline" is the time that
matrix units at the rate of a large product, or memory at the rate of a large copy, would need, divided by the time
taken; integer products may exceed 100 %.

Peak memory is the most that a call adds: by the allocator's count on a GPU, in the resident set on Linux.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from kernel_case import OURS, Case, Provider
from kernel_cases import cases
from rich import box
from rich.table import Table

from searchr1_fast.console import make_console
from searchr1_fast.errors import entry_point

KERNELS = ("head", "score", "gae", "group", "kl", "cached", "generation", "sample", "topk")
WAYS = ("head_ways", "gae_ways")
_EPILOG = """\
kernels:
  head        loss and gradients from hidden states
  score       log-probabilities without gradients
  gae, group  advantages
  kl          k3 with its gradient
  cached      attention over the KV cache
  generation  norm, rotation and SwiGLU of a decoding step
  sample      its next tokens
  topk        exact search, beside faiss where it is installed
  head_ways, gae_ways   on a GPU: ours with each of its switches turned

example:
  python bench/kernels.py gae topk --output --plot"""
# How long the calls of a sample take. On a CPU the first finds in the caches what ran before, and is reported apart.
_FILL_SECONDS = {"cuda": 2e-3, "cpu": 20e-3}
_FILL_CYCLES = 4_000_000  # of a GPU at 2 GHz
_SLOW_SECONDS = 1.0  # a call that takes longer is not repeated
_PROFILED_SECONDS = 0.1  # of calls under the profiler, which keeps an event per launch: a loop of launches has millions


class Clock:
    """Runs a provider a number of times, and says what one run took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def measure(self, provider: Provider, calls: int) -> dict[str, float]:
        """Return seconds per call; on a CPU for the calls after the first, if there are others, and for the first."""
        if self.device.type != "cuda":
            first = self._measure_on_cpu(provider, 1)
            following = self._measure_on_cpu(provider, calls - 1) if calls > 1 else first
            return following | {"first_seconds": first["seconds"]}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        if calls == 1:
            torch.cuda._sleep(_FILL_CYCLES)
        begin.record()
        for _ in range(calls):
            provider.run()
        end.record()
        torch.cuda.synchronize()
        return {
            "seconds": begin.elapsed_time(end) / 1e3 / calls,
            "cpu_seconds": (time.process_time() - cpu) / calls,
        }

    def _measure_on_cpu(self, provider: Provider, calls: int) -> dict[str, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            provider.run()
        return {
            "seconds": (time.perf_counter() - wall) / calls,
            "cpu_seconds": (time.process_time() - cpu) / calls,
        }

    def device_seconds(self, provider: Provider, seconds: float) -> float | None:
        """Return seconds per call that the GPU's kernels take, without gaps between them; None for what takes long."""
        if self.device.type != "cuda" or seconds > _PROFILED_SECONDS:
            return None
        calls = min(10, math.ceil(_PROFILED_SECONDS / seconds))
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                provider.run()
            torch.cuda.synchronize()
        kernels = (
            event
            for event in profile.key_averages()  # includes operators, to which their kernels' time is ascribed again
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        )
        return sum(event.self_device_time_total for event in kernels) / 1e6 / calls

    def once(self, provider: Provider) -> tuple[dict[str, float], int | None]:
        """-> `measure` of one call, and what it adds to peak memory; None where nothing counts it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return self.measure(provider, 1), torch.cuda.max_memory_allocated() - before
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return self.measure(provider, 1), None
        reset.write_text("5", encoding="ascii")  # resets the high-water mark
        before = resident("VmRSS")
        return self.measure(provider, 1), max(0, resident("VmHWM") - before)


def resident(name: str) -> int:
    """Read a number of bytes from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def copy_rate(device: torch.device) -> float:
    """Bytes per second of a large copy, counting those read and those written; the best of five."""
    source = torch.empty((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device).fill_(1)
    copy, clock = torch.empty_like(source), Clock(device)
    provider = Provider(lambda: copy.copy_(source))
    return 2 * source.nbytes / min(clock.measure(provider, 1)["seconds"] for _ in range(5))


def difference(have: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest |have - want| / |want| over the outputs, as norms."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(have, want, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def measure(case: Case, clock: Clock, repetitions: int, rates: dict[str, float]) -> dict[str, Any]:
    """Measure a case: the measured part of its row."""
    systems: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[dict[str, float]]] = {}
    wanted = None
    for name, provider in case.providers.items():
        try:
            output = provider.run()
        except torch.OutOfMemoryError:
            if name == OURS:
                raise
            case.left_out[name] = "does not fit into the GPU's memory"
            continue
        systems[name] = {}
        if provider.answer is not None:
            answer = provider.answer(output)
            wanted = answer if wanted is None else wanted
            systems[name]["difference"] = difference(answer, wanted)
        del output
        once, systems[name]["peak_bytes"] = clock.once(provider)  # by now it is compiled, and has what it keeps
        if once["seconds"] > _SLOW_SECONDS:
            samples[name] = [once]
            systems[name]["calls"] = 1
            continue
        seconds = clock.measure(provider, 1)["seconds"]
        systems[name]["calls"] = max(1, math.ceil(_FILL_SECONDS[clock.device.type] / max(seconds, 1e-7)))
    del wanted
    repeated = [name for name in systems if name not in samples]
    samples |= {name: [] for name in repeated}
    for _, name in harness.interleaved(repeated, repetitions) if repeated else ():
        samples[name].append(clock.measure(case.providers[name], systems[name]["calls"]))
    floor = max(case.flops / rates["matmul_flops"], case.bytes / rates["copy_bytes"])
    for name, system in systems.items():
        system |= harness.medians(samples[name])
        system["all_seconds"] = [sample["seconds"] for sample in samples[name]]
        system["device_seconds"] = clock.device_seconds(case.providers[name], system["seconds"])
        system["roofline"] = floor / system["seconds"]
    for system in systems.values():
        for key in ("seconds", "cpu_seconds"):
            system[f"{key}_over_ours"] = system[key] / systems[OURS][key]
    return {"repetitions": repetitions, "rates": rates, "left_out": case.left_out, "providers": systems}


# ------------------------------------------------------------------------------------------------------------ report


def table(case: Case, row: dict[str, Any]) -> Table:
    """Tabulate one case for a person."""
    shown = Table(title=f"{case.kernel}: {case.label}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                  caption_justify="left", collapse_padding=True)  # fmt: skip
    shown.add_column("", no_wrap=True)
    firsts = all("first_seconds" in system for system in row["providers"].values())
    first = ("first",) if firsts else ()
    for heading in ("time", "over ours", *first, "CPU time", "over ours", "roofline", "peak memory", "difference"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, system in row["providers"].items():
        peak, apart = system["peak_bytes"], system.get("difference")
        shown.add_row(
            name,
            milliseconds(system["seconds"]),
            f"{system['seconds_over_ours']:.2f}x",
            *((milliseconds(system["first_seconds"]),) if firsts else ()),
            milliseconds(system["cpu_seconds"]),
            f"{system['cpu_seconds_over_ours']:.2f}x",
            f"{system['roofline']:.0%}",
            "" if peak is None else f"{peak / 1e6:,.0f} MB",
            "" if apart is None else f"{apart:.0e}",
            style="bold" if name == OURS else None,
        )
    if case.left_out:  # below the table: in a column, a sentence would take the width that names need
        shown.caption = "\n".join(f"left out: {name}: {reason}" for name, reason in case.left_out.items())
    return shown


def milliseconds(seconds: float) -> str:
    """Format milliseconds with three significant digits."""
    return f"{1e3 * seconds:,.{max(0, 2 - math.floor(math.log10(max(1e3 * seconds, 1e-6))))}f} ms"


def plot(kernel: str, rows: Sequence[dict[str, Any]], folder: Path, on_gpu: bool) -> Path:
    """Plot time by shape and provider into a file; without a GPU CPU time, as a clock also sees others. It draws points
    because the axis is logarithmic: a bar would begin at no particular time, and its length would say nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    names = list(dict.fromkeys(name for row in rows for name in row["providers"]))
    key, label = ("seconds", "ms per call") if on_gpu else ("cpu_seconds", "ms of CPU time per call")
    figure, axes = pyplot.subplots(figsize=(max(6.4, 2 + 1.6 * len(rows)), 4.5), layout="constrained")
    for place, name in enumerate(names):
        drawn = [(i, row["providers"][name][key]) for i, row in enumerate(rows) if name in row["providers"]]
        where = [i + 0.7 * ((place + 0.5) / len(names) - 0.5) for i, _ in drawn]
        marker, size = ("D", 9) if name == OURS else ("o", 7)
        axes.plot(where, [1e3 * seconds for _, seconds in drawn], marker, markersize=size, label=name)
    varied = [key for key in rows[0]["shape"] if len({str(row["shape"].get(key)) for row in rows}) > 1]
    labels = ["\n".join(f"{key} {row['shape'][key]}" for key in varied) for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(axis="y", alpha=0.3)
    for border in range(1, len(rows)):
        axes.axvline(border - 0.5, color="0.85", linewidth=0.8)
    axes.set_ylabel(label)
    fixed = ", ".join(f"{key} {value}" for key, value in rows[0]["shape"].items() if key not in varied)
    threads = f"{rows[0]['threads']} thread{'s' if rows[0]['threads'] > 1 else ''}"
    title = f"{kernel} ({fixed})" if fixed else kernel
    axes.set_title(f"{title}\n{rows[0]['device']}, {threads}, {rows[0]['date'][:10]}", fontsize=11)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels_{kernel}{'_gpu' if on_gpu else ''}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


# -------------------------------------------------------------------------------------------------------------- main


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        prog="kernels.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Each kernel beside other ways to the same result.", epilog=_EPILOG,
    )  # fmt: skip
    known = KERNELS + WAYS
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="one of those below (default: all)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--repetitions", type=int, default=5, help="of every provider (default: 5)")
    parser.add_argument(
        "--plot", metavar="DIR", type=Path, nargs="?", const=harness.RESULTS,
        help="write kernels_KERNEL.png, or kernels_KERNEL_gpu.png, into DIR (without a name: bench/results)",
    )  # fmt: skip
    harness.add_output_argument(parser, "kernels")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.kernels if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
    harness.refuse_below_one(arguments, "repetitions")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib is not installed: pip install matplotlib")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: give cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if device == "cpu" and set(arguments.kernels) & set(WAYS):
        raise ValueError(f"{', '.join(WAYS)}: need a GPU, on a CPU there is one way")
    arguments.device = torch.device(device)
    arguments.kernels = arguments.kernels or list(KERNELS if device == "cpu" else known)
    return arguments


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case, print its table and leave its row; the last row is the last line of stdout."""
    arguments = parse_arguments(argv)
    console, clock = make_console(), Clock(arguments.device)
    dtype = torch.bfloat16 if arguments.device.type == "cuda" else torch.float32
    rates = {
        "matmul_flops": statistics.median(harness.matmul_flops(arguments.device, dtype) for _ in range(3)),
        "copy_bytes": copy_rate(arguments.device),
    }
    circumstances = harness.circumstances(arguments.device)
    console.print(
        f"{circumstances['device']}, {circumstances['threads']} threads (load {circumstances['load']}): products of "
        f"{rates['matmul_flops'] / 1e12:.3f} TFLOP/s, copies of {rates['copy_bytes'] / 1e9:.1f} GB/s"
    )
    rows = []
    for case in cases(arguments.device, arguments.kernels):
        row = {"benchmark": "kernels", "kernel": case.kernel, "shape": case.shape, **circumstances}
        row |= measure(case, clock, arguments.repetitions, rates)
        console.print(table(case, row))
        harness.emit(row, arguments.output)
        rows.append(row)
        torch.compiler.reset()  # so that each shape is compiled for itself, not with dynamic sizes
    if arguments.plot is not None:
        for kernel in dict.fromkeys(row["kernel"] for row in rows):
            found = [row for row in rows if row["kernel"] == kernel]
            path = plot(kernel, found, arguments.plot, arguments.device.type == "cuda")
            print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
