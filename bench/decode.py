"""Measure steps in which every sequence decodes one token: as CUDA graphs, and launched kernel by kernel.

    python bench/decode.py                                # Qwen2.5-3B's shape, random weights: for a GPU
    python bench/decode.py --shape tiny --rows 8 --context 50
    python bench/decode.py --rows 256,64,1 --top-p 0.95 --output
    python bench/decode.py --lora-rank 32 --output       # what an adapter costs
    python bench/decode.py --engines graphs --parts      # where the time goes, kernel by kernel

The engine is the trainer's. Its sequences are declared to have `--context` tokens in the cache (zeros, which cost as
much as any), so no prompt is computed. Then they decode, and each step is timed whole: schedule, one copy in, layers,
head, sampling, one copy out, bookkeeping. The engines share the weights and alternate, some steps each. On a GPU they
run ahead, and a step's time is that from reading one step to reading the next.

A step cannot be faster than memory: it reads every weight once, and every sequence's keys and values. The floor that is
printed is these bytes over the bandwidth of a copy, measured in the same run.

- `graphs` is what the trainer runs: recorded steps of the fused blocks.
- `waiting` is the same, except that it reads a step before it launches the next.
- `modules` records graphs too, but of the blocks that training uses; `--compile` compiles them.
- `single` is `graphs`, launched kernel by kernel.
- `base` is `graphs` without the adapter that `--lora-rank` puts on all layers: the time that weights with the adapter
  merged into them would take.

Without a GPU they all run the same kernels, with twins for the fused operations; the graphs' plain twin replays a step
by running it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import harness
import torch
from rich import box
from rich.table import Table

from searchr1_fast.config import LoraTarget, RolloutConfig
from searchr1_fast.console import make_console
from searchr1_fast.distributed import process
from searchr1_fast.errors import entry_point
from searchr1_fast.models import Decoder, DecoderConfig, TextTokenizer, load_tokenizer
from searchr1_fast.models.lora import adapter_parameters, add_adapter, without_adapter
from searchr1_fast.models.published import published_config
from searchr1_fast.rollout import Engine, RolloutRequest, SamplingParams
from searchr1_fast.rollout.decode_graph import DecodeGraphs
from searchr1_fast.rollout.sampling import stream_keys
from searchr1_fast.rollout.sequence import Sequence as RolloutSequence
from searchr1_fast.types import Question

SHAPES = {
    "3b": published_config("qwen2.5-3b"),
    "tiny": DecoderConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
ASSETS = Path(__file__).resolve().parent.parent / "searchr1_fast" / "assets" / "base"  # for its tokenizer
WARM_UP_STEPS, STEPS_IN_A_ROW = 4, 10
PROFILED_STEPS = 10
ENGINES = ("graphs", "waiting", "base", "modules", "single")


def build_model(config: DecoderConfig, dtype: torch.dtype, device: torch.device, lora_rank: int = 0) -> Decoder:
    """Make a model with random weights, and a random adapter."""
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    model.reset_parameters()
    if lora_rank:
        add_adapter(model, lora_rank, alpha=32.0, targets=get_args(LoraTarget), dtype=dtype)
        model.requires_grad_(False)
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=config.initializer_range)
    model.join_projections()
    return model


@contextmanager
def mode(model: Decoder, name: str) -> Iterator[None]:
    """Put the model into an engine's mode, which is read where a step is recorded and in every unrecorded step."""
    model.fused_generation = name != "modules"
    with without_adapter(model) if name == "base" else nullcontext():
        yield


