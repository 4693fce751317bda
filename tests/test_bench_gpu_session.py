"""The script that runs every check and benchmark on a GPU.

Its commands exist and take their arguments; it handles a missing GPU, failing steps and running out of time.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu_session.sh"

# Stands in for Python: reports a GPU and runs nothing; decode.py fails, and saving.py takes $SAVING_SECONDS.
STAND_IN = """#!/bin/sh
case "$*" in
    *bench/decode.py*) echo "it failed"; exit 3 ;;
    *bench/saving.py*) echo "began"; exec sleep $SAVING_SECONDS ;;
    *"-m pytest"*) echo "FAILED tests/test_one.py::test - AssertionError"; exit 1 ;;
esac
"""


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHON": sys.executable, "SAVING_SECONDS": "0"} | environment
    return subprocess.run([SCRIPT, *arguments], env=variables, cwd=cwd, capture_output=True, text=True, check=False)


def load(script: str):
    """The module, under another name, as transformers would find one called `kernels`."""
    spec = importlib.util.spec_from_file_location("bench_of_a_session", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stand_in(tmp_path):
    """The path of a fake interpreter for the script."""
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


def test_commands_are_those_of_the_benchmarks(monkeypatch):
    """Each command's arguments are parsed by the script that it names."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = run("--dry-run")
    assert done.returncode == 0 and done.stderr == ""
    commands = {line.partition(" (")[0]: shlex.split(line.partition("): ")[2]) for line in done.stdout.splitlines()}
    assert list(commands)[-12:-6] == ["search_parts", "ways", "topk", "decode", "replayed_step", "retrieval"]
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
    failed = "FAILED tests/test_one.py::test - AssertionError\n"
    assert (folder / "failed_tests.txt").read_text() == 2 * failed
    assert done.stdout.endswith(2 * failed + "2 tests failed\n" + "\n".join(summary) + "\n")


def test_what_there_is_no_time_for_is_left_out_and_resumed(tmp_path, stand_in):
    done = run("--seconds", "9", cwd=tmp_path, PYTHON=stand_in, OUT="results")
    logs = tmp_path / "results" / "gpu_session"  # relative to where it was called
    assert done.returncode == 1
    assert "left out  search_parts: no time" in done.stdout and not (logs / "decode.log").exists()
    (logs / "summary.txt").write_text("ok        topk: exit status 0 after 1 s\nleft out  saving: no time\n")
    done = run("--resume", cwd=tmp_path, PYTHON=stand_in, OUT="results")
    assert done.returncode == 0
    assert {path.name for path in logs.iterdir()} == {"summary.txt", "failed_tests.txt", "saving.log"}
    states = [line.split()[:2] for line in (logs / "summary.txt").read_text().splitlines() if "exit status" in line]
    assert states[0] == ["ok", "topk:"] and states[-1] == ["ok", "saving:"]
    done = run("--resume", OUT=str(tmp_path / "elsewhere"), PYTHON=stand_in)
    assert done.returncode == 2 and "summary.txt, which is not there" in done.stderr


def test_a_step_that_the_end_cuts_short_is_resumed_and_all_is_in_the_archive(tmp_path, stand_in):
    (tmp_path / "gpu_session").mkdir()
    (tmp_path / "gpu_session" / "summary.txt").write_text("left out  saving: no time\n")
    done = run("--resume", "--seconds", "20", "--archive", str(tmp_path / "all.tgz"),
               PYTHON=stand_in, OUT=str(tmp_path), SAVING_SECONDS="100")  # fmt: skip
    assert done.returncode == 1 and "cut short saving: exit status 124" in done.stdout
    with tarfile.open(tmp_path / "all.tgz") as archive:
        assert "./gpu_session/saving.log" in archive.getnames() and "./all.tgz" not in archive.getnames()
        summary = archive.extractfile("./gpu_session/summary.txt").read().decode()
    assert summary == (tmp_path / "gpu_session" / "summary.txt").read_text()
    assert [path.name for path in tmp_path.glob("all.tgz*")] == ["all.tgz"]


def test_arguments_that_it_does_not_know():
    done = run("--dry")
    assert done.returncode == 2 and "--dry is none of --dry-run, --resume, --seconds N" in done.stderr


@pytest.mark.parametrize("wrong", [["--seconds"], ["--seconds", "soon"], ["--seconds", "0"], ["--archive"]])
def test_options_without_what_they_want(wrong):
    done = run(*wrong, "--dry-run") if len(wrong) > 1 else run("--dry-run", *wrong)
    assert done.returncode == 2 and done.stderr.startswith(f"gpu_session.sh: {wrong[0]}: give a")
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_help_is_its_head():
    done = run("--help")
    assert done.returncode == 0 and done.stdout.startswith("Every check and every row that wants a GPU")
    assert "  bench/gpu_session.sh --seconds 540 " in done.stdout
    assert "#" not in done.stdout and "set " not in done.stdout
