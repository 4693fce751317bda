"""The batcher under ThreadSanitizer and AddressSanitizer, for a minute. For a long run: `make stress`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("batcher", "core", "cache", "channel")
SOURCES = [Path(__file__).with_name("stress.cpp"), *(ROOT / "csrc" / f"{name}.cpp" for name in PARTS)]
OPERATIONS = 60_000
REPORTS = ("ThreadSanitizer", "AddressSanitizer", "LeakSanitizer", "runtime error")


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_the_batcher_is_clean(sanitizer, tmp_path):
    """The second build signals through a pipe, as on machines without eventfd."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread", f"-I{ROOT / 'csrc'}"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = compile_with(compiler, flags, [probe], tmp_path / "probe")
    if built.returncode != 0:
        pytest.skip(f"{compiler} cannot build with -fsanitize={sanitizer}: {built.stderr.strip().splitlines()[-1]}")
    if sanitizer == "address":
        flags.append("-DSEARCHR1_USE_PIPE")
    built = compile_with(compiler, flags, SOURCES, tmp_path / "stress")
    assert built.returncode == 0, built.stderr
    command = [*same_addresses(), tmp_path / "stress", str(OPERATIONS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and not any(report in done.stderr for report in REPORTS), done.stdout + done.stderr
    assert done.stdout.count("submits:") == 3


def compile_with(compiler: str, flags: list[str], sources: list[Path], output: Path) -> subprocess.CompletedProcess:
    return subprocess.run([compiler, *flags, *sources, "-o", output], capture_output=True, text=True, check=False)


def same_addresses() -> list[str]:
    """Older ThreadSanitizers refuse the address randomization of newer kernels."""
    setarch = shutil.which("setarch") if sys.platform == "linux" else None
    if setarch is None or subprocess.run([setarch, "-R", "true"], capture_output=True, check=False).returncode != 0:
        return []
    return [setarch, "-R"]
