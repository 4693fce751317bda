"""What a run records: metrics.jsonl, TensorBoard, wandb, trajectories, and phase timers.

metrics.jsonl is the source of truth and everything else is drawn from it: one flat JSON object per step, flushed line
by line, and cut back to the checkpoint's step on resume, so that a step never appears twice. Rank 0 writes; the others
own no log. Left out: means over time and smoothing, which belong to whoever reads the file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from searchr1_fast.files import naming, write_jsonl
from searchr1_fast.types import Trajectory

METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"


class MetricsLog:
    """Appends one row per step.

    `resume_step`: the step of the checkpoint that the run resumes from; later rows are dropped (-1 drops all of them).
    None: a new run. ValueError if a new run's folder already has rows, or while another process writes there.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool = False,
        wandb: bool = False,
        resume_step: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        # Optional packages first: a missing one must not leave a half-made folder behind.
        wandb_module = _import_wandb() if wandb else None
        writer_class = _import_tensorboard() if tensorboard else None
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard, self._wandb = None, None
        # Released if anything fails on the way: this process may want the folder again, with other settings.
        with ExitStack() as undo:
            undo.enter_context(_lock(self.run_dir))
            self._last_step = _truncate(self.run_dir, resume_step)
            self._file = undo.enter_context((self.run_dir / METRICS_FILE).open("ab", buffering=0))
            if writer_class is not None:
                purge = None if resume_step is None else resume_step + 1
                self._tensorboard = writer_class(str(self.run_dir / "tensorboard"), purge_step=purge)
            if wandb_module is not None:
                # With the folder's name as id, a resumed run continues on its own wandb page.
                self._wandb = wandb_module.init(
                    project="searchr1_fast", id=self.run_dir.name, name=self.run_dir.name, resume="allow",
                    dir=str(self.run_dir), config=dict(config or {}),
                )  # fmt: skip
            self._open_files = undo.pop_all()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append `row`; `row["step"]` must be above every step before it."""
        step = int(row["step"])
        assert step > self._last_step, f"step {step} after step {self._last_step}"
        plain = {key: plain_number(value) for key, value in row.items()}
        self._append(json.dumps({"step": step} | plain, ensure_ascii=False, allow_nan=False) + "\n")
        self._last_step = step
        scalars = {key: value for key, value in plain.items() if key != "step" and _is_number(value)}
        if self._tensorboard is not None:
            self._write_tensorboard(scalars, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def _write_tensorboard(self, scalars: Mapping[str, float], step: int) -> None:
        try:
            with naming(self.run_dir / "tensorboard"):
                for key, value in scalars.items():
                    self._tensorboard.add_scalar(_tensorboard_tag(key), value, step)
                self._tensorboard.flush()
        except OSError:
            self._tensorboard = None  # its thread has ended; closing it would fail once more
            raise

    def _append(self, line: str) -> None:
        """Append the whole line or nothing of it."""
        rest, end = line.encode(), self._file.seek(0, os.SEEK_END)
        try:
            with naming(self.run_dir / METRICS_FILE):
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(end)
            raise

    def write_trajectories(self, step: int, trajectories: Sequence[Trajectory]) -> Path:
        """Write trajectories/step_000010.jsonl, whole or not at all."""
        path = self.run_dir / "trajectories" / f"step_{step:06d}.jsonl"
        write_trajectories(path, trajectories)
        return path

    def close(self) -> None:
        """Flush and close everything."""
        with self._open_files:
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run, in order. A last line that a killed run left unfinished is ignored.

    Raises ValueError if there is no metrics.jsonl, or a row is malformed (naming its line).
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run folder: it has no {METRICS_FILE}")
    lines = path.read_text(encoding="utf-8").split("\n")
    unfinished = lines.pop()  # "" after a complete last line
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_parse_row(line, f"{path} line {number}"))
    if unfinished.strip():
        with suppress(ValueError):  # cut short by a kill in the middle of the write; every whole row is above
            rows.append(_parse_row(unfinished, f"{path} last line"))
    return rows


def trajectory_record(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory for a person to read: text and turns, no token ids."""
    return {
        "id": trajectory.question.id,
        "question": trajectory.question.text,
        "golden_answers": list(trajectory.question.golden_answers),
        "source": trajectory.question.source,
        "kind": trajectory.question.kind,
        "group": int(trajectory.group),
        "reward": float(trajectory.reward),
        "finish_reason": trajectory.finish_reason.value,
        "num_searches": trajectory.num_searches,
        "response_length": trajectory.response_length,
        "segments": [[kind, text] for kind, text in trajectory.segments],
        "turns": [
            {
                "action": turn.action.value,
                "content": turn.content,
                "tokens": turn.end - turn.start,
                "passage_ids": None if turn.passage_ids is None else list(turn.passage_ids),
            }
            for turn in trajectory.turns
        ],
    }


