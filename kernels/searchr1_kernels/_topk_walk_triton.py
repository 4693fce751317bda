"""`block_bounds` with persistent programs: as many as the device runs at once, each going from block to block.

The loops over blocks and over components are flattened into one, so the pipeline of copies does not drain at the end of
a block: while its maxima are taken, rows of the next one are in flight. The tensor memory accelerator makes the copies
(tensor descriptors). It costs threads no addresses and fills what lies outside with zeros, so no size needs a mask.

A step of 256 rows reads the queries half as often as one of 128. This matters from about 64 queries on: queries come
from L2, and a 128-row step with 128 queries reads as many bytes of them as of rows.

For sm_90. On sm_100 Triton 3.6 spills these with 64 queries and more, and they have not been run there.

Shape legend: Q queries, M rows, D components, G blocks of 128 rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from searchr1_kernels._topk_bounds_triton import (
    VECTORS,
    Candidate,
    block_constants,
    joined,
    upper_bound,
    with_residuals,
)

ARCHITECTURES = (90,)

# Queries -> (programs per multiprocessor, rows of a step, warps, stages), all within an H100's shared memory. Not yet
# measured against each other.
WALKS = {
    16: ((2, 128, 4, 5), (3, 128, 4, 3), (1, 256, 8, 5)),
    32: ((2, 128, 4, 5), (3, 128, 4, 3), (1, 256, 8, 5)),
    64: ((2, 128, 4, 4), (1, 256, 8, 4)),
    128: ((2, 128, 4, 3), (1, 128, 8, 6), (1, 256, 8, 4)),
    256: ((1, 128, 8, 4),),
}
# The same with two digits of every query.
DIGITS_WALKS = {
    16: ((2, 128, 4, 5), (3, 128, 4, 3), (1, 256, 8, 5)),
    32: ((2, 128, 4, 4), (1, 256, 8, 4)),
    64: ((2, 128, 4, 3), (1, 256, 8, 4)),
    128: ((1, 128, 8, 4),),
}


@triton.jit(do_not_specialize=["num_rows", "num_queries", "num_blocks"])
def walk_bounds(
    rows,  # descriptor of [M, D] by [BM, BK]
    row_scales,  # [M] fp32, read if SCALED
    queries,  # descriptor of [Q, D] (with BASE [2 * Q, D]) by [BN, BK]
    scales,  # [Q] fp32: of the product
    norms,  # [Q] fp32: what a row's residual is multiplied by
    residual_norms,  # [Q] fp32: what a row's magnitude is multiplied by
    residuals,  # with BASE [M] fp32; otherwise [G], the largest of each block
    magnitudes,  # [G] fp32, the largest of each block
    out,  # [Q, G] fp32
    num_rows,
    num_queries,
    size,
    num_blocks,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCALED: tl.constexpr,
    BASE: tl.constexpr,
):
    """Compute what `block_bounds` computes, walking from step to step."""
    query_tiles = tl.cdiv(num_queries, BN)
    per_step: tl.constexpr = BM // 128
    num_steps = tl.cdiv(num_blocks, per_step) * query_tiles  # the tiles of one block follow each other
    for step in tl.range(tl.program_id(0), num_steps, tl.num_programs(0), flatten=True):
        block = step // query_tiles * per_step
        begin = step % query_tiles * BN
        product = tl.zeros((BM, BN), dtype=tl.int32 if BASE else tl.float32)
        fine = product
        for d in range(0, size, BK):
            x = rows.load([block * 128, d])
            y = queries.load([begin, d])
            if BASE:
                z = queries.load([num_queries + begin, d])
                product = tl.dot(x, tl.trans(y), product, out_dtype=tl.int32)
                fine = tl.dot(x, tl.trans(z), fine, out_dtype=tl.int32)
            else:
                product = tl.dot(x.to(y.dtype), tl.trans(y), product, input_precision="tf32")
        coarse = joined(product, fine, BASE)
        first, row = block.to(tl.int64) * 128, tl.arange(0, BM)
        query = begin + tl.arange(0, BN)
        known = tl.minimum(query, num_queries - 1)
        known_row = first + tl.minimum(row, num_rows - 1 - first)
        if SCALED:
            coarse = coarse * tl.load(row_scales + known_row)[:, None]
        scale, norm = tl.load(scales + known), tl.load(norms + known)
        if BASE:
            coarse = with_residuals(coarse, norm, scale, tl.load(residuals + known_row))
        coarse = tl.where((row < num_rows - first)[:, None], coarse, float("-inf"))
        number = block + tl.arange(0, per_step)
        inside = number < num_blocks
        magnitude = tl.load(magnitudes + number, mask=inside, other=0)
        error = tl.load(residual_norms + known)[None, :] * magnitude[:, None]
        if not BASE:
            error += norm[None, :] * tl.load(residuals + number, mask=inside, other=0)[:, None]
        bound = upper_bound(tl.max(tl.reshape(coarse, (per_step, 128, BN)), 1) * scale[None, :], error)
        mask = inside[:, None] & (query < num_queries)[None, :]
        tl.store(out + query.to(tl.int64)[None, :] * num_blocks + number[:, None], bound, mask=mask)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: tuples as in `_topk_bounds_triton`."""
    tables = (("fp16", WALKS), ("bf16", {256: WALKS[256]}), ("fp32", {256: WALKS[256]}), ("i8", DIGITS_WALKS))
    ways = [
        (element, Candidate(programs, rows, tile, *rest))
        for element, table in tables
        for tile in table
        for programs, rows, *rest in table[tile]
    ]
    return [_case(element, way) for element, way in ways]


def _case(element: str, way: Candidate) -> tuple:
    constants = block_constants(way, {"fp32": 4, "fp16": 2, "bf16": 2, "i8": 1}[element])
    constants |= {"SCALED": element == "i8", "BASE": 128 if element == "i8" else 0}
    num_warps, num_stages = constants.pop("num_warps"), constants.pop("num_stages")
    signature = {
        "rows": f"tensordesc<{element}[{way.rows},{constants['BK']}]>",
        "queries": f"tensordesc<{element}[{way.queries},{constants['BK']}]>",
        **dict.fromkeys(VECTORS, "*fp32"),
        **dict.fromkeys(("num_rows", "num_queries", "size", "num_blocks"), "i32"),
    }
    name = f"walk_bounds_{element}_{way.queries}_{way.programs}x{way.rows}"
    return name, walk_bounds, signature, constants, num_warps, num_stages, {*VECTORS, "size"}
