"""Updates whose loss or gradient was not finite, kept for inspection: `searchr1 replay` computes them again.

    <run>/bad_steps/step_000012_policy_0.pt        the micro-batches of all ranks and the other inputs of the loss
                    policy_000123.safetensors      the weights they met, after that many updates; the newest two

A skipped update changes nothing, so skipped updates in a row meet the same weights and share a file. Weights are as
large as the model, so older ones are deleted; a checkpoint near them may stand in. Files are complete or absent: if a
full disk has no room for one, this is reported and training goes on, which needs none of them.

Shape legend: P policy tokens of a micro-batch.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from searchr1_fast.distributed import full
from searchr1_fast.files import said, whole_file
from searchr1_fast.models.tensor_files import save_tensors
from searchr1_fast.policy import Learner
from searchr1_fast.types import PackedBatch, SharedPrefixes

FOLDER = "bad_steps"
KEPT_WEIGHTS = 2


class NotKept(Exception):
    """An update or its weights could not be written. The message is made to follow a semicolon."""


@dataclass(slots=True)
class MicroBatch:
    """A forward and backward pass of one rank, and what its loss took besides the batch."""

    rank: int
    batch: PackedBatch
    ref_logprobs: torch.Tensor | None = None  # [P] fp32
    returns: torch.Tensor | None = None  # [P] fp32, the critic's
    old_values: torch.Tensor | None = None  # [P] fp32, the critic's

    def inputs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All floating-point inputs that came from outside, by name, each [P]."""
        for owner, names in ((self.batch, ("rollout_logprobs", "advantages")), (self, ("ref_logprobs", "returns"))):
            yield from ((name, getattr(owner, name)) for name in names if getattr(owner, name) is not None)
        if self.old_values is not None:
            yield "old_values", self.old_values


@dataclass(slots=True)
class BadUpdate:
    """An optimizer step that was skipped."""

    step: int
    minibatch: int  # of the step, from 0
    learner: str  # `policy` or `critic`
    num_updates: int  # applied before it
    denominator: int  # policy tokens, all ranks together
    on_policy: bool
    diagnosis: str  # what the learner saw
    config: str  # of the run, YAML
    micro_batches: list[MicroBatch]  # of all ranks, by rank

    @property
    def file_name(self) -> str:
        """The update's file, within the folder."""
        return f"step_{self.step:06d}_{self.learner}_{self.minibatch}.pt"

    @property
    def weights_name(self) -> str:
        """The file with the weights that it met, within the folder."""
        return f"{self.learner}_{self.num_updates:06d}.safetensors"


def write_bad_update(folder: Path, update: BadUpdate, learner: Learner, dtype: torch.dtype) -> Path:
    """Write the update, and its weights in the type `dtype` of the computation; -> the update's file.

    Every rank calls this with its own micro-batches; rank 0 writes all of them. A failure is NotKept on all ranks.
    """
    ranks = learner.ranks
    shares = ranks.gather([_on_host(asdict(micro_batch)) for micro_batch in update.micro_batches])
    path, weights = folder / update.file_name, folder / update.weights_name
    values = {field.name: getattr(update, field.name) for field in fields(update)}
    values["micro_batches"] = [micro_batch for share in shares for micro_batch in share]
    failure = ranks.broadcast(_failure(partial(_write_values, path, values)) if ranks.is_main else None)
    if failure is not None:
        raise NotKept(f"what it met could not be kept in {folder}: {failure}")
    # The second in a row meets what the first met. At the first, a file there may be of a run that was rolled back.
    if learner.skipped_in_a_row == 1 or not ranks.broadcast(weights.is_file()):
        tensors = _gather_weights(learner, dtype)
        failure = ranks.broadcast(_failure(partial(_write_weights, weights, tensors)) if ranks.is_main else None)
        if failure is not None:
            raise NotKept(f"searchr1 replay {path} --model CHECKPOINT, as its weights could not be kept: {failure}")
    return path


def read_bad_update(path: Path) -> BadUpdate:
    """Read what `write_bad_update` wrote. ValueError if the file is something else."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; a run keeps its bad updates in <run>/{FOLDER}/step_*.pt")
    try:
        if not zipfile.is_zipfile(path):  # for anything else, torch.load's errors are of any kind
            raise ValueError("torch.save did not write it")
        values = torch.load(path, map_location="cpu", weights_only=True)
        values["micro_batches"] = [_micro_batch(micro_batch) for micro_batch in values["micro_batches"]]
        return BadUpdate(**values)
    except (RuntimeError, UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an update that a run has kept ({type(error).__name__}: {error})") from error


def _failure(write: Callable[[], None]) -> str | None:
    """Call `write`; return what the system says if that fails."""
    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's error for a full disk is a RuntimeError
        return said(error)
    return None


def _write_values(path: Path, values: dict[str, Any]) -> None:
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(values, file)


def _gather_weights(learner: Learner, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gather the weights on rank 0, one parameter after the other; nothing on the others. A collective."""
    tensors = {}
    for name, parameter in learner.parameters.items():
        whole = full(parameter.detach().to(dtype))
        if learner.ranks.is_main:
            tensors[name] = whole.cpu().clone()
    return tensors


def _write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.unlink(missing_ok=True)  # of a run that was rolled back; must not stay if the new ones find no room
    with whole_file(path) as temporary:
        save_tensors(tensors, temporary)
    newest = sorted(path.parent.glob("*.safetensors"), key=os.path.getmtime)
    for old in newest[:-KEPT_WEIGHTS]:
        old.unlink()


def _on_host(value: Any) -> Any:
    """The same value with every tensor on the CPU."""
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _micro_batch(values: dict[str, Any]) -> MicroBatch:
    batch = values["batch"]
    if batch["prefixes"] is not None:
        batch = batch | {"prefixes": SharedPrefixes(**batch["prefixes"])}
    return MicroBatch(**values | {"batch": PackedBatch(**batch)})
