"""Measure the native engine beside other ways to the same tokens: transformers, vLLM, and lock-step turns.

    python bench/rollout.py                            both parts, on a CPU
    python bench/rollout.py generate --prompts 256 --new-tokens 128 --output
    python bench/rollout.py replay --threads 1 --plot
    python bench/rollout.py --device cuda --shape 3b   both parts, on a GPU, all in bf16
    python bench/rollout.py generate --threads 2 --leave-out transformers      against vLLM, in its environment

generate   greedy, prompts of one length and a fixed number of new tokens: the engine and transformers' `generate` in
           fp32 and in bf16, over the whole batch at once; and vLLM in both where it is installed (docs/architecture.md
           has the installation). Ids of the fp32 ways are compared.
replay     trajectories of several turns with a search after each but the last (replay.py). The engine keeps its cache
           and lets every sequence go on by itself. It is measured against
           - the lock-step twin (`PlainEngine`), which waits for the slowest turn and prefills whole contexts again;
           - transformers' `generate` in fp32 and bf16, called for every turn with all contexts, padded on the left,
             until the longest turn ends;
           - `VllmEngine` in both types, which finds contexts in its prefix cache;
           - with `--run-on 500`, the twin as the original generates: without stop tags, every turn to 500 tokens, and
             then cut.
           A seed sets the lengths of turns and their queries, so all run the same turns. The row has the share of
           contexts that was cached, how long trajectories took, and how long they waited for others (timeline.py;
           drawn with `--plot`). Ids are compared with the twin's only: vLLM and transformers sample in their own ways.

The model's parameters are random, and its tokens end no turn. Providers are interleaved, repetition by repetition;
times are medians. With one thread, `cpu_seconds` is what a quiet machine would take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
import numpy as np
import replay
import torch
from rich import box
from rich.table import Table
from rollout_engines import (
    HAS_VLLM,
    OURS,
    SHAPES,
    Provider,
    build_model,
    in_type,
    make_sequences,
    native_engine,
    other_types,
    transformers_model,
    type_name,
)
from timeline import Timeline, draw

from searchr1_fast.config import RolloutConfig
from searchr1_fast.console import make_console
from searchr1_fast.distributed import process
from searchr1_fast.errors import entry_point
from searchr1_fast.models import Decoder, TextTokenizer, load_tokenizer
from searchr1_fast.rollout import Engine, SamplingParams
from searchr1_fast.rollout.vllm_model import VllmModel
from searchr1_fast.rollout.weight_handover import named_weights

_MOST = 0.9
PARTS = ("generate", "replay")


# ------------------------------------------------------------------------------------------------------------ generate


def generate_providers(
    model: Decoder, tokenizer: TextTokenizer, options: argparse.Namespace, stack: ExitStack
) -> dict[str, Provider]:
    """Make all ways to `--new-tokens` tokens after each prompt, [prompts] of [new tokens] int64. `stack` ends them."""
    size = (options.prompts, options.prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, size)
    config = RolloutConfig(
        max_num_seqs=options.prompts,
        max_turn_tokens=options.new_tokens,
        max_sequence_tokens=options.prompt_tokens + options.new_tokens,
        keep_cache=True,
    )
    providers = {OURS: native_provider(model, tokenizer, prompts, options.new_tokens, config)}
    for dtype in other_types(model)[1:]:
        other = in_type(model, dtype)
        providers[f"{OURS}, {type_name(dtype)}"] = native_provider(
            other, tokenizer, prompts, options.new_tokens, config
        )
    for dtype in other_types(model):
        name = f"transformers generate, {type_name(dtype)}"
        providers[name] = Provider(generator(model, prompts, options.new_tokens, dtype))
    for dtype in other_types(model) if HAS_VLLM else ():
        name = f"vLLM, {type_name(dtype)}"
        providers[name] = vllm_provider(in_type(model, dtype), prompts, options.new_tokens, config, stack)
    return providers


def native_provider(
    model: Decoder, tokenizer: TextTokenizer, prompts: np.ndarray, new_tokens: int, config: RolloutConfig
) -> Provider:
    """Make the native engine, which keeps its memory from run to run."""
    engine = native_engine(Engine, model, tokenizer, config, temperature=0.0)

    def run() -> list[np.ndarray]:
        sequences = make_sequences(prompts, [new_tokens] * len(prompts))
        engine.add(sequences)
        while engine.has_work:
            for sequence in engine.step():
                engine.release(sequence)
        return [sequence.token_pieces[-1] for sequence in sequences]

    return Provider(run)


def vllm_provider(
    model: Decoder, prompts: np.ndarray, new_tokens: int, config: RolloutConfig, stack: ExitStack
) -> Provider:
    """Make vLLM with the same weights, its prefix cache emptied before each run."""
    greedy = SamplingParams(0.0)
    other = VllmModel(model, config, greedy, eos_ids=())
    stack.callback(other.close)

    def run() -> list[np.ndarray]:
        written: dict[str, list[int]] = {str(place): [] for place in range(len(prompts))}
        running = set(written)
        for place, prompt in enumerate(prompts.tolist()):
            other.add(str(place), prompt, new_tokens, place, greedy)
        while running:
            for piece in other.step():
                written[piece.request_id] += piece.token_ids
                if piece.is_finished:
                    running.remove(piece.request_id)
        return [np.array(token_ids) for token_ids in written.values()]

    return Provider(run, lambda: other.load(named_weights(model)))


def generator(model: Decoder, prompts: np.ndarray, new_tokens: int, dtype: torch.dtype) -> Callable:
    """Return `generate` of transformers' own model with the same weights."""
    other = transformers_model(model, dtype)
    ids = torch.from_numpy(prompts).to(other.device)

    def run() -> list[np.ndarray]:
        output = other.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, use_cache=True
        )
        return list(output[:, ids.shape[1] :].cpu().numpy())

    return run


