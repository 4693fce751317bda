"""The benchmark of the update against its padded twin: both take the same step, and the counts are of what they did."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The module, imported as `python bench/padded_update.py` does it, with two trajectories to draw lengths from."""
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("padded_update")
    (tmp_path / "stats").mkdir()
    turns = [[[9, 20, 9, 60], [9, 10, 0, 0]], [[9, 30, 0, 0]]]
    text = json.dumps({"records": {"all": [{"turns": one} for one in turns]}})
    (tmp_path / "stats" / "trace_lengths.json").write_text(text)
    monkeypatch.setattr(module, "DATA", tmp_path)
    return module


def test_both_take_the_same_step(bench, capsys, tmp_path):
    arguments = ["--questions", "2", "--group-size", "3", "--prompt-tokens", "40", "--tokens-per-microbatch", "300"]
    assert bench.main([*arguments, "--repetitions", "1", "--output", str(tmp_path / "rows.jsonl")]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row == json.loads((tmp_path / "rows.jsonl").read_text())
    ours, plain, close = (row["systems"][name] for name in ("ours", "plain", "plain, close"))
    for twin in (plain, close):
        assert twin["loss"] == pytest.approx(ours["loss"], rel=1e-4, abs=1e-6)
        assert twin["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        assert twin["head_rows"] == 2 * twin["rows"]  # and once for old log-probabilities
    assert row["trajectories"] == 6
    lengths = {True: 130, False: 70}  # 40 and 20 + 60 + 10, or 40 and 30
    assert plain["rows"] == 6 * 130 and 6 * 70 < row["tokens"] < 6 * 130
    assert row["tokens"] % 10 == 0 and row["tokens"] <= close["rows"] <= plain["rows"]
    assert ours["rows"] == row["tokens"] - 2 * 2 * 40  # a group's prompt once
    num_long = (row["tokens"] - 6 * lengths[False]) // (lengths[True] - lengths[False])
    assert ours["head_rows"] == row["policy_tokens"] == 30 * 6 and 0 < num_long < 6
    assert row["ratios"].keys() == row["ratio_ranges"].keys() == {"plain", "plain, close"}


@pytest.mark.parametrize("option", ["--questions", "--group-size", "--repetitions"])
def test_mistakes_are_one_sentence(bench, capsys, option):
    assert bench.main([option, "0"]) == 2
    assert f"{option} 0: give at least 1" in capsys.readouterr().err
