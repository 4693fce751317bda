"""Log-probability and entropy without logits in memory: the matrix product folds each tile into running statistics.

Each program of `scan_vocabulary` takes some rows and one span of the vocabulary, and writes three numbers per row and
span. `merge_spans` joins the spans in order and compares the target's logit with them. There are no locks and no
atomics. Spans and tiles do not depend on N or on a row's position, and the rows of a tile do not affect each other; so
a row's result has the same bits alone and in any batch.

Used for passes without a gradient (a reference, a scorer), and for the forward pass of `linear_logprob` where its
backward pass has products of our own too (`_linear_gradient_triton`) and needs only a row's normalizer. Weights beyond
V never count: what the last tile reads past the end is replaced by the identity of the maximum before any exponential.

`target_logits` computes the target's logit with the same matrix instructions, in the same order, as a tile. A tensor
core truncates where a sum in fp32 would round (some 5e-5 for logits of 50, nearly always to the same side). Where the
target is likely, this error cancels in the difference to the log-sum-exp. With a more exact logit it would remain, and
exceed the whole log-probability of a target that is all but certain.

Shape legend: N rows, D hidden size, V vocabulary, S spans of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from searchr1_kernels._linear_rows_triton import _LN_2, _LOG2_E, _LOWEST, fold, tanh

# Rows, columns and depth of a tile, warps, pipeline stages. Without multicast, a tile's width decides how often the
# caches are read, and this is the widest that does not spill: 172 registers, 255 with a softcap (Triton 3.6 and 3.9,
# sm_90 and sm_100, 2026-11-24).
_TILE = (128, 256, 64, 8, 3)
# GPUs with descriptor loads and enough shared memory for the tile. Before sm_90 the loads are not pipelined.
ARCHITECTURES = (90, 100)
# Columns of a span, a multiple of the tile's. More spans keep a GPU busy with few rows; each costs 12 bytes a row.
_SPAN = 2048
# Row tiles that process a span together, so that it stays in the L2 cache meanwhile.
_GROUP = 32
# Rows of one launch; bounds the partial results.
_MAX_ROWS = 32768
# Rows, depth, warps and stages of a program of `target_logits`: the fewest rows that sm_90 has an instruction for.
_OWN = (64, 64, 4, 3)
# Rows of a program of `merge_spans`, one to a lane.
_MERGE_ROWS = 32


@triton.jit
def place(N, V, ROWS: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr):
    """-> this program's first row and its span's number. A group of row tiles takes one span after the other."""
    program = tl.program_id(0)
    row_tiles, spans = tl.cdiv(N, ROWS), tl.cdiv(V, SPAN)
    group = program // (GROUP * spans)
    width = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program - group * GROUP * spans
    return (group * GROUP + within % width) * ROWS, within // width


@triton.jit
def product(
    hidden_desc, weight_desc, row, column, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """-> logits [ROWS, COLUMNS], fp32."""
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    for depth in range(0, D, DEPTH):
        left = hidden_desc.load([row, depth])
        right = weight_desc.load([column, depth])
        z = tl.dot(left, right.T, z, input_precision="ieee")
    return z


@triton.jit(do_not_specialize=["N"])  # one kernel for every number of rows, and the same bits
def scan_vocabulary(
    hidden_desc,  # [N, D]
    weight_desc,  # [V, D]
    partial_ptr,  # [S, 3, N] fp32: maximum, sum and weighted sum of `fold`
    N,
    V,
    D,
    scale,  # log2(e) / temperature
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Compute the statistics of ROWS rows over one span of the vocabulary."""
    row, span = place(N, V, ROWS, SPAN, GROUP)
    highest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for column in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), COLUMNS):
        z = product(hidden_desc, weight_desc, row, column, D, ROWS, COLUMNS, DEPTH)
        if SOFTCAP:
            z = softcap * tanh(z / softcap)
        if column + COLUMNS > V:  # a mask on every tile would spill
            z = tl.where((column + tl.arange(0, COLUMNS))[None, :] < V, z, _LOWEST)
        highest, total, weighted = fold(z, scale, highest, total, weighted, 1)
    rows = row + tl.arange(0, ROWS)
    partial_ptr += span.to(tl.int64) * 3 * N + rows
    tl.store(partial_ptr, highest, mask=rows < N)
    tl.store(partial_ptr + N, total, mask=rows < N)
    tl.store(partial_ptr + 2 * N, weighted, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def target_logits(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    targets_ptr,  # [N] int64
    logits_ptr,  # [N] fp32: gets the result; 0 where the target is not a token
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    softcap,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Compute ROWS target logits: the diagonal of the product of the rows with their targets' weights."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets_ptr + rows, mask=rows < N, other=-1)
    known = (target >= 0) & (target < V)
    left_ptr = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride
    right_ptr = weight_ptr + target[:, None] * weight_stride
    z = tl.zeros([ROWS, ROWS], tl.float32)
    for depth in range(0, D, DEPTH):
        columns = depth + tl.arange(0, DEPTH)
        mask = known[:, None] & (columns < D)[None, :]
        left = tl.load(left_ptr + columns[None, :], mask=mask, other=0.0)
        right = tl.load(right_ptr + columns[None, :], mask=mask, other=0.0)
        z = tl.dot(left, right.T, z, input_precision="ieee")
    own = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
    logit = tl.sum(tl.where(own, z, 0.0), 1)
    if SOFTCAP:
        logit = softcap * tanh(logit / softcap)
    tl.store(logits_ptr + rows, logit, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def merge_spans(
    partial_ptr,  # [S, 3, N] fp32
    logits_ptr,  # [N] fp32 of `target_logits`
    targets_ptr,  # [N] int64
    logprobs_ptr,  # [N] fp32
    entropy_ptr,  # [N] fp32
    normalizer_ptr,  # [N, 2] fp32 as of `score_rows`, written if NORMALIZERS
    N,
    V,
    spans,
    scale,
    ROWS: tl.constexpr,
    ENTROPY: tl.constexpr,
    NORMALIZERS: tl.constexpr,
):
    """Join the spans of ROWS rows, first to last, and compare the target's logit with them."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    highest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for _ in range(spans):
        other = tl.load(partial_ptr + rows, mask=inside, other=0.0)
        other_total = tl.load(partial_ptr + N + rows, mask=inside, other=1.0)
        other_weighted = tl.load(partial_ptr + 2 * N + rows, mask=inside, other=0.0)
        new = tl.maximum(highest, other)
        shift, other_shift = (highest - new) * scale, (other - new) * scale
        shrink, other_shrink = tl.exp2(shift), tl.exp2(other_shift)
        weighted = shrink * (weighted + shift * total) + other_shrink * (other_weighted + other_shift * other_total)
        total = shrink * total + other_shrink * other_total
        highest = new
        partial_ptr += 3 * N
    target = tl.load(targets_ptr + rows, mask=inside, other=0)
    known = inside & (target >= 0) & (target < V)
    logit = tl.load(logits_ptr + rows, mask=inside, other=0.0)
    log_total = tl.log2(total)
    # Rounding must not push a probability above 1. A NaN must stay a NaN: by default a GPU's minimum of NaN and 0 is 0,
    # a certainty.
    logprob = ((logit - highest) * scale - log_total) * _LN_2
    logprob = tl.minimum(logprob, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(logprobs_ptr + rows, tl.where(known, logprob, float("nan")), mask=inside)
    if ENTROPY:
        tl.store(entropy_ptr + rows, (log_total - weighted / total) * _LN_2, mask=inside)
    if NORMALIZERS:
        tl.store(normalizer_ptr + 2 * rows, highest, mask=inside)
        tl.store(normalizer_ptr + 2 * rows + 1, log_total, mask=inside)


def score_without_logits(
    hidden: torch.Tensor,  # [N, D] bf16 or fp16, rows of whole 16 bytes
    weight: torch.Tensor,  # [V, D], likewise
    targets: torch.Tensor,  # [N] int64
    temperature: float,
    softcap: float | None,
    return_entropy: bool,
    normalizers: torch.Tensor | None = None,  # [N, 2] fp32: gets those of `score_rows`
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> logprobs [N] fp32, NaN where the target is not a token; and entropy [N] fp32 or None."""
    num_rows, vocabulary = hidden.shape[0], weight.shape[0]
    logprobs = hidden.new_empty(num_rows, dtype=torch.float32)
    entropy = torch.empty_like(logprobs) if return_entropy else None
    spans, most = triton.cdiv(vocabulary, _SPAN), min(num_rows, _MAX_ROWS)
    partial, logits, targets = logprobs.new_empty(spans * 3 * most), logprobs.new_empty(most), targets.contiguous()
    for begin in range(0, num_rows, _MAX_ROWS):
        where = slice(begin, begin + _MAX_ROWS)
        chunk = hidden[where]
        scan_vocabulary[grid(chunk, vocabulary)](
            *descriptors(chunk, weight), partial, len(chunk), vocabulary, hidden.shape[1],
            **launch_options(temperature, softcap),
        )  # fmt: skip
        find_targets(chunk, weight, targets[where], softcap, logits)
        merge(
            partial, logits, targets[where], vocabulary, temperature, logprobs[where],
            None if entropy is None else entropy[where], None if normalizers is None else normalizers[where],
        )  # fmt: skip
    return logprobs, entropy


def grid(hidden: torch.Tensor, columns: int) -> tuple[int]:
    """-> the number of programs that cover all rows and all spans of `columns` columns."""
    return (triton.cdiv(len(hidden), _TILE[0]) * triton.cdiv(columns, _SPAN),)


def descriptors(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """-> descriptors of the operands, as `product` loads them."""
    rows, columns, depth = _TILE[:3]
    return TensorDescriptor.from_tensor(hidden, [rows, depth]), TensorDescriptor.from_tensor(weight, [columns, depth])


def launch_options(temperature: float, softcap: float | None) -> dict[str, Any]:
    """-> launch options of the kernels that call `product`."""
    rows, columns, depth, warps, stages = _TILE
    return {
        "scale": _LOG2_E / temperature, "softcap": softcap or 1.0, "SOFTCAP": softcap is not None,
        "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "SPAN": _SPAN, "GROUP": _GROUP,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def find_targets(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [N] int64, contiguous
    softcap: float | None,
    logits: torch.Tensor,  # [N] fp32 or more: gets the result
) -> None:
    """Launch `target_logits` for all rows."""
    rows, depth, warps, stages = _OWN
    target_logits[(triton.cdiv(len(hidden), rows),)](
        hidden, weight, targets, logits, len(hidden), *weight.shape, hidden.stride(0), weight.stride(0),
        softcap=softcap or 1.0, ROWS=rows, DEPTH=depth, SOFTCAP=softcap is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def merge(
    partial: torch.Tensor,  # [S, 3, N] fp32
    logits: torch.Tensor,  # [N] fp32 or more: of the targets
    targets: torch.Tensor,  # [N] int64, contiguous
    vocabulary: int,
    temperature: float,
    logprobs: torch.Tensor,  # [N] fp32: gets the result
    entropy: torch.Tensor | None,  # [N] fp32, likewise
    normalizers: torch.Tensor | None,  # [N, 2] fp32, likewise
) -> None:
    """Launch `merge_spans` for all rows."""
    merge_spans[(triton.cdiv(len(targets), _MERGE_ROWS),)](
        partial, logits, targets, logprobs, logprobs if entropy is None else entropy,
        logprobs if normalizers is None else normalizers, len(targets), vocabulary, triton.cdiv(vocabulary, _SPAN),
        scale=_LOG2_E / temperature, ROWS=_MERGE_ROWS, ENTROPY=entropy is not None,
        NORMALIZERS=normalizers is not None, num_warps=1,
    )  # fmt: skip


def takes(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `score_without_logits` accepts CUDA tensors [N,D] and [V,D] of the same type."""
    return (
        hidden.dtype in (torch.bfloat16, torch.float16)
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(hidden.device)[0] * 10 in ARCHITECTURES
        and all(
            tensor.stride(1) == 1
            and tensor.stride(0) >= tensor.shape[1]
            and tensor.stride(0) % 8 == 0
            and tensor.data_ptr() % 16 == 0
            for tensor in (hidden, weight)
        )
    )


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """Kernels as they are launched on `ARCHITECTURES`: name, kernel, signature, constants, warps, stages, arguments
    divisible by 16."""
    rows, columns, depth, warps, stages = _TILE
    cases = []
    scan = {
        "hidden_desc": f"tensordesc<bf16[{rows},{depth}]>", "weight_desc": f"tensordesc<bf16[{columns},{depth}]>",
        "partial_ptr": "*fp32", "N": "i32", "V": "i32", "D": "i32", "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip
    own = {
        "hidden_ptr": "*bf16", "weight_ptr": "*bf16", "targets_ptr": "*i64", "logits_ptr": "*fp32",
        "N": "i32", "V": "i32", "D": "i32", "hidden_stride": "i32", "weight_stride": "i32", "softcap": "fp32",
    }  # fmt: skip
    merge = {
        "partial_ptr": "*fp32", "logits_ptr": "*fp32", "targets_ptr": "*i64", "logprobs_ptr": "*fp32",
        "entropy_ptr": "*fp32", "normalizer_ptr": "*fp32", "N": "i32", "V": "i32", "spans": "i32", "scale": "fp32",
    }  # fmt: skip
    aligned = {*scan, *own, *merge} - {"N", "spans", "scale", "softcap"}
    for suffix, softcap in (("", False), ("_softcap", True)):
        constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "SPAN": _SPAN, "GROUP": _GROUP}
        constants["SOFTCAP"] = softcap
        name = f"scan_vocabulary{suffix}"
        cases.append((name, scan_vocabulary, scan, constants, warps, stages, aligned & set(scan)))
        rows_of_own, depth_of_own, *rest = _OWN
        constants = {"ROWS": rows_of_own, "DEPTH": depth_of_own, "SOFTCAP": softcap}
        cases.append((f"target_logits{suffix}", target_logits, own, constants, *rest, aligned & set(own)))
    constants = {"ROWS": _MERGE_ROWS, "ENTROPY": True, "NORMALIZERS": True}
    cases.append(("merge_spans", merge_spans, merge, constants, 1, 3, aligned & set(merge)))
    return cases