def write_trajectories(path: str | Path, trajectories: Sequence[Trajectory]) -> None:
    """Write JSONL, one trajectory per line."""
    write_jsonl(path, map(trajectory_record, trajectories))


class PhaseTimers:
    """Seconds by phase of one step: `with timers("rollout"): …`, then `collect()`.

    Entering a phase again adds to its time. `synchronize` (torch.cuda.synchronize) runs at both ends of a phase, so
    that queued GPU work counts where it was queued.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.add(phase, self._now() - start)

    def add(self, phase: str, seconds: float) -> None:
        """Count time that was measured elsewhere, as the search loop measures its waiting."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def collect(self) -> dict[str, float]:
        """`{"time_rollout": …, …, "time_step": all since the last collect}`; starts the next step."""
        now = self._now()
        times = {f"time_{phase}": seconds for phase, seconds in self._seconds.items()}
        times["time_step"] = now - self._started
        self._seconds, self._started = {}, now
        return times

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


def plain_number(value: Any) -> Any:
    """Convert for JSON: tensors and numpy scalars become numbers, NaN and infinities None (a mean of nothing)."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tensorboard_tag(key: str) -> str:
    """TensorBoard groups tags by their first part; keys without one are sorted into time/ and train/."""
    if "/" in key:
        return key
    return f"time/{key.removeprefix('time_')}" if key.startswith("time_") else f"train/{key}"


def check_is_new(run_dir: Path) -> None:
    """Raise ValueError if a folder has rows. A run that failed before its first row leaves none."""
    path = run_dir / METRICS_FILE
    if path.is_file() and path.stat().st_size:
        raise ValueError(f"{run_dir} holds a run already: go on with run.resume=true or choose another run.name")


def _truncate(run_dir: Path, resume_step: int | None) -> int:
    """Keep the rows up to `resume_step`, atomically. Returns the last step kept, or -1."""
    if resume_step is None:
        check_is_new(run_dir)
    if resume_step is None or not (run_dir / METRICS_FILE).is_file():
        return -1
    rows = [row for row in read_metrics(run_dir) if row["step"] <= resume_step]
    write_jsonl(run_dir / METRICS_FILE, rows)
    return rows[-1]["step"] if rows else -1


def _lock(run_dir: Path) -> IO[bytes]:
    """Open and lock a file: no other process can lock it while this one has it open, however this one ends."""
    file = (run_dir / LOCK_FILE).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"{run_dir} is being written by another run: end it, or choose another run.name") from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):  # a file system without locks: go on
            raise
    return file


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg})") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{where} is not a metrics row: it needs an object with a whole number `step`")
    return row


def _import_tensorboard() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "run.tensorboard needs the package tensorboard: pip install tensorboard, or set run.tensorboard=false"
        ) from error
    return SummaryWriter


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("run.wandb needs the package wandb: pip install wandb, or set run.wandb=false") from error
    return wandb
