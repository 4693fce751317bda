"""What is installed besides torch and numba. Asking imports nothing."""

from __future__ import annotations

import functools
import importlib.util
import warnings


def triton_is_installed() -> bool:
    """Whether Triton is installed, for code that cannot do without it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, for CUDA tensors that torch's own operators can take as well.

    If they have to, warns once."""
    installed = triton_is_installed()
    if not installed:
        warnings.warn(
            "searchr1_kernels: Triton is not installed, so CUDA tensors take several passes of torch in place of one "
            "kernel; pip install triton",
            stacklevel=2,
        )
    return installed
