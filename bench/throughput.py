"""Time one RL step by phase, ours against a plain twin: same weights, questions and seeds, in one process, in turn.

    python bench/throughput.py
    python bench/throughput.py --model runs/demo --questions 16 --group-size 8 --steps 5 --output
    python bench/throughput.py --plain original,stop,kindest rollout.max_turn_tokens=128
    python bench/throughput.py --model qwen2.5-3b --workload A --scale 0.125    # a published shape: replayed_step.py

A step is rollout (with its searches), reward and advantage, log-probabilities that the update needs, and update. Ours
is made of `train`'s own functions (steps.py); the twin (plain.py) does what Search-R1 does. Both sample the same
trajectories, token for token, and their gradients agree; the benchmark checks that first, and says so in its row.

Where the time can come from. A decoder costs about 2 FLOP per token and parameter of its layers, its head 2 V D per
row, and a backward pass twice its forward. So the work is counted in tokens through the layers and rows through the
head:

    rollout     decoding is bound by memory (on a GPU) or by small matrices and overhead (on a CPU), and pays per engine
                step; prefill is bound by arithmetic and pays per token. Keeping the cache across turns saves the
                re-prefill; sharing beginnings saves the copies of them; stopping at the tag saves all that would be cut
                away; continuous batching saves the steps in which a few stragglers run alone.
    log-probs   the sampler's are kept, so there is nothing to recompute; a reference (kl_coefficient) costs one pass.
    update      no padding; the head sees policy tokens only, and [T, V] is never held.

The table that is printed before the clock starts has these counts for each provider, and the ratio of time that they
alone would give. Any difference between that and the measured ratio is how well each keeps the machine busy.

Answers are scored, but every second sample of a group is declared the winner. So every group teaches something, both
train on the same trajectories, and the work does not depend on how good the model is. `--scored` uses the rewards that
were won; ours then drops the groups whose rewards are all equal, which the original trains on, and gains by it.

Weights and optimizer are put back after every step, so that each repetition is the same work. A repetition is noisy on
a machine that others use. So the row holds every total, the ratio's range over repetitions, and the CPU time, which
others disturb less (on one thread without a GPU, it is the time that a quiet machine would take).

With a published shape for `--model` (`qwen2.5-{0.5b,1.5b,3b,7b}`, `llama-3.2-3b`, …), weights are random and would
never write a tag. Turns are then replayed: replayed_step.py does everything, with its own options, and with the twin
unless `--no-plain` is given.

Left out: PPO (the twin has no critic), and more than one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import harness
import replayed_step
import torch
from plain import VARIANTS, PlainPolicy, plain_policy, plain_run
from rich import box
from rich.table import Table
from steps import PHASES, Step, agreement, our_step, plain_step, restorer, share_of_equal

from searchr1_fast.cli import model_directory
from searchr1_fast.config import Config, EvalConfig, load_config
from searchr1_fast.console import Console, make_console
from searchr1_fast.distributed import process
from searchr1_fast.errors import entry_point
from searchr1_fast.models.published import PUBLISHED
from searchr1_fast.run import Run, build_run

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
OURS = "ours"


@dataclass(slots=True)
class Provider:
    """One column of the tables: how to run the step, how to undo it, and what was measured."""

    label: str
    step: Callable[[], Step]
    restore: Callable[[], None]
    warm_up: Step | None = None
    seconds: list[dict[str, float]] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def run(self) -> Step:
        """Run a step, and put everything back."""
        step = self.step()
        self.restore()
        return step

    def measure(self) -> None:
        """Measure one repetition."""
        started = time.process_time()
        self.seconds.append(self.run().seconds)
        self.cpu_seconds.append(time.process_time() - started)


# ------------------------------------------------------------------------------------------------------------- report


def cost_table(providers: dict[str, Provider], flops: dict[str, dict[str, float]]) -> Table:
    """Tabulate what each provider puts through the model in one step."""
    table = columns("one step, counted", providers)
    for label, text in {
        "tokens prefilled": lambda cost: f"{cost.prefill_tokens:,}",
        "tokens decoded": lambda cost: f"{cost.decode_tokens:,}",
        "  in engine steps": lambda cost: f"{cost.decode_steps:,}",
        "  sampled and cut away": lambda cost: f"{cost.discarded_tokens:,}",
        "trajectories trained on": lambda cost: f"{cost.trained_trajectories:,}",
        "log-probs: tokens": lambda cost: f"{cost.logprob_tokens:,}",
        "log-probs: head rows": lambda cost: f"{cost.logprob_rows:,}",
        "update: tokens": lambda cost: f"{cost.update_tokens:,}",
        "  padding": lambda cost: f"{cost.padding_tokens:,}",
        "update: head rows": lambda cost: f"{cost.update_rows:,}",
    }.items():
        table.add_row(label, *(text(provider.warm_up.cost) for provider in providers.values()))
    for phase in ("rollout", "logprobs", "update", "total"):
        cells = [f"{flops[name][phase] / 1e9:,.1f}{times(flops, name, phase)}" for name in providers]
        table.add_row(f"GFLOP {phase}", *cells, style="bold" if phase == "total" else None)
    return table


def time_table(row: dict[str, Any], providers: dict[str, Provider]) -> Table:
    """Tabulate medians by phase, and what follows from them."""
    systems = row["systems"]
    ratios = {name: f"{ratio:.2f}x" for name, ratio in row["ratios"].items()}
    table = columns(f"one step, median of {row['repetitions']}", providers)
    seconds = {name: systems[name]["seconds"] for name in providers}
    for phase in PHASES:
        cells = [f"{seconds[name][phase]:.3f} s{times(seconds, name, phase)}" for name in providers]
        table.add_row(phase, *cells, style="bold" if phase == "total" else None)
    for label, key, digits in (
        ("CPU seconds, all threads", "cpu_seconds", 2),
        ("trajectories/s", "trajectories_per_second", 1),
        ("policy tokens/s", "policy_tokens_per_second", 0),
        ("GFLOP/s", "gflops_per_second", 1),
    ):
        table.add_row(label, *(f"{systems[name][key]:,.{digits}f}" for name in providers))
    table.add_row("share of matmul speed", *(f"{systems[name]['share_of_matmul']:.1%}" for name in providers))
    table.add_row("ours is faster by", *(ratios.get(name, "") for name in providers), style="bold")
    return table


def columns(title: str, providers: dict[str, Provider]) -> Table:
    """An empty table with a column per provider."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for provider in providers.values():
        table.add_column(provider.label, justify="right", no_wrap=True)
    return table


