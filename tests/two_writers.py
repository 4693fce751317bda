"""What test_resharding.py starts on two ranks: `two_writers.py OUTPUT` lets writes fail on one of them, and writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter

from searchr1_fast import checkpoint
from searchr1_fast.checkpoint import Checkpoint, CheckpointFailed, latest_checkpoint
from searchr1_fast.checkpoint_writer import CheckpointWriter
from searchr1_fast.distributed import Ranks, process


def full(*_) -> None:
    """A disk without room."""
    raise OSError(28, "No space left on device")


def failures(output: Path, ranks: Ranks) -> list[str]:
    """What a write says that fails on rank 1 alone, or on rank 0 in what only that does, by its part."""
    said = []
    parts = [(FileSystemWriter, "write_data", 1), (checkpoint, "_checksum", 1), (checkpoint, "_publish", 0)]
    for step, (owner, part, failing) in enumerate(parts, start=1):
        writer, before = CheckpointWriter(output / part, ranks, keep=1), getattr(owner, part)
        writer.stage(step, {"a": torch.ones(2)}, {}, {}, lambda weights, directory: None)
        if ranks.rank == failing:
            setattr(owner, part, full)
        writer.start()
        try:
            writer.wait()
        except CheckpointFailed as failure:
            said.append(str(failure))
        setattr(owner, part, before)
    return said


def beside_training(output: Path, ranks: Ranks) -> list[float]:
    """Collectives of the main thread while another writes; then what was written."""
    writer = CheckpointWriter(output, ranks, keep=2)
    sums = []
    for step in (1, 2):
        value = torch.full((3,), float(step))
        writer.stage(step, {"a": value}, {}, {}, lambda weights, directory: None)
        writer.start()
        value.zero_()
        sums += [ranks.sum(ranks.rank + step) for _ in range(50)]
    writer.wait()
    restored = {"a": torch.zeros(3)}
    Checkpoint(latest_checkpoint(output), ranks).read(restored)
    assert sums == [2 * step + 1 for step in (1, 2) for _ in range(50)], sums
    return restored["a"].tolist()


def main() -> None:
    """Writes OUTPUT/writer<rank>.json."""
    output = Path(sys.argv[1])
    with process("cpu", num_threads=1) as ranks:
        report = {"failures": failures(output / "full", ranks), "read": beside_training(output / "room", ranks)}
        (output / f"writer{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
