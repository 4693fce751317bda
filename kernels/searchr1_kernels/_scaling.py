"""Scale a tensor by one number, or each of its rows by its own, rounding once.

A factor of 1, which only the device knows to be one, costs no reads or writes.

Torch rounds a 0-d factor to the type of the other operand before it multiplies: 1 / 4915 in bf16 is off by a
thousandth, in every gradient alike. And on CUDA, a bf16 tensor times an fp32 one takes a kernel that casts number by
number: 1.17 ms to read and write 622 MB, at 1.1 TB/s (H200, 2026-11-27).

Shape legend: C rows, D columns.
"""

from __future__ import annotations

import torch

from searchr1_kernels._installed import has_triton

# Whether a gradient that will not be needed again is scaled in place.
IN_PLACE = True


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, may_change: bool) -> torch.Tensor:
    """-> gradient times factor (0-d, fp32 or fp64), in `dtype`. Called in the backward pass of the node that saved it.

    With `may_change` the caller asserts that only the node holds the gradient. Where the backward pass frees the graph,
    the result is then the saved tensor itself: no later pass can ask for it, and the node drops it before the gradient
    goes on. With `retain_graph`, while a compiler traces, and for another type the result is a new tensor.
    """
    may_change = may_change and IN_PLACE and gradient.dtype == dtype and type(gradient) is torch.Tensor
    if may_change and not torch._C._autograd._get_current_graph_task_keep_graph():
        scale(gradient, factor)
        return gradient
    return torch.mul(gradient, factor.reshape(1), out=gradient.new_empty(gradient.shape, dtype=dtype))


def scale(tensor: torch.Tensor, factor: torch.Tensor) -> None:
    """tensor *= factor (0-d, fp32 or fp64), computed in the factor's type."""
    if _fused(tensor) and tensor.is_contiguous():  # a hook for saved tensors may return another view
        from searchr1_kernels import _scaling_triton

        _scaling_triton.scale(tensor, factor)
    elif tensor.device.type != "cpu" or factor != 1:
        torch.mul(tensor, factor.reshape(1), out=tensor)


def scale_rows(rows: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """out [C,D], of any type, = rows [C,D] times scales [C], computed in the scales' type. rows may be a view."""
    if _fused(rows):
        from searchr1_kernels import _scaling_triton

        _scaling_triton.scale_rows(rows, scales, out)
    else:
        torch.mul(rows, scales[:, None], out=out)


def _fused(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and has_triton()
