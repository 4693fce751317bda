"""Checkpoints: a run can be stopped at any moment, and resumes as if it had not been.

    <run>/checkpoints/step_000100/state/    what is learned, and the optimizers' tensors (torch.distributed.checkpoint:
                                            each rank writes its shards), trainer.pt, manifest.json, searches-00000.bin
                                            of each rank whose retriever remembers them
                     step_000100/hf/        the policy and its tokenizer as a Hugging Face directory
                     step_000100/adapter/   if an adapter is learned: the adapter alone, and the tokenizer
                     latest                 link to the newest, replaced last
                     best                   link to the one with the best evaluation score, if `checkpoint.best` is set

A checkpoint is written under another name, flushed to the disk, and renamed when complete. So a folder called step_* is
complete, and the manifest's sizes and checksums prove it again before it is read. A different number of ranks may read
it. With several nodes, the run folder must be on a file system that they share. checkpoint_writer.py decides when a run
writes, and in which thread.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from searchr1_fast.distributed import Ranks
from searchr1_fast.files import of_the_system, said

LATEST = "latest"
BEST = "best"
MANIFEST = "manifest.json"
TRAINER = "trainer.pt"
COPY_AHEAD = 10_000_000  # bytes copied from a device ahead of writing; torch's own choice

T = TypeVar("T")

# Saving from a single process is intended. Set once, here: a filter around a call would apply to every thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class CheckpointFailed(ValueError):
    """A checkpoint could not be written. A ValueError because the disk is the user's; the message quotes the cause."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds; none of it may change until it is written."""

    step: int
    tensors: dict[str, torch.Tensor]  # whole tensors or DTensors, any shapes
    trainer_state: dict[str, Any]  # only what torch.load(weights_only=True) reads; rank 0's is kept
    rng_states: list[dict[str, Any]]  # by rank
    export: Callable[[Path], None]  # writes the Hugging Face directory; called on rank 0
    best_step: int | None = None  # the step that `best` links to from now on, this one or an older one


def begin_checkpoint(
    root: Path,  # <run>/checkpoints
    step: int,
    ranks: Ranks,
    save_searches: Callable[[Path], None] = lambda path: None,  # may write that file; called on every rank
) -> list[dict[str, Any]]:
    """Make room for step_<step> and write what the next step would change: the searches that retrievers remember.

    -> the state of the random generators, by rank. Every rank calls this.
    """
    temporary = _temporary(root, step)

    def clear() -> None:
        if ranks.is_main:
            _clear(root)  # what a run that was killed left of any step: it may be as large as this one will be
            (temporary / "state").mkdir(parents=True)

    _everywhere(clear, root, step, ranks)  # also the barrier before the first write
    _everywhere(lambda: save_searches(temporary / "state" / _searches(ranks.rank)), root, step, ranks)
    return ranks.gather(_rng_state())


