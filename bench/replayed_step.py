"""A whole RL step on a published shape with random weights: rollout, retrieval and update, each doing its true work.

    python bench/replayed_step.py --model qwen2.5-3b --workload A --scale 0.125 --output
    python bench/replayed_step.py --model tiny --device cpu --dtype float32 --scale 0.02 --plain

Two published workloads (turn_script.py): A, 512 questions with 4 samples and one search each; B, 512 with 5 and three
searches. `--scale` takes that share of the questions. The step is that of the trainer, function by function (steps.py):
sampling with real searches between turns, packing, the loss and its optimizer step, handing over the weights. What the
random weights would not do, a script does: each turn's text, with its query, is given (turn_script.py). The prompt is
Search-R1's template over a question about a generated encyclopedia, which BM25 searches.

The limit is what the same step would take if matrix products ran at the rate of one large product, and memory at that
of a large copy, both measured here: products of the prefill and of the update as they are done, and for every decode
step the weights once and every sequence's keys and values once. Nothing overlaps in it, as nothing does in the step.

`--plain` runs the twin that does what the original does (plain.py) on the same trajectories: in lock-step, contexts
computed again every turn, right-padding, the head on every token, old log-probabilities computed again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import harness
import numpy as np
import torch
from plain import VARIANTS, PlainPolicy, plain_run
from random_work import Work, count_flops
from rich import box
from rich.table import Table
from steps import PHASES, STEP, Step, our_step, plain_step
from turn_script import WORKLOADS, ScriptedEngine, ScriptedPlainEngine, Workload, write_scripts
from workload import add_model_arguments, peak_flops, random_decoder, tiny_config

from searchr1_fast.config import Config
from searchr1_fast.console import Console, make_console
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.environment import build_environments
from searchr1_fast.errors import entry_point
from searchr1_fast.evaluate import trajectory_seed
from searchr1_fast.metrics import PhaseTimers
from searchr1_fast.models import TextTokenizer, load_tokenizer
from searchr1_fast.models.published import published_config
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy
from searchr1_fast.prompt import PromptBuilder
from searchr1_fast.retrieval.memory_plan import size_text
from searchr1_fast.rollout import SearchLoop
from searchr1_fast.run import Run
from searchr1_fast.types import Question

OURS, PLAIN = "ours", "plain"


def make_config(options: argparse.Namespace, workload: Workload) -> Config:
    """A run's configuration of this workload."""
    prompt, observation, turn = 400, 500, 500
    longest = prompt + (observation + 120) * workload.searches + turn
    return Config.model_validate(
        {
            "run": {"device": options.device},
            "model": {"dtype": options.dtype},
            "prompt": {"template": "search_r1"},
            "data": {"world": {"style": "rich", "num_questions": max(64, num_questions(options, workload))}},
            "retrieval": {"backend": "bm25", "topk": 5},
            "rollout": {
                "max_searches": workload.searches,
                "max_turn_tokens": turn,
                "max_observation_tokens": observation,
                "max_sequence_tokens": longest,
                "max_num_seqs": options.max_num_seqs,
                "keep_cache": True,
            },
            "algorithm": {"name": "grpo", "group_size": workload.group_size},
            "train": {
                "questions_per_step": num_questions(options, workload),
                "tokens_per_microbatch": options.tokens_per_microbatch,
                "activation_checkpointing": options.checkpointing,
            },
        }
    )


def num_questions(options: argparse.Namespace, workload: Workload) -> int:
    """Of a step."""
    return max(2, round(options.scale * workload.questions))


def build(config: Config, options: argparse.Namespace, ranks: Ranks, ui: Console) -> Run:
    """A run over random weights that writes nothing down. No token of its tokenizer ends a turn by itself."""
    tokenizer = TextTokenizer(load_tokenizer("builtin:base").backend)
    shape = tiny_config(tokenizer.vocab_size) if options.model == "tiny" else published_config(options.model)
    environment, _ = build_environments(config, ranks, ui)
    policy = Policy(random_decoder(shape, ranks.device), config, ranks)
    engine = ScriptedEngine(policy.replica, tokenizer, config.rollout)
    return Run(
        config=config, ranks=ranks, ui=ui,
        timers=PhaseTimers(torch.cuda.synchronize if ranks.device.type == "cuda" else None),
        stream=None, environment=environment, evaluations={}, tokenizer=tokenizer,
        prompt=PromptBuilder(config.prompt, tokenizer), policy=policy, critic=None, engine=engine,
        loop=SearchLoop(engine, environment.search), checkpoints=None,
    )  # fmt: skip


