"""Run the Triton kernels' cases (`*_interpreted.py`): everywhere in Triton's interpreter, and compiled on a GPU.

They run in processes of their own, because importing Triton fixes the choice of interpreter.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import searchr1_kernels
import torch

CASES = sorted(Path(__file__).parent.glob("*_interpreted.py"))
# Of about the same length in the interpreter. To begin a process takes some seven seconds.
GROUPS = (
    ("topk",),
    ("gae", "linear", "linear_offsets"),
    ("cached_attention", "generation", "memory", "sampling", "scaling", "topk_bounds"),
)


def run(*cases: Path, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, cases)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_in_the_interpreter(group):
    run_in_the_interpreter(*(path for path in CASES if path.stem.removesuffix("_interpreted") in group))


def test_every_file_is_in_a_group():
    files = [path.stem.removesuffix("_interpreted") for path in CASES]
    assert sorted(name for group in GROUPS for name in group) == sorted(files)


def run_in_the_interpreter(*cases: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    versions = [importlib.metadata.version(name).split(".")[:2] for name in ("triton", "numpy")]
    triton, numpy = (tuple(map(int, version)) for version in versions)
    if triton == (3, 6) and numpy >= (2, 4):
        pytest.skip("Triton 3.6's interpreter makes numbers of arrays of one element, as numpy before 2.4 did")
    run(*cases, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem.removesuffix("_interpreted"))
def test_compiled(cases):
    run(cases)


def test_every_module_of_kernels_has_cases():
    """A module without cases would be compiled but never run."""
    modules = {path.stem for path in Path(searchr1_kernels.__file__).parent.glob("_*_triton.py")}
    text = "".join(path.read_text(encoding="utf-8") for path in CASES)
    assert modules == {name for name in modules if name in text}
