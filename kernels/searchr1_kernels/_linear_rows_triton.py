"""The passes over a chunk's logits on a GPU, one program per row: each reads its row once and keeps fp32 statistics.

`PlainRows` in `_linear_chunks` is the plain twin, with each formula in one place. Here the logits stay as the matrix
product left them: softcap and temperature are applied on the way in, and the gradient on the way out.

Exponentials are to base 2, and only of differences to the row's maximum: scaling a logit of 1e4 itself would round away
its difference to its neighbours. The identity of the maximum is finite, so no difference is a NaN.

Shape legend: C rows of a chunk, V vocabulary, W columns of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from searchr1_kernels._linear_sums import compute_dtype, multiply

# Columns that a program holds at a time, and its warps: 40 to 120 registers, no spill (Triton 3.6 and 3.9, 2026-11-24).
_BLOCK = 8192
_WARPS = 8
_LOG2_E = 1.4426950408889634
# Below every logit, with a finite square.
_LOWEST = tl.constexpr(-1e18)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh from one exponential, which cannot overflow; absolute error 1e-7."""
    t = tl.exp2(tl.abs(x) * -2.8853900817779268)
    y = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def fold(z, scale, highest, total, weighted, axis: tl.constexpr):
    """Fold logits along an axis into running statistics.

    These are the maximum m, the sum of p = 2^((z - m) scale), and the sum of p (z - m) scale."""
    new = tl.maximum(highest, tl.max(z, axis))
    shift = (highest - new) * scale
    shrink = tl.exp2(shift)
    d = (z - tl.expand_dims(new, axis)) * scale
    p = tl.exp2(d)
    weighted = shrink * (weighted + shift * total) + tl.sum(p * d, axis)
    return new, shrink * total + tl.sum(p, axis), weighted


