"""The script that measures all that wants a GPU: what it would run exists and takes its arguments, and what it does
where there is no GPU, where steps fail, and where time runs out."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu_session.sh"

# In place of Python: says that there is a GPU, and runs nothing; decode.py fails.
STAND_IN = """#!/bin/sh
case "$*" in
    *bench/decode.py*) echo "it failed"; exit 3 ;;
    *"-m pytest"*) echo "FAILED tests/test_one.py::test - AssertionError"; exit 1 ;;
esac
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run([SCRIPT, *arguments], env=variables, capture_output=True, text=True, check=False)


def load(script: str):
    """The module, under another name: as `kernels` transformers would find it."""
    spec = importlib.util.spec_from_file_location("bench_of_a_session", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stand_in(tmp_path):
    """An interpreter for the script."""
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


def test_commands_are_those_of_the_benchmarks(monkeypatch):
    """Each one's arguments are parsed by the script that it names."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = run("--dry-run")
    assert done.returncode == 0 and done.stderr == ""
    commands = {line.partition(" (")[0]: shlex.split(line.partition("): ")[2]) for line in done.stdout.splitlines()}
    assert list(commands)[-10:-4] == ["search_parts", "ways", "topk", "decode", "replayed_step", "retrieval"]
    for name, (_, script, *arguments) in commands.items():
        if script.startswith("bench/"):
            load(script).parse_arguments(arguments)
            assert name.startswith("warm_") or arguments[-2] == "--output"
        else:
            assert all((ROOT / part).exists() for part in arguments if part.startswith("tests"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would begin")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run(OUT=str(tmp_path / "results"))
    assert done.returncode == 2 and "torch finds no CUDA device here; --dry-run lists" in done.stderr
    assert not (tmp_path / "results").exists()


def test_it_goes_on_after_what_fails_and_says_what_did(tmp_path, stand_in):
    done = run(PYTHON=stand_in, OUT=str(tmp_path / "results"))
    assert done.returncode == 1
    folder = tmp_path / "results" / "gpu_session"
    assert (folder / "decode.log").read_text() == "it failed\n"
    summary = (folder / "summary.txt").read_text().splitlines()
    steps = {line.split()[1].rstrip(":"): line.split()[0] for line in summary if ": exit status " in line}
    failed = {"test_cases", "test_gpu", "warm_decode", "decode", "adapter"}
    assert {name for name, state in steps.items() if state != "ok"} == failed
    assert steps["saving"] == "ok" and list(steps)[-1] == "saving"
    assert summary.count("FAILED tests/test_one.py::test - AssertionError") == 2
    assert done.stdout.endswith("\n".join(summary) + "\n")


def test_what_there_is_no_time_for_is_left_out(tmp_path, stand_in):
    done = run("--seconds", "9", PYTHON=stand_in, OUT=str(tmp_path))
    assert done.returncode == 1
    assert "left out  search_parts: no time" in done.stdout and not (tmp_path / "gpu_session" / "decode.log").exists()


def test_arguments_that_it_does_not_know():
    done = run("--dry")
    assert done.returncode == 2 and "--dry is neither --dry-run nor --seconds N" in done.stderr
