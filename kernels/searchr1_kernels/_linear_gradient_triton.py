"""Gradients of logits that are never in memory: formed tile by tile in the matrix product that makes the logits.

Where a row's normalizer is known (the backward pass of `linear_logprob`), `differentiate_products` writes a slab's
gradient in the operand's type, which moves 2 bytes a logit for bf16. fp32 logits that a library writes and that a pass
reads and turns into a gradient move 10.

Where the normalizer is not yet known (`linear_policy_loss`, which goes through the head once), `keep_probabilities`
writes K = 2^((z - m) scale): the probabilities up to a factor. m is the logit of the row's target, which `find_targets`
computes first. If a logit of a tile exceeds m by more than `_HEADROOM`, the tile takes its maximum as m, and the span's
later tiles start from that; a sampler seldom chooses so unlikely a token. Afterwards the factor is known, and
`normalize_rows` does what remains:

- Where m was the target's logit throughout, a row is one factor away from its gradient, as p is
  2^((z - m) scale - log2 sum). `normalize_rows` sets the target's entry and leaves the factor s to the two products,
  where it multiplies [C,D] instead of [C,V]: grad_hidden = diag(s) K weight, and grad_weight = K^T (diag(s) hidden).
  That is 2 bytes a logit in all, written once.
- Other rows are turned into gradients in place, as are all rows if the entropy, which is not linear in p, has a
  gradient: 6 bytes a logit, against 14 with a library's fp32 logits.

What is rounded to the operand's type, each with a relative error, is the probabilities and then either the gradients
or, for grad_weight alone, the rows of hidden. The target's 1 - p would suffer from that, so it is formed from the fp32
log-probability and rounded once, or twice with a row of hidden. grad_weight, itself rounded to bf16, is then off by
2.9e-3 of its norm instead of 2.4e-3, and grad_hidden by 2.3e-3 either way (512 rows of 256, V 8,192, flat and peaky, in
bf16 on a CPU). A softcap is not supported: its slope needs the logit itself, and `keep_probabilities` would spill
(Triton 3.6, sm_90).

Shape legend: C rows of a chunk, D hidden size, V vocabulary, W columns of a slab, S spans and T tiles of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from searchr1_kernels import _linear_forward_triton as forward
from searchr1_kernels._linear_forward_triton import place, product
from searchr1_kernels._linear_rows_triton import _LN_2, _LOG2_E, _LOWEST

ARCHITECTURES = forward.ARCHITECTURES
# Tiles of a row that a program of `normalize_rows` holds at a time, and its warps.
_TILES_AT_ONCE = 32
_ROW_WARPS = 8
# Powers of two by which a probability may exceed the target's before a maximum replaces the target's logit. Up to here
# all are in the range of bf16 and of fp32 sums, and a row's entropy, a difference of two numbers about as large, is
# good to 1e-5. Of 151,936 tokens, those this unlikely have at most 4e-5 of the probability together, so a sampler
# chooses one in 28,000 tokens or none.
_HEADROOM = 32.0
# Whether the factors of rows are left to the products.
SCALE_ROWS = True
# A row of gradients begins at a multiple of this many numbers: descriptors require 16 bytes.
_ALIGNED = 8


@triton.jit(do_not_specialize=["N", "first"])
def differentiate_products(
    hidden_desc,  # [N, D]
    weight_desc,  # [W, D]
    gradient_desc,  # [N, W]
    targets_ptr,  # [N] int64
    g_ptr,  # [N] fp32: gradient of the log-probability
    e_ptr,  # [N] fp32: of the entropy
    entropy_ptr,  # [N] fp32
    normalizer_ptr,  # [N, 2] fp32: of the whole row
    N,
    W,
    D,
    first,  # number of the first column
    scale,  # log2(e) / temperature
    softcap,  # unused: not supported
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Form the gradient of the logits of ROWS rows over one span of the slab, as `differentiate_rows` does."""
    row, span = place(N, W, ROWS, SPAN, GROUP)
    rows = row + tl.arange(0, ROWS)
    inside = rows < N
    target = tl.load(targets_ptr + rows, mask=inside, other=-1) - first
    target = tl.where((target >= 0) & (target < W), target, -1).to(tl.int32)
    inverse_temperature = scale * _LN_2
    g = tl.load(g_ptr + rows, mask=inside, other=0.0) * inverse_temperature
    highest = tl.load(normalizer_ptr + 2 * rows, mask=inside, other=0.0)
    log_total = tl.load(normalizer_ptr + 2 * rows + 1, mask=inside, other=0.0)
    if ENTROPY:
        e = tl.load(e_ptr + rows, mask=inside, other=0.0) * inverse_temperature
        entropy = tl.load(entropy_ptr + rows, mask=inside, other=0.0)
    for column in range(span * SPAN, tl.minimum(span * SPAN + SPAN, W), COLUMNS):
        z = product(hidden_desc, weight_desc, row, column, D, ROWS, COLUMNS, DEPTH)
        log2_p = (z - highest[:, None]) * scale - log_total[:, None]
        p = tl.exp2(log2_p)
        hit = (column + tl.arange(0, COLUMNS))[None, :] == target[:, None]
        if ENTROPY:
            gradient = tl.where(hit, g[:, None], 0.0) - p * (
                g[:, None] + e[:, None] * (log2_p * _LN_2 + entropy[:, None])
            )
        else:
            gradient = p * -g[:, None]
            gradient = tl.where(hit, gradient + g[:, None], gradient)
        gradient_desc.store([row, column], gradient.to(gradient_desc.dtype))


