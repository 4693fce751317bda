"""Measure a whole RL step on a published shape, with random weights and turns of real lengths.

    python bench/throughput.py --model qwen2.5-3b --workload A --scale 0.125       # with the plain twin
    python bench/replayed_step.py --model qwen2.5-3b --workload A --scale 0.125 --output
    python bench/replayed_step.py --model tiny --device cpu --dtype float32 --scale 0.02 --plain

There are two published workloads (turn_script.py). A has 512 questions with 4 samples and one search each, which come
to 760 tokens a trajectory; B has 512 with 5 and three searches, 1,820 tokens. `--scale` takes that share of the
questions. The step is that of the trainer, function by function (steps.py): rollout with real searches between turns,
packing, the loss and its optimizer step, handing over the weights. What random weights would not do, a script does: it
gives each turn's text, with its query (turn_script.py). The prompt is Search-R1's template over a question about a
generated encyclopedia, which BM25 searches. There is one process with one GPU, so rates per second are those of a GPU.

The limit is what the same step would take if matrix products ran at the rate of one large product, and memory at that
of a large copy, both measured here. It counts the products of the prefill and of the update as they are done, and for
every decode step the weights once and every sequence's keys and values once. Nothing overlaps in it, as nothing does in
the step.

`--plain` runs the twin that does what the original does (plain.py) on the same trajectories: in lock-step, contexts
recomputed every turn, right-padding, the head on every token, old log-probabilities recomputed. On a GPU it begins
when ours has left the memory, which the two could not share at these sizes. It recomputes activations as ours does, and
its micro-batches have 8,192 positions at most, about the original's eight sequences: all their logits exist at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import harness
import numpy as np
import torch
from plain import VARIANTS, PlainPolicy
from random_work import Work, count_flops
from rich import box
from rich.table import Table
from steps import PHASES, STEP, Step, our_step, plain_step, share_of_equal
from turn_script import WORKLOADS, ScriptedEngine, ScriptedPlainEngine, Workload, write_scripts
from workload import add_model_arguments, make_plan, peak_flops, random_decoder, release, tiny_config

from searchr1_fast.config import Config
from searchr1_fast.console import Console, make_console
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.environment import Environment, build_environments
from searchr1_fast.errors import entry_point
from searchr1_fast.evaluate import trajectory_seed
from searchr1_fast.metrics import PhaseTimers
from searchr1_fast.models import Decoder, TextTokenizer, load_tokenizer
from searchr1_fast.models.published import published_config
from searchr1_fast.packing import pack
from searchr1_fast.policy import Learner, Policy
from searchr1_fast.prompt import PromptBuilder
from searchr1_fast.retrieval.memory_plan import size_text
from searchr1_fast.rollout import Engine, SearchLoop
from searchr1_fast.run import Run
from searchr1_fast.types import PackedBatch, Question

OURS, PLAIN = "ours", "plain"
PLAIN_POSITIONS = 8192  # the most in a micro-batch of the twin


def make_config(options: argparse.Namespace, workload: Workload) -> Config:
    """Make a run's configuration for this workload."""
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
    """The number of questions of a step."""
    return max(2, round(options.scale * workload.questions))


def make_run(config: Config, ranks: Ranks, environment: Environment, policy: Learner, engine: Engine) -> Run:
    """Make a run that writes nothing to disk."""
    return Run(
        config=config, ranks=ranks, ui=Console(quiet=True),
        timers=PhaseTimers(torch.cuda.synchronize if ranks.device.type == "cuda" else None),
        stream=None, environment=environment, evaluations={}, tokenizer=engine.tokenizer,
        prompt=PromptBuilder(config.prompt, engine.tokenizer), policy=policy, critic=None, engine=engine,
        loop=SearchLoop(engine, environment.search), checkpoints=None,
    )  # fmt: skip


def build(config: Config, options: argparse.Namespace, ranks: Ranks, environment: Environment) -> Run:
    """Make our run, over random weights. No token of its tokenizer ends a turn by itself."""
    policy = Policy(same_decoder(config, options, ranks), config, ranks)
    return make_run(config, ranks, environment, policy, ScriptedEngine(policy.replica, tokenizer(), config.rollout))


