"""Measure the update and the engine on one real training workload: a published shape with random weights.

    python bench/workload.py --model qwen2.5-1.5b
    python bench/workload.py --model qwen2.5-3b --checkpointing selective --tokens-per-microbatch 16384 --output
    python bench/workload.py --model qwen2.5-3b --checkpointing selective --phases update --offload optimizer replica
    python bench/workload.py --model qwen2.5-7b --lora-rank 32 --checkpointing selective --output
    python bench/workload.py --model tiny --device cpu --dtype float32

The update is `Policy.update` on trajectories of random tokens in the mix of Search-R1's traces (prompt, turn, passages,
turn; 35 % of the tokens are the policy's; lengths spread by half around their mean), in groups that share their prompt.
The engine samples a fixed number of tokens from each prompt, which a group shares; lengths are fixed because random
weights never end a turn. Nothing is loaded or downloaded. An update that does not fit, by the planner, is left out, and
that is reported.

Operations are counted in two ways (random_work.py): `model` is what the workload asks for if nothing is shared and the
head sees every token, and MFU is computed from it; `done` is the part that is computed, plus what checkpointing
recomputes.

MFU may exceed the share of the peak that is `done`, by what is saved. The peak is the data sheet's of an H100 SXM or
H200 (989 TFLOP/s, bf16, dense); the rate of one large matrix product, measured here, is given beside it.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import numpy as np
import torch
from random_work import QUESTION, Work, count_flops, make_trajectories
from rich import box
from rich.table import Table

from searchr1_fast.config import Config
from searchr1_fast.console import make_console
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.errors import entry_point
from searchr1_fast.memory_plan import RESERVE, Batch, TrainingPlan, plan_training
from searchr1_fast.models import Decoder, DecoderConfig, TextTokenizer, load_tokenizer
from searchr1_fast.models.attention_backends import describe_attention, repeats_key_heads
from searchr1_fast.models.published import PUBLISHED, published_config
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy, to_device
from searchr1_fast.retrieval.memory_plan import size_text
from searchr1_fast.rollout import Engine, RolloutRequest
from searchr1_fast.rollout.sampling import stream_keys
from searchr1_fast.rollout.sequence import Sequence as Rollout
from searchr1_fast.types import PackedBatch

HOPPER, HOPPER_FLOPS = (9, 0), 989e12  # bf16, dense; NVIDIA's data sheets of H100 SXM and H200
WARM_UP_STEPS = 8  # decode steps that are not timed


# ------------------------------------------------------------------------------------------------------------- update


def measure_update(
    policy: Policy, batches: list[PackedBatch], denominator: int, repetitions: int
) -> tuple[list[float], int | None]:
    """Return the seconds of each optimizer step after one that warms up, and the peak of all (None without a GPU)."""
    device = policy.ranks.device
    wait = harness.waiter(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    policy.release_replica()
    for _ in range(repetitions + 1):
        wait()
        started = time.perf_counter()
        policy.update(batches, denominator)
        wait()
        seconds.append(time.perf_counter() - started)
    if policy.num_skipped:
        raise ValueError(f"{policy.num_skipped} updates had gradients that are not finite; what was timed is no update")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    policy.sync_replica()
    return seconds[1:], peak


def run_update(policy: Policy, batches: list[PackedBatch], work: Work, plan: TrainingPlan, options) -> dict[str, Any]:
    """Measure the row's part about the update."""
    device = policy.ranks.device
    on_device = [to_device(batch, device) for batch in batches]
    seconds, peak = measure_update(policy, on_device, work.policy_tokens, options.repetitions)
    typical = float(np.median(seconds))
    flops = count_flops(policy.replica.config, work, options.checkpointing, options.lora_rank)
    matmul = harness.matmul_flops(device, getattr(torch, options.dtype))
    row = {
        "seconds": seconds,
        "tokens_per_second": work.tokens / typical,
        "rows_per_second": work.rows / typical,
        "policy_tokens_per_second": work.policy_tokens / typical,
        "tflops_model": flops["model"] / typical / 1e12,
        "tflops_done": flops["done"] / typical / 1e12,
        "matmul_tflops": matmul / 1e12,
        "model_of_matmul": flops["model"] / typical / matmul,
        "done_of_matmul": flops["done"] / typical / matmul,
        "planned_bytes": plan.update,
        "peak_bytes": peak,
    }
    limit = peak_flops(device, options)
    if limit is not None:
        row |= {"mfu": flops["model"] / typical / limit, "done_of_peak": flops["done"] / typical / limit}
        row |= {"peak_tflops": limit / 1e12}
    return row


