"""Checks of arguments, with the same form of error everywhere: which argument, what was expected, what came.

Only properties known to the host are checked; nothing here waits for a GPU.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad


def check_tensor(name: str, tensor: object) -> None:
    """Require a tensor: no list, array, module or None."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def check_optional(name: str, tensor: object) -> None:
    """Require a tensor or None."""
    if tensor is not None:
        check_tensor(name, tensor)


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | str]) -> None:
    """Require a tensor of this shape; `expected` has a size, or a letter where any size will do: `("N", 128)`."""
    check_tensor(name, tensor)
    shape = tensor.shape
    fits = len(shape) == len(expected)
    if fits:
        for want, have in zip(expected, shape, strict=True):  # a generator would cost as much as all the rest
            fits = fits and (isinstance(want, str) or want == have)
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(shape)}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Require any floating type."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_precise(name: str, logprobs: torch.Tensor | None) -> None:
    """Require None or log-probabilities of more than 16 bits: a ratio is the exponential of a difference of two."""
    if logprobs is not None and logprobs.dtype.itemsize < 4:
        raise ValueError(
            f"{name}: expected torch.float32 or torch.float64, got {logprobs.dtype}, whose rounding becomes a ratio; "
            "if FSDP casts the arguments of a module, give MixedPrecisionPolicy(cast_forward_inputs=False)"
        )


def check_dtype(name: str, tensor: torch.Tensor, *expected: torch.dtype) -> None:
    """Require one of the listed types."""
    if tensor.dtype not in expected:
        raise ValueError(f"{name}: expected {' or '.join(str(dtype) for dtype in expected)}, got {tensor.dtype}")


def check_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Require both on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name} ({other.device}), got {tensor.device}")


def check_number(name: str, value: object, low: float | None = None) -> None:
    """Require a number of Python or numpy, not below `low`.

    A tensor is refused: reading its value would have to wait for a GPU, and it would get no gradient.
    """
    if not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"{name}: expected a number, got {type(value).__name__}")
    if low is not None and not value >= low:
        raise ValueError(f"{name}: expected a number not below {low:g}, got {value}")


def check_whole(name: str, value: object) -> None:
    """Require a whole number of Python or numpy."""
    if not isinstance(value, (numbers.Integral, torch.SymInt)):
        got = value if isinstance(value, numbers.Real) else type(value).__name__
        raise ValueError(f"{name}: expected a whole number, got {got}")


def check_positive(name: str, value: object) -> None:
    """Require a finite number above 0."""
    check_number(name, value)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def check_mask(mask: torch.Tensor | None, like_name: str, like: torch.Tensor) -> None:
    """Require None or a bool tensor with one entry per row of `like`, on its device."""
    if mask is not None:
        check_shape("mask", mask, (like.shape[0],))
        check_dtype("mask", mask, torch.bool)
        check_device("mask", mask, like_name, like)


def check_reverse_mode(name: str, tensor: torch.Tensor) -> None:
    """Require a tensor without a tangent: torch would silently leave it out of an operator's outputs."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(f"{name}: expected a tensor without a tangent: there is no forward-mode differentiation")


def check_indices(name: str, indices: torch.Tensor, bound: int) -> None:
    """Require numbers from 0 to below `bound`. The values are read on a CPU only, where no wait is needed."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= bound:
            raise ValueError(f"{name}: expected ids from 0 to {bound - 1}, got {low} to {high}")


def check_cu_seqlens(cu_seqlens: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Require `[S+1]` integers on the device of `like`. Reads no values, so `torch.compile` can trace it."""
    check_shape("cu_seqlens", cu_seqlens, ("S+1",))
    check_dtype("cu_seqlens", cu_seqlens, torch.int32, torch.int64)
    check_device("cu_seqlens", cu_seqlens, like_name, like)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: expected at least one offset, got none")


def check_offsets(name: str, offsets: torch.Tensor, total: int) -> None:
    """Require offsets `[S+1]` that go from 0 to `total` and never fall.

    The values are read on a CPU only, where no wait is needed. For use inside an operator, where there are values.
    """
    if offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"{name}: expected offsets that rise from 0 to {total}, got {first} to {last}"
            + ("" if first != 0 or last != total else " with a fall between")
        )
