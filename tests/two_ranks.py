"""Started by test_distributed.py on two ranks: `two_ranks.py OUTPUT CONFIG…` runs collectives, then trains each."""

from __future__ import annotations

import atexit
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from searchr1_fast.config import load_config
from searchr1_fast.console import Console
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.train import train


def collectives(ranks: Ranks) -> dict:
    """-> results of every collective on values that differ by rank; the same on every rank if they work."""
    items = list("abcde")
    ranks.barrier()
    return {
        "world_size": ranks.world_size,
        "sum": ranks.sum(ranks.rank + 1),
        "max": ranks.max(10 * ranks.rank),
        "gather": ranks.gather({"rank": ranks.rank}),
        "broadcast": ranks.broadcast(f"from {ranks.rank}"),
        "all_reduce": ranks.all_reduce(torch.tensor([1.0, ranks.rank])).tolist(),
        "all_reduce_max": ranks.all_reduce(torch.tensor([1.0, ranks.rank]), dist.ReduceOp.MAX).tolist(),
        "unshare": ranks.unshare([item.upper() for item in ranks.share(items)]),
        "shares": ranks.gather(ranks.share(items)),
    }


def num_gloo_threads() -> int:
    """Number of threads of gloo's groups in this process."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("pt_gloo") for name in names)


def main() -> None:
    """Write OUTPUT/rank<i>.json with the collectives' results and what each training returned.

    As the interpreter ends, write OUTPUT/rank<i>.threads with the numbers of gloo's threads in training and at the end.
    """
    output = Path(sys.argv[1])
    counts: list[int] = []
    atexit.register(lambda: (output / f"rank{ranks.rank}.threads").write_text(f"{counts[0]} {num_gloo_threads()}"))
    with process("cpu", num_threads=1) as ranks:
        report = {"collectives": collectives(ranks)}
        report["trained"] = [train(load_config(path), Console(quiet=True)) for path in sys.argv[2:]]
        counts.append(num_gloo_threads())
        (output / f"rank{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
