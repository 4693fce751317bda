"""Training that is killed while it saves, again and again, ends as if it had never been touched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import environment
from safetensors.torch import load_file

from searchr1_fast.checkpoint import Checkpoint, latest_checkpoint
from searchr1_fast.distributed import Ranks
from searchr1_fast.metrics import read_metrics
from searchr1_fast.train import train

# (step of the save in which it is killed, where in it, the newest checkpoint then); each run resumes the one before.
KILLS = [
    (2, "_write_files", None),
    (4, "_flush_tree", 2),
    (6, "_point", 4),  # step_000006 is whole, but nothing names it
    (6, "_prune", 6),
]
NUM_STEPS = 8
SECONDS = 120  # before a child is given up


@pytest.fixture
def start(tmp_path):
    """config, step, moment -> the process, once the save of that step has reached that moment; it may launch ranks."""
    children = []

    def run(config, step: int, moment: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        yaml, file, root = tmp_path / "child.yaml", tmp_path / f"{step}{moment}", Path(__file__).parent
        yaml.write_text(config.to_yaml())
        child = subprocess.Popen(
            [sys.executable, *launcher, str(root / "killed_run.py"), str(yaml), str(step), moment, str(file)],
            env=environment(OMP_NUM_THREADS="1"),
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append((child, file))
        wait_for(file.exists, child)
        return child

    yield run
    for child, file in children:
        if child.poll() is None:  # after a failed test; a launcher with its ranks
            child.kill()
            for pid in (int(path.read_text()) for path in tmp_path.glob(f"{file.name}.pid*")):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        child.communicate()


def wait_for(condition, child: subprocess.Popen) -> None:
    """Wait until the condition holds; an error if the child ends first."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert child.poll() is None, child.communicate()[1][-4000:]
        assert time.monotonic() < deadline, "the child does not get there"
        time.sleep(0.02)


def rows(config) -> list[dict]:
    return read_metrics(config.run_directory)  # which skips a line that is still being written


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(config.run_directory / "checkpoints" / "latest" / "hf" / "model.safetensors")


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if not re.match("time_|search/wait_|.*_per_second", key)}


def test_a_run_that_is_killed_in_its_saves_is_the_run_that_was_not(make_config, make_console, start):
    """Bit for bit, after four SIGKILLs, each one step after it began to save."""
    settings = {"train": {"num_steps": NUM_STEPS}, "checkpoint": {"every": 2}, "eval": {"sets": {}}}
    whole = make_config(run={"name": "whole"}, **settings)
    train(whole, make_console())
    killed = make_config(run={"name": "killed", "resume": True}, **settings)
    root = killed.run_directory / "checkpoints"
    for step, moment, expected in KILLS:
        child = start(killed, step, moment)
        # Training goes on while the save hangs; the next save would wait for it.
        wait_for(lambda step=step: rows(killed)[-1]["step"] == step + 1, child)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        newest = latest_checkpoint(root)
        assert (newest and newest.name) == (expected and f"step_{expected:06d}"), (step, moment)
        if newest is not None:
            assert Checkpoint(newest, Ranks(0, 1, torch.device("cpu"))).step == expected
    console = make_console()
    train(killed, console)
    assert console.notes[0].startswith("going on after step 6")
    assert [without_times(row) for row in rows(killed)] == [without_times(row) for row in rows(whole)]
    assert weights(killed).keys() == weights(whole).keys()
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(killed).items())
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000006", "step_000008"]


def test_two_ranks_that_are_killed_in_a_save_go_on_as_one(make_config, make_console, start, tmp_path):
    """As if their machine had been lost. The resumed run is that of one rank, up to the rounding of sums."""
    settings = {"train": {"num_steps": 6}, "checkpoint": {"every": 2}, "eval": {"sets": {}}}
    whole = make_config(run={"name": "whole"}, **settings)
    train(whole, make_console())
    killed = make_config(run={"name": "killed", "resume": True}, **settings)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    child = start(killed, 4, "_checksum", launcher)
    wait_for(lambda: rows(killed)[-1]["step"] == 5, child)
    os.kill(child.pid, signal.SIGKILL)  # the launcher first, or it would stop the ranks
    for rank in range(2):
        os.kill(int((tmp_path / f"4_checksum.pid{rank}").read_text()), signal.SIGKILL)
    assert os.readlink(killed.run_directory / "checkpoints" / "latest") == "step_000002"
    console = make_console()
    train(killed, console)
    assert console.notes[0].startswith("going on after step 2")
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5, 6]
    for theirs, ours in zip(rows(killed), rows(whole), strict=True):
        assert theirs["reward_mean"] == ours["reward_mean"]
        for key in ("policy_loss", "grad_norm", "entropy"):
            assert theirs[key] == pytest.approx(ours[key], rel=5e-3, abs=1e-5), (ours["step"], key)
