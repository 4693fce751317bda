"""The benchmark of saving saves what it says. No durations are tested."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"
SMALL = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--tokens", "300", "--sequence-length", "60"]


def test_main_prints_a_row_last_and_leaves_nothing_behind(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    saving = importlib.import_module("saving")
    saved = []
    stage = saving.stage
    monkeypatch.setattr(
        saving,
        "stage",
        lambda writer, policy, step: saved.append((writer.background, step)) or stage(writer, policy, step),
    )
    output = tmp_path / "saving.jsonl"
    arguments = [*SMALL, "--repetitions", "2", "--directory", str(tmp_path), "--output", str(output)]
    assert saving.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert output.read_text().splitlines() == printed[-1:]
    row = json.loads(printed[-1])
    assert row.keys() >= {"benchmark", "date", "commit", "device", "versions", "model", "dtype"}
    assert {name: len(row[name]) for name in ("stage", "write", "alone", "plain")} == {
        "stage": 2, "write": 2, "alone": 2, "plain": 2,
    }  # fmt: skip
    assert len(row["beside"]) >= 2
    assert saved == [(True, 1), (False, 1), (True, 2), (False, 2)]
    layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 160 + 2 * 64 + (64 + 2 * 32)  # with norms and biases
    parameters = 1024 * 64 + 2 * layer + 64
    assert row["bytes"] > 4 * 4 * parameters  # weights, two moments, and the export
    assert row["bytes"] < 1.5 * 4 * 4 * parameters
    assert [path.name for path in tmp_path.iterdir()] == ["saving.jsonl"]