# ---------------------------------------------------------------------------------------------------------------- both


def measure(providers: dict[str, Provider], repetitions: int, compared: Sequence[str]) -> dict[str, Any]:
    """Return medians by provider, and how many sequences of `compared` have our tokens.

    AssertionError if one ran other lengths, and unless most have our tokens: a few may differ where two tokens are
    equally likely, to the last bits of fp32.
    """
    for _, name in harness.interleaved(list(providers), repetitions + 1):
        providers[name].measure()
    ours = providers[OURS].tokens
    for name, provider in providers.items():
        assert [len(tokens) for tokens in provider.tokens] == [len(tokens) for tokens in ours], name
    same = {
        name: float(np.mean([np.array_equal(a, b) for a, b in zip(ours, providers[name].tokens, strict=True)]))
        for name in compared
    }
    assert all(share > _MOST for share in same.values()), same
    systems = {name: harness.medians(one.samples[1:]) for name, one in providers.items()}  # the first warms up
    for system in systems.values():
        for key in ("seconds", "cpu_seconds"):
            system[f"{key}_over_ours"] = system[key] / systems[OURS][key]
    return {"repetitions": repetitions, "same_tokens": same, "providers": systems}


def without(names: Sequence[str], providers: dict[str, Provider]) -> dict[str, Provider]:
    """Leave out the providers of the projects that are named."""
    return {name: one for name, one in providers.items() if name.partition(" ")[0].rstrip(",") not in names}