def build_plain(config: Config, options: argparse.Namespace, ranks: Ranks, environment: Environment) -> Run:
    """Make the plain twin's run, over the same weights."""
    budget = min(options.tokens_per_microbatch, PLAIN_POSITIONS)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"tokens_per_microbatch": budget}),
            "algorithm": config.algorithm.model_copy(update={"drop_zero_variance_groups": False}),
        }
    )
    decoder = same_decoder(config, options, ranks)
    decoder.checkpoint_blocks(options.checkpointing)
    policy = PlainPolicy(decoder, config, ranks)
    stops = VARIANTS[options.plain_variant].stop_at_tags
    engine = ScriptedPlainEngine(policy.replica, tokenizer(), config.rollout, stop_at_tags=stops)
    return make_run(config, ranks, environment, policy, engine)


def tokenizer() -> TextTokenizer:
    """Make a tokenizer whose tokens end no turn by themselves."""
    return TextTokenizer(load_tokenizer("builtin:base").backend)


def same_decoder(config: Config, options: argparse.Namespace, ranks: Ranks) -> Decoder:
    """Make a decoder with random weights, the same at every call."""
    torch.manual_seed(config.run.seed)
    tiny = options.model == "tiny"
    return random_decoder(
        tiny_config(tokenizer().vocab_size) if tiny else published_config(options.model), ranks.device
    )


def limit_seconds(run: Run, step: Step, options: argparse.Namespace) -> dict[str, float]:
    """Return how long the step's own work takes at the machine's own rates, and those rates."""
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
    """Count the tokens that all policy tokens attend to: what decoding reads of the cache if each reads its own."""
    return sum(int(np.flatnonzero(trajectory.loss_mask).sum()) for trajectory in step.trajectories)


def update_flops(run: Run, step: Step, options: argparse.Namespace) -> dict[str, float]:
    """Return `model` and `done` of random_work.py; half of the trajectories win, so all groups are trained on."""
    work = Work.of(step.trajectories, packed(step, options))
    return count_flops(run.policy.replica.config, work, options.checkpointing)


def packed(step: Step, options: argparse.Namespace) -> list[PackedBatch]:
    """Return our micro-batches."""
    return pack(step.trajectories, np.ones(len(step.trajectories)), options.tokens_per_microbatch)


