"""Ctrl-C, sent as a terminal does, to every process of the run at once: no process stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import environment

from searchr1_fast.metrics import read_metrics

SECONDS = 120  # before a run is given up
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def members(mark: str) -> list[int]:
    """Ids of the living processes with `mark` in their environment, whatever started them.

    A session would not find them: torchrun gives each rank one of its own.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():  # a zombie has no environment
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="asks /proc who is alive")
@pytest.mark.parametrize(("launcher", "presses"), [((), 1), (RANKS, 1), (RANKS, 2)], ids=["alone", "ranks", "ranks-2"])
def test_an_interrupted_run_leaves_nobody_behind(make_config, tmp_path, launcher, presses):
    """Even with searches in flight, a batcher's threads and a launcher's children."""
    config = make_config(
        run={"num_threads": 1},
        train={"num_steps": 1000},
        eval={"sets": {}},
        rollout={"overlap": True},
        retrieval={"backend": "dense", "topk": 1, "hashing_dimension": 64, "timeout_seconds": 60.0},
    )
    yaml = tmp_path / "run.yaml"
    yaml.write_text(config.to_yaml())
    child = subprocess.Popen(
        [sys.executable, *launcher, "-m", "searchr1_fast.train", str(yaml)],
        env=environment(OMP_NUM_THREADS="1", INTERRUPTED=str(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rows, mark = config.run_directory / "metrics.jsonl", f"INTERRUPTED={tmp_path}"
    try:
        wait_for(lambda: child.poll() is not None or (rows.is_file() and rows.stat().st_size > 0), "no step was done")
        assert child.poll() is None, child.communicate()[1][-4000:]
        assert len(members(mark)) >= (3 if launcher else 1)
        for _ in range(presses):
            os.killpg(child.pid, signal.SIGINT)
            time.sleep(0.2)  # two at the same time would count as one
        _, errors = child.communicate(timeout=SECONDS)
        wait_for(lambda: not members(mark), "a process stayed behind")
    finally:
        for pid in members(mark):
            os.kill(pid, signal.SIGKILL)
        child.communicate()
    assert child.returncode != 0
    assert errors.count("stopping after this step, with a checkpoint") == 1
    if not launcher:
        last = read_metrics(config.run_directory)[-1]["step"]
        assert os.readlink(config.run_directory / "checkpoints" / "latest") == f"step_{last:06d}"
