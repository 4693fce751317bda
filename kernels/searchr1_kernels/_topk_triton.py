"""The search's two kernels: an upper bound per block of rows, and exact scores of chosen blocks.

Rows are the first operand of the product (128 of them per program) and queries the second, so that a corpus is read
once whatever the number of queries, and what is written is one number per 128 rows and query. No atomics, and nothing
depends on the order in which programs run.

Shape legend: Q queries, M rows, D components, G blocks of 128 rows, P chosen blocks per query.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

BLOCK_ROWS = 128

# Queries per program -> warps, pipeline stages: at most half of an H100's shared memory where 128 queries or fewer, so
# that one program computes while another begins. A stage holds 128 bytes of every row and query. Neither 64 queries nor
# 128 with 8 warps: Triton 3.6 spills both on sm_100, and up to 128 the products take less time than the reading anyway.
CONFIGURATIONS = {16: (4, 4), 32: (4, 4), 128: (4, 3), 256: (8, 3)}
_STAGE_BYTES = 128


@triton.jit(do_not_specialize=["num_rows", "num_queries", "num_blocks"])
def block_bounds(
    rows,  # [M, D] fp16, bf16, fp32 or int8
    row_scales,  # [M] fp32, read if SCALED
    queries,  # [Q, D]
    scales,  # [Q] fp32: of the product
    norms,  # [Q] fp32: what a row's residual is multiplied by
    residual_norms,  # [Q] fp32: what a row's magnitude is multiplied by
    residuals,  # [G] fp32, the largest of each block
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
    EVEN: tl.constexpr,  # size % BK == 0
):
    """out = max over a block of scale * row_scale * (row . query), plus what the product may have missed."""
    query_tiles = tl.cdiv(num_queries, BN)
    block = tl.program_id(0) // query_tiles  # the tiles of one block follow each other, and find its rows in L2
    query = tl.program_id(0) % query_tiles * BN + tl.arange(0, BN)
    first = block.to(tl.int64) * BM
    # The last block repeats its last row, and the last tile its last query: no mask, and no maximum changes.
    row = tl.minimum(tl.arange(0, BM), num_rows - 1 - first).to(tl.int32)
    known = tl.minimum(query, num_queries - 1)
    component = tl.arange(0, BK)
    row_pointers = rows + first * size + row[:, None] * size + component[None, :]
    query_pointers = queries + known[:, None] * size + component[None, :]
    integers: tl.constexpr = queries.dtype.element_ty == tl.int8
    product = tl.zeros((BM, BN), dtype=tl.int32 if integers else tl.float32)
    for d in range(0, size, BK):
        if EVEN:
            x = tl.load(row_pointers + d)
            y = tl.load(query_pointers + d)
        else:
            x = tl.load(row_pointers + d, mask=(d + component < size)[None, :], other=0)
            y = tl.load(query_pointers + d, mask=(d + component < size)[None, :], other=0)
        if integers:
            product = tl.dot(x, tl.trans(y), product, out_dtype=tl.int32)
        else:
            product = tl.dot(x.to(y.dtype), tl.trans(y), product, input_precision="tf32")
    coarse = product.to(tl.float32)
    if SCALED:
        coarse = coarse * tl.load(row_scales + first + row)[:, None]
    coarse = tl.max(coarse, 0) * tl.load(scales + known)
    error = tl.load(norms + known) * tl.load(residuals + block)
    error += tl.load(residual_norms + known) * tl.load(magnitudes + block)
    bound = coarse + error + 1e-6 * (tl.abs(coarse) + error)  # the slack is for the rounding of these lines
    tl.store(out + query.to(tl.int64) * num_blocks + block, bound, mask=query < num_queries)


@triton.jit(do_not_specialize=["num_rows", "num_chosen"])
def exact_keys(
    rows,  # [M, D]
    row_scales,  # [M] fp32, read if SCALED
    queries,  # [Q, D] floating
    blocks,  # [Q, P] int64
    keys,  # [Q, P * BM] int64
    num_rows,
    size,
    num_chosen,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Exact scores of the rows of one block, packed with their ids so that a larger key is a better result.

    Products are exact in fp64, and summed in fp64 in an order that only `size` decides. The upper half of a key is the
    score's bits made monotone, the lower half the id's complement; rows past the end get the smallest key of all.
    """
    place = tl.program_id(0).to(tl.int64)
    query = place // num_chosen
    first = tl.load(blocks + place) * BM
    for begin in range(0, BM, BR):
        row = first + begin + tl.arange(0, BR)
        inside = row < num_rows
        sums = tl.zeros((BR, BD), dtype=tl.float64)
        for d in range(0, size, BD):
            component = d + tl.arange(0, BD)
            mask = inside[:, None] & (component < size)[None, :]
            x = tl.load(rows + row[:, None] * size + component[None, :], mask=mask, other=0).to(tl.float64)
            y = tl.load(queries + query * size + component, mask=component < size, other=0).to(tl.float64)
            sums += x * y[None, :]
        total = tl.sum(sums, 1)
        if SCALED:
            total *= tl.load(row_scales + row, mask=inside, other=0).to(tl.float64)
        score = total.to(tl.float32)
        score = tl.where(score == 0, 0.0, score)  # -0 equals 0, and must look like it
        bits = score.to(tl.int32, bitcast=True)
        monotone = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        key = (monotone << 32) | (0xFFFFFFFF - row)
        key = tl.where(inside, key, -0x8000000000000000)
        tl.store(keys + place * BM + begin + tl.arange(0, BR), key)


