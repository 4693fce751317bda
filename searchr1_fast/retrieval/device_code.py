"""CUDA C++ of `csrc/*.cu`, compiled when it is first wanted, for the GPU that is there: CuPy hands it to NVRTC.

So an install needs neither nvcc nor a GPU. The sources include nothing, as a machine that runs torch need not have
CUDA's headers. Without CuPy (`pip install 'searchr1_fast[cupy]'`) there is the twin of each kernel instead.

`OPTIONS` are also those that the tests compile with, for every architecture, where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

OPTIONS = ("-std=c++17",)

# (blocks, threads of a block, bytes of shared memory, arguments): queued on the current stream of torch
Launch = Callable[[int, int, int, tuple[Any, ...]], None]


def cuda_source(name: str) -> str:
    """The text of csrc/NAME.cu: of a checkout, or as the wheel brings it."""
    package = Path(__file__).parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / f"{name}.cu").is_file():
            return (folder / f"{name}.cu").read_text(encoding="utf-8")
    raise FileNotFoundError(f"{name}.cu lies neither in {package / 'csrc'} nor in {package.parent / 'csrc'}")


def load_kernel(name: str, function: str) -> Launch:
    """A function of csrc/NAME.cu, by CuPy, for torch's current device. Its arguments are numbers of numpy's types,
    pointers uint64."""
    import cupy

    kernel = cupy.RawModule(code=cuda_source(name), options=OPTIONS).get_function(function)

    def launch(num_blocks: int, num_threads: int, shared_bytes: int, arguments: tuple[Any, ...]) -> None:
        with cupy.cuda.Stream.from_external(_CurrentStream()):
            kernel((num_blocks,), (num_threads,), arguments, shared_mem=shared_bytes)

    return launch


class _CurrentStream:
    """torch's, by the protocol that CuPy asks for (not every torch that runs here has it)."""

    def __cuda_stream__(self) -> tuple[int, int]:
        import torch

        return 0, torch.cuda.current_stream().cuda_stream