def times(values: dict[str, dict[str, float]], name: str, phase: str) -> str:
    """Format how many times ours a value is."""
    ours = values[OURS][phase]
    return f"  {values[name][phase] / ours:5.1f}x" if name != OURS and ours > 1e-3 else ""


def describe(providers: dict[str, Provider], flops: dict[str, dict[str, float]], peak: float) -> dict[str, Any]:
    """The measured part of the row."""
    trajectories = providers[OURS].warm_up.trajectories
    policy_tokens = sum(int(t.loss_mask.sum()) for t in trajectories)
    systems = {}
    for name, provider in providers.items():
        seconds = harness.medians(provider.seconds)
        rate = flops[name]["total"] / seconds["total"]
        systems[name] = {
            "label": provider.label,
            "seconds": seconds,
            "totals": [one["total"] for one in provider.seconds],
            "cpu_seconds": statistics.median(provider.cpu_seconds),
            "trajectories_per_second": len(trajectories) / seconds["total"],
            "policy_tokens_per_second": policy_tokens / seconds["total"],
            "gflops_per_second": rate / 1e9,
            "share_of_matmul": rate / peak,
            "cost": asdict(provider.warm_up.cost),
            "flops": flops[name],
            "equal_trajectories": share_of_equal(trajectories, provider.warm_up.trajectories),
        }
    rates = {name: system["trajectories_per_second"] for name, system in systems.items()}
    twins = [name for name in providers if name != OURS]
    pairs = {
        name: [b / a for a, b in zip(systems[OURS]["totals"], systems[name]["totals"], strict=True)] for name in twins
    }
    return {
        "ratio": rates[OURS] / rates[twins[0]],  # the headline: against the first twin named
        "ratios": {name: rates[OURS] / rates[name] for name in twins},
        "ratio_ranges": {name: [min(pairs[name]), max(pairs[name])] for name in twins},
        "flops_ratios": {name: flops[name]["total"] / flops[OURS]["total"] for name in twins},
        "repetitions": len(providers[OURS].seconds),
        "matmul_gflops": peak / 1e9,
        "systems": systems,
    }


