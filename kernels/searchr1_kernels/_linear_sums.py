"""Gradients of hidden states and weight, summed over chunks in types that keep them as exact as plain torch's.

Shape legend: N rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import torch

from searchr1_kernels._scaling import scale_rows

# Up to this many chunks (`_linear_chunks`: 35,000 rows, V 151,936), the weight's gradient is summed in its final type,
# and rounded with each chunk; with more chunks, in fp32, which takes twice the memory.
ROUNDED_SUMS = 8


class Gradients:
    """The sums grad_hidden [N,D] and grad_weight [V,D], to which the two matrix products of every chunk add.

    grad_hidden is fp32 where hidden is fp16, whose range ends at 6e-8. grad_weight has the type that
    `weight_gradient_dtype` gives; over more than `ROUNDED_SUMS` chunks it is summed in fp32 (fp64 for fp64)."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, want_hidden: bool, want_weight: bool) -> None:
        self.operand = operand(weight)
        self._hidden = hidden.new_zeros(hidden.shape, dtype=gradient_dtype(hidden)) if want_hidden else None
        self._num_rows, self._shape, self._want_weight = hidden.shape[0], weight.shape, want_weight
        self._weight_dtype, self._compute = weight_gradient_dtype(weight), compute_dtype(hidden)
        self._weight: torch.Tensor | None = None

    def add(
        self, gradient: torch.Tensor, scales: torch.Tensor | None, rows: torch.Tensor, where: slice | torch.Tensor
    ) -> None:  # fmt: skip
        """Add a chunk: the gradient [C,V], its rows times scales [C] unless None, of the logits of rows [C,D].

        The rows are as `operand` returns them, and are those at `where` in N."""
        if self._hidden is not None:
            self._add_hidden(gradient, scales, where)
        if self._want_weight:
            if scales is not None:
                unscaled, rows = rows, torch.empty_like(rows, memory_format=torch.contiguous_format)
                scale_rows(unscaled, scales, out=rows)
            self._add_weight(gradient, rows)

    def _add_hidden(self, gradient, scales, where) -> None:
        if scales is not None:  # applied to an fp32 product, so that it is rounded once
            part = self._hidden.new_empty(len(gradient), self._shape[1], dtype=self._compute)
            multiply(gradient, self.operand, out=part)
            scale_rows(part, scales, out=self._hidden[where])
        elif isinstance(where, slice):
            multiply(gradient, self.operand, out=self._hidden[where])
        else:
            part = self._hidden.new_empty(len(gradient), self._shape[1])
            multiply(gradient, self.operand, out=part)
            self._hidden[where] = part

    def _add_weight(self, gradient, rows) -> None:
        if self._weight is not None:
            multiply_add(gradient.t(), rows, out=self._weight)
        else:
            # A chunk's product adds to the sum in fp32, and the result is rounded. The square of that error is
            # proportional to the share of rows in the sum, so n chunks are off by sqrt((n + 1) / 2) times as much as
            # one, 8 by 2.1. Plain torch also has the errors of bf16 logits and their gradient: simulated (16,384 rows,
            # V 1,500, D 64), 8 chunks are off by 0.14 times torch's error where logits are spread by 10, 0.6 by 4, 1.9
            # by 1, and 2.0 where all are nearly 0 and all rows pull the same way.
            dtype = self._weight_dtype if ROUNDED_SUMS * len(rows) >= self._num_rows else self._compute
            self._weight = rows.new_empty(self._shape, dtype=dtype)
            multiply(gradient.t(), rows, out=self._weight)

    def results(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """-> grad_hidden, grad_weight; None where not wanted."""
        if not self._want_weight:
            return self._hidden, None
        if self._weight is None:
            return self._hidden, self.operand.new_zeros(self._shape, dtype=self._weight_dtype)
        return self._hidden, self._weight.to(self._weight_dtype)


def multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor, scale: float = 1.0) -> None:
    """out = scale * left @ right, summed in at least fp32 and rounded at most once.

    Autocast leaves products into a given tensor alone; it would round the operands of all others."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=0, alpha=scale, out=out)  # beta 0: `out` is not read
    elif out.dtype == torch.float32:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
        if scale != 1.0:
            out.mul_(scale)
    else:
        out.copy_(torch.mm(left, right, out=left.new_empty(out.shape)).mul_(scale))


def multiply_add(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    """out += left @ right."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """-> dtype of everything but the operands of matrix products."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def gradient_dtype(hidden: torch.Tensor) -> torch.dtype:
    """-> dtype of the grad_hidden of `Gradients`."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def weight_gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """-> dtype of the grad_weight of `Gradients`."""
    if weight.device.type == "cuda" and weight.dtype == torch.bfloat16:
        return weight.dtype
    return compute_dtype(weight)


def operand(tensor: torch.Tensor) -> torch.Tensor:
    """-> the tensor in the dtype that the matrix products take.

    bf16 stays bf16 on CUDA, which multiplies it with fp32 results. A CPU would round the logits to bf16, and fp16
    cannot hold gradients divided by a large number of tokens."""
    if tensor.device.type == "cuda" and tensor.dtype == torch.bfloat16:
        return tensor
    return tensor.to(compute_dtype(tensor))