def peak_flops(device: torch.device, options) -> float | None:
    """Return the data sheet's peak, if it is known."""
    if options.peak_tflops is not None:
        return options.peak_tflops * 1e12
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER or options.dtype != "bfloat16":
        return None
    return HOPPER_FLOPS


# ------------------------------------------------------------------------------------------------------------- rollout


def run_rollout(model: Decoder, tokenizer: TextTokenizer, config: Config, num_seqs: int, options) -> dict[str, Any]:
    """Run the engine over `num_seqs` sequences: seconds of its prefill, then decoded tokens per second."""
    rollout = config.rollout.model_copy(update={"max_num_seqs": num_seqs})
    engine = Engine(model, tokenizer, rollout, stop_at_tags=False)
    wait = harness.waiter(model.head_weight.device)
    prefill, decode = [], []  # seconds per step
    engine.add(make_sequences(num_seqs, model.config.vocab_size, options))
    while engine.has_work:
        had = engine.statistics.num_prefill_tokens
        wait()
        started = time.perf_counter()
        engine.step()
        wait()
        is_prefill = engine.statistics.num_prefill_tokens > had
        (prefill if is_prefill else decode).append(time.perf_counter() - started)
    statistics = engine.statistics
    engine.reset()
    engine.free_cache()
    timed = decode[min(WARM_UP_STEPS, len(decode) // 2) :]
    typical = float(np.median(timed))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "num_seqs": num_seqs,
        "prefill_seconds": sum(prefill),
        "prefill_tokens": statistics.num_prefill_tokens,
        "shared_tokens": statistics.num_shared_tokens,
        "decode_steps": len(timed),
        "decode_step_seconds": typical,
        "decode_tokens_per_second": num_seqs / typical,
        "weights_gb_per_second": weights / typical / 1e9,  # the rate of reading the weights alone
    }


def make_sequences(num_seqs: int, vocab_size: int, options) -> list[Rollout]:
    """Make sequences with prompts of random tokens, one prompt per group."""
    generator = np.random.default_rng(0)
    sequences = []
    for place, key in enumerate(stream_keys(list(range(num_seqs)))):
        if place % options.group_size == 0:
            prompt = generator.integers(0, vocab_size, options.prompt_tokens).tolist()
        sequence = Rollout(RolloutRequest(QUESTION, place // options.group_size, "", place), key)
        sequence.append_prompt(prompt, "")
        sequence.turn_limit = options.new_tokens
        sequences.append(sequence)
    return sequences


# --------------------------------------------------------------------------------------------------------------- main


def measure(options, ranks: Ranks, say: Callable[[str], None]) -> dict[str, Any]:
    """The row."""
    # None of its tokens ends a turn, and random ones do not spell a tag that would.
    tokenizer = TextTokenizer(load_tokenizer("builtin:base").backend)
    tiny = options.model == "tiny"
    decoder = tiny_config(tokenizer.vocab_size) if tiny else published_config(options.model)
    config = make_config(options)
    trajectories = make_trajectories(options.tokens, options.sequence_length, options.group_size, decoder.vocab_size)
    advantages = np.where(np.arange(len(trajectories)) % 2, -1.0, 1.0).astype(np.float32)
    batches = pack(trajectories, advantages, options.tokens_per_microbatch)
    work = Work.of(trajectories, batches)
    plan = make_plan(config, decoder, batches, ranks.device)
    say(describe_attention(ranks.device, getattr(torch, options.dtype), decoder.head_dim))
    row: dict[str, Any] = {"benchmark": "workload", **harness.circumstances(ranks.device)}
    row["model"] = {"name": options.model, "dtype": options.dtype, "lora_rank": options.lora_rank}
    row["workload"] = workload_row(options, work, batches)
    row["plan"] = {one.name: one.num_bytes for one in plan.rows if one.when in ("always", "update")}
    model = None
    row["update"] = None
    if "update" in options.phases:
        if plan.device_bytes is not None and plan.update + RESERVE > plan.device_bytes:
            say(f"update left out: {size_text(plan.update)} are needed, {size_text(plan.device_bytes)} are there")
        else:
            policy = Policy(random_decoder(decoder, ranks.device), config, ranks)
            row["update"] = run_update(policy, batches, work, plan, options)
            model = policy.replica.requires_grad_(False)
            del policy
            release(ranks.device)
    row["rollout"] = []
    if "rollout" in options.phases:
        if model is None:
            model = random_decoder(decoder, ranks.device).to(getattr(torch, options.dtype)).requires_grad_(False)
        for num_seqs in options.num_seqs:
            row["rollout"].append(run_rollout(model, tokenizer, config, num_seqs, options))
            release(ranks.device)
    return row


def tiny_config(vocab_size: int) -> DecoderConfig:
    """Return a tiny shape, for a CPU and the tests."""
    return DecoderConfig(vocab_size, 64, 160, 2, 4, 2, tie_word_embeddings=True)


def make_config(options) -> Config:
    """Make the parts of a run's configuration that count here."""
    length = options.prompt_tokens + options.new_tokens
    return Config.model_validate(
        {
            "model": {
                "dtype": options.dtype,
                "offload": dict.fromkeys(options.offload, True),
                "lora": {"rank": options.lora_rank},
            },
            "train": {
                "tokens_per_microbatch": options.tokens_per_microbatch,
                "activation_checkpointing": options.checkpointing,
                "reshard_after": options.reshard_after,
                "reduce_after": options.reduce_after,
            },
            "algorithm": {"group_size": max(2, options.group_size)},
            "rollout": {"max_sequence_tokens": length, "max_turn_tokens": options.new_tokens},
        }
    )


def random_decoder(decoder: DecoderConfig, device: torch.device) -> Decoder:
    """Make a random decoder in fp32, drawn on the device: a CPU takes a minute for some billions of numbers."""
    with device:
        return Decoder(decoder)


def make_plan(
    config: Config, decoder: DecoderConfig, batches: Sequence[PackedBatch], device: torch.device
) -> TrainingPlan:
    """Plan the memory for the micro-batch with the most rows."""
    largest = max(batches, key=lambda batch: batch.num_tokens)
    keys = largest.num_tokens if largest.prefixes is None else len(largest.prefixes.key_index)
    return plan_training(
        config,
        decoder,
        batch=Batch(largest.num_tokens, keys, len(largest.scored_rows)),
        device_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        repeats_keys=repeats_key_heads(getattr(torch, config.model.dtype)),
    )


def workload_row(options, work: Work, batches: Sequence[PackedBatch]) -> dict[str, Any]:
    """The row's part about what was asked for."""
    return {
        "tokens": work.tokens,
        "policy_tokens": work.policy_tokens,
        "rows": work.rows,
        "scored_rows": work.scored,
        "microbatches": len(batches),
        "tokens_per_microbatch": options.tokens_per_microbatch,
        "sequence_length": options.sequence_length,
        "group_size": options.group_size,
        "checkpointing": options.checkpointing,
        "offload": sorted(options.offload),
        "reshard_after": options.reshard_after,
        "reduce_after": options.reduce_after,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
    }


def tables(row: dict[str, Any]) -> list[Table]:
    """Tabulate the row for a person."""
    work, update, found = row["workload"], row["update"], []
    if update is not None:
        table = Table("update", "", title=f"{row['model']['name']}, {work['checkpointing']}", box=box.SIMPLE_HEAD)
        table.add_row("tokens, policy tokens", f"{work['tokens']:,}, {work['policy_tokens']:,}")
        table.add_row("rows, scored rows", f"{work['rows']:,}, {work['scored_rows']:,}")
        table.add_row("seconds", ", ".join(f"{one:.3f}" for one in update["seconds"]))
        table.add_row("tokens/s, rows/s", f"{update['tokens_per_second']:,.0f}, {update['rows_per_second']:,.0f}")
        rates = f"{update['tflops_model']:.3g}, {update['tflops_done']:.3g}, {update['matmul_tflops']:.3g}"
        table.add_row("TFLOP/s: model, done, one matmul", rates)
        table.add_row("of one matmul: model, done", f"{update['model_of_matmul']:.1%}, {update['done_of_matmul']:.1%}")
        if "mfu" in update:
            table.add_row("MFU, done of peak", f"{update['mfu']:.1%}, {update['done_of_peak']:.1%}")
        measured = "no GPU" if update["peak_bytes"] is None else size_text(update["peak_bytes"])
        table.add_row("memory: planned, peak", f"{size_text(update['planned_bytes'])}, {measured}")
        found.append(table)
    if row["rollout"]:
        table = Table("sequences", "prefill s", "tokens", "step ms", "decoded tokens/s", "weights GB/s", title="engine")
        for one in row["rollout"]:
            table.add_row(
                str(one["num_seqs"]),
                f"{one['prefill_seconds']:.2f}",
                f"{one['prefill_tokens']:,}",
                f"{one['decode_step_seconds'] * 1e3:.2f}",
                f"{one['decode_tokens_per_second']:,.0f}",
                f"{one['weights_gb_per_second']:,.1f}",
            )
        found.append(table)
    return found


def release(device: torch.device) -> None:
    """Free memory that is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def add_model_arguments(
    parser: argparse.ArgumentParser, *, model: str, tokens_per_microbatch: int, checkpointing: str
) -> None:
    """Add what is run where, and how its update is cut; replayed_step.py takes the same options."""
    parser.add_argument("--model", choices=("tiny", *PUBLISHED), default=model)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens-per-microbatch", type=int, default=tokens_per_microbatch)
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default=checkpointing)
    parser.add_argument("--peak-tflops", type=float, help="what MFU is by (default: 989 on Hopper in bf16)")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        prog="workload.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The update and the engine on a published shape with random weights.",
        epilog="example:\n  python bench/workload.py --model qwen2.5-1.5b --checkpointing selective",
    )  # fmt: skip
    add_model_arguments(parser, model="qwen2.5-1.5b", tokens_per_microbatch=8192, checkpointing="none")
    parser.add_argument("--lora-rank", type=int, default=0, help="of an adapter on all layers (default: 0, none)")
    parser.add_argument("--tokens", type=int, default=65536, help="of an update's trajectories, at least")
    parser.add_argument("--sequence-length", type=int, default=1024, help="mean of a trajectory's tokens")
    parser.add_argument(
        "--offload", nargs="+", choices=("optimizer", "replica"), default=[], help="as model.offload (default: nothing)"
    )
    parser.add_argument("--reshard-after", choices=("forward", "backward", "update"), default="forward")
    parser.add_argument("--reduce-after", choices=("microbatch", "update"), default="microbatch")
    parser.add_argument("--group-size", type=int, default=8, help="trajectories and sequences that share a prompt")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--phases", nargs="+", choices=("update", "rollout"), default=["update", "rollout"])
    harness.add_output_argument(parser, "workload")
    options = parser.parse_args(argv)
    harness.refuse_ranks()
    harness.refuse_below_one(
        options, "tokens", "sequence_length", "tokens_per_microbatch", "group_size", "repetitions", "prompt_tokens"
    )
    if options.lora_rank < 0:
        raise ValueError(f"--lora-rank {options.lora_rank}: give 0 or more")
    harness.refuse_below_one(options, "num_seqs")
    if options.new_tokens < 4:
        raise ValueError(f"--new-tokens {options.new_tokens}: give at least 4, or no step only decodes")
    return options


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and leave the row as the last line of stdout."""
    options = parse_arguments(argv)
    console = make_console()
    with process(options.device) as ranks:
        row = measure(options, ranks, console.print)
    for table in tables(row):
        console.print(table)
    harness.emit(row, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