def shapes(run: Run, step: Step) -> dict[str, Any]:
    """The row's description of model and workload."""
    config, model = run.config, run.policy.replica.config
    trajectories = step.trajectories
    return {
        "model": {
            "name": Path(config.model.path).name,
            "dtype": config.model.dtype,
            "parameters": sum(parameter.numel() for parameter in run.policy.replica.parameters()),
            "hidden_size": model.hidden_size,
            "layers": model.num_hidden_layers,
            "vocabulary": model.vocab_size,
        },
        "workload": {
            "questions": config.train.questions_per_step,
            "group_size": config.algorithm.group_size,
            "trajectories": len(trajectories),
            "policy_tokens": sum(int(t.loss_mask.sum()) for t in trajectories),
            "tokens_mean": statistics.mean(len(t.token_ids) for t in trajectories),
            "tokens_max": max(len(t.token_ids) for t in trajectories),
            "searches_mean": statistics.mean(t.num_searches for t in trajectories),
            "reward_mean": float(step.rewards.mean()),
            "kept_fraction": step.cost.trained_trajectories / len(trajectories),
            "max_turn_tokens": config.rollout.max_turn_tokens,
            "tokens_per_microbatch": config.train.tokens_per_microbatch,
            "minibatches": config.train.num_minibatches,
        },
    }