def measure(options: argparse.Namespace, ranks: Ranks, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure ours and, with `--plain`, the twin -> the row."""
    workload = WORKLOADS[options.workload]
    config = make_config(options, workload)
    environment, _ = build_environments(config, ranks, Console(quiet=True))
    builders = {OURS: build} | ({PLAIN: build_plain} if options.plain else {})
    apart = ranks.device.type == "cuda" if options.apart is None else options.apart
    row = {"benchmark": "replayed_step", **harness.circumstances(ranks.device)}
    row["model"] = {"name": options.model, "dtype": options.dtype}
    last: dict[str, Step] = {}
    systems: dict[str, dict[str, Any]] = {}
    for names in [[name] for name in builders] if apart else [list(builders)]:
        runs = {name: builders[name](config, options, ranks, environment) for name in names}
        steps, peaks = take_steps(runs, options, workload, say)
        if OURS in runs:
            row["limit_seconds"] = limit_seconds(runs[OURS], steps[OURS][-1], options)
        for name, run in runs.items():
            systems[name] = system(name, run, steps[name], peaks[name], options, row["limit_seconds"])
            run.engine.close()
        last |= {name: taken[-1] for name, taken in steps.items()}
        del runs, run
        release(ranks.device)
    row["workload"] = describe(options, workload, last[OURS])
    if PLAIN in last:
        systems[PLAIN]["equal_trajectories"] = share_of_equal(*(one.trajectories for one in last.values()))
    return row | {"systems": systems}


def take_steps(
    runs: dict[str, Run], options: argparse.Namespace, workload: Workload, say: Callable[[str], None]
) -> tuple[dict[str, list[Step]], dict[str, int | None]]:
    """Run interleaved steps; return each run's, the first of which warms up, and the memory peak of its last."""
    ways = {OURS: our_step, PLAIN: lambda run, *arguments: plain_step(run, VARIANTS[options.plain_variant], *arguments)}
    taken: dict[str, list[Step]] = {name: [] for name in runs}
    peaks: dict[str, int | None] = {}
    for _, name in harness.interleaved(list(runs), options.steps + 1):
        run = runs[name]
        device, questions = run.ranks.device, run.environment.questions[: run.config.train.questions_per_step]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken[name].append(scripted(run, ways[name], questions, workload))
        peaks[name] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        say(f"{name}: {taken[name][-1].seconds['total']:.2f} s")
    return taken, peaks


def scripted(run: Run, step, questions: Sequence[Question], workload: Workload) -> Step:
    """Run the step, after writing its trajectories' turns."""
    titles = [passage.title for passage in run.environment.retriever.search(["the"], 50)[0]]
    seeds = trajectory_seeds(run, len(questions))
    run.engine.scripts = write_scripts(seeds, titles, workload.searches, run.tokenizer)
    return step(run, questions, False)


def trajectory_seeds(run: Run, count: int) -> list[int]:
    """Return the seed of every trajectory of the step, as `train.sample` makes them."""
    size = run.config.algorithm.group_size
    return [trajectory_seed(run.config.run.seed, STEP, place) for place in range(count * size)]


def system(
    name: str, run: Run, steps: list[Step], peak: int | None, options: argparse.Namespace, limit: dict[str, float]
) -> dict[str, Any]:
    """Describe one column; the first step warms up."""
    device = run.ranks.device
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
    if name == OURS:  # planned for a GPU, wherever this runs
        one["planned_bytes"] = make_plan(run.config, run.policy.replica.config, packed(step, options), device).peak
    # What the workload asks for: the same for both, whatever each saves or adds.
    rate = update_flops(run, step, options)["model"] / seconds["update"]
    one["update_of_matmul"] = rate / (limit["matmul_tflops"] * 1e12)
    if (peak_rate := peak_flops(device, options)) is not None:
        one["update_mfu"] = rate / peak_rate
    return one


def describe(options: argparse.Namespace, workload: Workload, step: Step) -> dict[str, Any]:
    """Describe what was run."""
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
    """Tabulate the row for a person."""
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
    for label, key in (("MFU of the update", "update_mfu"), ("update, of one matmul's rate", "update_of_matmul")):
        if key in systems[OURS]:
            table.add_row(label, *(f"{one[key]:.1%}" for one in systems.values()))
    table.add_row("memory of a GPU, as planned", size_text(systems[OURS]["planned_bytes"]), *[""] * (len(systems) - 1))
    peaks = [one["peak_bytes"] for one in systems.values()]
    table.add_row("peak memory", *("no GPU" if peak is None else size_text(peak) for peak in peaks))
    table.caption = (
        f"limit: {limit['total']:.2f} s (prefill {limit['prefill']:.2f}, decode {limit['decode']:.2f}, update "
        f"{limit['update']:.2f}), {work['trajectories'] / limit['total']:,.1f} trajectories/s"
    )
    return table


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
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
    parser.add_argument(
        "--plain", action=argparse.BooleanOptionalAction, default=False, help="the plain twin, on the same trajectories"
    )
    parser.add_argument(
        "--apart", action=argparse.BooleanOptionalAction, default=None,
        help="the twin begins when ours has left the memory (default: on a GPU; else both take turns)",
    )  # fmt: skip
    parser.add_argument("--plain-variant", choices=sorted(VARIANTS), default="stop", help="of the twin (default: stop)")
    harness.add_output_argument(parser, "replayed_step")
    options = parser.parse_args(argv)
    harness.refuse_ranks()
    if not 0 < options.scale <= 1:
        raise ValueError(f"--scale {options.scale}: give a share above 0, up to 1")
    harness.refuse_below_one(options, "steps", "max_num_seqs", "tokens_per_microbatch")
    return options


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and leave the row as the last line of stdout."""
    options = parse_arguments(argv)
    console = make_console()
    with process(options.device) as ranks:
        row = measure(options, ranks, console.print)
    console.print(table_of(row))
    harness.emit(row, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