def write_checkpoint(root: Path, contents: Contents, ranks: Ranks, keep: int) -> Path:
    """Fill the folder that was begun, make it `latest`, delete all but the newest `keep` and `best`.

    Every rank calls this; a second thread may, with `Ranks.apart`. CheckpointFailed on all ranks if any of them fails.
    """
    step = contents.step
    final, temporary = root / _name(step), _temporary(root, step)
    _everywhere(lambda: _write_files(temporary, contents, ranks), root, step, ranks)
    files = ranks.broadcast(sorted(path for path in temporary.rglob("*") if path.is_file()))
    mine = _everywhere(lambda: [_checksum(path) for path in ranks.share(files)], root, step, ranks)
    checksums = ranks.unshare(mine)

    def finish() -> None:
        if not ranks.is_main:
            return
        manifest = {
            str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "crc32": checksum}
            for path, checksum in zip(files, checksums, strict=True)
        }
        (temporary / "state" / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _flush_tree(temporary)
        _publish(temporary, final)
        _point(root / LATEST, final)
        if contents.best_step is not None and (best := root / _name(contents.best_step)).is_dir():
            _point(root / BEST, best)
        _prune(root, step, keep)

    _everywhere(finish, root, step, ranks)
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint, or None if there is none. ValueError if `latest` leads nowhere.

    Without `latest`, it is the one of the last step: the folder may be a copy on a file system without links, or its
    run was killed just before the first link. Starting over would cut back the metrics of a run that has checkpoints.
    """
    link = root / LATEST
    if not link.is_symlink():
        if link.is_dir():
            raise ValueError(f"{link} is a folder, where a link to one of the step_* beside it should be; delete it")
        return max(_complete(root), key=_number, default=None)
    path = root / os.readlink(link)
    if not path.is_dir():
        raise ValueError(f"{link} names {path.name}, which is gone; point it at one of the step_* folders beside it")
    return path


class Checkpoint:
    """One checkpoint on disk, verified. `trainer_state` is what was saved; `read` fills tensors in place."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path = path
        self._ranks = ranks
        self._verify()
        state: dict[str, Any] = torch.load(path / "state" / TRAINER, map_location="cpu", weights_only=True)
        self._rng_states: list[dict[str, Any]] = state.pop("rng_states")
        self.step: int = state.pop("step")
        self.trainer_state = state
        metadata = dcp.FileSystemReader(path / "state").read_metadata().state_dict_metadata
        self._shapes = {key: entry.size for key, entry in metadata.items()}
        self.keys = frozenset(metadata)

    @property
    def searches(self) -> Path:
        """The file of what this rank's retriever remembered, or another's if there were fewer. It may not exist."""
        num_files = len(list((self.path / "state").glob(_searches("*"))))
        return self.path / "state" / _searches(self._ranks.rank % max(1, num_files))

    def read(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill every tensor from the checkpoint, bit for bit, and set the random generators. Every rank calls this."""
        missing, surplus = sorted(tensors.keys() - self.keys), sorted(self.keys - tensors.keys())
        if missing or surplus:
            what = f"lacks {missing[0]!r}" if missing else f"also holds {surplus[0]!r}"
            raise ValueError(
                f"checkpoint {self.path} is of another kind of run: it {what}; "
                "resume with the model and algorithm that the run began with"
            )
        for key, tensor in tensors.items():
            saved, own = tuple(self._shapes[key]), tuple(tensor.shape)
            if saved != own:
                raise ValueError(
                    f"checkpoint {self.path}: {key} is {saved}, the model's is {own}; "
                    "resume with the model that the run began with"
                )
        dcp.load(tensors, checkpoint_id=self.path / "state", no_dist=self._ranks.world_size == 1)
        if self._ranks.rank < len(self._rng_states):  # ranks that joined since keep the state they were seeded with
            _set_rng_state(self._rng_states[self._ranks.rank])

    def _verify(self) -> None:
        """Check that every file in the manifest is there and has its checksum; the ranks share the reading."""
        manifest_path = self.path / "state" / MANIFEST
        if not manifest_path.is_file():
            raise ValueError(f"checkpoint {self.path} is incomplete: it has no state/{MANIFEST}")
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"checkpoint {self.path} is damaged: state/{MANIFEST} is not JSON") from error
        mine = self._ranks.share(sorted(manifest))
        damages = self._ranks.unshare([_damage(self.path / name, manifest[name]) for name in mine])
        for name, damage in zip(sorted(manifest), damages, strict=True):
            if damage:
                raise ValueError(
                    f"checkpoint {self.path} is damaged: {name} {damage}; delete the folder and point "
                    f"{self.path.parent / LATEST} at an older one"
                )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    saved_keys: Collection[str] | None = None,
    new_state: Callable[[torch.nn.Parameter], dict[str, torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by `<parameter>.<entry>`: those it has or, with `saved_keys`, new ones to read the saved
    ones into, made by `new_state` (None: on the parameter's device).

    AdamW makes its state at a parameter's first step. torch's own helper for state dicts takes such a step to make it,
    which counts in the bias correction. Here what was absent stays absent, so a resumed run stays bitwise equal.
    """
    tensors = {}
    for name, parameter in parameters.items():
        if saved_keys is not None and f"{name}.step" in saved_keys:
            optimizer.state[parameter] = (new_state or _new_state)(parameter)
        for entry, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{entry}"] = tensor
    return tensors


def _new_state(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's state, of zeros."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


def _everywhere(action: Callable[[], T], root: Path, step: int, ranks: Ranks) -> T:
    """Run `action` and return its result. If it fails on any rank, all of them raise: none waits for one that left."""
    result, failure = None, None
    try:
        result = action()
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        failure = error
    first = next((one for one in ranks.gather(_said(failure, ranks.rank)) if one), None)
    if first is not None:
        if ranks.is_main:  # nobody writes there any more, and its content may be what filled the disk
            shutil.rmtree(_temporary(root, step), ignore_errors=True)
        rank, text = first
        where = f" on rank {rank}" if ranks.world_size > 1 else ""
        raise CheckpointFailed(
            f"the checkpoint of step {step} could not be written to {root}{where}: {text}; {_newest(root)}. "
            "Mend that and go on with run.resume=true"
        ) from failure
    return result


def _newest(root: Path) -> str:
    """Say, for a person, what a run can be resumed from, or what is wrong with it."""
    try:
        newest = latest_checkpoint(root)
    except ValueError as error:
        return str(error)
    return "there is none before it" if newest is None else f"the newest that is whole is {newest.name}"


def _said(failure: BaseException | None, rank: int) -> tuple[int, str] | None:
    """The rank of a failure, and the failure in one line; of several that torch gathered from ranks, the first."""
    if isinstance(failure, dcp.CheckpointException):
        rank, (failure, _) = next(iter(failure.failures.items()))
    return None if failure is None else (rank, said(failure))


class _Writer(dcp.FileSystemWriter):
    """Raises the system's own error: the cause of an exception does not travel with it to other ranks."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise of_the_system(error) from error


def _write_files(temporary: Path, contents: Contents, ranks: Ranks) -> None:
    """Write this rank's shards and, on rank 0, all that is not sharded."""
    path = temporary / "state"
    # When torch copies ahead of writing, it waits on the device's current stream, even for tensors on the host: every
    # few MB would wait for whatever training has queued there.
    on_host = all(tensor.device.type == "cpu" for tensor in contents.tensors.values())
    writer = _Writer(path, per_thread_copy_ahead=0 if on_host else COPY_AHEAD)
    dcp.save(contents.tensors, storage_writer=writer, no_dist=ranks.world_size == 1, process_group=ranks.group)
    if ranks.is_main:
        state = {"step": contents.step, "rng_states": contents.rng_states}
        with (path / TRAINER).open("wb") as file:  # given a path, torch.save hides the system's error
            torch.save(contents.trainer_state | state, file)
        (temporary / "hf").mkdir()
        contents.export(temporary / "hf")


def _searches(rank: int | str) -> str:
    return f"searches-{rank if isinstance(rank, str) else f'{rank:05d}'}.bin"


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _number(path: Path) -> int:
    """The inverse of `_name`."""
    return int(path.name.removeprefix("step_"))


def _temporary(root: Path, step: int) -> Path:
    return root / f".{_name(step)}.partial"


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _damage(path: Path, expected: dict[str, int]) -> str:
    """What is wrong with a file, or ""."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"has {path.stat().st_size} bytes instead of {expected['bytes']}"
    return "" if _checksum(path) == expected["crc32"] else "has another checksum than when it was written"


def _flush_tree(directory: Path) -> None:
    """Force every file, then every folder, to the disk, so that the rename that follows cannot get there first."""
    for path in sorted(directory.rglob("*"), reverse=True):
        _flush(path)
    _flush(directory)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name, in place of one of the same step left by a run that was rolled back."""
    if final.exists():
        _put_aside(final)
    temporary.rename(final)
    _flush(final.parent)


def _put_aside(path: Path) -> Path:
    """Rename a checkpoint atomically before it is deleted, so that a half-deleted one is never taken for complete."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def _point(link: Path, path: Path) -> None:
    """Point a link beside the folder at it, atomically."""
    new = link.with_name(f".{link.name}.partial")
    new.unlink(missing_ok=True)
    new.symlink_to(path.name, target_is_directory=True)
    new.replace(link)
    _flush(link.parent)


def _prune(root: Path, step: int, keep: int) -> None:
    """Delete checkpoints beyond the newest `keep`, except the best, and the leftovers of writes that never finished."""
    best = root / BEST
    kept = root / os.readlink(best) if best.is_symlink() else None
    older = [path for path in _complete(root) if _number(path) <= step]
    for path in sorted(older, key=_number)[:-keep]:
        if path != kept:
            _put_aside(path)
    _clear(root)


def _complete(root: Path) -> list[Path]:
    """The checkpoints in the folder, without copies that a person made."""
    return [path for path in root.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name) and path.is_dir()]


def _clear(root: Path) -> None:
    """Delete what was begun, or put aside, but never finished."""
    for path in root.glob(".step_*"):
        shutil.rmtree(path)


def _rng_state() -> dict[str, Any]:
    """The state of every random generator in this process, in types that a safe torch.load reads."""
    _, numpy_keys, numpy_position, numpy_has_gauss, numpy_gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # asking would initialise it
        "numpy": (torch.from_numpy(numpy_keys.astype(np.int64)), numpy_position, numpy_has_gauss, numpy_gauss),
        "python": random.getstate(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
