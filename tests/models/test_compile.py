"""Blocks compiled by torch give the same numbers, share one graph for all layers, and serve any lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from searchr1_fast.metrics import read_metrics
from searchr1_fast.models import Decoder, DecoderConfig, KVCache
from searchr1_fast.models.decoder import Block
from searchr1_fast.train import train


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(50, 32, 48, 4, 4, 2, model_type="qwen3", head_dim=8))


BATCHES = [[9, 4, 12], [7], [3, 3, 3, 3, 3, 20], [31, 1], [2, 2], [64, 5, 5]]  # other totals, other counts of sequences


def train_on(model: Decoder, lengths: list[int]) -> list[torch.Tensor]:
    """-> hidden states of some rows, as in training, and the gradients."""
    cu_seqlens, num_tokens = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    token_ids, rows = torch.arange(num_tokens) % 50, torch.arange(0, num_tokens, 2)
    hidden = model.hidden(token_ids, cu_seqlens, rows)
    model.zero_grad()
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.model.parameters())]


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_lengths_do_not_compile_anew_and_numbers_stay():
    model, compiled = build(), build()
    compiled.compile_blocks(backend="aot_eager")
    for lengths in BATCHES:
        for got, expected in zip(train_on(compiled, lengths), train_on(model, lengths), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert num_graphs() == 2  # before and after attention, for all four layers and any lengths
    train_on(compiled, [1])
    assert num_graphs() == 4  # a lone token
    with torch.no_grad():
        for lengths in BATCHES:
            compiled.hidden(torch.zeros(sum(lengths), dtype=torch.int64), torch.tensor([0, *lengths]).cumsum(0))
    assert num_graphs() == 6
    train_on(compiled, BATCHES[0])
    assert num_graphs() == 6


def test_cached_steps_of_any_size_share_their_graphs():
    model, compiled = build(), build()
    compiled.compile_blocks(backend="eager")
    model.fused_generation = compiled.fused_generation = False  # the compiled modules take no part in it
    caches = [KVCache(model.config, num_slots=4, max_length=40) for _ in range(2)]
    start = torch.zeros(4, dtype=torch.int64)
    for step, counts in enumerate(([5, 9, 3, 1], [1, 1, 1, 1], [4, 1, 8], [1, 1], [6, 5])):
        slots, cu_seqlens = torch.arange(len(counts)), torch.tensor([0, *counts]).cumsum(0)
        token_ids = torch.arange(sum(counts)) % 50
        one, other = (
            m.forward_cached(token_ids, cu_seqlens, slots, start[slots], cache)
            for m, cache in zip((model, compiled), caches, strict=True)
        )
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda text, s=step: f"step {s}: {text}")
        start[slots] += torch.tensor(counts)
        assert num_graphs() == 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "algorithm": {"name": "ppo", "group_size": 4, "kl_coefficient": 0.01},
            "model": {"dtype": "bfloat16"},  # one rank of FSDP2, and a replica
            "train": {"activation_checkpointing": "selective"},
        },
    ],
    ids=["grpo", "ppo-bf16-selective"],
)
def test_a_run_with_compiled_blocks_is_the_run_without(changes, make_config, make_console, monkeypatch):
    """Policy, replica, reference and critic, with the backend that only traces and needs no C++ compiler."""
    compiled = []

    def compile_traced(block: Block, backend: str) -> None:
        compiled.append(block)
        compile_in_place(block, "aot_eager")

    compile_in_place = Block.compile_in_place
    monkeypatch.setattr(Block, "compile_in_place", compile_traced)
    rows = {}
    for name in (False, True):
        settings = {key: dict(value) for key, value in changes.items()}
        settings["model"] = settings.get("model", {}) | {"compile_blocks": name}
        settings["train"] = settings.get("train", {}) | {"num_steps": 2, "eval_every": 0}
        config = make_config(**settings, run={"name": f"compiled-{name}"}, eval={"sets": {}})
        train(config, make_console())
        rows[name] = read_metrics(config.run_directory)
        num_layers = len(compiled)
        assert (num_layers > 0) == name
    num_models = 4 if "algorithm" in changes else 1
    assert num_layers == num_models * DecoderConfig.from_hf(json.loads(model_config(config))).num_hidden_layers
    for want, have in zip(rows[False], rows[True], strict=True):
        for key in ("reward_mean", "policy_tokens", "entropy", "grad_norm", "kl_ref", "rollout_policy_kl"):
            expected = None if want[key] is None else pytest.approx(want[key], rel=1e-3, abs=1e-5)
            assert have[key] == expected, key


def model_config(config) -> str:
    return (Path(config.model.path) / "config.json").read_text(encoding="utf-8")
