"""The native engine beside other ways to the same tokens, on a CPU: transformers, vLLM, and lock-step turns.

    python bench/rollout.py                            both parts
    python bench/rollout.py generate --prompts 256 --new-tokens 128 --output
    python bench/rollout.py replay --threads 1

generate   prompts of one length, greedy, so many new tokens each: the engine in fp32; transformers' `generate` in fp32
           and in bf16, over the whole batch at once; and where vLLM is installed, vLLM in both (docs/architecture.md
           has the installation). Ids of the fp32 ways are compared.
replay     trajectories of several turns with an observation behind each: the engine, which keeps its cache and lets
           every sequence go on by itself, against the lock-step twin (`PlainEngine`), which waits for the slowest turn
           and prefills whole contexts again. Turns are as long as a seed says, the same for both; so are the tokens.

The model is a Qwen2 of 3.4 million random parameters, whose tokens end no turn. Providers run in turn, repetition by
repetition; times are medians. With one thread, `cpu_seconds` is what a quiet machine would take.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import harness
import numpy as np
import torch
from rich import box
from rich.table import Table

from searchr1_fast.config import RolloutConfig
from searchr1_fast.console import make_console
from searchr1_fast.distributed import process
from searchr1_fast.errors import entry_point
from searchr1_fast.models import Decoder, DecoderConfig, TextTokenizer, load_tokenizer
from searchr1_fast.rollout import Engine, RolloutRequest, SamplingParams
from searchr1_fast.rollout.plain import PlainEngine
from searchr1_fast.rollout.sampling import stream_keys
from searchr1_fast.rollout.sequence import Sequence as Rollout
from searchr1_fast.rollout.vllm_model import VllmModel
from searchr1_fast.rollout.weight_handover import named_weights
from searchr1_fast.types import Question

_MOST = 0.9
PARTS = ("generate", "replay")
OURS = "native"
MODEL = DecoderConfig(4096, 256, 512, 4, 4, 2, tie_word_embeddings=True)
QUESTION = Question("", "", ("",), "bench")


class Provider:
    """One way: how to run it, what its runs took and what it left."""

    def __init__(self, run: Callable[[], list[np.ndarray]]) -> None:
        self.run = run
        self.samples: list[dict[str, float]] = []
        self.tokens: list[np.ndarray] = []

    def measure(self) -> None:
        """One run."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.tokens = self.run()
        self.samples.append({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu})


# ------------------------------------------------------------------------------------------------------------ generate


def generate_providers(
    model: Decoder, tokenizer: TextTokenizer, options: argparse.Namespace, stack: ExitStack
) -> dict[str, Provider]:
    """All that give `--new-tokens` tokens behind each prompt, [prompts] of [new tokens] int64. `stack` ends them."""
    prompts = np.random.default_rng(0).integers(0, MODEL.vocab_size, (options.prompts, options.prompt_tokens))
    config = RolloutConfig(
        max_num_seqs=options.prompts,
        max_turn_tokens=options.new_tokens,
        max_sequence_tokens=options.prompt_tokens + options.new_tokens,
    )

    def native() -> list[np.ndarray]:
        engine = make_engine(Engine, model, tokenizer, config, temperature=0.0)
        sequences = make_sequences(prompts, [options.new_tokens] * len(prompts))
        engine.add(sequences)
        while engine.has_work:
            for sequence in engine.step():
                engine.release(sequence)
        return [sequence.token_pieces[-1] for sequence in sequences]

    providers = {OURS: Provider(native)}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"transformers generate, {str(dtype).removeprefix('torch.')}"
        providers[name] = Provider(generator(model, prompts, options.new_tokens, dtype))
    if importlib.util.find_spec("vllm") is not None:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"vLLM, {str(dtype).removeprefix('torch.')}"
            providers[name] = Provider(vllm_generator(model, prompts, options.new_tokens, config, dtype, stack))
    return providers


