"""A tensor times a number, or each of its rows times one of its own, rounded once. Where the number is 1, which only
the device knows, nothing is read or written.

Torch rounds a 0-d factor to the type of what it multiplies before it does: 1 / 4915 in bf16 is off by a thousandth, in
every gradient alike. And on CUDA a tensor of bf16 times one of fp32 takes a kernel that casts number by number: 1.17 ms
for 622 MB there and back, at 1.1 TB/s (H200, 2026-11-27).

Shape legend: C rows, D columns.
"""

from __future__ import annotations

import torch

from searchr1_kernels._installed import has_triton

# Whether a gradient that nobody will ask for again is scaled where it lies.
IN_PLACE = True


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, may_change: bool) -> torch.Tensor:
    """gradient, saved by a node whose backward pass this is, times factor (0-d, fp32 or fp64), in `dtype`.

    If it may change, by which the caller says that the node alone has it, the result is the saved tensor itself where
    the backward pass frees the graph: no later one can ask for it, and the node drops it before the gradient goes on.
    With `retain_graph`, while a compiler traces, and for another type it is a new one.
    """
    may_change = may_change and IN_PLACE and gradient.dtype == dtype and type(gradient) is torch.Tensor
    if may_change and not torch._C._autograd._get_current_graph_task_keep_graph():
        scale(gradient, factor)
        return gradient
    return torch.mul(gradient, factor.reshape(1), out=gradient.new_empty(gradient.shape, dtype=dtype))


def scale(tensor: torch.Tensor, factor: torch.Tensor) -> None:
    """tensor *= factor (0-d, fp32 or fp64), in the type of the factor."""
    if _fused(tensor) and tensor.is_contiguous():  # a hook for saved tensors may give back another view
        from searchr1_kernels import _scaling_triton

        _scaling_triton.scale(tensor, factor)
    elif tensor.device.type != "cpu" or factor != 1:
        torch.mul(tensor, factor.reshape(1), out=tensor)


def scale_rows(rows: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """rows [C,D] times scales [C], in the type of the scales -> out [C,D], of any type. rows may be a view."""
    if _fused(rows):
        from searchr1_kernels import _scaling_triton

        _scaling_triton.scale_rows(rows, scales, out)
    else:
        torch.mul(rows, scales[:, None], out=out)


def _fused(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and has_triton()
