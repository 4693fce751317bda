"""The benchmark of a step on scripted turns: both ways do the script's work, searches included. No durations tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
SMALL = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--scale", "0.005", "--steps", "1"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("replayed_step")


@pytest.mark.parametrize(
    ("workload", "samples", "searches", "apart"), [("A", 4, 1, "--apart"), ("B", 5, 3, "--no-apart")]
)
def test_a_step_does_the_work_of_its_script(bench, capsys, workload, samples, searches, apart):
    assert bench.main([*SMALL, "--workload", workload, "--plain", apart, "--scale", "0.001"]) == 0  # two questions
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["workload"]["trajectories"] == 2 * samples
    assert row["workload"]["searches_mean"] == searches
    ours, plain = (row["systems"][name] for name in ("ours", "plain"))
    assert plain["equal_trajectories"] == 1
    assert ours["planned_bytes"] > 0 and "planned_bytes" not in plain
    assert ours["update_of_matmul"] > 0 and plain["update_of_matmul"] > 0
    assert ours["cost"]["sampled_tokens"] == plain["cost"]["sampled_tokens"]
    assert ours["cost"]["prefill_tokens"] < plain["cost"]["prefill_tokens"]
    assert ours["cost"]["update_tokens"] < plain["cost"]["update_tokens"]
    assert ours["cost"]["trained_trajectories"] == plain["cost"]["trained_trajectories"] == 2 * samples
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
        environment, _ = bench.build_environments(config, ranks, bench.Console(quiet=True))
        run = bench.build(config, options, ranks, environment)
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


def test_the_throughput_benchmark_takes_published_shapes(bench, monkeypatch, capsys, tmp_path):
    """They run replayed_step.py, with the twin unless it is left out; a folder named like a shape is still a folder."""
    throughput, given = importlib.import_module("throughput"), []
    monkeypatch.setattr(bench, "main", lambda argv: given.append(bench.parse_arguments(argv)) or 0)
    assert throughput.main(["--model", "qwen2.5-3b", "--workload", "B", "--scale", "0.25"]) == 0
    assert throughput.main(["--scale=0.5", "--model=llama-3.2-3b", "--no-plain"]) == 0
    assert [(o.model, o.workload, o.scale, o.plain) for o in given] == [
        ("qwen2.5-3b", "B", 0.25, True), ("llama-3.2-3b", "A", 0.5, False),
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen2.5-3b").mkdir()
    assert throughput.main(["--model", "qwen2.5-3b"]) == 2
    assert "is not a Hugging Face directory" in capsys.readouterr().err
    assert len(given) == 2


def test_both_begin_with_the_same_weights(bench):
    options = bench.parse_arguments(SMALL)
    config = bench.make_config(options, bench.WORKLOADS["A"])
    with bench.process("cpu") as ranks:
        one, two = (bench.same_decoder(config, options, ranks).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_one_process(bench, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench.main(SMALL) == 2
    assert "start it with python, not torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "message"), [("--scale", "give a share above 0"), ("--steps", "give at least 1")])
def test_wrong_arguments_are_named(bench, capsys, option, message):
    assert bench.main([*SMALL, option, "0"]) != 0
    assert message in capsys.readouterr().err
