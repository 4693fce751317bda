"""The whole step on scripted turns: that both ways do the script's work, searches included. How fast, is not tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parent.parent / "bench"
SMALL = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--scale", "0.005", "--steps", "1"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("replayed_step")


@pytest.mark.parametrize(("workload", "samples", "searches"), [("A", 4, 1), ("B", 5, 3)])
def test_a_step_does_the_work_of_its_script(bench, capsys, workload, samples, searches):
    assert bench.main([*SMALL, "--workload", workload, "--plain"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["workload"]["trajectories"] == 3 * samples
    assert row["workload"]["searches_mean"] == searches
    ours, plain = (row["systems"][name] for name in ("ours", "plain"))
    assert ours["cost"]["sampled_tokens"] == plain["cost"]["sampled_tokens"]
    assert ours["cost"]["prefill_tokens"] < plain["cost"]["prefill_tokens"]
    assert ours["cost"]["update_tokens"] < plain["cost"]["update_tokens"]
    assert ours["cost"]["trained_trajectories"] == plain["cost"]["trained_trajectories"] == 3 * samples
    assert sum(ours["seconds"][phase] for phase in ("rollout", "search", "logprobs", "update", "other")) == (
        pytest.approx(ours["seconds"]["total"])
    )
    limit = row["limit_seconds"]
    assert limit["total"] == pytest.approx(limit["prefill"] + limit["decode"] + limit["update"])


def test_trajectories_say_what_the_script_says(bench):
    options = bench.parse_arguments([*SMALL, "--workload", "B"])
    workload = bench.WORKLOADS["B"]
    config = bench.make_config(options, workload)
    with bench.process("cpu") as ranks:
        run = bench.build(config, options, ranks, bench.Console(quiet=True))
        step = bench.scripted(run, bench.our_step, run.environment.questions[:3], workload)
    scripts = list(run.engine.scripts.values())
    assert len(scripts) == len(step.trajectories) == 15
    for script, trajectory in zip(scripts, step.trajectories, strict=True):
        written = trajectory.token_ids[trajectory.loss_mask]
        np.testing.assert_array_equal(written, np.concatenate(script))
        assert len(trajectory.turns) == 4
        assert all(turn.passage_ids for turn in trajectory.turns[:3])
    lengths = [len(turn) for script in scripts for turn in script]
    assert 8 <= min(lengths) < max(lengths) <= 120


@pytest.mark.parametrize(("option", "message"), [("--scale", "give a share above 0"), ("--steps", "give at least 1")])
def test_wrong_arguments_are_named(bench, capsys, option, message):
    assert bench.main([*SMALL, option, "0"]) != 0
    assert message in capsys.readouterr().err
