"""A run's searches: counted in every row, remembered across a stop, tried again, and never given up silently."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from searchr1_fast import environment, report
from searchr1_fast import train as trainer
from searchr1_fast.advantage import grpo_advantages
from searchr1_fast.config import Config, load_config
from searchr1_fast.console import step_line
from searchr1_fast.environment import Environment
from searchr1_fast.errors import sentence
from searchr1_fast.retrieval import MissingRetriever, NullRetriever, RetrievalError, dense
from searchr1_fast.retrieval.device_rows import DeviceRows
from searchr1_fast.retrieval.protocol import RetrievalTimeout
from searchr1_fast.retrieval.statistics import SearchStatistics, percentile
from searchr1_fast.rollout.statistics import RolloutStatistics
from searchr1_fast.run import open_run
from searchr1_fast.train import baselines, count_failed_searches, main, train
from searchr1_fast.types import FinishReason, Passage, SearchError

DENSE = {"backend": "dense", "topk": 1, "hashing_dimension": 64, "timeout_seconds": 60.0}


def rows(config: Config) -> list[dict]:
    return [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]


class Scripted:
    """Each search takes the next entry of the script, which is raised; None, or no entry, lets it through."""

    def __init__(self, *script):
        self.script = list(script)

    def search(self, queries, k):
        step = self.script.pop(0) if self.script else None
        if step is not None:
            raise step
        return [[Passage(query, "", "", 1.0)] for query in queries]


# ------------------------------------------------------------------------------------------------------- statistics


def test_percentiles_are_of_queries_not_of_calls():
    waits = [(3.0, 1), (1.0, 98), (2.0, 1)]
    assert (percentile(waits, 50), percentile(waits, 98), percentile(waits, 99)) == (1.0, 1.0, 2.0)
    assert percentile(waits, 100) == 3.0
    assert percentile([], 50) is None
    rng = np.random.default_rng(0)
    waits = list(zip(rng.random(50).tolist(), rng.integers(1, 9, 50).tolist(), strict=True))
    every = [seconds for seconds, count in waits for _ in range(count)]
    for percent in (1, 50, 90, 99):
        assert percentile(waits, percent) == np.percentile(every, percent, method="inverted_cdf")


def test_statistics_of_ranks_add_up():
    one = SearchStatistics(queries=4, unique=3, batches=1, batch_rows=3, waits=[(1.0, 4)])
    two = SearchStatistics(queries=2, unique=2, batches=3, batch_rows=5, retries=1, waits=[(3.0, 2)])
    row = sum([one, two], SearchStatistics()).row()
    assert row == {
        "search/queries": 6, "search/unique": 5, "search/cache_hits": 0, "search/batches": 4, "search/timeouts": 0,
        "search/retries": 1, "search/failures": 0, "search/page_failures": 0, "search/batch_rows_mean": 2.0,
        "search/wait_p50": 1.0, "search/wait_p99": 3.0,
    }  # fmt: skip
    empty = SearchStatistics().row()
    assert (empty["search/batch_rows_mean"], empty["search/wait_p50"]) == (None, None)


def test_any_retriever_is_counted_where_it_is_called():
    searched = Environment([], MissingRetriever(NullRetriever(), 0.5))
    searched.search(["a", "b", "a"])
    searched.search(["a"])
    taken = searched.take_statistics()
    assert (taken.queries, taken.unique, taken.batches, taken.batch_rows) == (4, 3, 2, 3)
    assert [count for _, count in taken.waits] == [3, 1]
    assert searched.take_statistics() == SearchStatistics()


# ----------------------------------------------------------------------------------------------------- what is late


def test_a_late_search_is_tried_again_as_often_as_configured_and_said():
    said = []
    late = RetrievalTimeout("a search for 1 query did not end before its deadline")
    searched = Environment([], Scripted(late, late), max_retries=2, say=said.append)
    assert searched.search(["x"])[0][0].id == "x"
    taken = searched.take_statistics()
    assert (taken.timeouts, taken.retries, taken.failures, taken.queries) == (2, 2, 0, 1)
    assert said == [f"{late}; trying again, {number} of 2 times" for number in (1, 2)]
    line = step_line({"step": 1} | taken.row(), 9).plain
    assert line.endswith("searches late 2  tried again 2")
    assert "late" not in step_line({"step": 1} | SearchStatistics().row(), 9).plain


def test_a_search_that_stays_late_or_fails_ends_in_its_error(capsys):
    late = RetrievalTimeout("too late")
    searched = Environment([], Scripted(late, late), max_retries=1)
    with pytest.raises(RetrievalTimeout, match="too late, in 2 attempts"):
        searched.search(["x"])
    assert "too late; trying again, 1 of 1 times" in capsys.readouterr().err
    assert searched.take_statistics().row()["search/failures"] == 1
    broken = Environment([], Scripted(RetrievalError("gone")), max_retries=5)
    with pytest.raises(RetrievalError, match="gone"):
        broken.search(["x"])  # broken, not late: it is not tried again
    assert broken.take_statistics().retries == 0


def patched(monkeypatch, make):
    """Wrap every retriever that a run opens: it becomes `make(retriever)`."""
    open_retriever = environment.open_retriever
    monkeypatch.setattr(environment, "open_retriever", lambda *arguments: make(open_retriever(*arguments)))


class Late:
    """A retriever that is late at the first search of each different batch of queries."""

    def __init__(self, inner):
        self.inner, self.seen = inner, set()

    def search(self, queries, k):
        if tuple(queries) not in self.seen:
            self.seen.add(tuple(queries))
            raise RetrievalTimeout("a search did not end before its deadline")
        return self.inner.search(queries, k)


def test_a_step_goes_on_after_late_searches_and_trains_on_what_it_would_have(make_config, make_console, monkeypatch):
    settings = {"eval": {"sets": {}}, "train": {"num_steps": 1}}
    untroubled = make_config(**settings, run={"name": "untroubled"}, retrieval=DENSE)
    train(untroubled, make_console())
    patched(monkeypatch, Late)
    config = make_config(**settings, run={"name": "late"}, retrieval=DENSE | {"max_retries": 1})
    console = make_console()
    train(config, console)
    (row,), (other,) = rows(config), rows(untroubled)
    assert row["search/timeouts"] == row["search/retries"] > 0
    assert len([note for note in console.notes if "trying again, 1 of 1" in note]) == row["search/retries"]
    assert row["policy_loss"] == other["policy_loss"]


def test_a_step_whose_searches_stay_late_fails_and_leaves_no_row(make_config, make_console, monkeypatch):
    patched(monkeypatch, Late)
    config = make_config(eval={"sets": {}}, retrieval=DENSE | {"max_retries": 0})
    with pytest.raises(RetrievalTimeout, match="in 1 attempt") as caught:
        train(config, make_console())
    assert "this ended the rollout: a search for" in caught.value.__notes__[0]
    assert sentence(caught.value).startswith("a search did not end before its deadline")
    assert rows(config) == []


class Broken:
    """A retriever whose every second search fails for good."""

    def __init__(self, inner):
        self.inner, self.num_calls = inner, 0

    def search(self, queries, k):
        self.num_calls += 1
        if self.num_calls % 2 == 0:
            raise RetrievalError("the server is gone")
        return self.inner.search(queries, k)


def test_trajectories_whose_search_failed_count_nowhere(make_config, make_console, monkeypatch):
    patched(monkeypatch, Broken)
    console, seen = make_console(), []
    monkeypatch.setattr("searchr1_fast.train.baselines", lambda *a: seen.append((a, baselines(*a))) or seen[-1][1])
    settings = {"eval": {"sets": {}}, "train": {"num_steps": 1}, "algorithm": {"drop_zero_variance_groups": False}}
    train(make_config(**settings, rollout={"on_search_error": "drop"}, retrieval=DENSE), console)
    ((_, trajectories, rewards), (advantages, kept)) = seen[0]
    is_dropped = np.array([t.finish_reason is FinishReason.SEARCH_FAILED for t in trajectories])
    assert 0 < is_dropped.sum() < len(is_dropped)
    assert not kept[is_dropped].any()
    assert kept[~is_dropped].all()
    groups = np.array([t.group for t in trajectories])
    expected, _ = grpo_advantages(rewards[~is_dropped], groups[~is_dropped])
    np.testing.assert_array_equal(advantages[~is_dropped], expected)
    (row,) = rows(make_config(**settings, rollout={"on_search_error": "drop"}, retrieval=DENSE))
    assert row["finish_search_failed"] == is_dropped.mean()
    assert row["reward_mean"] == row["em"] == pytest.approx(rewards[~is_dropped].mean())
    judged = [trajectories[i] for i in np.flatnonzero(~is_dropped)]
    assert row["searches_mean"] == np.mean([t.num_searches for t in judged])
    assert row["response_tokens_mean"] == np.mean([t.response_length for t in judged])
    assert row["policy_tokens"] == sum(int(trajectories[i].loss_mask.sum()) for i in np.flatnonzero(~is_dropped))
    (note,) = [note for note in console.notes if "do not count" in note]
    assert note.startswith(f"step 1: {is_dropped.sum()} searches failed") and note.endswith("the server is gone")


class Elsewhere:
    """Two ranks, of which the other one has these numbers."""

    def __init__(self, *other):
        self.other = other

    def gather(self, own):
        return [own, self.other]


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        ((0, 5, None), (0, 7, None), None),
        ((3, 0, "gone"), (0, 7, None), "step 4: 3 searches failed, and their trajectories do not count: gone"),
        ((0, 5, None), (3, 0, "late"), "step 4: 3 searches failed, and their trajectories do not count: late"),
        ((3, 0, "gone"), (1, 0, "late"), SearchError("step 4: 4 searches failed, and none worked: gone")),
        ((0, 0, None), (1, 0, "late"), SearchError("step 4: 1 searches failed, and none worked: late")),
    ],
)
def test_whether_searches_work_all_ranks_decide_together(make_console, make_trajectory, own, other, said):
    """A rank whose own searches all failed goes on if those of others worked; otherwise no rank goes on."""
    failed, worked, cause = own
    statistics = RolloutStatistics(num_failed_searches=failed, num_searches=worked)
    loop = SimpleNamespace(statistics=statistics, last_error=cause and RetrievalError(cause))
    run = SimpleNamespace(loop=loop, ranks=Elsewhere(*other), ui=make_console())
    judged = make_trajectory(0, [(False, 3), (True, 4)])
    if isinstance(said, SearchError):
        with pytest.raises(SearchError, match=f"^{said}$"):
            count_failed_searches(run, [judged], 4)
        return
    count_failed_searches(run, [judged], 4)
    assert run.ui.notes == ([said] if said else [])
    if said:
        judged.finish_reason = FinishReason.SEARCH_FAILED
        with pytest.raises(SearchError, match="no trajectory is left"):
            count_failed_searches(run, [judged], 4)


def test_a_step_of_which_every_search_failed_ends_the_run(make_config, monkeypatch, capsys, tmp_path):
    class Gone(Broken):
        def search(self, queries, k):
            raise RetrievalError("the server is gone")

    patched(monkeypatch, Gone)
    config = make_config(eval={"sets": {}}, rollout={"on_search_error": "drop"}, retrieval=DENSE)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert main([str(path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("searchr1: error: step 1: ") and error.endswith("and none worked: the server is gone")
    assert rows(config) == []


def test_an_evaluation_is_never_of_some_questions_alone(make_config, make_console, monkeypatch):
    patched(monkeypatch, Broken)
    with pytest.raises(RetrievalError, match="the server is gone"):
        train(make_config(rollout={"on_search_error": "drop"}, retrieval=DENSE), make_console())


# -------------------------------------------------------------------------------------------------------- in a run


def test_every_row_has_the_batchers_counts_of_its_step(make_config, make_console):
    config = make_config(retrieval=DENSE, train={"num_steps": 3, "eval_every": 1})
    train(config, make_console())
    history = rows(config)
    assert "search/queries" not in history[0]  # before the first step there is only an evaluation
    for row in history[1:]:
        trajectories = config.train.questions_per_step * config.algorithm.group_size
        assert row["search/queries"] == row["searches_mean"] * trajectories
        assert 0 < row["search/unique"] + row["search/cache_hits"] <= row["search/queries"]
        assert (row["search/batch_rows_mean"] or 0) * row["search/batches"] == pytest.approx(row["search/unique"])
        assert 0 < row["search/wait_p50"] <= row["search/wait_p99"]
    assert history[-1]["search/cache_hits"] > 0
    summary = report.summarise(history)
    assert summary["queries per step"] == f"{np.mean([row['search/queries'] for row in history[1:]]):,.1f}"
    assert_shares(summary["of these searched, cached, shared"])
    assert "searches late, tried again" not in summary


def assert_shares(text: str) -> None:
    searched, cached, shared = (int(part.rstrip("%")) for part in text.split(", "))
    assert 0 < searched < 100 and 0 < cached < 100
    assert searched + cached + shared == pytest.approx(100, abs=1.5)


def retrieval_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "retrieval"]


def test_a_run_closes_its_retrievers_when_it_ends_however_it_ends(make_config, make_console, tmp_path):
    before = retrieval_threads()
    opened = []

    def look(metrics):
        opened.append(len(retrieval_threads()) - len(before))
        if metrics["step"] == 2:
            raise RuntimeError("killed")

    corpus = str(tmp_path / "corpus.jsonl")
    questions = str(tmp_path / "questions.jsonl")
    config = make_config(retrieval=DENSE, eval={"sets": {"own": {"questions": questions, "corpus": corpus}}})
    with pytest.raises(RuntimeError, match="killed") as kept:  # its traceback keeps the run alive
        train(config, make_console(look))
    assert opened == [4, 4]  # two stages each
    assert retrieval_threads() == before
    assert kept.value.__traceback__ is not None


def test_what_was_found_is_known_after_a_stop(make_config, make_console):
    """A resumed run searches as often as a run that was not stopped, number for number."""
    settings = {"retrieval": DENSE, "train": {"num_steps": 4, "eval_every": 3}}
    whole = make_config(**settings, run={"name": "whole"})
    train(whole, make_console())

    def stop(metrics):
        if metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    train(make_config(**settings, run={"name": "halves"}), make_console(stop))
    resumed = make_config(**settings, run={"name": "halves", "resume": True})
    console = make_console()
    train(resumed, console)
    remembered = [note for note in console.notes if note.endswith("searches remembered from the checkpoint")]
    assert len(remembered) == 1 and int(remembered[0].split()[0]) > 0
    counts = ("search/queries", "search/unique", "search/cache_hits", "search/batches")
    assert [[row.get(key) for key in counts] for row in rows(resumed)] == [
        [row.get(key) for key in counts] for row in rows(whole)
    ]
    assert rows(whole)[-1]["search/cache_hits"] > 0


def test_searches_of_another_corpus_are_refused_and_that_is_said(make_config, make_console, tmp_path):
    config = make_config(retrieval=DENSE, train={"num_steps": 1}, eval={"sets": {}})
    train(config, make_console())
    saved = config.run_directory / "checkpoints" / "latest" / "state" / "searches-00000.bin"
    assert saved.is_file()
    corpus = tmp_path / "corpus.jsonl"
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines[::-1]))  # the same passages in other rows
    for changes, said in (
        ({}, "left out: .*searches-00000.bin was saved from other searches"),
        ({"hashing_dimension": 128}, "left out: .*searches-00000.bin was saved from other searches"),
        ({"backend": "bm25"}, "left out: this retriever remembers none"),
    ):
        console = make_console()
        again = Config.model_validate(
            config.model_dump() | {
                "run": config.run.model_dump() | {"resume": True},
                "retrieval": config.retrieval.model_dump() | changes,
            }
        )  # fmt: skip
        with open_run(again, console) as run:
            assert run.environment.take_statistics().cache_hits == 0
        notes = [note for note in console.notes if "the checkpoint remembers" in note]
        assert len(notes) == 1
        assert re.search(said, notes[0])
    corpus.write_text("".join(lines))
    console = make_console()
    with open_run(
        Config.model_validate(config.model_dump() | {"run": config.run.model_dump() | {"resume": True}}), console
    ):
        assert sum(note.endswith("searches remembered from the checkpoint") for note in console.notes) == 1


def test_the_demo_searches_vectors_and_needs_nothing_but_what_is_here(tmp_path, monkeypatch):
    """A few steps of the demo: a world hashed in memory, searched through the batcher, nothing downloaded."""
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    overrides = [
        *("train.num_steps=2", "train.questions_per_step=4", "algorithm.group_size=4"),
        *("data.world.num_entities=60", "data.world.num_questions=64", "run.tensorboard=false", "run.num_threads=1"),
        "eval.sets={unseen: {world: {split: eval, num_entities: 60, num_questions: 12}}}",
    ]
    assert main([str(Path(environment.__file__).parents[1] / "configs" / "demo.yaml"), *overrides]) == 0
    (history,) = [rows(load_config(None, ["run.name=demo"]))]
    assert [row["step"] for row in history] == [0, 1, 2]
    for row in history[1:]:
        assert row["search/queries"] > 0 and row["search/batches"] > 0 and row["search/failures"] == 0
    assert history[0]["eval/unseen/searches_mean"] > 0.5
    assert history[0]["eval/unseen/em"] > 0  # the model reads what it finds
    state = tmp_path / "runs" / "demo" / "checkpoints" / "latest" / "state"
    assert (state / "searches-00000.bin").stat().st_size > 1000


def no_network(*_):
    raise AssertionError("the demo needs no network")


def test_an_index_that_is_parked_during_updates_trains_the_same(make_config, make_console, monkeypatch):
    """The index's rows leave the device (here a CPU stands in for it) while weights are updated, and are back before
    any search, evaluations included."""
    monkeypatch.setattr(dense, "open_rows", lambda parts, device, scan, show: DeviceRows(list(parts), device, scan))
    opened, seen = [], []
    plain_update, plain_open = trainer.update, environment.open_retriever

    def open_retriever(*arguments):
        opened.append(plain_open(*arguments))
        return opened[-1]

    def update(run, *arguments):
        seen.append([retriever.is_parked for retriever in opened])
        return plain_update(run, *arguments)

    monkeypatch.setattr(environment, "open_retriever", open_retriever)
    monkeypatch.setattr(trainer, "update", update)
    histories = []
    for parked in (False, True):
        opened.clear()
        config = make_config(
            retrieval=DENSE | {"park_during_update": parked},
            train={"num_steps": 3, "eval_every": 1},
            run={"name": f"parked-{parked}"},
        )
        train(config, make_console())
        histories.append(rows(config))
        assert seen == [[parked] * len(opened)] * 3
        seen.clear()
    timed = ("time_park", "time_unpark")
    for one, other in zip(*histories, strict=True):
        assert not any(name in one for name in timed)
        assert all(other[name] > 0 for name in timed if other["step"])
        names = {
            name for name in one if not name.startswith(("time_", "search/wait", "trajectories_per", "tokens_per"))
        }
        names -= {"update_imbalance"}
        assert {name: one[name] for name in names} == {name: other[name] for name in names}