class Decoding:
    """An engine whose sequences all decode, and what its steps took."""

    def __init__(
        self, model: Decoder, tokenizer: TextTokenizer, arguments: argparse.Namespace, num_rows: int, name: str
    ) -> None:
        graphs = name != "single"
        num_steps = WARM_UP_STEPS + arguments.steps + 1 + arguments.parts * (PROFILED_STEPS + 1)
        config = RolloutConfig(
            max_num_seqs=num_rows,
            max_turn_tokens=num_steps,
            max_sequence_tokens=arguments.context + 1 + num_steps,
            cuda_graphs=graphs,
        )
        sampling = SamplingParams(arguments.temperature, arguments.top_p, arguments.top_k)
        twin = DecodeGraphs if graphs and model.head_weight.device.type == "cpu" else None
        options = {"decode_graphs": twin, "run_ahead": False if name == "waiting" else None}
        self.engine = Engine(model, tokenizer, config, sampling, stop_at_tags=False, **options)
        self.engine.share_prefixes = False
        self.engine.is_eos[:] = False
        self.engine.add([self._sequence(row, arguments.context, num_steps) for row in range(num_rows)])
        self.seconds: list[float] = []
        self.run(WARM_UP_STEPS)
        self.seconds.clear()

    def run(self, num_steps: int) -> None:
        """Run `num_steps` more steps. A step that another engine left under way is not among them."""
        if self.engine.model.head_weight.is_cuda:
            torch.cuda.synchronize()
        for _ in range(num_steps):
            started = time.perf_counter()
            ended = self.engine.step()
            self.seconds.append(time.perf_counter() - started)
            assert not ended

    @staticmethod
    def _sequence(row: int, context: int, turn_limit: int) -> RolloutSequence:
        request = RolloutRequest(Question(str(row), "", ("",), "bench"), row, "", seed=row)
        sequence = RolloutSequence(request, stream_keys([row])[0])
        sequence.append_prompt([0] * context + [row % 1000], "")
        sequence.num_cached, sequence.turn_limit = context, turn_limit
        return sequence


