"""The rollout benchmark: that all providers do the same work, and that it is counted. How fast, is not tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

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


def test_replay_counts_what_each_computes(measure):
    row = measure("replay", "--run-on", "20")
    native, twin = row["work"]["native"], row["work"]["lock-step, re-prefilled"]
    run_on = row["work"]["lock-step, re-prefilled, turns run on"]
    assert row["same_tokens"] == {"lock-step, re-prefilled": 1.0, "lock-step, re-prefilled, turns run on": 1.0}
    assert run_on["tokens_that_exist"] == native["tokens_that_exist"]
    sampled = run_on["tokens_computed"] - twin["tokens_computed"]  # in vain: turns have 20 tokens and not 2 to 9
    assert 4 * 3 * 11 <= sampled <= 4 * 3 * 18
    assert row["work"]["native, bfloat16"]["tokens_computed"] == native["tokens_computed"]
    assert native["tokens_that_exist"] == native["tokens_computed"] == twin["tokens_that_exist"]
    # Prompts, three turns, and two observations, which passages fill.
    assert 4 * (8 + 2 * 60) < native["tokens_that_exist"] < 4 * (8 + 3 * 12 + 2 * 120)
    assert twin["cache_hit_share"] == 0 < native["cache_hit_share"] < 1
    assert twin["tokens_computed"] > native["tokens_computed"]
    assert native["search_seconds"] > 0 < twin["search_seconds"]