def twin_of(run: Run, options: argparse.Namespace) -> Run:
    """The run the plain way, with the same weights."""
    config, device = run.config, run.ranks.device
    copy = random_decoder(run.policy.replica.config, device)
    source = run.policy.replica.state_dict()
    copy.load_state_dict({name: tensor.float() for name, tensor in source.items()})
    policy = PlainPolicy(copy, config, run.ranks, None)
    return plain_run(run, policy, VARIANTS[options.plain_variant], ScriptedPlainEngine)


def limit_seconds(run: Run, step: Step, options: argparse.Namespace) -> dict[str, float]:
    """What the step's own work takes at the machine's own rates, and those."""
    device, dtype = run.ranks.device, getattr(torch, options.dtype)
    matmul, bandwidth = harness.matmul_flops(device, dtype), harness.copy_bandwidth(device)
    decoder, cost = run.policy.replica, step.cost
    shape = decoder.config
    layers = sum(parameter.numel() for parameter in decoder.layers.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in decoder.parameters())
    token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * dtype.itemsize
    decoded = attended(step)
    seconds = {
        "prefill": 2.0 * layers * cost.prefill_tokens / matmul,
        "decode": (cost.decode_steps * weights + decoded * token) / bandwidth,
        "update": update_flops(run, step, options)["done"] / matmul,
    }
    return seconds | {"total": sum(seconds.values()), "matmul_tflops": matmul / 1e12, "copy_gb": bandwidth / 1e9}


def attended(step: Step) -> int:
    """Tokens that the policy's tokens attend to, summed: what decoding reads of the cache if each reads its own."""
    return sum(int(np.flatnonzero(trajectory.loss_mask).sum()) for trajectory in step.trajectories)


def update_flops(run: Run, step: Step, options: argparse.Namespace) -> dict[str, float]:
    """`model` and `done` of random_work.py; half of the trajectories win, so all groups are trained on."""
    advantages = np.ones(len(step.trajectories), dtype=np.float32)
    work = Work.of(step.trajectories, pack(step.trajectories, advantages, options.tokens_per_microbatch))
    return count_flops(run.policy.replica.config, work, options.checkpointing)


def measure(options: argparse.Namespace, ranks: Ranks, say) -> dict[str, Any]:
    """The row."""
    workload = WORKLOADS[options.workload]
    config = make_config(options, workload)
    run = build(config, options, ranks, Console(quiet=True))
    questions = run.environment.questions[: config.train.questions_per_step]
    steps = {OURS: partial(scripted, run, our_step, questions, workload)}
    if options.plain:
        twin = twin_of(run, options)
        plain = partial(plain_step, twin, VARIANTS[options.plain_variant])
        steps[PLAIN] = partial(scripted, twin, lambda _, *arguments: plain(*arguments), questions, workload)
    taken: dict[str, list[Step]] = {name: [] for name in steps}
    peaks: dict[str, int | None] = {}
    for _, name in harness.interleaved(list(steps), options.steps + 1):
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
        taken[name].append(steps[name]())
        peaks[name] = torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else None
        say(f"{name}: {taken[name][-1].seconds['total']:.2f} s")
    ours = taken[OURS][-1]
    return {
        "benchmark": "replayed_step",
        **harness.circumstances(ranks.device),
        "model": {"name": options.model, "dtype": options.dtype},
        "workload": describe(options, workload, ours),
        "limit_seconds": limit_seconds(run, ours, options),
        "systems": {name: system(name, run, ones, peaks[name], options) for name, ones in taken.items()},
    }


def scripted(run: Run, step, questions: Sequence[Question], workload: Workload) -> Step:
    """The step, after its trajectories' turns were written."""
    titles = [passage.title for passage in run.environment.retriever.search(["the"], 50)[0]]
    seeds = trajectory_seeds(run, len(questions))
    run.engine.scripts = write_scripts(seeds, titles, workload.searches, run.tokenizer)
    return step(run, questions, False)


def trajectory_seeds(run: Run, count: int) -> list[int]:
    """Of every trajectory of the step, as `train.sample` makes them."""
    size = run.config.algorithm.group_size
    return [trajectory_seed(run.config.run.seed, STEP, place) for place in range(count * size)]