@triton.jit
def score_rows(
    logits_ptr,  # [C, V]
    targets_ptr,  # [C] int64
    logprobs_ptr,  # [C] fp32
    entropy_ptr,  # [C] fp32
    normalizer_ptr,  # [C, 2] fp32: maximum after the softcap, log2 of the sum of exponentials
    V,
    stride,  # of a row's logits
    scale,  # log2(e) / temperature
    softcap,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Compute a row's target log-probability, its entropy, and the normalizer that `differentiate_rows` needs."""
    row = tl.program_id(0).to(tl.int64)  # C * V exceeds 2^31
    logits_ptr += row * stride
    highest, total, weighted = _LOWEST + 0.0, 0.0, 0.0
    for begin in tl.range(0, V, BLOCK, num_stages=2):
        columns = begin + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = softcap * tanh(z / softcap)
        z = tl.where(columns < V, z, _LOWEST)
        highest, total, weighted = fold(z, scale, highest, total, weighted, 0)
    column = tl.load(targets_ptr + row)
    target = tl.load(logits_ptr + column, mask=(column >= 0) & (column < V), other=float("nan")).to(tl.float32)
    if SOFTCAP:
        target = softcap * tanh(target / softcap)
    log_total = tl.log2(total)
    tl.store(logprobs_ptr + row, ((target - highest) * scale - log_total) * _LN_2)
    if ENTROPY:
        tl.store(entropy_ptr + row, (log_total - weighted / total) * _LN_2)
    tl.store(normalizer_ptr + 2 * row, highest)
    tl.store(normalizer_ptr + 2 * row + 1, log_total)


@triton.jit(do_not_specialize=["first"])
def differentiate_rows(
    logits_ptr,  # [C, W]
    gradient_ptr,  # [C, W]: may be the logits
    targets_ptr,  # [C] int64
    g_ptr,  # [C] fp32: gradient of the log-probability
    e_ptr,  # [C] fp32: of the entropy
    entropy_ptr,  # [C] fp32
    normalizer_ptr,  # [C, 2] fp32: of the whole row
    first,  # number of the first column
    W,
    stride,  # of a row's logits, and of their gradient
    scale,  # log2(e) / temperature
    softcap,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Compute the gradient of W of a row's logits. A row whose g and e are 0 is not read."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    gradient_ptr += row * stride
    target = tl.load(targets_ptr + row) - first
    inverse_temperature = scale * _LN_2
    g = tl.load(g_ptr + row) * inverse_temperature
    e, entropy = 0.0, 0.0
    if ENTROPY:
        e = tl.load(e_ptr + row) * inverse_temperature
        entropy = tl.load(entropy_ptr + row)
    highest = tl.load(normalizer_ptr + 2 * row)
    log_total = tl.load(normalizer_ptr + 2 * row + 1)
    readable = tl.where((g != 0) | (e != 0), W, 0)
    for begin in tl.range(0, W, BLOCK, num_stages=2):
        columns = begin + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + columns, mask=columns < readable, other=0.0).to(tl.float32)
        slope = 1.0
        if SOFTCAP:
            t = tanh(z / softcap)
            slope = 1.0 - t * t
            z = softcap * t
        log2_p = (z - highest) * scale - log_total
        p = tl.exp2(log2_p)
        if ENTROPY:
            gradient = tl.where(columns == target, g, 0.0) - p * (g + e * (log2_p * _LN_2 + entropy))
        else:
            gradient = g * (tl.where(columns == target, 1.0, 0.0) - p)
        gradient = tl.where(columns < readable, gradient * slope, 0.0)
        tl.store(gradient_ptr + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=columns < W)


def launch_options(temperature: float, softcap: float | None, columns: int) -> dict[str, Any]:
    """-> launch options of both row kernels, for `columns` columns."""
    return {
        "scale": _LOG2_E / temperature,
        "softcap": softcap or 1.0,
        "BLOCK": min(_BLOCK, triton.next_power_of_2(columns)),
        "SOFTCAP": softcap is not None,
        "num_warps": _WARPS,
    }


def differentiate(
    logits: torch.Tensor,  # [C, W]
    gradient: torch.Tensor,  # [C, W]: gets the result; may be the logits
    first: int,  # number of the first column
    targets: torch.Tensor,  # [C] int64
    g: torch.Tensor,  # [C] gradient of the log-probability
    e: torch.Tensor | None,  # [C] of the entropy; None where there is none
    entropy: torch.Tensor | None,  # [C]: where e is given
    normalizer: torch.Tensor,  # [C, 2] of `score_rows`
    options: dict[str, Any],  # of `launch_options`
) -> None:
    """Launch `differentiate_rows` for W columns."""
    with_entropy = e is not None
    g = g.contiguous()  # the gradient of a sum is one number, repeated by a stride of 0
    e, entropy = (e.contiguous(), entropy) if with_entropy else (g, g)
    differentiate_rows[(len(logits),)](
        logits, gradient, targets.contiguous(), g, e, entropy, normalizer, first, logits.shape[1],
        logits.stride(0), ENTROPY=with_entropy, **options,
    )  # fmt: skip


class FusedRows:
    """The passes over a chunk, with the interface of `PlainRows`. A gradient of the logits' type overwrites them."""

    def __init__(self, hidden, weight, temperature, softcap, num_rows: int, *, for_gradient: bool) -> None:
        """`weight` [V,D] is as `operand` returns it; the workspace holds chunks of up to `num_rows`."""
        self.weight = weight
        self.logits = hidden.new_empty(num_rows, weight.shape[0], dtype=compute_dtype(hidden))
        self.gradients = self.logits
        if for_gradient and weight.dtype != self.logits.dtype:
            self.gradients = torch.empty_like(self.logits, dtype=weight.dtype)
        self.normalizers = self.logits.new_empty(num_rows, 2)
        self.options = launch_options(temperature, softcap, weight.shape[0])

    @staticmethod
    def saved_shape(hidden, weight, softcap, differentiable: bool) -> tuple[int, int]:
        """-> [N,2], for the normalizers."""
        return (hidden.shape[0] if differentiable else 0), 2

    def scores(self, rows, targets, logprobs, entropy, saved=None) -> None:
        """rows [C,D], targets [C] -> fills logprobs [C] and, where not None, entropy [C].

        The first C rows of `saved` [C or more, 2], unless None, get the normalizers that a backward pass needs."""
        self.normalizer = self.normalizers[: len(rows)] if saved is None else saved
        self._products(rows)
        score_rows[(len(rows),)](
            self.chunk, targets.contiguous(), logprobs, logprobs if entropy is None else entropy, self.normalizer,
            self.weight.shape[0], self.chunk.stride(0), ENTROPY=entropy is not None, **self.options,
        )  # fmt: skip

    def gradient(self, targets, g, e, entropy) -> tuple[torch.Tensor, None]:  # [C,V] in the dtype of the operand
        """Gradient of the logits, given targets [C] and the gradients g, e [C] of log-probability and entropy H [C].

        e is None where the entropy has no gradient."""
        gradient = self.gradients[: len(targets)]
        differentiate(self.chunk, gradient, 0, targets, g, e, entropy, self.normalizer, self.options)
        return gradient, None

    def _products(self, rows: torch.Tensor) -> None:
        self.chunk = self.logits[: len(rows)]
        multiply(rows, self.weight.t(), out=self.chunk)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """Kernels as they are launched: name, kernel, signature, constants, warps, stages, arguments divisible by 16."""
    score = {
        "logits_ptr": "*fp32", "targets_ptr": "*i64", "logprobs_ptr": "*fp32", "entropy_ptr": "*fp32",
        "normalizer_ptr": "*fp32", "V": "i32", "stride": "i32", "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip
    differentiate = {
        "logits_ptr": "*fp32", "gradient_ptr": "*bf16", "targets_ptr": "*i64", "g_ptr": "*fp32", "e_ptr": "*fp32",
        "entropy_ptr": "*fp32", "normalizer_ptr": "*fp32", "first": "i32", "W": "i32", "stride": "i32",
        "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip
    in_place = differentiate | {"gradient_ptr": "*fp32"}
    cases = []
    for name, kernel, signature, entropy, softcap in (
        ("score_rows", score_rows, score, True, False),
        ("score_rows_softcap", score_rows, score, True, True),
        ("differentiate_rows", differentiate_rows, differentiate, False, False),
        ("differentiate_rows_entropy", differentiate_rows, differentiate, True, False),
        ("differentiate_rows_entropy_softcap", differentiate_rows, differentiate, True, True),
        ("differentiate_rows_in_place", differentiate_rows, in_place, True, True),
    ):
        constants = {"BLOCK": _BLOCK, "SOFTCAP": softcap, "ENTROPY": entropy}
        aligned = {argument for argument in signature if argument.endswith("_ptr") or argument in ("V", "W", "stride")}
        cases.append((name, kernel, signature, constants, _WARPS, 3, aligned))
    return cases
