"""Running a file of cases in Triton's interpreter, and counting what is alive."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of memory that operators have made and that are still there, and the most there have been: what the
    allocator of a GPU counts. Memory from before does not count, nor does a view. It does not look into operators of
    one's own: give it their implementations."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.namespace != "searchr1_kernels", f"{function} would hide what it allocates"
        given = {StorageWeakRef(t.untyped_storage()) for t in tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        known = given | {reference for reference, _ in self._alive}
        for tensor in tensors(result):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference not in known:
                known.add(reference)
                self._alive.append((reference, tensor.untyped_storage().nbytes()))
        self._alive = [(reference, size) for reference, size in self._alive if not reference.expired()]
        self.peak = max(self.peak, sum(size for _, size in self._alive))
        return result


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def live_bytes():
    """-> a fresh `LiveBytes`, to be entered."""
    return LiveBytes()


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