# --------------------------------------------------------------------------------------------------------------- main


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """Parse and check the arguments -> them, and the configuration they make."""
    parser = argparse.ArgumentParser(
        prog="throughput.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="One RL step by phase, ours against the plain twin that does what Search-R1 does.",
        epilog="examples:\n  python bench/throughput.py --questions 16 --group-size 8 --steps 5\n"
        "  python bench/throughput.py --model qwen2.5-3b --workload A --scale 0.125\n"
        "  python bench/throughput.py --model qwen2.5-3b --help     options with a published shape: random weights,\n"
        "                                                           turns of real lengths",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe (default: configs/demo.yaml)")
    parser.add_argument(
        "--model", metavar="DIR|SHAPE",
        help="Hugging Face or run folder (default: the recipe's), or a published shape, which has other options: "
        f"{', '.join(PUBLISHED)}",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=3, help="repetitions of the step (default: 3)")
    parser.add_argument("--questions", type=int, help="questions per step (default: the recipe's)")
    parser.add_argument("--group-size", type=int, help="samples per question (default: the recipe's)")
    parser.add_argument(
        "--plain", type=variants, default="original,stop", metavar="A,B",
        help="twins to run, the first makes the headline: original (as Search-R1), stop (its rollout stops at tags), "
        "unpadded (its update has no padding), kindest (both) (default: original,stop)",
    )  # fmt: skip
    parser.add_argument("--scored", action="store_true", help="rewards as won; ours drops groups where all are equal")
    harness.add_output_argument(parser, "throughput")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings over the recipe's")
    arguments = parser.parse_intermixed_args(argv)
    harness.refuse_below_one(arguments, "steps")
    given = {
        "model.path": model_directory(arguments.model) if arguments.model else None,
        "train.questions_per_step": arguments.questions,
        "algorithm.group_size": arguments.group_size,
    }
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    config = load_config(arguments.config, [*overrides, *arguments.overrides])
    if config.algorithm.name != "grpo":
        raise ValueError("the plain twin trains without a critic; set algorithm.name=grpo")
    if config.rollout.engine != "native":
        raise ValueError("rollout.engine=plain would compare the twin with itself; leave it at native")
    if config.model.lora.rank:
        raise ValueError("the plain twin learns every weight; leave model.lora.rank at 0")
    return arguments, config.model_copy(update={"eval": EvalConfig()})  # evaluation sets need not be built


def variants(text: str) -> list[str]:
    """Parse and check the names of `--plain`."""
    names = text.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different ones of {', '.join(VARIANTS)}")
    return names


def build_providers(run: Run, twin: PlainPolicy, names: Sequence[str], scored: bool) -> dict[str, Provider]:
    """-> providers by name, ours and the twins, on the same questions."""
    questions = run.stream.next(run.config.train.questions_per_step)
    providers = {OURS: Provider("ours", partial(our_step, run, questions, scored), restorer(run.policy))}
    restore = restorer(twin)
    for name in names:
        variant = VARIANTS[name]
        one = plain_run(run, twin, variant)
        providers[name] = Provider(variant.label, partial(plain_step, one, variant, questions, scored), restore)
    return providers


def names_a_shape(argv: Sequence[str]) -> bool:
    """Whether `--model` is a published shape, or the tiny one, and no folder has that name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    name = parser.parse_known_args(argv)[0].model
    return name in ("tiny", *PUBLISHED) and not Path(name).exists()


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and leave the row as the last line of stdout."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if names_a_shape(argv):
        return replayed_step.main(["--plain", *argv])
    arguments, config = parse_arguments(argv)
    harness.refuse_ranks()
    console = make_console()
    with process(config.run.device, config.run.num_threads, config.run.seed) as ranks:
        run = build_run(config, ranks, Console(quiet=True))
        twin = plain_policy(run)
        providers = build_providers(run, twin, arguments.plain, arguments.scored)
        for provider in providers.values():
            provider.warm_up = provider.run()
        row = {"benchmark": "throughput", "config": arguments.config.name, "overrides": arguments.overrides}
        row["scored"] = arguments.scored
        row |= harness.circumstances(ranks.device) | shapes(run, providers[OURS].warm_up)
        row["agreement"] = agreement(run, twin, providers[OURS].warm_up)
        decoder = run.policy.replica
        layers = sum(parameter.numel() for parameter in decoder.layers.parameters())
        flops = {name: one.warm_up.cost.flops(layers, decoder.head_weight.numel()) for name, one in providers.items()}
        console.print(headline(row), soft_wrap=True)
        console.print(cost_table(providers, flops))
        for _, name in harness.interleaved(list(providers), arguments.steps):
            providers[name].measure()
        peak = harness.matmul_flops(ranks.device, getattr(torch, config.model.dtype))
        row |= describe(providers, flops, peak)
    console.print(time_table(row, providers))
    harness.emit(row, arguments.output)
    return 0


def headline(row: dict[str, Any]) -> str:
    """What is about to be measured, and whether ours and the twin do the same."""
    model, work, agreed = row["model"], row["workload"], row["agreement"]
    lines = [
        f"{model['name']}: {model['parameters']:,} parameters, {model['dtype']}, on {row['device']}, "
        f"{row['threads']} threads (load {row['load']})",
        f"{work['questions']} questions x {work['group_size']} samples: {work['policy_tokens']:,} policy tokens, "
        f"{work['tokens_mean']:.0f} tokens and {work['searches_mean']:.1f} searches per trajectory",
        "no group has rewards that differ: ours has nothing to update, and the ratio means little; ask more questions"
        if agreed is None
        else f"same trajectories: loss {agreed['loss_ours']:.6f} and {agreed['loss_plain']:.6f}, "
        f"gradients apart by {agreed['gradient_difference']:.1e}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
