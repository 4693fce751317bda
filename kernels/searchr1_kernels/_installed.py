"""What is installed beside torch and numba. Asking loads nothing."""

from __future__ import annotations

import functools
import importlib.util
import warnings


def triton_is_installed() -> bool:
    """For what cannot do without."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_triton() -> bool:
    """For CUDA tensors that torch's own operators could take as well. Says so, once, where they have to."""
    installed = triton_is_installed()
    if not installed:
        warnings.warn(
            "searchr1_kernels: Triton is not installed, so CUDA tensors take several passes of torch in place of one "
            "kernel; pip install triton",
            stacklevel=2,
        )
    return installed
