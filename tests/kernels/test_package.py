"""The kernels' own package: what its wheel contains and requires, and that it works with nothing else installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import searchr1_kernels

import searchr1_fast

KERNELS = Path(__file__).parents[2] / "kernels"

# Forbids what the package must not need, then uses it. Search is left to its own tests: it compiles for seconds.
USE_ALONE = """
import sys
sys.path.insert(0, {site!r})
for name in ("searchr1_fast", "transformers", "triton", "cupy"):
    sys.modules[name] = None
import torch
import searchr1_kernels as kernels
assert kernels.__file__.startswith({site!r}), kernels.__file__
hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
targets, values, cu_seqlens = torch.arange(9), torch.randn(9), torch.tensor([0, 4, 9])
logprob, entropy = kernels.linear_logprob(hidden, weight, targets, return_entropy=True)
loss, _ = kernels.linear_policy_loss(hidden, weight, targets, logprob.detach(), values, denominator=9)
(loss + entropy.sum() + kernels.masked_kl(logprob, values).sum()).backward()
advantages, returns = kernels.gae(values, values, cu_seqlens)
kernels.masked_whiten(advantages)
kernels.group_advantages(values, torch.arange(9) // 3)
[getattr(kernels, name) for name in kernels.__all__]
assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """-> a wheel, built from a copy so that the checkout stays clean."""
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(KERNELS, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_the_kernels_and_asks_for_little(wheel):
    files = zipfile.ZipFile(wheel)
    have = {name for name in files.namelist() if ".dist-info/" not in name}
    modules = {f"searchr1_kernels/{path.name}" for path in (KERNELS / "searchr1_kernels").glob("*.py")}
    assert have == modules | {"searchr1_kernels/py.typed"}
    (licence,) = (files.read(name) for name in files.namelist() if name.endswith("/LICENSE"))
    assert licence == (KERNELS.parent / "LICENSE").read_bytes(), "kernels/LICENSE is to be a copy of LICENSE"
    (metadata,) = (files.read(name).decode() for name in files.namelist() if name.endswith(".dist-info/METADATA"))
    assert searchr1_kernels.__version__ == searchr1_fast.__version__
    assert f"\nVersion: {searchr1_fast.__version__}\n" in metadata
    needs = re.findall(r"^Requires-Dist: ([\w-]+)((?:(?!extra ==).)*)$", metadata, re.MULTILINE)
    assert {name for name, _ in needs} == {"torch", "numpy", "numba"}


def test_it_works_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    command = [sys.executable, "-P", "-c", USE_ALONE.format(site=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
