"""Checkpoints read back as they were written, and a stop at any moment leaves one that can be read."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import threading

import numpy as np
import pytest
import torch

from searchr1_fast import checkpoint
from searchr1_fast.checkpoint import Checkpoint, CheckpointFailed, latest_checkpoint, optimizer_tensors
from searchr1_fast.checkpoint_writer import CheckpointWriter
from searchr1_fast.distributed import Ranks


@pytest.fixture
def ranks() -> Ranks:
    return Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def stage(tmp_path, ranks):
    """step -> a writer that has staged its checkpoint, whose tensors depend on the step."""
    writers = {}

    def run(step: int, keep: int = 2, value: float | None = None, background: bool = True, best: int | None = None):
        def export(weights, directory):
            (directory / "model.safetensors").write_bytes(b"weights of %d" % int(weights["weight"]))

        writer = writers.setdefault(background, CheckpointWriter(tmp_path, ranks, keep, background))
        writer.keep = keep
        held = tensors(step if value is None else value)
        weights = {"weight": torch.tensor(float(step))}
        writer.stage(step, held, {"stream": {"index": step}}, weights, export, best)
        if background:  # training goes on and changes the tensors
            for tensor in (*held.values(), *weights.values()):
                tensor.fill_(-5.0)
        return writer

    return run


@pytest.fixture
def save(tmp_path, stage):
    """step -> the folder of its checkpoint, once it is complete."""

    def run(step: int, **settings):
        writer = stage(step, **settings)
        writer.start()
        writer.wait()
        return tmp_path / f"step_{step:06d}"

    return run


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "policy.weight": torch.full((3, 2), float(value)),
        "policy.optimizer.weight.step": torch.tensor(float(value)),
    }


def read(path, ranks) -> dict[str, torch.Tensor]:
    target = tensors(-1)
    Checkpoint(path, ranks).read(target)
    return target


def assert_holds(path, step: int, ranks: Ranks) -> None:
    assert all(torch.equal(tensor, tensors(step)[key]) for key, tensor in read(path, ranks).items())
    assert (Checkpoint(path, ranks).step, Checkpoint(path, ranks).trainer_state) == (step, {"stream": {"index": step}})


@pytest.mark.parametrize("background", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, save, ranks, background):
    assert latest_checkpoint(tmp_path) is None
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    path = save(100, background=background)
    assert path == tmp_path / "step_000100" == latest_checkpoint(tmp_path)
    assert (tmp_path / "latest" / "hf" / "model.safetensors").read_bytes() == b"weights of 100"
    expected = torch.rand(4), np.random.rand(4), random.random()
    assert_holds(path, 100, ranks)
    Checkpoint(path, ranks).read(tensors(-1))  # also restores the random generators
    assert torch.equal(torch.rand(4), expected[0])
    assert (np.random.rand(4) == expected[1]).all()
    assert random.random() == expected[2]


def test_only_the_newest_are_kept(tmp_path, save, ranks):
    for step in (1, 2, 3, 4):
        save(step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000003", "step_000004"]
    assert_holds(latest_checkpoint(tmp_path), 4, ranks)


def test_steps_are_numbers_and_copies_are_their_owners(tmp_path, save):
    for step in (999_998, 999_999, 1_000_000):
        save(step, keep=2)
        if step == 999_998:
            (tmp_path / "step_999998").rename(tmp_path / "step_999998_mine")
    save(1_000_001, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_1000000", "step_1000001", "step_999998_mine"]


def test_the_best_outlives_newer_ones(tmp_path, save, ranks):
    save(1, keep=1, best=1)
    save(2, keep=1, best=1)
    save(3, keep=1, best=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "step_000001", "step_000003"]
    assert_holds(tmp_path / "best", 1, ranks)
    save(4, keep=1, best=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "step_000004"]
    assert os.readlink(tmp_path / "best") == os.readlink(tmp_path / "latest") == "step_000004"


def test_training_goes_on_while_the_disk_works_and_the_next_save_waits(monkeypatch, tmp_path, save, stage, ranks):
    save(1)
    is_open, flush_tree = threading.Event(), checkpoint._flush_tree
    monkeypatch.setattr(checkpoint, "_flush_tree", lambda path: is_open.wait(60) and flush_tree(path))
    writer = stage(2)
    writer.start()
    writer.check()  # waits for nothing
    assert latest_checkpoint(tmp_path).name == "step_000001"
    opener = threading.Timer(0.3, is_open.set)
    opener.start()
    times = writer.stage(3, tensors(3), {"stream": {"index": 3}}, {}, lambda weights, directory: None)
    opener.join()  # `stage` waited for the timer: otherwise it would still be waiting
    assert times.keys() == {"time_checkpoint_wait", "time_checkpoint", "time_checkpoint_write"}
    assert_holds(latest_checkpoint(tmp_path), 2, ranks)
    writer.start()
    writer.wait()
    assert_holds(latest_checkpoint(tmp_path), 3, ranks)
    writer.start()  # nothing is staged: nothing is written
    assert latest_checkpoint(tmp_path).name == "step_000003"


def _full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("ask", ["check", "wait", "stage"])
@pytest.mark.parametrize("moment", ["_write_files", "_checksum", "_publish"])
def test_what_a_write_fails_with_is_said_at_the_next_occasion(monkeypatch, tmp_path, save, stage, ranks, moment, ask):
    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, _full)
        writer = stage(2)
        writer.start()
        writer._thread.join()
    says = r"checkpoint of step 2 could not be written to .*: OSError: .* No space left on device; .* is step_000001\."
    with pytest.raises(CheckpointFailed, match=says) as caught:
        stage(3) if ask == "stage" else getattr(writer, ask)()
    assert isinstance(caught.value.__cause__, OSError)
    writer.wait()  # said once
    assert_holds(latest_checkpoint(tmp_path), 1, ranks)
    assert not list(tmp_path.glob(".step_*"))  # half of a checkpoint may be what fills the disk
    save(3, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000003"]


@pytest.mark.parametrize("part", ["tensors", "trainer_state"])
def test_what_the_system_says_is_said(tmp_path, ranks, part):
    """With a real limit on file sizes: torch's own message is `unexpected pos 704 vs 598`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {part: torch.ones(1 << 20)}
    writer = CheckpointWriter(tmp_path, ranks, keep=1)
    held, state = large if part == "tensors" else tensors(1), large if part == "trainer_state" else {}
    writer.stage(1, held, state, {}, lambda weights, directory: None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        writer.start()
        with pytest.raises(CheckpointFailed, match=r"OSError: \[Errno 27\] File too large"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_where_somebody_made_room(monkeypatch, tmp_path, save, stage):
    """Somebody deleted the checkpoint that `latest` names."""
    shutil.rmtree(save(1))
    monkeypatch.setattr(checkpoint, "_write_files", _full)
    with pytest.raises(CheckpointFailed, match=r"No space left on device; \S+latest names step_000001, which is gone"):
        stage(2, background=False).start()


def test_what_a_killed_write_left_makes_room_before_the_next_begins(tmp_path, stage):
    """Whatever its step: the next write may be of another step."""
    (tmp_path / ".step_000001.partial" / "state").mkdir(parents=True)
    stage(2)
    assert [path.name for path in tmp_path.iterdir()] == [".step_000002.partial"]


def test_a_full_disk_is_said_when_nobody_waits_for_it(monkeypatch, tmp_path, stage):
    monkeypatch.setattr(checkpoint, "_write_files", _full)
    with pytest.raises(CheckpointFailed, match="there is none before it"):
        stage(1, background=False).start()
    writer = stage(1)
    writer.start()
    notes = []
    writer.settle(notes.append)  # as a run does that failed for another reason
    assert "step 1 could not be written" in notes[0]


@pytest.mark.parametrize("moment", ["_write_files", "_checksum", "_flush_tree", "_publish", "_point", "_prune"])
def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(monkeypatch, tmp_path, save, ranks, moment):
    """The process dies inside `moment`, without a chance to clean up; the next save does."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # a forked child may not use its parent's CUDA
    save(1)
    child = os.fork()
    if child == 0:
        setattr(checkpoint, moment, lambda *_: os._exit(9))
        save(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    survivor = latest_checkpoint(tmp_path)
    assert_holds(survivor, 2 if moment == "_prune" else 1, ranks)
    save(2, keep=1)
    assert_holds(latest_checkpoint(tmp_path), 2, ranks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002"]


def test_a_step_that_was_rolled_back_is_written_anew(tmp_path, save, ranks):
    save(1), save(2)
    assert (tmp_path / "latest" / "hf" / "model.safetensors").read_bytes() == b"weights of 2"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step_000001")  # somebody went back
    save(2, value=7)
    assert float(read(latest_checkpoint(tmp_path), ranks)["policy.optimizer.weight.step"]) == 7.0


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "is missing"),
        (_truncate, r"has \d+ bytes instead of \d+"),
        (_flip, "has another checksum than when it was written"),
    ],
)
@pytest.mark.parametrize("name", ["state/trainer.pt", "state/.metadata", "hf/model.safetensors"])
def test_damage_is_found_and_named(save, ranks, damage, says, name):
    path = save(5)
    damage(path / name)
    with pytest.raises(ValueError, match=rf"checkpoint \S+step_000005 is damaged: {name} {says}; .*an older one"):
        Checkpoint(path, ranks)


def test_a_copy_that_lacks_its_manifest_is_incomplete(tmp_path, save, ranks):
    path = save(5)
    (path / "state" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"step_000005 is incomplete: it has no state/manifest.json"):
        Checkpoint(path, ranks)
    (path / "state" / "manifest.json").write_text(json.dumps({})[:1])
    with pytest.raises(ValueError, match=r"step_000005 is damaged: state/manifest.json is not JSON"):
        Checkpoint(path, ranks)
    shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"latest names step_000005, which is gone"):
        latest_checkpoint(tmp_path)


def test_a_checkpoint_of_another_kind_of_run_is_refused(save, ranks):
    saved = Checkpoint(save(5), ranks)
    with pytest.raises(ValueError, match=r"another kind of run: it lacks 'critic.weight'"):
        saved.read(tensors(0) | {"critic.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"another kind of run: it also holds 'policy.weight'"):
        saved.read({"policy.optimizer.weight.step": torch.zeros(())})
    with pytest.raises(ValueError, match=r"policy.weight is \(3, 2\), the model's is \(2, 3\)"):
        saved.read(tensors(0) | {"policy.weight": torch.zeros(2, 3)})


def test_optimizer_state_that_is_not_there_stays_absent():
    """A parameter that never took a step has no state, and gets none from being saved or restored."""
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("moved", "still")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    parameters["moved"].grad = torch.ones(2)
    optimizer.step()
    saved = optimizer_tensors(optimizer, parameters)
    assert sorted(saved) == ["moved.exp_avg", "moved.exp_avg_sq", "moved.step"]

    fresh = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    room = optimizer_tensors(fresh, parameters, saved.keys())
    assert room.keys() == saved.keys()
    assert parameters["still"] not in fresh.state
    for key, tensor in room.items():
        tensor.copy_(saved[key])
    twin = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.step()
    moved = parameters["moved"].detach().clone()
    with torch.no_grad():
        parameters["moved"].copy_(twin["moved"])
    fresh.step()
    assert torch.equal(parameters["moved"], moved)
