"""A full disk: a run does what is documented, and nothing half-written is ever taken for complete.

`/dev/full` gives the error of a full disk; where that is not enough, a write is made to fail.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from searchr1_fast import bad_updates as bad_updates_module
from searchr1_fast import metrics as metrics_module
from searchr1_fast import train as train_module
from searchr1_fast.bad_updates import BadUpdate, MicroBatch, NotKept, read_bad_update, write_bad_update
from searchr1_fast.config import load_config
from searchr1_fast.curves import save_curves
from searchr1_fast.distributed import Ranks
from searchr1_fast.files import naming, whole_file, write_jsonl
from searchr1_fast.metrics import MetricsLog, read_metrics
from searchr1_fast.packing import pack
from searchr1_fast.policy import Policy, TrainingDiverged
from searchr1_fast.train import main, train

FULL = "No space left on device"


def is_full(*arguments, **options) -> None:
    raise OSError(errno.ENOSPC, FULL)


def half(tensors, path: Path, metadata=None) -> None:
    """Write as much as fits, then fail."""
    Path(path).write_bytes(b"half")
    is_full()


def rows(config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------ one file


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "below" / "a.json"
    with whole_file(path) as place:
        place.write_text("old")
    with pytest.raises(OSError, match=FULL) as failure, whole_file(path) as place:
        is_full(place.write_text("ne"))
    assert failure.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="below"), whole_file(path / "b") as place:
        raise AssertionError("not reached")


def test_an_error_that_names_a_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as failure, naming(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert failure.value.filename == str(tmp_path / "b")


def test_a_row_is_whole_or_not_there(tmp_path, monkeypatch):
    """Nothing remains of a line that did not fit, and the log goes on once there is room."""

    class Short:
        """A file on a disk with room for five more bytes."""

        def __init__(self, file) -> None:
            self.file, self.room = file, 5

        def write(self, data: bytes) -> int:
            if not self.room:
                is_full()
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    with MetricsLog(tmp_path) as log:
        log.write({"step": 1})
        file, log._file = log._file, Short(log._file)
        with pytest.raises(OSError, match=FULL) as failure:
            log.write({"step": 2, "em": 0.5})
        assert failure.value.filename == str(tmp_path / "metrics.jsonl")
        log._file = file
        log.write({"step": 2, "em": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "em": 0.25}\n'
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_tensorboard_that_cannot_be_written_is_named_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        monkeypatch.setattr(log._tensorboard, "flush", is_full)
        with pytest.raises(OSError, match=FULL) as failure:
            log.write({"step": 1, "em": 0.5})
        assert failure.value.filename == str(tmp_path / "tensorboard")
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
def test_other_files_name_themselves(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "em": 0.5}\n')
    monkeypatch.setattr(os, "getpid", lambda: "full")
    for name in ("curves.png", "answers.jsonl"):
        (tmp_path / f".{name}.full").symlink_to("/dev/full")
    for name, write in (
        ("curves.png", lambda: save_curves(tmp_path)),
        ("answers.jsonl", lambda: write_jsonl(tmp_path / "answers.jsonl", [{"a": 1}])),
    ):
        with pytest.raises(OSError, match=FULL) as failure:
            write()
        assert failure.value.filename == str(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


# --------------------------------------------------------------------------------------------------------- bad updates


@pytest.fixture
def skipped(make_config, make_decoder, make_trajectory):
    """A policy whose last update was not finite, and that update."""
    config, ranks = make_config(), Ranks(0, 1, torch.device("cpu"))
    policy = Policy(make_decoder(0), config, ranks)
    (batch,) = pack([make_trajectory(seed, [(False, 4), (True, 3)]) for seed in range(3)], [1.0, -1.0, 0.0], 100)
    batches = [replace(batch, advantages=batch.advantages * float("nan"))]
    policy.update(batches, 9)
    micro_batches = [MicroBatch(0, batch) for batch in batches]
    bad = BadUpdate(1, 0, "policy", 0, 9, True, policy.diagnosis, config.to_yaml(), micro_batches)
    return policy, bad


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "bad_steps").mkdir()
    return tmp_path / "bad_steps"


def test_an_update_that_finds_no_room_leaves_nothing(skipped, folder, monkeypatch):
    policy, bad = skipped
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", is_full)
        with pytest.raises(NotKept, match=rf"^what it met could not be kept in \S+: OSError: \[Errno 28\] {FULL}"):
            write_bad_update(folder, bad, policy, torch.float32)
    assert list(folder.iterdir()) == []
    path = write_bad_update(folder, bad, policy, torch.float32)  # as for the second in a row, once there is room
    assert {file.name for file in folder.iterdir()} == {path.name, bad.weights_name}


def test_weights_that_find_no_room_do_not_leave_others_in_their_place(skipped, folder, monkeypatch):
    """Weights left by a run that was rolled back are not those that this update met."""
    policy, bad = skipped
    (folder / bad.weights_name).write_bytes(b"older")
    monkeypatch.setattr(bad_updates_module, "save_tensors", half)
    with pytest.raises(NotKept, match=rf"^searchr1 replay \S+{bad.file_name} --model CHECKPOINT, as its .*{FULL}"):
        write_bad_update(folder, bad, policy, torch.float32)
    assert [file.name for file in folder.iterdir()] == [bad.file_name]
    assert read_bad_update(folder / bad.file_name).step == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
def test_torch_s_own_error_is_the_system_s(skipped, folder, monkeypatch):
    policy, bad = skipped
    monkeypatch.setattr(os, "getpid", lambda: "full")
    (folder / f".{bad.file_name}.full").symlink_to("/dev/full")
    with pytest.raises(NotKept, match=rf"OSError: \[Errno 28\] {FULL}"):
        write_bad_update(folder, bad, policy, torch.float32)
    assert list(folder.iterdir()) == []


@pytest.fixture
def spoiled(monkeypatch):
    """-> None; from the second step on the policy's advantages are NaN."""
    make = train_module.make_minibatches

    def changed(run, *arguments):
        minibatches = make(run, *arguments)
        for minibatch in minibatches if run.step > 0 else ():
            nans = [replace(batch, advantages=batch.advantages * float("nan")) for batch in minibatch.batches]
            minibatch.batches = nans
        return minibatches

    monkeypatch.setattr(train_module, "make_minibatches", changed)


