"""Measure encoding queries on a GPU: a forward pass recorded as one launch, beside the same piece by piece.

This is a part of retrieval_gpu.py. The encoder has E5-base's shape and random weights (on a CPU a small shape, which
shows that it runs); texts have about as many tokens as a policy's queries, prefix included. By batch size:

    recorded    one CUDA graph, replayed: what is used
    launched    the same kernels, launched by the host
    by length   attention by torch, for all texts of one length at once: what is used without Triton
    unparked    recorded, from the call that takes the encoder's memory back (`retrieval.park_during_update`): weights
                are copied, passes recorded again

The vectors of all but the third must be the same to the bit, alone and in the batch; those of the third must be close.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

from searchr1_fast.retrieval.encoder_bert import _SMALL_TILE, _TOKENS_AT_ONCE, _Bert
from searchr1_fast.retrieval.parking import ParkedMemory
from searchr1_fast.retrieval.recorded_encoder import CudaRecordedForward, RecordedForward

_VOCABULARY = 1000
_CLOSE = 1e-3  # of vectors whose components are about 1


def measure_encoder(device: torch.device, batches: Sequence[int], repetitions: int) -> tuple[list[dict[str, Any]], int]:
    """-> a row per way and batch size, and how many vectors are wrong."""
    model = random_model(device)
    kind, step = (CudaRecordedForward if device.type == "cuda" else RecordedForward), _SMALL_TILE[device.type]
    recorded = kind(partial(model.pooled_packed, pooling="mean"), device, step, _TOKENS_AT_ONCE)
    recorded.record()
    memory = ParkedMemory(model.tensors, [], device)
    generator = np.random.default_rng(0)
    lengths = generator.normal(20, 5, max(batches)).round().clip(8, 60).astype(int)
    texts = [generator.integers(0, _VOCABULARY, length).tolist() for length in lengths]
    rows, wrong = [], 0
    for count in batches:
        batch = sorted(texts[:count], key=len)
        seconds, others = _measure_batch(model, recorded, memory, batch, device, repetitions)
        wrong += others
        rows += [
            {"way": name, "queries": count, "tokens": sum(map(len, batch)), "ms": float(np.median(times)) * 1e3}
            for name, times in seconds.items()
        ]
    return rows, wrong


def _measure_batch(
    model: _Bert,
    recorded: RecordedForward,
    memory: ParkedMemory,
    batch: list[list[int]],
    device: torch.device,
    repetitions: int,
) -> tuple[dict[str, list[float]], int]:
    """-> seconds by way, and how many vectors are wrong."""

    def run(name: str) -> torch.Tensor:
        if name == "by length":
            return model.pooled(batch, "mean").cpu()
        if name == "unparked":
            memory.unpark()
            recorded.record_again()
        recorded.enabled = name != "launched"
        return recorded.pooled(batch)

    before = run("recorded")
    names = ("recorded", "launched", "by length", "unparked")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition, name in harness.interleaved(names, repetitions + 1):
        if name == "unparked":
            recorded.forget()
            memory.park()
        elapsed = harness.timed(partial(run, name), device)
        if repetition:  # the first compiles and allocates
            seconds[name].append(elapsed)
    replayed, launched, by_length = (run(name) for name in names[:3])
    others = (replayed != launched) | (replayed != before) | ((by_length - replayed).abs() > _CLOSE)
    recorded.enabled = True
    return seconds, int(others.any(1).sum() + (recorded.pooled(batch[:1]) != replayed[:1]).any())


def random_model(device: torch.device) -> _Bert:
    """Make a random encoder in fp32, in which queries are encoded."""
    is_gpu = device.type == "cuda"
    width, inner, layers, heads = (768, 3072, 12, 12) if is_gpu else (64, 96, 2, 2)
    config = {
        "model_type": "bert", "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers,
        "hidden_act": "gelu", "pad_token_id": 0,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int) -> None:
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        weights[f"{name}.weight"] = scale * torch.randn(shape, generator=generator)

    def linear(name: str, outputs: int, inputs: int) -> None:
        add(name, outputs, inputs)
        weights[f"{name}.bias"] = torch.zeros(outputs)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.ones(width), torch.zeros(width)

    for name, rows in (("word", _VOCABULARY), ("position", 512), ("token_type", 2)):
        add(f"embeddings.{name}_embeddings", rows, width)
    norm("embeddings.LayerNorm")
    for layer in range(layers):
        place = f"encoder.layer.{layer}."
        for name in ("query", "key", "value"):
            linear(f"{place}attention.self.{name}", width, width)
        linear(f"{place}attention.output.dense", width, width)
        norm(f"{place}attention.output.LayerNorm")
        linear(f"{place}intermediate.dense", inner, width)
        linear(f"{place}output.dense", width, inner)
        norm(f"{place}output.LayerNorm")
    return _Bert(config, weights, device, torch.float32, Path("random weights"))
