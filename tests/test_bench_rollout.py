"""The rollout benchmark: all providers do the same work, and it is counted. No durations are tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
SMALL = ["--prompts", "3", "--new-tokens", "5", "--prompt-tokens", "8", "--trajectories", "4", "--max-num-seqs", "4"]
SMALL += ["--searches", "2", "--turn-tokens", "6", "--observation-tokens", "120", "--repetitions", "1"]


@pytest.fixture
def measure(monkeypatch, capsys):
    """part -> its row."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(importlib.import_module("rollout_engines"), "HAS_VLLM", False)
    monkeypatch.setattr(importlib.import_module("rollout"), "HAS_VLLM", False)

    def run(part: str, *options: str) -> dict:
        assert importlib.import_module("rollout").main([part, *SMALL, *options]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_generate_compares_the_tokens(measure):
    row = measure("generate")
    names = ["native", "native, bfloat16", "transformers generate, float32", "transformers generate, bfloat16"]
    assert list(row["providers"]) == names
    assert row["same_tokens"] == {names[2]: 1.0}
    assert all(one["seconds"] > 0 for one in row["providers"].values())


def test_others_can_be_left_out(measure):
    row = measure("generate", "--leave-out", "transformers")
    assert list(row["providers"]) == ["native", "native, bfloat16"] and row["same_tokens"] == {}


def test_replay_counts_what_each_computes(measure):
    row = measure("replay", "--run-on", "20")
    native, twin = row["work"]["native"], row["work"]["lock-step, re-prefilled"]
    run_on = row["work"]["lock-step, re-prefilled, turns run on"]
    assert row["same_tokens"] == {"lock-step, re-prefilled": 1.0, "lock-step, re-prefilled, turns run on": 1.0}
    assert run_on["tokens_that_exist"] == native["tokens_that_exist"]
    sampled = run_on["tokens_computed"] - twin["tokens_computed"]  # wasted: turns run to 20 tokens in place of 2 to 9
    assert 4 * 3 * 11 <= sampled <= 4 * 3 * 18
    assert row["work"]["native, bfloat16"]["tokens_computed"] == native["tokens_computed"]
    assert native["tokens_that_exist"] == native["tokens_computed"] == twin["tokens_that_exist"]
    # Prompts, three turns, and two observations that are full of passages.
    assert 4 * (8 + 2 * 60) < native["tokens_that_exist"] < 4 * (8 + 3 * 12 + 2 * 120)
    assert twin["cache_hit_share"] == 0 < native["cache_hit_share"] < 1
    assert twin["tokens_computed"] > native["tokens_computed"]
    assert native["search_seconds"] > 0 < twin["search_seconds"]
    others = [row["work"].pop(f"transformers generate, {dtype}") for dtype in ("float32", "bfloat16")]
    assert others[0] == others[1] and others[0]["tokens_that_exist"] == native["tokens_that_exist"]
    assert twin["tokens_computed"] < others[0]["tokens_computed"] < run_on["tokens_computed"]  # padding, to 9 at most
    for one in row["work"].values():
        assert 0 < one["latency_p50"] <= one["latency_p99"]
        assert sum(one[f"{what}_share"] for what in ("generate", "search", "idle")) == pytest.approx(1)
    assert twin["idle_share"] > native["idle_share"]  # in lock-step all wait for the longest turn


def test_generate_in_lock_step_goes_on_behind_every_context(monkeypatch):
    """Each greedy turn is what the model would write after that context alone: the padding has no influence."""
    monkeypatch.syspath_prepend(str(BENCH))
    engines, replay = importlib.import_module("rollout_engines"), importlib.import_module("replay")
    generate = replay.Generate.__new__(replay.Generate)
    generate.num_computed = 0
    model = engines.build_model("small", torch.device("cpu"))
    generate._other = engines.transformers_model(model, torch.float32)
    written = generate._other.generate
    generate._other.generate = lambda ids, **options: written(ids, **options | {"do_sample": False})
    contexts = [np.arange(5, 5 + length) for length in (3, 17, 9)]
    turns = generate._write(contexts, np.array([4, 2, 6]))
    assert [len(turn) for turn in turns] == [4, 2, 6] and generate.num_computed == 3 * (17 + 6 - 1)
    for context, turn in zip(contexts, turns, strict=True):
        assert np.array_equal(turn, generate._write([context], np.array([len(turn)]))[0])


def test_a_timeline_is_what_happened(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    timeline = importlib.import_module("timeline").Timeline()
    now, first, other = [0.0], object(), object()
    timeline.now = lambda: now[0]
    timeline.begin_turn(0), timeline.begin_turn(1)
    timeline._turn_ended[id(first)] = 2.0  # in the middle of a step that ends at 5
    now[0] = 5.0
    timeline.end_turn(0, first), timeline.end_turn(1, other)
    now[0] = 9.0
    timeline.search([0], 6.0)
    timeline.begin_turn(0)
    now[0] = 10.0
    timeline.end_turn(0, first)
    spans = sorted(map(tuple, timeline.spans))
    assert spans == [
        (0, "generate", 0.0, 2.0), (0, "generate", 9.0, 10.0), (0, "idle", 2.0, 6.0), (0, "search", 6.0, 9.0),
        (1, "generate", 0.0, 5.0),
    ]  # fmt: skip
    summary = timeline.summary()
    assert (summary["latency_p50"], summary["latency_p99"]) == pytest.approx((7.5, 9.95))
    shares = [summary[f"{what}_share"] for what in ("generate", "search", "idle")]
    assert shares == pytest.approx([8 / 15, 3 / 15, 4 / 15])
    path = importlib.import_module("timeline").draw({"one": timeline, "two": timeline}, "title", tmp_path / "new/a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
