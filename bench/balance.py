"""Measure how evenly an update's micro-batches lie on ranks: how much ranks wait for one another, counted, not timed.

    python bench/balance.py
    python bench/balance.py --lengths mix --questions 64 --group-size 8 --output

FSDP gathers a block's weights on all ranks at once, so in every round of micro-batches all wait for the costliest. The
imbalance is the sum of each round's costliest micro-batch over the mean rank's cost (packing.py has the cost); 1.0 is
none. `largest rank` is the largest sum of a rank over the mean, which counts where nothing is gathered between
micro-batches (`train.reshard_after=update`).

Columns: `dealt` is packing.lay_out, which cuts the micro-batches of all ranks from one list. `apart` is its plain twin:
sequences are dealt out by cost, and every rank packs its own.

Lengths: `real` are the turns of released Search-R1 models (trace_lengths.json in $SEARCHR1_DATA/stats, read in place),
drawn with a seed, after a prompt that a group shares; `mix` is bench/workload.py's. No model, no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from random_work import QUESTION, make_trajectories
from rich import box
from rich.table import Table

from searchr1_fast.console import make_console
from searchr1_fast.errors import entry_point
from searchr1_fast.packing import Layout, lay_out, plan
from searchr1_fast.types import FinishReason, Trajectory

DATA = Path(os.environ.get("SEARCHR1_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
VOCABULARY = 100_000  # large enough that no two trajectories continue alike by chance
MIX_LENGTH = 1024  # mean, as in bench/workload.py


def real_trajectories(turns: Sequence[list[list[int]]], options, seed: int) -> list[Trajectory]:
    """Make groups of random tokens in turns that were really taken, each sample's drawn by itself."""
    generator = np.random.default_rng(seed)
    trajectories = []
    for group in range(options.questions):
        prompt = generator.integers(0, VOCABULARY, options.prompt_tokens)
        for _ in range(options.group_size):
            sizes = [size for turn in turns[generator.integers(len(turns))] for size in turn[1::2]]  # policy, passages
            mask = np.repeat([False, *(place % 2 == 0 for place in range(len(sizes)))], [len(prompt), *sizes])
            tokens = np.concatenate([prompt, generator.integers(0, VOCABULARY, sum(sizes))])
            logprobs = np.zeros(len(mask), dtype=np.float32)
            trajectories.append(
                Trajectory(QUESTION, group, tokens, mask, logprobs, len(prompt), [], FinishReason.ANSWER)
            )
    return trajectories


def read_turns(path: Path) -> list[list[list[int]]]:
    """Read the turns of each trajectory: characters and tokens of the policy, then of its passages."""
    if not path.is_file():
        raise ValueError(f"no {path}; set SEARCHR1_DATA to the directory that holds stats/, or give --lengths mix")
    return [record["turns"] for record in json.loads(path.read_text(encoding="utf-8"))["records"]["all"]]


def lay_out_apart(trajectories: Sequence[Trajectory], budget: int, world_size: int) -> Layout:
    """The plain twin: one run of nearly equal cost per rank, which every rank cuts by itself."""
    whole = lay_out(trajectories, budget)
    by_rank = plan(whole.lengths, whole.shared, sum(whole.lengths), world_size)
    runs = []
    for begin, end in by_rank:
        own = plan(whole.lengths[begin:end], [0, *whole.shared[begin + 1 : end]], budget)
        runs.append([(begin + first, begin + last) for first, last in own])
    return Layout(whole.order, whole.lengths, whole.shared, runs + [[]] * (world_size - len(runs)))


def measure(options) -> list[dict[str, Any]]:
    """Make a row for each budget and number of ranks: means over the seeds."""
    turns = read_turns(DATA / "stats" / "trace_lengths.json") if options.lengths == "real" else None
    number = options.questions * options.group_size
    found: dict[tuple[int, int], list[tuple[Layout, Layout]]] = {}
    for seed in range(options.seeds):
        if turns is None:
            trajectories = make_trajectories(number * MIX_LENGTH, MIX_LENGTH, options.group_size, VOCABULARY, seed)
        else:
            trajectories = real_trajectories(turns, options, seed)
        for budget in options.tokens_per_microbatch:
            for world_size in options.ranks:
                pair = lay_out(trajectories, budget, world_size), lay_out_apart(trajectories, budget, world_size)
                found.setdefault((budget, world_size), []).append(pair)
    return [
        {"tokens_per_microbatch": budget, "ranks": world_size}
        | {name: summary([pair[place] for pair in pairs]) for place, name in enumerate(("dealt", "apart"))}
        for (budget, world_size), pairs in found.items()
    ]


def summary(layouts: Sequence[Layout]) -> dict[str, float]:
    """Means over layouts."""
    return {
        "imbalance": statistics.mean(layout.imbalance for layout in layouts),
        "largest_rank": statistics.mean(layout.largest_rank for layout in layouts),
        "rounds": statistics.mean(layout.num_rounds for layout in layouts),
    }


def table_of(row: dict[str, Any]) -> Table:
    """Tabulate the row for a person."""
    table = Table("rows", "ranks", "rounds", "dealt", "largest rank", "rounds, apart", "apart", "largest rank, apart",
                  title=f"imbalance: {row['questions']} questions x {row['group_size']}, {row['lengths']} lengths",
                  box=box.SIMPLE_HEAD)  # fmt: skip
    for one in row["layouts"]:
        cells = [
            text
            for name in ("dealt", "apart")
            for text in (
                f"{one[name]['rounds']:.1f}",
                f"{one[name]['imbalance']:.3f}",
                f"{one[name]['largest_rank']:.3f}",
            )
        ]
        table.add_row(f"{one['tokens_per_microbatch']:,}", str(one["ranks"]), *cells)
    return table


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        prog="balance.py", allow_abbrev=False, description="How evenly micro-batches lie on ranks.",
        epilog="example: python bench/balance.py --questions 256 --group-size 1",
    )  # fmt: skip
    parser.add_argument("--lengths", choices=("real", "mix"), default="real")
    parser.add_argument("--questions", type=int, default=51, help="of an optimizer step; 51 in the paper's GRPO")
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=170, help="before real turns")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens-per-microbatch", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--seeds", type=int, default=5)
    harness.add_output_argument(parser, "balance")
    options = parser.parse_args(argv)
    harness.refuse_below_one(options, "questions", "group_size", "prompt_tokens", "seeds", "ranks")
    return options


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Count, print the table, and leave the row as the last line of stdout."""
    options = parse_arguments(argv)
    row: dict[str, Any] = {"benchmark": "balance", **harness.circumstances(torch.device("cpu"))}
    row |= {name: getattr(options, name) for name in ("lengths", "questions", "group_size", "seeds")}
    row["layouts"] = measure(options)
    make_console().print(table_of(row))
    harness.emit(row, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
