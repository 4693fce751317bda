"""When a run writes its checkpoints, and in which thread: training goes on while the disk works.

A save has two halves. `stage` stops training for the time of a copy: every tensor to the host, into memory that the
next save reuses, with everything else that the next step would change. `start` hands the copy to a thread, which writes
it (checkpoint.py) and renames it when complete. There is one write at a time: `stage` waits for the one before.

    loop   … step 50 | stage, row of metrics, start | step 51 | step 52 | …
    thread                                     write, checksum, flush, rename, link

The step's row is written between the two halves, so a run that resumes from a checkpoint has the rows of all its steps.
A failed write is raised in the loop at the next `check`, `stage` or `wait`, on every rank.
`background=False` is the plain twin: nothing is copied, and `start` returns when the checkpoint is complete.
Left out: pinned memory for the copy. Copies would be faster, and take as much again of memory that cannot be swapped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from searchr1_fast.checkpoint import Contents, begin_checkpoint, write_checkpoint
from searchr1_fast.distributed import Ranks
from searchr1_fast.offload import local


class CheckpointWriter:
    """The checkpoints of one run. Every rank has one, and calls the same methods in the same order."""

    def __init__(self, root: Path, ranks: Ranks, keep: int, background: bool = True) -> None:
        """`root`: <run>/checkpoints. A collective; make it once every process group that training needs is there."""
        self.root, self.keep, self.background = root, keep, background
        self._ranks = ranks
        self._apart = ranks.apart() if background else ranks
        self._copies: dict[str, torch.Tensor] = {}  # on the host, by name
        self._staged: Contents | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._seconds: float | None = None  # that the last write took

    def stage(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],  # whole tensors or DTensors, any shapes
        trainer_state: dict[str, Any],
        weights: dict[str, torch.Tensor],  # whole
        export: Callable[[dict[str, torch.Tensor], Path], None],  # writes such weights as a Hugging Face directory
        best_step: int | None = None,
        save_searches: Callable[[Path], None] = lambda path: None,
    ) -> dict[str, float]:
        """Collect what the checkpoint of a step will hold; afterwards training may go on.

        -> seconds: `time_checkpoint_wait` for the write before, `time_checkpoint` for this copy and, from the second
        save on, `time_checkpoint_write` that the write before took, most of it while training went on.
        """
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter()
        rng_states = begin_checkpoint(self.root, step, self._ranks, save_searches)
        if self.background:
            tensors = self._copied("state", tensors)
            weights = self._copied("hf", weights) if self._ranks.is_main else {}
        self._staged = Contents(step, tensors, trainer_state, rng_states, partial(export, weights), best_step)
        times = {"time_checkpoint_wait": waited - started, "time_checkpoint": time.perf_counter() - waited}
        return times if self._seconds is None else times | {"time_checkpoint_write": self._seconds}

    def start(self) -> None:
        """Write what was staged, if anything was."""
        contents, self._staged = self._staged, None
        if contents is None:
            return
        if not self.background:
            self._write(contents)
            return
        # A daemon: ending the process at once does not wait for a disk, and loses what was not complete yet.
        self._thread = threading.Thread(target=self._run, args=(contents,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether the thread is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise a write's failure, once the write has ended on every rank: all raise, or none. Waits for no disk."""
        if not self._ranks.max(self.is_writing):
            self.wait()

    def wait(self) -> None:
        """Wait until the write is done. CheckpointFailed, once, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def settle(self, note: Callable[[str], None]) -> None:
        """`wait` in a run that has already failed: what it saved last may be all that is left of it."""
        try:
            self.wait()
        except Exception as failure:  # whatever it is (a peer that has gone, say): the run's own error is raised
            note(f"{type(failure).__name__}: {failure}")

    def _run(self, contents: Contents) -> None:
        """The body of the thread."""
        try:
            if self._ranks.device.type == "cuda":
                torch.cuda.set_device(self._ranks.device)  # or it would make a context on the first GPU
            self._write(contents)
        except BaseException as failure:  # in a thread: raised in the loop
            self._failure = failure

    def _write(self, contents: Contents) -> None:
        started = time.perf_counter()
        write_checkpoint(self.root, contents, self._apart, self.keep)
        self._seconds = time.perf_counter() - started

    def _copied(self, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy to the host, where nothing changes before the next save; of a DTensor, only this rank's shard."""
        copies = {}
        for name, tensor in tensors.items():
            key = f"{prefix}/{name}"
            if key in self._copies:
                local(self._copies[key]).copy_(local(tensor.detach()))
            else:
                self._copies[key] = tensor.detach().to("cpu", copy=True)
            copies[name] = self._copies[key]
        return copies