def table(title: str, row: dict[str, Any], count: int, unit: str) -> Table:
    """A table with a line per provider."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    shown.add_column("")
    for heading in ("seconds", "over ours", "CPU seconds", "over ours", f"{unit}/s"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, system in row["providers"].items():
        shown.add_row(
            name, f"{system['seconds']:.2f}", f"{system['seconds_over_ours']:.2f}x", f"{system['cpu_seconds']:.2f}",
            f"{system['cpu_seconds_over_ours']:.2f}x", f"{count / system['seconds']:,.1f}",
            style="bold" if name == OURS else None,
        )  # fmt: skip
    return shown


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(prog="rollout.py", description="The native engine beside other ways.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: both)")
    parser.add_argument("--prompts", type=int, default=256, help="generate: sequences (default: 256)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of a prompt (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=128, help="generate: of a sequence (default: 128)")
    parser.add_argument("--trajectories", type=int, default=64, help="replay (default: 64)")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="replay: cached at a time (default: 64)")
    parser.add_argument("--searches", type=int, default=3, help="replay: of a trajectory (default: 3)")
    parser.add_argument("--turn-tokens", type=int, default=64, help="replay: of a turn, on average (default: 64)")
    parser.add_argument(
        "--observation-tokens", type=int, default=500, help="replay: behind a turn at most (default: 500)"
    )
    parser.add_argument("--run-on", type=int, default=0, help="replay: tokens of a turn without stop tags (0: not run)")
    parser.add_argument("--leave-out", choices=("transformers", "vLLM"), nargs="+", default=[], help="do not run these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="decoder, random weights (default: small)")
    parser.add_argument("--threads", type=int, default=0, help="of torch and numba (default: torch's choice)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each, after one to warm up (default: 3)")
    harness.add_output_argument(parser, "rollout")
    parser.add_argument(
        "--plot", metavar="DIR", type=Path, nargs="?", const=harness.RESULTS,
        help="replay: draw when every trajectory was generated, searched for and idle",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    harness.refuse_below_one(
        arguments,
        "prompts",
        "prompt_tokens",
        "new_tokens",
        "trajectories",
        "max_num_seqs",
        "searches",
        "observation_tokens",
        "repetitions",
    )
    if 0 < arguments.run_on < 2 * arguments.turn_tokens or arguments.run_on < 0:
        raise ValueError(
            f"--run-on {arguments.run_on}: give 0, or at least {2 * arguments.turn_tokens}, as long as turns may be"
        )
    if arguments.turn_tokens < 4:
        raise ValueError(f"--turn-tokens {arguments.turn_tokens}: give at least 4")
    arguments.parts = arguments.parts or list(PARTS)
    return arguments


def measure_parts(options: argparse.Namespace, device: torch.device) -> None:
    """Measure the parts asked for; print each one's table and leave its row."""
    console = make_console()
    model = build_model(options.shape, device)
    tokenizer = TextTokenizer(load_tokenizer("builtin:base").backend)
    settings = {"parameters": sum(parameter.numel() for parameter in model.parameters()), "shape": options.shape}
    settings["dtype"] = type_name(model.head_weight.dtype)
    circumstances = harness.circumstances(device)
    console.print(f"{circumstances['device']}, {circumstances['threads']} threads (load {circumstances['load']})")
    if "generate" in options.parts:
        settings_of = {name: getattr(options, name) for name in ("prompts", "prompt_tokens", "new_tokens")}
        row = {"benchmark": "rollout", "part": "generate", **circumstances, **settings, **settings_of}
        with ExitStack() as stack:
            providers = without(options.leave_out, generate_providers(model, tokenizer, options, stack))
            compared = [name for name in providers if name.endswith("float32")]
            row |= measure(providers, options.repetitions, compared)
        title = f"generate: {options.prompts} prompts of {options.prompt_tokens}, {options.new_tokens} new tokens each"
        console.print(table(title, row, options.prompts * options.new_tokens, "tokens"))
        harness.emit(row, options.output)
    if "replay" in options.parts:
        names = (
            "trajectories",
            "max_num_seqs",
            "searches",
            "prompt_tokens",
            "turn_tokens",
            "observation_tokens",
            "run_on",
        )
        work: dict[str, Any] = {}
        timelines: dict[str, Timeline] = {}
        row = {"benchmark": "rollout", "part": "replay", **circumstances, **settings, "topk": replay.TOPK}
        row |= {name: getattr(options, name) for name in names}
        with ExitStack() as stack:
            made = replay.replay_providers(model, tokenizer, options, work, timelines, stack)
            providers = without(options.leave_out, made)
            twins = [name for name in (replay.LOCK_STEP, replay.RUN_ON) if name in providers]
            compared = twins if device.type == "cpu" else []  # in bf16 two tokens are often equally likely
            row |= measure(providers, options.repetitions, compared)
        row["work"] = work
        title = f"replay: {options.searches} searches of at most {options.observation_tokens} tokens a trajectory"
        console.print(table(title, row, options.trajectories, "trajectories"))
        for name, one in work.items():
            console.print(replay.describe(name, one))
        if options.plot is not None:
            title = f"{title}, {circumstances['device']}, {circumstances['date'][:10]}"
            console.print(f"drawn in {draw(timelines, title, options.plot / 'rollout_timeline.png')}")
        harness.emit(row, options.output)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and leave a row per part; the last row is the last line of stdout."""
    options = parse_arguments(argv)
    with process(options.device, options.threads) as ranks:
        measure_parts(options, ranks.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
