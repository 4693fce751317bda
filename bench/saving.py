"""Measure what a checkpoint costs training, on a published shape with random weights: in the background, and plainly.

    python bench/saving.py --model qwen2.5-1.5b --directory /some/disk --output
    python bench/saving.py --model tiny --device cpu --dtype float32

A checkpoint is the policy with its optimizer's state, as a run of one rank saves it, and the exported weights:
    stage    training stands still for the copy to the host; the first also allocates that memory
    write    what the thread then takes, while updates go on
    update   seconds of an update alone, and the median of those that ran beside a write, the last only in part
    plain    training stands still for all of it (`checkpoint.background=false`)

Times include the page cache: every file is flushed to the disk, and none is read. The checkpoints are deleted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from random_work import make_trajectories
from rich import box
from rich.table import Table
from workload import random_decoder, tiny_config

from searchr1_fast.checkpoint_writer import CheckpointWriter
from searchr1_fast.config import Config
from searchr1_fast.console import make_console
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.errors import entry_point
from searchr1_fast.models import save_weights
from searchr1_fast.models.published import PUBLISHED, published_config
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy, to_device
from searchr1_fast.retrieval.memory_plan import size_text


def measure(config: Config, ranks: Ranks, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the row, without its circumstances."""
    decoder = tiny_config(1024) if options.model == "tiny" else published_config(options.model)
    policy = Policy(random_decoder(decoder, ranks.device), config, ranks)
    trajectories = make_trajectories(options.tokens, options.sequence_length, 8, decoder.vocab_size)
    advantages = np.where(np.arange(len(trajectories)) % 2, -1.0, 1.0).astype(np.float32)
    packed = pack(trajectories, advantages, options.tokens_per_microbatch)
    batches = [to_device(batch, ranks.device) for batch in packed]
    count = sum(batch.num_policy_tokens for batch in batches)

    def update() -> float:
        return harness.timed(lambda: policy.update(batches, count), ranks.device)

    update()  # makes the optimizer's state, and compiles
    row: dict[str, Any] = {"stage": [], "write": [], "beside": [], "plain": []}
    row["alone"] = [update() for _ in range(options.repetitions)]
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        writer = CheckpointWriter(Path(folder) / "background", ranks, keep=1)
        plain = CheckpointWriter(Path(folder) / "plain", ranks, keep=1, background=False)
        for step in range(1, options.repetitions + 1):
            row["stage"].append(harness.timed(partial(stage, writer, policy, step), ranks.device))
            started = time.perf_counter()
            writer.start()
            row["beside"].append(update())
            while writer.is_writing:
                row["beside"].append(update())
            writer.wait()
            row["write"].append(time.perf_counter() - started)
            still = harness.timed(partial(stage, plain, policy, step), ranks.device)
            row["plain"].append(still + harness.timed(plain.start, ranks.device))
        files = [path for path in (Path(folder) / "plain" / "latest").resolve().rglob("*") if path.is_file()]
        row["bytes"] = sum(path.stat().st_size for path in files)
    return row


def stage(writer: CheckpointWriter, policy: Policy, step: int) -> None:
    """Stage a checkpoint as a run does."""

    def export(weights: dict[str, torch.Tensor], directory: Path) -> None:
        save_weights(weights, policy.replica.config, directory)

    writer.stage(step, policy.tensors(), policy.state_dict(), dict(policy.replica.named_parameters()), export)


def table(row: dict[str, Any]) -> Table:
    """Tabulate the row for a person."""
    shown = Table("", "seconds", title=f"{row['model']}: {size_text(row['bytes'])} each", box=box.SIMPLE_HEAD)
    for name, title in (
        ("stage", "training stands still: copy to the host"),
        ("write", "written beside training in"),
        ("alone", "an update alone"),
        ("beside", "an update beside a write"),
        ("plain", "training stands still: the plain way"),
    ):
        first, rest = row[name][0], statistics.median(row[name][1:] or row[name])
        shown.add_row(title, f"{rest:.3f}" + (f" (the first {first:.3f})" if name in ("stage", "beside") else ""))
    return shown


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        prog="saving.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What a checkpoint costs a training, on a published shape with random weights.",
        epilog="example:\n  python bench/saving.py --model qwen2.5-1.5b --directory /some/disk",
    )  # fmt: skip
    parser.add_argument("--model", choices=("tiny", *PUBLISHED), default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=65536, help="of an update's trajectories, at least")
    parser.add_argument("--sequence-length", type=int, default=1024, help="mean of a trajectory's tokens")
    parser.add_argument("--tokens-per-microbatch", type=int, default=8192)
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="selective")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--directory", metavar="DIR", help="on the disk to measure; room for two checkpoints and more")
    harness.add_output_argument(parser, "saving")
    options = parser.parse_args(argv)
    harness.refuse_below_one(options, "repetitions")
    return options


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and leave the row as the last line of stdout."""
    options = parse_arguments(argv)
    config = Config.model_validate(
        {"model": {"dtype": options.dtype}, "train": {"activation_checkpointing": options.checkpointing}}
    )
    with process(options.device) as ranks:
        row = {"benchmark": "saving", **harness.circumstances(ranks.device), "model": options.model}
        row |= {"dtype": options.dtype} | measure(config, ranks, options)
    make_console().print(table(row))
    harness.emit(row, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
