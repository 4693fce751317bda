"""The balance benchmark counts the layouts that training uses, and its plain twin is a valid layout."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def balance(monkeypatch):
    """The module, imported as `python bench/balance.py` does it."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("balance")


@pytest.fixture
def data(tmp_path, balance, monkeypatch) -> Path:
    """Lengths in the format of the real file: [characters, tokens] of the policy and of what was found."""
    turns = [[[9, 90, 9, 400], [9, 30, 0, 0]], [[9, 60, 9, 380], [9, 80, 9, 410], [9, 20, 0, 0]], [[9, 500, 0, 0]]]
    (tmp_path / "stats").mkdir()
    records = {"all": [{"turns": one} for one in turns]}
    (tmp_path / "stats" / "trace_lengths.json").write_text(json.dumps({"records": records}))
    monkeypatch.setattr(balance, "DATA", tmp_path)
    return tmp_path


def test_trajectories_have_the_lengths_that_were_read(balance, data):
    options = balance.parse_arguments(["--questions", "20", "--group-size", "3", "--prompt-tokens", "50"])
    trajectories = balance.real_trajectories(balance.read_turns(data / "stats" / "trace_lengths.json"), options, 0)
    assert len(trajectories) == 60
    found = {(len(t.token_ids), int(t.loss_mask.sum())) for t in trajectories}
    assert found == {(50 + 520, 120), (50 + 950, 160), (50 + 500, 500)}
    assert not any(t.loss_mask[:50].any() for t in trajectories)


def test_the_twin_is_another_layout_of_the_same(balance, data):
    options = balance.parse_arguments(["--questions", "20", "--group-size", "3"])
    trajectories = balance.real_trajectories(balance.read_turns(data / "stats" / "trace_lengths.json"), options, 1)
    ours, twin = (lay(trajectories, 4096, 4) for lay in (balance.lay_out, balance.lay_out_apart))
    assert ours.order == twin.order
    for layout in (ours, twin):
        assert sorted(place for runs in layout.runs for run in runs for place in range(*run)) == list(range(60))
    assert 1.0 <= ours.imbalance < twin.imbalance


@pytest.mark.parametrize("lengths", ["real", "mix"])
def test_main_prints_a_row_last(balance, data, capsys, lengths):
    arguments = ["--lengths", lengths, "--questions", "8", "--group-size", "2", "--seeds", "1", "--ranks", "2", "3"]
    assert balance.main([*arguments, "--tokens-per-microbatch", "2048"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["ranks"], one["tokens_per_microbatch"]) for one in row["layouts"]] == [(2, 2048), (3, 2048)]
    for one in row["layouts"]:
        for name in ("dealt", "apart"):
            assert one[name]["imbalance"] >= one[name]["largest_rank"] >= 1


def test_lengths_that_are_not_there_are_one_sentence(balance, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(balance, "DATA", tmp_path / "nowhere")
    assert balance.main([]) == 2
    assert "set SEARCHR1_DATA" in capsys.readouterr().err