def system(name: str, run: Run, steps: list[Step], peak: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """One column; the first step warms up."""
    seconds = harness.medians([step.seconds for step in steps[1:]])
    step, count = steps[-1], len(steps[-1].trajectories)
    tokens = sum(len(trajectory.token_ids) for trajectory in step.trajectories)
    one: dict[str, Any] = {
        "seconds": seconds,
        "totals": [step.seconds["total"] for step in steps[1:]],
        "trajectories_per_second": count / seconds["total"],
        "tokens_per_second": tokens / seconds["total"],
        "peak_bytes": peak,
        "cost": asdict(step.cost),
    }
    limit = peak_flops(run.ranks.device, options)
    if name == OURS and limit is not None:
        one["update_mfu"] = update_flops(run, step, options)["model"] / seconds["update"] / limit
    return one


def describe(options: argparse.Namespace, workload: Workload, step: Step) -> dict[str, Any]:
    """What was run."""
    lengths = [len(trajectory.token_ids) for trajectory in step.trajectories]
    return asdict(workload) | {
        "name": options.workload,
        "scale": options.scale,
        "trajectories": len(lengths),
        "tokens_mean": statistics.mean(lengths),
        "tokens_max": max(lengths),
        "policy_tokens_mean": statistics.mean(int(t.loss_mask.sum()) for t in step.trajectories),
        "searches_mean": statistics.mean(trajectory.num_searches for trajectory in step.trajectories),
        "max_num_seqs": options.max_num_seqs,
        "tokens_per_microbatch": options.tokens_per_microbatch,
        "checkpointing": options.checkpointing,
    }


def table_of(row: dict[str, Any]) -> Table:
    """For a person."""
    work, systems, limit = row["workload"], row["systems"], row["limit_seconds"]
    title = (
        f"{row['model']['name']}, workload {work['name']} x {work['scale']}: {work['trajectories']} trajectories of "
        f"{work['tokens_mean']:.0f} tokens, {work['searches_mean']:.1f} searches"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in systems:
        table.add_column(name, justify="right", no_wrap=True)
    for phase in PHASES:
        table.add_row(phase, *(f"{one['seconds'][phase]:.2f} s" for one in systems.values()))
    table.add_row("trajectories/s", *(f"{one['trajectories_per_second']:,.2f}" for one in systems.values()))
    table.add_row("tokens/s, no padding counted", *(f"{one['tokens_per_second']:,.0f}" for one in systems.values()))
    if "update_mfu" in systems[OURS]:
        table.add_row("MFU of the update", f"{systems[OURS]['update_mfu']:.1%}", *[""] * (len(systems) - 1))
    peaks = [one["peak_bytes"] for one in systems.values()]
    table.add_row("peak memory", *("no GPU" if peak is None else size_text(peak) for peak in peaks))
    table.caption = (
        f"limit: {limit['total']:.2f} s (prefill {limit['prefill']:.2f}, decode {limit['decode']:.2f}, update "
        f"{limit['update']:.2f}), {work['trajectories'] / limit['total']:,.1f} trajectories/s"
    )
    return table


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="replayed_step.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="A whole RL step on a published shape with random weights and scripted turns.",
        epilog="example:\n  python bench/replayed_step.py --model qwen2.5-3b --workload A --scale 0.125",
    )  # fmt: skip
    add_model_arguments(parser, model="qwen2.5-3b", tokens_per_microbatch=16384, checkpointing="selective")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="A")
    parser.add_argument("--scale", type=float, default=0.125, help="share of the workload's questions (default: 0.125)")
    parser.add_argument("--steps", type=int, default=2, help="after one that warms up (default: 2)")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="sequences under way (default: 256)")
    parser.add_argument("--plain", action="store_true", help="the plain twin too, on the same trajectories")
    parser.add_argument("--plain-variant", choices=sorted(VARIANTS), default="stop", help="of the twin (default: stop)")
    harness.add_output_argument(parser, "replayed_step")
    options = parser.parse_args(argv)
    if not 0 < options.scale <= 1:
        raise ValueError(f"--scale {options.scale}: give a share above 0, up to 1")
    for name in ("steps", "max_num_seqs", "tokens_per_microbatch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    return options


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and leave the row."""
    options = parse_arguments(argv)
    console = make_console()
    with process(options.device) as ranks:
        row = measure(options, ranks, console.print)
    console.print(table_of(row))
    harness.emit(row, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