def vllm_generator(
    model: Decoder, prompts: np.ndarray, new_tokens: int, config: RolloutConfig, dtype: torch.dtype, stack: ExitStack
) -> Callable:
    """vLLM with the same weights, its prefix cache emptied before each run; that takes no time worth mentioning."""
    greedy, copy = SamplingParams(0.0), Decoder(model.config).to(dtype)
    copy.load_state_dict(model.state_dict())
    other = VllmModel(copy, config, greedy, eos_ids=())
    stack.callback(other.close)

    def run() -> list[np.ndarray]:
        other.load(named_weights(copy))
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

    return run


def generator(model: Decoder, prompts: np.ndarray, new_tokens: int, dtype: torch.dtype) -> Callable:
    """transformers' own model of the same weights, behind `generate`."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=MODEL.vocab_size, hidden_size=MODEL.hidden_size, intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=MODEL.num_hidden_layers, num_attention_heads=MODEL.num_attention_heads,
        num_key_value_heads=MODEL.num_key_value_heads, rms_norm_eps=MODEL.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_theta},
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    other = Qwen2ForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    other = other.to(dtype)
    ids = torch.from_numpy(prompts)

    def run() -> list[np.ndarray]:
        output = other.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, use_cache=True
        )
        return list(output[:, ids.shape[1] :].numpy())

    return run


# -------------------------------------------------------------------------------------------------------------- replay


def replay_providers(
    model: Decoder, tokenizer: TextTokenizer, options: argparse.Namespace, statistics: dict[str, dict[str, int]]
) -> dict[str, Provider]:
    """Both engines over the same script; what they computed goes into `statistics`."""
    generator = np.random.default_rng(1)
    shape = (options.trajectories, options.searches + 1)
    limits = generator.integers(options.turn_tokens // 4, 2 * options.turn_tokens - options.turn_tokens // 4, shape)
    prompts = generator.integers(0, MODEL.vocab_size, (options.trajectories, options.prompt_tokens))
    observations = generator.integers(0, MODEL.vocab_size, (*shape, options.observation_tokens))
    longest = int(limits.sum(1).max()) + options.prompt_tokens + options.searches * options.observation_tokens
    config = RolloutConfig(
        max_num_seqs=options.max_num_seqs, max_turn_tokens=int(limits.max()), max_sequence_tokens=longest
    )

    def run(kind: type[Engine], name: str) -> list[np.ndarray]:
        engine = make_engine(kind, model, tokenizer, config, temperature=1.0)
        sequences = make_sequences(prompts, limits[:, 0].tolist())
        number = {id(sequence): place for place, sequence in enumerate(sequences)}
        turns = [0] * len(sequences)
        engine.add(sequences)
        while engine.has_work:
            for sequence in engine.step():
                place = number[id(sequence)]
                turns[place] += 1
                if turns[place] > options.searches:
                    engine.release(sequence)
                    continue
                sequence.append_observation(observations[place, turns[place] - 1].tolist(), "")
                sequence.turn_limit = int(limits[place, turns[place]])
                engine.resume(sequence)
        # What exists: every token but a trajectory's last, which nobody attends to.
        existing = sum(sequence.length - 1 for sequence in sequences)
        computed = engine.statistics.num_prefill_tokens + engine.statistics.num_decode_tokens
        statistics[name] = {"tokens_computed": computed, "tokens_that_exist": existing}
        return [sequence.tokens_from(0) for sequence in sequences]

    return {
        OURS: Provider(lambda: run(Engine, OURS)),
        "lock-step, re-prefilled": Provider(lambda: run(PlainEngine, "lock-step, re-prefilled")),
    }


# ---------------------------------------------------------------------------------------------------------------- both


def make_engine(
    kind: type[Engine], model: Decoder, tokenizer: TextTokenizer, config: RolloutConfig, temperature: float
) -> Engine:
    """One whose turns end at their limit, as the tokenizer has no end of a sequence."""
    return kind(model, tokenizer, config, SamplingParams(temperature), stop_at_tags=False)


def make_sequences(prompts: np.ndarray, turn_limits: list[int]) -> list[Rollout]:
    """One per prompt [S, n], each with its own stream."""
    sequences = []
    for place, key in enumerate(stream_keys(list(range(len(prompts))))):
        sequence = Rollout(RolloutRequest(QUESTION, place, "", place), key)
        sequence.append_prompt(prompts[place].tolist(), "")
        sequence.turn_limit = turn_limits[place]
        sequences.append(sequence)
    return sequences


def measure(providers: dict[str, Provider], repetitions: int, compared: Sequence[str]) -> dict[str, Any]:
    """Medians by provider; how many sequences of `compared` have our tokens. AssertionError where that is not most: a
    few may take another way where two tokens are as likely, to the last bits of fp32."""
    for _, name in harness.interleaved(list(providers), repetitions + 1):
        providers[name].measure()
    ours = providers[OURS].tokens
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


def table(title: str, row: dict[str, Any], count: int, unit: str) -> Table:
    """A line per provider."""
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
    """The arguments, checked."""
    parser = argparse.ArgumentParser(prog="rollout.py", description="The native engine beside other ways, on a CPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: both)")
    parser.add_argument("--prompts", type=int, default=256, help="generate: sequences (default: 256)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of a prompt (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=128, help="generate: of a sequence (default: 128)")
    parser.add_argument("--trajectories", type=int, default=64, help="replay (default: 64)")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="replay: cached at a time (default: 64)")
    parser.add_argument("--searches", type=int, default=3, help="replay: of a trajectory (default: 3)")
    parser.add_argument("--turn-tokens", type=int, default=64, help="replay: of a turn, on average (default: 64)")
    parser.add_argument("--observation-tokens", type=int, default=500, help="replay: behind a turn (default: 500)")
    parser.add_argument("--threads", type=int, default=0, help="of torch and numba (default: torch's choice)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each, after one to warm up (default: 3)")
    harness.add_output_argument(parser, "rollout")
    arguments = parser.parse_args(argv)
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    for name in ("prompts", "prompt_tokens", "new_tokens", "trajectories", "max_num_seqs", "searches",
                 "observation_tokens", "repetitions"):  # fmt: skip
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give at least 1")
    if arguments.turn_tokens < 4:
        raise ValueError(f"--turn-tokens {arguments.turn_tokens}: give at least 4")
    arguments.parts = arguments.parts or list(PARTS)
    return arguments


def measure_parts(options: argparse.Namespace) -> None:
    """Both parts, each with its table and its row."""
    console = make_console()
    torch.manual_seed(0)
    model = Decoder(MODEL).requires_grad_(False)
    tokenizer = TextTokenizer(load_tokenizer("builtin:base").backend)
    settings = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    circumstances = harness.circumstances(torch.device("cpu"))
    console.print(f"{circumstances['device']}, {circumstances['threads']} threads (load {circumstances['load']})")
    if "generate" in options.parts:
        settings_of = {name: getattr(options, name) for name in ("prompts", "prompt_tokens", "new_tokens")}
        row = {"benchmark": "rollout", "part": "generate", **circumstances, **settings, **settings_of}
        with ExitStack() as stack:
            providers = generate_providers(model, tokenizer, options, stack)
            compared = [name for name in providers if name.endswith("float32")]
            row |= measure(providers, options.repetitions, compared)
        title = f"generate: {options.prompts} prompts of {options.prompt_tokens}, {options.new_tokens} new tokens each"
        console.print(table(title, row, options.prompts * options.new_tokens, "tokens"))
        harness.emit(row, options.output)
    if "replay" in options.parts:
        names = ("trajectories", "max_num_seqs", "searches", "prompt_tokens", "turn_tokens", "observation_tokens")
        statistics: dict[str, dict[str, int]] = {}
        row = {"benchmark": "rollout", "part": "replay", **circumstances, **settings}
        row |= {name: getattr(options, name) for name in names}
        providers = replay_providers(model, tokenizer, options, statistics)
        row |= measure(providers, options.repetitions, ["lock-step, re-prefilled"])
        row["work"] = statistics
        title = f"replay: {options.searches} searches of {options.observation_tokens} tokens a trajectory"
        console.print(table(title, row, options.trajectories, "trajectories"))
        for name, work in statistics.items():
            share = work["tokens_computed"] / work["tokens_that_exist"]
            console.print(f"{name}: {work['tokens_computed']:,} tokens computed, {share:.2f} of those that exist")
        harness.emit(row, options.output)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and leave a row per part, the last one as the last line."""
    options = parse_arguments(argv)
    with process("cpu", options.threads):
        measure_parts(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
