"""Started by test_resharding.py on two ranks: `two_writers.py OUTPUT CONFIG` lets writes and updates fail on one."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter

from searchr1_fast import bad_updates as bad_updates_module
from searchr1_fast import checkpoint
from searchr1_fast.bad_updates import BadUpdate, MicroBatch, NotKept, write_bad_update
from searchr1_fast.checkpoint import Checkpoint, CheckpointFailed, latest_checkpoint
from searchr1_fast.checkpoint_writer import CheckpointWriter
from searchr1_fast.config import Config, load_config
from searchr1_fast.distributed import Ranks, process
from searchr1_fast.distributed import full as full_tensor
from searchr1_fast.models import meta_model
from searchr1_fast.policy import Policy
from searchr1_fast.types import PackedBatch


def full(*_) -> None:
    """Fail like a disk without room."""
    raise OSError(28, "No space left on device")


def full_in_torch(*_) -> None:
    """Fail as torch does when the disk has no room."""
    try:
        full()
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")


def failures(output: Path, ranks: Ranks) -> list[str]:
    """-> messages of writes that fail in one part: on rank 1 alone, or on rank 0 in the part that only it does."""
    said = []
    parts = [
        (FileSystemWriter, "write_data", 1, full_in_torch),
        (checkpoint, "_checksum", 1, full),
        (checkpoint, "_publish", 0, full),
    ]
    for step, (owner, part, failing, fail) in enumerate(parts, start=1):
        writer, before = CheckpointWriter(output / part, ranks, keep=1), getattr(owner, part)
        writer.stage(step, {"a": torch.ones(2)}, {}, {}, lambda weights, directory: None)
        if ranks.rank == failing:
            setattr(owner, part, fail)
        writer.start()
        try:
            writer.wait()
        except CheckpointFailed as failure:
            said.append(str(failure))
        setattr(owner, part, before)
    return said


def found_together(output: Path, ranks: Ranks) -> int:
    """-> the number of the `check` that reports a failure; rank 1's thread ends long after rank 0's."""
    writer, before = CheckpointWriter(output, ranks, keep=1), checkpoint._publish
    writer.stage(1, {"a": torch.ones(2)}, {}, {}, lambda weights, directory: None)
    checkpoint._publish = full
    run = writer._run
    writer._run = lambda contents: (run(contents), time.sleep(0.5 * ranks.rank))
    writer.start()
    for number in range(600):
        try:
            writer.check()
        except CheckpointFailed:
            checkpoint._publish = before
            return number
        ranks.barrier()  # would hang if only one rank had been told
        time.sleep(0.05)
    raise AssertionError("nobody was told")


def beside_training(output: Path, ranks: Ranks) -> list[float]:
    """Call collectives in the main thread while another thread writes -> what was written."""
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


def batch(rank: int, is_bad: bool) -> PackedBatch:
    """One sequence of six tokens, four of them the policy's; a bad one has a NaN among its advantages."""
    advantages = torch.tensor([1.0, 1.0, float("nan") if is_bad else 1.0, 1.0])
    return PackedBatch(
        token_ids=torch.arange(6) + rank,
        positions=torch.arange(6),
        cu_seqlens=torch.tensor([0, 6], dtype=torch.int32),
        max_seqlen=6,
        policy_index=torch.arange(1, 5),
        targets=torch.arange(2, 6) + rank,
        policy_cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
        rollout_logprobs=torch.full((4,), -5.0),
        advantages=advantages,
        trajectory_index=[rank],
    )


def bad_updates(output: Path, config: Config, ranks: Ranks) -> list:
    """Updates that are not finite on rank 1 alone, in gradient or in loss: both ranks skip them, one keeps them.

    Gradients are summed over ranks after the last micro-batch, and the first is the bad one. The next update must equal
    that of a policy that never met the bad ones.
    """
    directory = Path(config.model.path)
    held = {"reshard_after": "update", "reduce_after": "update"}
    config = config.model_copy(update={"train": config.train.model_copy(update=held)})
    policy, fresh = (Policy(meta_model(directory), config, ranks, weights=directory) for _ in range(2))
    good = [batch(ranks.rank, False) for _ in range(2)]
    micro_batches = [batch(ranks.rank, ranks.rank == 1), good[1]]
    norms = [policy.update(micro_batches, 16)[1]]
    diagnosis, kept = policy.diagnosis, [MicroBatch(ranks.rank, micro_batch) for micro_batch in micro_batches]
    bad = BadUpdate(1, 0, policy.name, policy.num_updates, 16, True, diagnosis, config.to_yaml(), kept)
    write, bad_updates_module._write_values = bad_updates_module._write_values, full  # rank 0 alone calls it
    try:
        write_bad_update(output, bad, policy, torch.float32)
    except NotKept as failure:
        not_kept = str(failure)
    bad_updates_module._write_values = write
    path = write_bad_update(output, bad, policy, torch.float32)
    loss = policy.loss
    if ranks.rank == 1:
        policy.loss = lambda *arguments: (loss(*arguments)[0] + float("inf"), {})
    norms.append(policy.update(good, 16)[1])
    policy.loss = loss
    norms.append(policy.update(good, 16)[1])
    assert norms[2] == fresh.update(good, 16)[1]
    pairs = zip(policy.parameters.values(), fresh.parameters.values(), strict=True)
    assert all(torch.equal(full_tensor(one), full_tensor(other)) for one, other in pairs)
    return [str(path), [math.isfinite(norm) for norm in norms], policy.num_skipped, diagnosis, not_kept]


def main() -> None:
    """Write OUTPUT/writer<rank>.json."""
    output, config = Path(sys.argv[1]), load_config(sys.argv[2])
    with process("cpu", num_threads=1) as ranks:
        report = {"failures": failures(output / "full", ranks), "read": beside_training(output / "room", ranks)}
        report["told"] = found_together(output / "together", ranks)
        report["bad"] = bad_updates(output / "bad_steps", config, ranks)
        (output / f"writer{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
