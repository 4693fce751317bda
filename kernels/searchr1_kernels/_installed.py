"""What is installed beside torch and numba."""

from __future__ import annotations

import functools
import importlib.util
import warnings


@functools.cache
def has_triton() -> bool:
    """Asked for CUDA tensors: installed? Not loaded by asking. Says so, once, where it is not."""
    installed = importlib.util.find_spec("triton") is not None
    if not installed:
        warnings.warn(
            "searchr1_kernels: Triton is not installed, so CUDA tensors take several passes of torch in place of one "
            "kernel; pip install triton",
            stacklevel=2,
        )
    return installed