@triton.jit(do_not_specialize=["N"])
def keep_probabilities(
    hidden_desc,  # [N, D]
    weight_desc,  # [V, D]
    kept_desc,  # [N, V]
    references_ptr,  # [N] fp32: what a row's probabilities are relative to, unless above it by over HEADROOM
    partial_ptr,  # [S, 3, N] fp32, as of `scan_vocabulary`
    peaks_ptr,  # [T, N] fp32: the m to which a tile's probabilities are relative
    N,
    V,
    D,
    scale,  # log2(e) / temperature
    softcap,  # unused: not supported
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEADROOM: tl.constexpr,
):
    """Do what `scan_vocabulary` does, and write the probabilities up to a factor.

    The "maximum" of the statistics is the m that they are relative to: never less than the reference."""
    row, span = place(N, V, ROWS, SPAN, GROUP)
    rows = row + tl.arange(0, ROWS)
    highest = tl.load(references_ptr + rows, mask=rows < N, other=0.0)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for column in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), COLUMNS):
        z = product(hidden_desc, weight_desc, row, column, D, ROWS, COLUMNS, DEPTH)
        if column + COLUMNS > V:  # a mask on every tile would spill
            z = tl.where((column + tl.arange(0, COLUMNS))[None, :] < V, z, _LOWEST)
        top = tl.max(z, 1)
        new = tl.where((top - highest) * scale > HEADROOM, top, highest)
        shift = (highest - new) * scale
        shrink = tl.exp2(shift)
        d = (z - new[:, None]) * scale
        p = tl.exp2(d)
        weighted = shrink * (weighted + shift * total) + tl.sum(p * d, 1)
        total = shrink * total + tl.sum(p, 1)
        highest = new
        kept_desc.store([row, column], p.to(kept_desc.dtype))
        tl.store(peaks_ptr + column // COLUMNS * N + rows, new, mask=rows < N)
    partial_ptr += span.to(tl.int64) * 3 * N + rows
    tl.store(partial_ptr, highest, mask=rows < N)
    tl.store(partial_ptr + N, total, mask=rows < N)
    tl.store(partial_ptr + 2 * N, weighted, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def normalize_rows(
    kept_ptr,  # [N, V] of `keep_probabilities`: gets the gradients
    peaks_ptr,  # [T, N] fp32
    targets_ptr,  # [N] int64
    g_ptr,  # [N] fp32: gradient of the log-probability
    e_ptr,  # [N] fp32: of the entropy
    logprobs_ptr,  # [N] fp32
    entropy_ptr,  # [N] fp32
    normalizer_ptr,  # [N, 2] fp32
    references_ptr,  # [N] fp32: if SCALES
    scales_ptr,  # [N] fp32: gets the factor that the row must still be multiplied by, if SCALES
    N,
    V,
    stride,  # of a row
    scale,  # log2(e) / temperature
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    ENTROPY: tl.constexpr,
    SCALES: tl.constexpr,  # without ENTROPY
):
    """Form the gradient of a row's logits. A row whose g and e are 0 is not read.

    If SCALES, a row that is one factor away from its gradient is not read either."""
    row = tl.program_id(0).to(tl.int64)
    kept_ptr += row * stride
    target = tl.load(targets_ptr + row)
    inverse_temperature = scale * _LN_2
    g = tl.load(g_ptr + row) * inverse_temperature
    e, entropy = 0.0, 0.0
    if ENTROPY:
        e = tl.load(e_ptr + row) * inverse_temperature
        entropy = tl.load(entropy_ptr + row)
    logprob = tl.load(logprobs_ptr + row)
    # The target's own gradient, from fp32: 1 - p would lose what rounding took from p.
    known = tl.exp2(logprob / _LN_2)
    at_target = g * (1.0 - known) - known * e * (logprob + entropy)
    highest = tl.load(normalizer_ptr + 2 * row)
    log_total = tl.load(normalizer_ptr + 2 * row + 1)
    readable = tl.where((g != 0) | (e != 0), V, 0)
    end = V
    if SCALES:
        whole = highest == tl.load(references_ptr + row)  # no tile was relative to anything else
        total = tl.exp2(log_total)
        tl.store(scales_ptr + row, tl.where(whole, -g / total, 1.0))
        of_target = (known - 1.0) * total
        within = whole & (target >= 0) & (target < V)
        tl.store(kept_ptr + target, of_target.to(kept_ptr.dtype.element_ty), mask=within)
        end = tl.where(whole, 0, V)
    for begin in tl.range(0, end, TILES * COLUMNS):
        tile = begin // COLUMNS + tl.arange(0, TILES)
        peak = tl.load(peaks_ptr + tile * N + row, mask=tile * COLUMNS < readable, other=_LOWEST)
        shift = (peak - highest) * scale - log_total
        columns = tile[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        kept = tl.load(kept_ptr + columns, mask=columns < readable, other=0.0).to(tl.float32)
        p = kept * tl.exp2(shift)[:, None]
        if ENTROPY:
            log2_p = tl.log2(tl.where(kept > 0, kept, 1.0)) + shift[:, None]
            gradient = -p * (g + e * (log2_p * _LN_2 + entropy))
        else:
            gradient = -g * p
        gradient = tl.where(columns == target, at_target, gradient)
        gradient = tl.where(columns < readable, gradient, 0.0)
        tl.store(kept_ptr + columns, gradient.to(kept_ptr.dtype.element_ty), mask=columns < V)


def aligned_rows(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """-> view [rows, columns] of a flat buffer that has `aligned_width(columns)` numbers a row or more."""
    width = aligned_width(columns)
    return buffer[: rows * width].view(rows, width)[:, :columns]


def aligned_width(columns: int) -> int:
    """-> numbers from one row to the next."""
    return columns + -columns % _ALIGNED


def differentiate_slab(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [W, D]
    gradient: torch.Tensor,  # [N, W] of `aligned_rows`: gets the result
    first: int,  # number of the first column
    targets: torch.Tensor,  # [N] int64
    g: torch.Tensor,  # [N] gradient of the log-probability
    e: torch.Tensor | None,  # [N] of the entropy; None where there is none
    entropy: torch.Tensor | None,  # [N]: where e is given
    normalizers: torch.Tensor,  # [N, 2]
    temperature: float,
) -> None:
    """Launch `differentiate_products` for a slab."""
    with_entropy = e is not None
    g = g.contiguous()  # the gradient of a sum is one number, repeated by a stride of 0
    e, entropy = (e.contiguous(), entropy) if with_entropy else (g, g)
    columns = weight.shape[0]
    differentiate_products[forward.grid(hidden, columns)](
        *forward.descriptors(hidden, weight), TensorDescriptor.from_tensor(gradient, list(forward._TILE[:2])),
        targets.contiguous(), g, e, entropy, normalizers, len(hidden), columns, hidden.shape[1], first,
        ENTROPY=with_entropy, **forward.launch_options(temperature, None),
    )  # fmt: skip


class KeptRows:
    """The passes over a chunk, with the interface of `PlainRows` in `_linear_chunks`, without a softcap."""

    def __init__(self, hidden, weight, temperature, softcap, num_rows: int, *, for_gradient: bool) -> None:
        """`weight` [V,D] is as `operand` returns it; the workspace holds chunks of up to `num_rows`."""
        assert softcap is None, "probabilities do not say what a softcap made of a logit"
        self.weight, self.temperature = weight, temperature
        vocabulary = weight.shape[0]
        self.kept = hidden.new_empty(num_rows * aligned_width(vocabulary), dtype=weight.dtype)
        self.peaks = hidden.new_empty(triton.cdiv(vocabulary, forward._TILE[1]) * num_rows, dtype=torch.float32)
        self.partial = self.peaks.new_empty(triton.cdiv(vocabulary, forward._SPAN) * 3 * num_rows)
        self.normalizers = self.peaks.new_empty(num_rows, 2)
        # Not parts of one tensor: the second's alignment, and so N, would choose between two kernels.
        self.references, self.scales = self.peaks.new_empty(num_rows), self.peaks.new_empty(num_rows)

    def scores(self, rows, targets, logprobs, entropy, saved=None) -> None:
        """rows [C,D], targets [C] -> fills logprobs [C] and entropy [C]."""
        self.logprobs, (vocabulary, depth) = logprobs, self.weight.shape
        self.chunk, targets = aligned_rows(self.kept, len(rows), vocabulary), targets.contiguous()
        forward.find_targets(rows, self.weight, targets, None, self.references)
        keep_probabilities[forward.grid(rows, vocabulary)](
            *forward.descriptors(rows, self.weight),
            TensorDescriptor.from_tensor(self.chunk, list(forward._TILE[:2])), self.references, self.partial,
            self.peaks, len(rows), vocabulary, depth, HEADROOM=_HEADROOM,
            **forward.launch_options(self.temperature, None),
        )  # fmt: skip
        forward.merge(
            self.partial, self.references, targets, vocabulary, self.temperature, logprobs, entropy, self.normalizers
        )

    def gradient(self, targets, g, e, entropy) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> gradient of the logits [C,V] in the operand's dtype, and the factors [C] its rows still need, or None.

        targets [C]; g, e [C] are the gradients of log-probability and entropy H [C], e None where there is none."""
        with_entropy = e is not None
        scales = None if with_entropy or not SCALE_ROWS else self.scales[: len(targets)]
        g = g.contiguous()
        e, entropy = (e.contiguous(), entropy) if with_entropy else (g, g)
        normalize_rows[(len(targets),)](
            self.chunk, self.peaks, targets.contiguous(), g, e, self.logprobs, entropy, self.normalizers,
            self.references, self.scales, len(targets), self.weight.shape[0], self.chunk.stride(0),
            _LOG2_E / self.temperature, COLUMNS=forward._TILE[1], TILES=_TILES_AT_ONCE, ENTROPY=with_entropy,
            SCALES=scales is not None, num_warps=_ROW_WARPS,
        )  # fmt: skip
        return self.chunk, scales


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """Kernels as they are launched on `ARCHITECTURES`: name, kernel, signature, constants, warps, stages, arguments
    divisible by 16."""
    rows, columns, depth, warps, stages = forward._TILE
    multiplying = {
        "hidden_desc": f"tensordesc<bf16[{rows},{depth}]>", "weight_desc": f"tensordesc<bf16[{columns},{depth}]>",
        "N": "i32", "D": "i32", "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip
    tile = f"tensordesc<bf16[{rows},{columns}]>"
    constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "SPAN": forward._SPAN, "GROUP": forward._GROUP}
    vectors = {"targets_ptr": "*i64"}
    vectors |= dict.fromkeys(("g_ptr", "e_ptr", "entropy_ptr", "normalizer_ptr"), "*fp32")
    slab = multiplying | vectors | {"gradient_desc": tile, "W": "i32", "first": "i32"}
    keep = multiplying | {"kept_desc": tile, "V": "i32"}
    keep |= dict.fromkeys(("references_ptr", "partial_ptr", "peaks_ptr"), "*fp32")
    normalize = vectors | {"kept_ptr": "*bf16"}
    normalize |= dict.fromkeys(("peaks_ptr", "logprobs_ptr", "references_ptr", "scales_ptr"), "*fp32")
    aligned = {*vectors, *normalize, "partial_ptr", "V", "W", "D", "stride"}
    normalize |= {"N": "i32", "V": "i32", "stride": "i32", "scale": "fp32"}
    cases = []
    for suffix, entropy in (("", False), ("_entropy", True)):
        more = constants | {"ENTROPY": entropy, "SOFTCAP": False}
        name = f"differentiate_products{suffix}"
        cases.append((name, differentiate_products, slab, more, warps, stages, aligned & set(slab)))
    more = constants | {"SOFTCAP": False, "HEADROOM": _HEADROOM}
    cases.append(("keep_probabilities", keep_probabilities, keep, more, warps, stages, aligned & set(keep)))
    for suffix, entropy, scales in (("", False, False), ("_scales", False, True), ("_entropy", True, False)):
        more = {"COLUMNS": columns, "TILES": _TILES_AT_ONCE, "ENTROPY": entropy, "SCALES": scales}
        name = f"normalize_rows{suffix}"
        cases.append((name, normalize_rows, normalize, more, _ROW_WARPS, 3, aligned & set(normalize)))
    return cases