def bounds_configuration(num_queries: int, itemsize: int, shared_memory: int) -> dict[str, int]:
    """Meta-parameters of `block_bounds` for rows and queries of `itemsize` bytes, in so much shared memory."""
    tile = min((tile for tile in CONFIGURATIONS if tile >= num_queries), default=max(CONFIGURATIONS))
    num_warps, num_stages = CONFIGURATIONS[tile]
    fitting = shared_memory // ((BLOCK_ROWS + tile) * _STAGE_BYTES)
    return {
        "BM": BLOCK_ROWS,
        "BN": tile,
        "BK": _STAGE_BYTES // itemsize,
        "num_warps": num_warps,
        "num_stages": max(1, min(num_stages, fitting)),
    }


# Of `exact_keys`: 16 rows by 128 components in fp64 are 32 registers of a thread (32 by 64 spill in Triton 3.6, sm_80).
EXACT_CONFIGURATION = {"BM": BLOCK_ROWS, "BR": 16, "BD": 128, "num_warps": 4}


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16."""
    cases = [_bounds_case("fp16", "fp16", tile) for tile in CONFIGURATIONS]
    cases += [_bounds_case("i8", "i8", tile) for tile in CONFIGURATIONS]
    cases += [_bounds_case(element, element, 256) for element in ("bf16", "fp32")]
    cases += [_bounds_case("i8", "fp16", 256), _bounds_case("fp16", "fp16", 256, even=False)]
    for element, scaled in (("fp16", False), ("bf16", False), ("fp32", False), ("i8", True)):
        constants = {**EXACT_CONFIGURATION, "SCALED": scaled}
        signature = {
            "rows": f"*{element}", "row_scales": "*fp32", "queries": "*fp32", "blocks": "*i64", "keys": "*i64",
            "num_rows": "i32", "size": "i32", "num_chosen": "i32",
        }  # fmt: skip
        divisible = {"rows", "row_scales", "queries", "blocks", "keys", "size"}
        num_warps = constants.pop("num_warps")
        cases.append((f"exact_keys_{element}", exact_keys, signature, constants, num_warps, 3, divisible))
    return cases


def _bounds_case(rows: str, queries: str, tile: int, even: bool = True) -> tuple:
    """One of `compile_cases`: element types of rows and queries, queries per program."""
    itemsize = {"fp32": 4, "fp16": 2, "bf16": 2, "i8": 1}[queries]
    constants = bounds_configuration(tile, itemsize, 1 << 20) | {"SCALED": rows == "i8", "EVEN": even}
    num_warps, num_stages = constants.pop("num_warps"), constants.pop("num_stages")
    vectors = ("row_scales", "scales", "norms", "residual_norms", "residuals", "magnitudes", "out")
    signature = {"rows": f"*{rows}", "queries": f"*{queries}", **dict.fromkeys(vectors, "*fp32")}
    divisible = {*signature, "size"}
    signature |= dict.fromkeys(("num_rows", "num_queries", "size", "num_blocks"), "i32")
    kind = rows if rows == queries else f"{rows}_{queries}"
    name = f"block_bounds_{kind}_{tile}" + ("" if even else "_uneven")
    return name, block_bounds, signature, constants, num_warps, num_stages, divisible
