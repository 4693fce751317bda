"""metrics.jsonl, trajectories, timers: round trips, resumption, and nothing half-written."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from searchr1_fast import metrics
from searchr1_fast.metrics import MetricsLog, PhaseTimers, read_metrics, write_trajectories
from searchr1_fast.types import Action, FinishReason, Question, Trajectory, Turn


def make_trajectory(text: str = "<answer> Ann </answer>") -> Trajectory:
    return Trajectory(
        question=Question("q1", "Who?", ("Ann", "Änne"), "world", "2-hop"),
        group=3,
        token_ids=np.arange(10),
        loss_mask=np.array([False] * 2 + [True] * 3 + [False] * 2 + [True] * 3),
        rollout_logprobs=np.zeros(10, np.float32),
        prompt_length=2,
        turns=[Turn(2, 5, Action.SEARCH, "who", ("p1", "p2")), Turn(7, 10, Action.ANSWER, "Ann")],
        finish_reason=FinishReason.ANSWER,
        segments=[("prompt", "Who?"), ("policy", "<search>who</search>"), ("observation", "…"), ("policy", text)],
        reward=1.0,
    )


def test_rows_round_trip_in_order(tmp_path):
    rows = [{"step": 0, "eval/world/em": 0.25}, {"step": 1, "reward_mean": 0.5, "em": 0.5}, {"step": 5, "lr": 1e-6}]
    with MetricsLog(tmp_path) as log:
        for row in rows:
            log.write(row)
            assert read_metrics(tmp_path)[-1] == row  # readable at once, not only when the file is closed
    assert read_metrics(tmp_path) == rows


def test_tensors_and_numpy_become_numbers_and_nan_becomes_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "a": torch.tensor(0.5), "b": np.float32(0.25), "c": np.int64(7), "d": float("nan")})
    line = (tmp_path / "metrics.jsonl").read_text()
    # parse_constant: fail on NaN, which Python's json accepts and no other reader does
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "a": 0.5, "b": 0.25, "c": 7, "d": None}


def test_resume_drops_the_rows_after_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(6):
            log.write({"step": step, "reward_mean": float(step)})
    with MetricsLog(tmp_path, resume_step=3) as log:
        assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
        log.write({"step": 4, "reward_mean": 40.0})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["reward_mean"] == 40.0


def test_resume_before_the_first_step_starts_clean(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 0})
    with MetricsLog(tmp_path, resume_step=-1) as log:
        log.write({"step": 0, "again": True})
    assert read_metrics(tmp_path) == [{"step": 0, "again": True}]


def test_resume_survives_a_line_cut_short_by_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    with MetricsLog(tmp_path, resume_step=2) as log:
        log.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_new_run_never_overwrites_an_old_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"run\.resume=true"):
        MetricsLog(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("resume_step", [None, 1])
def test_two_runs_cannot_write_into_one_folder(tmp_path, resume_step):
    with MetricsLog(tmp_path) as log:
        with pytest.raises(ValueError, match="is being written by another run: end it, or choose another run.name"):
            MetricsLog(tmp_path, resume_step=resume_step)
        log.write({"step": 1})
        log.write({"step": 2})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    with MetricsLog(tmp_path, resume_step=1):
        assert [row["step"] for row in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("fails", ["opening", "closing"])
def test_a_folder_is_free_again_whatever_failed(tmp_path, monkeypatch, fails):
    """Even while something holds the error, as a notebook does."""

    class Writer:
        def __init__(self, *arguments, **options):
            if fails == "opening":
                raise OSError("no space left")

        def close(self):
            raise OSError("no space left")

    monkeypatch.setattr("searchr1_fast.metrics._import_tensorboard", lambda: Writer)
    with pytest.raises(OSError, match="no space left") as held:
        MetricsLog(tmp_path, tensorboard=True).close()
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1})
    assert held.value is not None and [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_step_cannot_appear_twice(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 2})
        with pytest.raises(AssertionError):
            log.write({"step": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"step": 1}\nnonsense\n{"step": 2}\n', "line 2"), ('{"loss": 1}\n', "line 1"), ("[1]\n", "line 1")],
)
def test_a_malformed_row_names_its_line(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)


def test_no_run_folder(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        read_metrics(tmp_path / "nowhere")


def test_tensorboard_holds_the_same_numbers(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write({"step": 1, "reward_mean": 0.5, "time_rollout": 2.0, "eval/world/em": 0.25, "note": None})
        log.write({"step": 2, "reward_mean": 0.75})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/world/em", "time/rollout", "train/reward_mean"]
    assert [(e.step, e.value) for e in events.Scalars("train/reward_mean")] == [(1, 0.5), (2, 0.75)]


@pytest.mark.parametrize(
    ("package", "switch"), [("wandb", {"wandb": True}), ("torch.utils.tensorboard", {"tensorboard": True})]
)
def test_a_missing_logger_is_one_sentence_and_leaves_no_folder(tmp_path, monkeypatch, package, switch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="pip install"):
        MetricsLog(tmp_path / "run", **switch)
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_rows_and_the_configuration(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    class Wandb:
        @staticmethod
        def init(**settings):
            calls.append((settings["id"], settings["resume"], settings["config"]))
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    with MetricsLog(tmp_path / "run7", wandb=True, config={"seed": 1}) as log:
        log.write({"step": 4, "em": 0.5, "nothing": None})
    assert calls == [("run7", "allow", {"seed": 1}), (4, {"em": 0.5}), "finished"]


def test_trajectories_are_readable_rows(tmp_path):
    with MetricsLog(tmp_path) as log:
        path = log.write_trajectories(10, [make_trajectory(), make_trajectory("odd \x1b[31m \u2028 text")])
    assert path == tmp_path / "trajectories" / "step_000010.jsonl"
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1])
    assert first["question"] == "Who?"
    assert first["golden_answers"] == ["Ann", "Änne"]
    assert first["kind"] == "2-hop"
    assert first["reward"] == 1.0
    assert first["finish_reason"] == "answer"
    assert first["num_searches"] == 1
    assert first["segments"][1] == ["policy", "<search>who</search>"]
    assert first["turns"][0] == {"action": "search", "content": "who", "tokens": 3, "passage_ids": ["p1", "p2"]}
    assert second["segments"][-1][1] == "odd \x1b[31m \u2028 text"


def test_a_failed_trajectory_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "step_000001.jsonl"
    write_trajectories(path, [make_trajectory()])
    before = path.read_text()
    monkeypatch.setattr(metrics, "trajectory_record", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_trajectories(path, [make_trajectory()])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_timers_add_up_by_phase_and_start_again(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0, 11.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    timers = PhaseTimers()  # 0
    with timers("rollout"):  # 1 … 3
        pass
    with pytest.raises(KeyError), timers("rollout"):  # 4 … 4.5: time counts even when the phase fails
        raise KeyError
    timers.add("search_wait", 0.25)
    assert timers.collect() == {"time_rollout": 2.5, "time_search_wait": 0.25, "time_step": 10.0}
    assert timers.collect() == {"time_step": 1.0}


def test_timers_synchronise_at_both_ends_of_a_phase():
    calls = []
    timers = PhaseTimers(synchronize=lambda: calls.append("sync"))
    calls.clear()
    with timers("update"):
        calls.append("work")
    assert calls == ["sync", "work", "sync"]
