"""Running a file of cases in Triton's interpreter."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def run_in_interpreter():
    """(file of cases) -> None. In a process of its own: the choice is made when Triton is imported, for good."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    versions = [importlib.metadata.version(name).split(".")[:2] for name in ("triton", "numpy")]
    triton, numpy = (tuple(map(int, version)) for version in versions)
    if triton == (3, 6) and numpy >= (2, 4):
        pytest.skip("Triton 3.6's interpreter makes numbers of arrays of one element, as numpy before 2.4 did")

    def run(cases: Path) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run
