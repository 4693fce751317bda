"""Compiles the CUDA C++ of `csrc/*.cu` on first use, for the GPU at hand: CuPy hands it to NVRTC.

An install therefore needs neither nvcc nor a GPU. The sources include nothing, because a machine that runs torch need
not have CUDA's headers. Without CuPy (`pip install 'searchr1_fast[cupy]'`) the twin of each kernel is used instead.

Tests compile with the same `OPTIONS` where there is no GPU, for every architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

OPTIONS = ("-std=c++17",)

# (blocks, threads of a block, bytes of shared memory, arguments): queued on the current stream of torch
Launch = Callable[[int, int, int, tuple[Any, ...]], None]


def cuda_source(name: str) -> str:
    """The text of csrc/NAME.cu, from a checkout or from the wheel."""
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / f"{name}.cu").is_file():
            return (folder / f"{name}.cu").read_text(encoding="utf-8")
    raise FileNotFoundError(f"{name}.cu lies neither in {package / 'csrc'} nor in {package.parent / 'csrc'}")


def load_kernel(name: str, function: str) -> Launch:
    """Load a function of csrc/NAME.cu through CuPy, for torch's current device. Its arguments are numpy scalars, with
    pointers as uint64."""
    import cupy

    kernel = cupy.RawModule(code=cuda_source(name), options=OPTIONS).get_function(function)

    def launch(num_blocks: int, num_threads: int, shared_bytes: int, arguments: tuple[Any, ...]) -> None:
        with cupy.cuda.Stream.from_external(_CurrentStream()):
            kernel((num_blocks,), (num_threads,), arguments, shared_mem=shared_bytes)

    return launch


class _CurrentStream:
    """torch's current stream, by the protocol that CuPy asks for (not every supported torch has it)."""

    def __cuda_stream__(self) -> tuple[int, int]:
        import torch

        return 0, torch.cuda.current_stream().cuda_stream
