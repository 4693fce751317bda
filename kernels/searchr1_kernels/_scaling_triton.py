"""`_scaling` on a GPU, at the speed of memory.

Shape legend: C rows, D columns.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

# Numbers that a program holds at a time, and its warps: four vectors of 16 bytes a thread in bf16.
_BLOCK = 4096
_WARPS = 4
# Programs per multiprocessor: 64 kB in flight hide the latency. With more programs than fit, a factor of 1 would still
# pay for starting them.
_PROGRAMS = 8


@triton.jit
def scale_all(values_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """values[:count] *= factor. Reads no values where the factor is 1."""
    factor = tl.load(factor_ptr)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    end = tl.where(factor == 1.0, begin, count)
    for first in tl.range(begin, end, tl.num_programs(0).to(tl.int64) * BLOCK):
        place = first + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + place, mask=place < count, other=0.0).to(factor.dtype) * factor
        tl.store(values_ptr + place, values.to(values_ptr.dtype.element_ty), mask=place < count)


@triton.jit
def scale_each(
    rows_ptr,  # [C, D]
    scales_ptr,  # [C]
    out_ptr,  # [C, D]
    D,
    stride,  # of a row
    out_stride,
    BLOCK: tl.constexpr,
):
    """Multiply BLOCK numbers of a row by the row's factor."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scales_ptr + row)
    values = tl.load(rows_ptr + row * stride + column, mask=column < D, other=0.0).to(scale.dtype) * scale
    tl.store(out_ptr + row * out_stride + column, values.to(out_ptr.dtype.element_ty), mask=column < D)


def scale(tensor: torch.Tensor, factor: torch.Tensor) -> None:
    """tensor *= factor (0-d, fp32 or fp64); the tensor is contiguous."""
    count = tensor.numel()
    if count == 0:
        return
    with torch.cuda.device_of(tensor):
        programs = min(triton.cdiv(count, _BLOCK), _PROGRAMS * _multiprocessors(tensor.device))
        scale_all[(programs,)](tensor, factor, count, BLOCK=_BLOCK, num_warps=_WARPS)


def scale_rows(rows: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """out [C,D] = rows [C,D] times scales [C]. The numbers of a row are contiguous."""
    num_rows, columns = rows.shape
    block = min(1024, triton.next_power_of_2(columns))
    if num_rows:
        scale_each[(num_rows, triton.cdiv(columns, block))](
            rows, scales, out, columns, rows.stride(0), out.stride(0), BLOCK=block, num_warps=_WARPS
        )  # fmt: skip


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """-> multiprocessors of a GPU; an arbitrary number for the interpreter on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """Kernels as they are launched: name, kernel, signature, constants, warps, stages, arguments divisible by 16."""
    all_of = {"values_ptr": "*bf16", "factor_ptr": "*fp32", "count": "i32"}
    each = {"rows_ptr": "*fp32", "scales_ptr": "*fp32", "out_ptr": "*bf16"}
    each |= {"D": "i32", "stride": "i32", "out_stride": "i32"}
    return [
        ("scale_all", scale_all, all_of, {"BLOCK": _BLOCK}, _WARPS, 3, set(all_of)),
        ("scale_each", scale_each, each, {"BLOCK": 1024}, _WARPS, 3, set(each)),
    ]
