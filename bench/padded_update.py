"""Measure one update on trajectories of real lengths: ours, and the padded twin that does what Search-R1 does.

    python bench/padded_update.py --output
    python bench/padded_update.py --lengths mix --questions 4      # without the file of real lengths

Ours packs, computes what samples of a question share only once, and runs the head on policy tokens only; the sampler's
log-probabilities are kept. The twin (plain.py) pads rows to the longest of the step (or, as `plain, close`, of only
their micro-batch), runs the head on every token, and first computes old log-probabilities, in a pass of their own. The
original, whose rows have room for 4,096 tokens, removes the padding again before its passes.

All take one optimizer step on the same trajectories with the demo's model; losses and gradients agree. Tokens are
random, in turns as long as those of released Search-R1 models (balance.py). Seconds are CPU seconds of this process:
medians of interleaved repetitions.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import harness
import numpy as np
from balance import DATA, MIX_LENGTH, read_turns, real_trajectories
from plain import PlainPolicy, pad
from random_work import make_trajectories
from rich import box
from rich.table import Table
from steps import restorer

from searchr1_fast.config import Config
from searchr1_fast.console import make_console
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.errors import entry_point
from searchr1_fast.models import load_model
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy
from searchr1_fast.types import Trajectory

OURS, PLAIN, CLOSE = "ours", "plain", "plain, close"


def draw(options: argparse.Namespace, vocab_size: int) -> list[Trajectory]:
    """Draw groups of trajectories, their tokens within the vocabulary."""
    if options.lengths == "mix":
        number = options.questions * options.group_size
        return make_trajectories(number * MIX_LENGTH, MIX_LENGTH, options.group_size, vocab_size)
    trajectories = real_trajectories(read_turns(DATA / "stats" / "trace_lengths.json"), options, seed=0)
    return [replace(trajectory, token_ids=trajectory.token_ids % vocab_size) for trajectory in trajectories]


def measure(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Measure the row, without its circumstances."""
    config = Config.model_validate(
        {"algorithm": {"importance_cap": 0.0}, "train": {"tokens_per_microbatch": options.tokens_per_microbatch}}
    )
    policy = Policy(load_model(config.model.path), config, ranks)
    twin = PlainPolicy(load_model(config.model.path), config, ranks)
    trajectories = draw(options, policy.replica.config.vocab_size)
    advantages = np.where(np.arange(len(trajectories)) % 2, -1.0, 1.0).astype(np.float32)
    tokens = sum(len(trajectory.token_ids) for trajectory in trajectories)
    count = sum(int(trajectory.loss_mask.sum()) for trajectory in trajectories)
    reports: dict[str, dict[str, float]] = {}

    def ours() -> dict[str, float]:
        batches = pack(trajectories, advantages, options.tokens_per_microbatch)
        metrics, norm = policy.update(batches, count)
        rows = sum(batch.num_tokens for batch in batches)
        scored = sum(len(batch.scored_rows) for batch in batches)
        return {"loss": float(metrics["policy_loss"]) / count, "grad_norm": norm, "rows": rows, "head_rows": scored}

    def plain(to_longest: bool) -> dict[str, float]:
        every = range(len(trajectories))
        batches = pad(trajectories, advantages, every, config, ranks.device, to_longest=to_longest)
        old = twin.logprobs(batches, twin.module)
        loss = float(twin.accumulate(batches, old, None, denominator=count))
        rows = sum(batch.num_positions for batch in batches)
        return {"loss": loss, "grad_norm": twin.step(), "rows": rows, "head_rows": 2 * rows}

    systems = {
        OURS: (ours, restorer(policy)),
        PLAIN: (partial(plain, True), restorer(twin)),
        CLOSE: (partial(plain, False), restorer(twin)),
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for repetition, name in harness.interleaved(list(systems), options.repetitions + 1):
        update, restore = systems[name]
        restore()  # both start from the same weights
        started = time.process_time()
        reports[name] = update()
        if repetition:  # the first warms up
            seconds[name].append({"seconds": time.process_time() - started})
    for name, report in reports.items():
        report |= harness.medians(seconds[name])
        report["tokens_per_second"] = tokens / report["seconds"]
    ratios = {
        name: [b["seconds"] / a["seconds"] for a, b in zip(seconds[OURS], seconds[name], strict=True)]
        for name in (PLAIN, CLOSE)
    }
    return {
        "trajectories": len(trajectories),
        "tokens": tokens,
        "policy_tokens": count,
        "ratios": {name: reports[OURS]["tokens_per_second"] / reports[name]["tokens_per_second"] for name in ratios},
        "ratio_ranges": {name: [min(values), max(values)] for name, values in ratios.items()},
        "systems": reports,
    }


def table_of(row: dict[str, Any]) -> Table:
    """Tabulate the row for a person."""
    title = (
        f"{row['trajectories']} trajectories of {row['lengths']} lengths, {row['tokens']:,} tokens, of which "
        f"{row['policy_tokens']:,} the policy's"
    )
    table = Table("", *row["systems"], title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for key, format_ in (("seconds", ".2f"), ("tokens_per_second", ",.0f"), ("rows", ",.0f"), ("head_rows", ",.0f"),
                         ("loss", ".6f"), ("grad_norm", ".6f")):  # fmt: skip
        table.add_row(key, *(format(one[key], format_) for one in row["systems"].values()))
    table.caption = "ours is so many times as fast: " + ", ".join(
        f"{name} {ratio:.1f} ({' to '.join(f'{end:.1f}' for end in row['ratio_ranges'][name])})"
        for name, ratio in row["ratios"].items()
    )
    return table


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        prog="padded_update.py", allow_abbrev=False, description="An update on real lengths, and its padded twin.",
        epilog="example: python bench/padded_update.py --questions 4 --repetitions 3",
    )  # fmt: skip
    parser.add_argument("--lengths", choices=("real", "mix"), default="real")
    parser.add_argument("--questions", type=int, default=6, help="of the optimizer step (default: 6)")
    parser.add_argument("--group-size", type=int, default=5, help="samples of a question (default: 5, the paper's)")
    parser.add_argument("--prompt-tokens", type=int, default=170, help="before real turns (default: 170)")
    parser.add_argument("--tokens-per-microbatch", type=int, default=8192)
    parser.add_argument("--repetitions", type=int, default=3)
    harness.add_output_argument(parser, "padded_update")
    options = parser.parse_args(argv)
    harness.refuse_ranks()
    harness.refuse_below_one(
        options, "questions", "group_size", "prompt_tokens", "tokens_per_microbatch", "repetitions"
    )
    return options


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and leave the row as the last line of stdout."""
    options = parse_arguments(argv)
    row: dict[str, Any] = {"benchmark": "padded_update"}
    with process("cpu", num_threads=1) as ranks:
        row |= harness.circumstances(ranks.device)
        keys = ("lengths", "questions", "group_size", "tokens_per_microbatch", "repetitions")
        row |= {name: getattr(options, name) for name in keys}
        row |= measure(options, ranks)
    make_console().print(table_of(row))
    harness.emit(row, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