def test_a_run_goes_on_and_ends_as_if_there_were_room(make_config, make_console, spoiled, monkeypatch):
    """Two updates are skipped and counted but not kept; the third in a row ends the run, as it would anyway."""
    algorithm = {"drop_zero_variance_groups": False}
    config = make_config(algorithm=algorithm, train={"num_steps": 9}, eval={"sets": {}}, checkpoint={"every": 1})
    console = make_console()
    monkeypatch.setattr(bad_updates_module, "save_tensors", half)
    with monkeypatch.context() as patched:
        patched.setattr(bad_updates_module.torch, "save", is_full)
        patched.setattr(train_module.Run, "stage_checkpoint", lambda self: {})
        with pytest.raises(TrainingDiverged, match=rf"3 times in a row, after 1 updates.*; what it met could .*{FULL}"):
            train(config, console)
    assert [row["skipped_updates"] for row in rows(config)] == [0, 1, 1]
    notes = [note for note in console.notes if "skipped an update" in note]
    assert len(notes) == 3 and all("could not be kept" in note and FULL in note for note in notes)
    assert list((config.run_directory / "bad_steps").iterdir()) == []


# -------------------------------------------------------------------------------------------------------- the run's own


@pytest.mark.parametrize("what", ["metrics", "trajectories"])
def test_a_run_that_cannot_write_its_rows_stops_and_goes_on_later(
    make_config, make_console, tmp_path, monkeypatch, capsys, what
):
    config = make_config(
        train={"num_steps": 4}, eval={"sets": {}}, checkpoint={"every": 1}, run={"trajectories_every": 1}
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    file = {"metrics": "metrics.jsonl", "trajectories": "step_000003.jsonl"}[what]
    with monkeypatch.context() as patched:
        own = {"metrics": MetricsLog._append, "trajectories": metrics_module.trajectory_record}[what]

        def until_it_is_full(*arguments):
            is_third = len(list((config.run_directory / "trajectories").glob("step_*"))) == 2
            return is_full() if is_third else own(*arguments)

        if what == "metrics":

            def append(self, line):
                with naming(self.run_dir / "metrics.jsonl"):
                    until_it_is_full(self, line)

            patched.setattr(MetricsLog, "_append", append)
        else:
            patched.setattr(metrics_module, "trajectory_record", until_it_is_full)
        assert main([str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"error: what step 3 came to could not be written: {config.run_directory}" in error
    assert f"{file}: no space left on device; mend that and go on with run.resume=true" in error
    assert os.readlink(config.run_directory / "checkpoints" / "latest") == "step_000002"
    result = train(load_config(tmp_path / "config.yaml", ["run.resume=true"]), make_console())
    assert result["step"] == 4
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4]
    assert len(list((config.run_directory / "trajectories").glob("step_*"))) == 4


def test_a_configuration_is_whole_or_not_there(make_config, make_console, monkeypatch):
    """An empty file would be read as the defaults."""
    config = make_config(train={"num_steps": 1}, eval={"sets": {}})
    train(config, make_console())
    before = (config.run_directory / "config.yaml").read_text()
    write_text = Path.write_text

    def cut(self, text, **options):
        if self.name.startswith(".config.yaml"):
            write_text(self, text[:9], **options)
            is_full()
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", cut)
    again = make_config(train={"num_steps": 2}, eval={"sets": {}}, run={"resume": True})
    with pytest.raises(OSError, match=FULL) as failure:
        train(again, make_console())
    assert failure.value.filename == str(config.run_directory / "config.yaml")
    assert (config.run_directory / "config.yaml").read_text() == before
