"""A run resumed on another number of ranks equals one that was never stopped; and writers on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from searchr1_fast import replay
from searchr1_fast.train import train

ROOT = Path(__file__).parent
ALGORITHMS = {
    "grpo": {"kl_coefficient": 0.05, "drop_zero_variance_groups": False},
    "ppo": {"name": "ppo", "group_size": 2, "critic_learning_rate": 1e-3, "kl_coefficient": 0.05, "kl_in_reward": True},
}
# What PPO's ranks keep within an update, and what they offload; one rank alone does neither.
TRAIN = {"grpo": {}, "ppo": {"reshard_after": "update", "reduce_after": "update"}}
OFFLOAD = {"grpo": {}, "ppo": {"optimizer": True, "reference": True, "replica": True}}
STOP, END = 2, 4


def settings(make_config, algorithm: str, name: str, resume: bool = False):
    return make_config(
        algorithm=ALGORITHMS[algorithm],
        run={"name": f"{algorithm}-{name}", "resume": resume},
        model={"path": make_config().model.path, "offload": OFFLOAD[algorithm]},
        train={"num_steps": END, "num_minibatches": 2} | TRAIN[algorithm],
        checkpoint={"every": STOP},
    )


def stopped_copy(make_config, algorithm: str, name: str, new: str):
    """Copy a run, under another name, as a kill after step 3 would leave it -> the configuration that resumes it."""
    whole, copy = settings(make_config, algorithm, name), settings(make_config, algorithm, new, resume=True)
    shutil.copytree(whole.run_directory, copy.run_directory, symlinks=True)
    checkpoints = copy.run_directory / "checkpoints"
    shutil.rmtree(checkpoints / f"step_{END:06d}")
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to(f"step_{STOP:06d}", target_is_directory=True)
    return copy


def rows(config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(config.run_directory / "checkpoints" / "latest" / "hf" / "model.safetensors")


def assert_same_run(changed, whole) -> None:
    """Tokens must be the same one by one; sums over them may differ by rounding."""
    assert [row["step"] for row in rows(changed)] == [row["step"] for row in rows(whole)] == list(range(END + 1))
    for theirs, ours in zip(rows(changed), rows(whole), strict=True):
        for key in ("reward_mean", "searches_mean", "response_tokens_mean", "policy_tokens", "kept_fraction", "lr"):
            assert theirs.get(key) == ours.get(key), (ours["step"], key)
        for key in ours.keys() & {"policy_loss", "value_loss", "entropy", "kl_ref", "grad_norm", "critic_grad_norm"}:
            assert theirs[key] == pytest.approx(ours[key], rel=5e-3, abs=1e-5), (ours["step"], key)
    assert rows(changed)[-1]["eval/letters/em"] == rows(whole)[-1]["eval/letters/em"]
    theirs, ours = weights(changed), weights(whole)
    differences = torch.cat([(theirs[name] - ours[name]).abs().flatten() for name in ours])
    assert (differences < 1e-5).float().mean() > 0.99  # AdamW takes rounding noise in a gradient for a direction
    assert differences.max() < 8e-3


def test_a_run_goes_on_with_another_number_of_ranks(make_config, make_console, tmp_path, on_two_ranks):
    """From one rank to two, and from two to one. One launch, as starting processes takes most of the time."""
    files = []
    for algorithm in ALGORITHMS:
        train(settings(make_config, algorithm, "one"), make_console())
        configs = [
            stopped_copy(make_config, algorithm, "one", "one-two"),
            settings(make_config, algorithm, "two"),
        ]
        for config in configs:
            files.append(tmp_path / f"{config.run.name}.yaml")
            files[-1].write_text(config.to_yaml())
    on_two_ranks(ROOT / "two_ranks_offload.py", *files)
    for algorithm in ALGORITHMS:
        assert_same_run(settings(make_config, algorithm, "one-two"), settings(make_config, algorithm, "one"))
        resumed = stopped_copy(make_config, algorithm, "two", "two-one")
        console = make_console()
        train(resumed, console)
        assert console.notes[0].startswith(f"going on after step {STOP}")
        assert_same_run(resumed, settings(make_config, algorithm, "two"))


def test_nothing_is_drawn_from_generators_that_belong_to_a_rank(make_config, make_console):
    """Samples depend on seed, step and place, so it does not matter whose generators a rank has restored."""

    def stir(metrics):
        torch.manual_seed(10_000 + metrics["step"])
        np.random.seed(metrics["step"])

    histories = []
    for name, on_step in (("calm", None), ("stirred", stir)):
        config = make_config(run={"name": name}, algorithm=ALGORITHMS["ppo"], train={"num_steps": 3})
        train(config, make_console(on_step))
        keys = ("reward_mean", "policy_loss", "grad_norm")
        histories.append([[row[key] for key in keys] for row in rows(config)[1:]])
    assert histories[0] == histories[1]


def test_writers_on_two_ranks(make_config, tmp_path, capsys, on_two_ranks):
    """A failure on one rank reaches all, none waits for ever, and both threads of a rank may call collectives."""
    (tmp_path / "config.yaml").write_text(make_config().to_yaml())
    on_two_ranks(ROOT / "two_writers.py", tmp_path, tmp_path / "config.yaml")
    reports = [json.loads((tmp_path / f"writer{rank}.json").read_text()) for rank in range(2)]
    assert reports[0] == reports[1]
    assert reports[0]["read"] == [2.0, 2.0, 2.0]
    for step, (said, rank) in enumerate(zip(reports[0]["failures"], (1, 1, 0), strict=True), start=1):
        assert f"the checkpoint of step {step} could not be written" in said
        assert f"on rank {rank}: OSError: [Errno 28] No space left on device" in said
    check_replay(*reports[0]["bad"], capsys)


def check_replay(path: str, are_finite: list[bool], num_skipped: int, diagnosis: str, not_kept: str, capsys) -> None:
    """One rank replays an update that two skipped, and names the rank of the bad micro-batch.

    Where rank 0 found no room to keep the update, both ranks know.
    """
    assert not_kept.startswith("what it met could not be kept in ") and "No space left on device" in not_kept
    assert (are_finite, num_skipped) == ([False, False, True], 2)
    assert diagnosis.startswith("the gradient of ")
    assert replay.main([path]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "micro-batch 2, rank 1: the advantages that the loss was given, of 1 of 4 policy tokens" in said
    assert said.count("rank 0:") == 0 and said.count("rank 1:") == 1