def measure(
    model: Decoder, tokenizer: TextTokenizer, arguments: argparse.Namespace, num_rows: int, bandwidth: float
) -> dict[str, Any]:
    """Measure one batch size: milliseconds per step, with graphs and without, and the floor."""
    engines = {}
    for name in arguments.engines:
        with mode(model, name):
            engines[name] = Decoding(model, tokenizer, arguments, num_rows, name)
    for _, name in harness.interleaved(list(engines), arguments.steps // STEPS_IN_A_ROW):
        with mode(model, name):
            engines[name].run(STEPS_IN_A_ROW)
    seconds = {name: statistics.median(one.seconds) for name, one in engines.items()}
    graphs = engines["graphs"].engine
    assert graphs.statistics.num_replayed_steps == graphs.statistics.num_steps - 1  # the first one hands out blocks
    parts = {}
    if arguments.parts:  # after the timing, as profiling takes time
        with mode(model, "graphs"):
            parts = harness.device_parts(lambda: engines["graphs"].run(1), model.head_weight.device, PROFILED_STEPS)
    floor = step_bytes(model, num_rows, arguments.context + WARM_UP_STEPS + arguments.steps // 2) / bandwidth
    return {
        "rows": num_rows,
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "tokens_per_second": {name: num_rows / value for name, value in seconds.items()},
        "floor_milliseconds": 1e3 * floor,
        "recording_milliseconds": 1e3 * graphs.statistics.time_recording,
        "parts": parts,
    }


def step_bytes(model: Decoder, num_rows: int, length: int) -> int:
    """The bytes a step must read: every weight but an untied embedding, and the keys and values of every sequence."""
    parameters = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    if not model.config.tie_word_embeddings:
        del parameters["model.embed_tokens.weight"]
    config, size = model.config, model.head_weight.element_size()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    return sum(parameters.values()) + num_rows * length * per_token


def table(results: list[dict[str, Any]]) -> Table:
    """Tabulate the results, a row per batch size."""
    shown = Table(box=box.SIMPLE_HEAD)
    names = list(results[0]["milliseconds"])
    titles = (*(f"{name} ms" for name in names), *(f"{name} tokens/s" for name in names), "floor ms", "record ms")
    for title in ("sequences", *titles):
        shown.add_column(title, justify="right")
    for one in results:
        cells = [*one["milliseconds"].values(), *one["tokens_per_second"].values(), one["floor_milliseconds"]]
        cells.append(one["recording_milliseconds"])
        shown.add_row(f"{one['rows']:,}", *(f"{cell:,.2f}" for cell in cells))
    return shown


def parts_table(one: dict[str, Any]) -> Table:
    """Tabulate what takes more than a thousandth of a step on the device, for one batch size."""
    busy = sum(part["ms"] for part in one["parts"].values())
    title = f"{one['rows']:,} sequences: the device is at work for {busy:.2f} ms of a step"
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name, justify in (("part", "left"), ("ms", "right"), ("launches", "right")):
        shown.add_column(name, justify=justify)
    for name, part in one["parts"].items():
        if part["ms"] > busy / 1000:
            shown.add_row(name, f"{part['ms']:.3f}", f"{part['launches']:.0f}")
    return shown


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(prog="decode.py", description="One decode step, with CUDA graphs and without.")
    parser.add_argument("--shape", choices=SHAPES, default="3b", help="decoder, random weights (default: 3b)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--rows", default="256,64,8,1", help="sequences, batch sizes in turn (default: 256,64,8,1)")
    parser.add_argument("--context", type=int, default=900, help="tokens in the cache at the start (default: 900)")
    parser.add_argument("--steps", type=int, default=50, help="timed steps of each, a multiple of 10 (default: 50)")
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"which of {', '.join(ENGINES)} (default: all)")
    parser.add_argument("--parts", action="store_true", help="each kernel of a step of `graphs`, on a GPU")
    parser.add_argument("--compile", action="store_true", help="the modules around attention by torch.compile")
    parser.add_argument("--lora-rank", type=int, default=0, help="of an adapter on all layers (default: 0, none)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    harness.add_output_argument(parser, "decode")
    arguments = parser.parse_args(argv)
    arguments.engines = [name for name in ENGINES if name in arguments.engines.split(",")]
    if arguments.lora_rank < 0:
        raise ValueError(f"--lora-rank {arguments.lora_rank}: give 0 or more")
    if not arguments.lora_rank and "base" in arguments.engines:
        arguments.engines.remove("base")  # the same as `graphs`
    if "graphs" not in arguments.engines:
        raise ValueError(f"--engines: give `graphs` and any of {', '.join(ENGINES[1:])}")
    if arguments.steps < STEPS_IN_A_ROW or arguments.steps % STEPS_IN_A_ROW:
        raise ValueError(f"--steps {arguments.steps}: give a multiple of {STEPS_IN_A_ROW}")
    if not all(number.isdecimal() and int(number) > 0 for number in arguments.rows.split(",")):
        raise ValueError(f"--rows {arguments.rows}: give numbers from 1 on, a comma between them")
    if arguments.context < 0:
        raise ValueError(f"--context {arguments.context}: give 0 or more")
    return arguments


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and leave the row as the last line of stdout."""
    arguments = parse_arguments(argv)
    with process(arguments.device) as ranks:
        device = ranks.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = build_model(SHAPES[arguments.shape], dtype, device, arguments.lora_rank)
        if arguments.compile:
            model.compile_blocks()
        tokenizer = load_tokenizer(ASSETS)
        bandwidth = harness.copy_bandwidth(device)
        results = [
            measure(model, tokenizer, arguments, int(num_rows), bandwidth) for num_rows in arguments.rows.split(",")
        ]
        row = {"benchmark": "decode", "shape": arguments.shape, "dtype": str(dtype), "context": arguments.context}
        settings = ("steps", "compile", "lora_rank", "temperature", "top_p", "top_k")
        row |= {name: getattr(arguments, name) for name in settings}
        row |= harness.circumstances(device) | {"copy_gigabytes_per_second": bandwidth / 1e9, "results": results}
    make_console().print(table(results), *(parts_table(one) for one in results if one["parts"]))
    harness.emit(row, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
