"""The search's pass over the corpus: an upper bound for every block of 128 rows and every query.

Rows are the first operand of the product and queries the second, so the corpus is read once whatever the number of
queries, and only one number per 128 rows and query is written. There are no atomics, and nothing depends on the order
in which programs run.

`block_bounds` has a program per block. `_topk_walk_triton` has the same with programs that go from block to block, for
GPUs whose copies take descriptors. `candidates` lists what is worth trying for a number of queries. Which one is the
fastest is measured on the device (`Passes.tune` in `_topk_passes`), and no result depends on it: bounds differ in their
last bits, and what they let through is scored exactly.

A query against 8-bit rows has two digits: q ~ unit * (coarse + fine / BASE), both int8. One digit would blur the bound
by about as much as the codes of the rows do; the second costs products, whose units are idle while rows are read.

Shape legend: Q queries, M rows, D components, G blocks of 128 rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

BLOCK_ROWS = 128
# Bytes of every row and query in a stage, where 16 divides their width and they are read in vectors.
STAGE_BYTES = 128
# Arguments that are fp32 vectors, whatever rows and queries are.
VECTORS = ("row_scales", "scales", "norms", "residual_norms", "residuals", "magnitudes", "out")


class Candidate(NamedTuple):
    """One way to compute bounds."""

    programs: int  # per multiprocessor, walking from block to block; 0: one program for every block
    rows: int  # of a program's step, a multiple of 128
    queries: int
    num_warps: int
    num_stages: int
    stage_bytes: int = STAGE_BYTES

    @property
    def name(self) -> str:
        """-> a name for reports."""
        kind = f"{self.programs} walking" if self.programs else "block"
        return f"{kind} {self.rows}x{self.queries} w{self.num_warps} s{self.num_stages}"


# `block_bounds`: queries per program -> warps, pipeline stages. With 128 queries or fewer, at most half of an H100's
# shared memory, so that one program computes while another begins. Neither 64 queries nor 128 with 8 warps: Triton 3.6
# spills both on sm_100, and up to 128 the products take less time than the reading anyway.
CONFIGURATIONS = {16: (4, 4), 32: (4, 4), 128: (4, 3), 256: (8, 3)}
# The same with two digits, whose products take twice the registers.
DIGITS_CONFIGURATIONS = {16: (4, 4), 32: (4, 4), 64: (4, 3)}
# Both, for a width that 16 does not divide: each number has its own pointer, and these take so many registers that the
# above spill, up to 6,864 bytes. As exact, and slow.
SCALAR_CONFIGURATIONS = {16: (8, 2), 32: (8, 2)}
_SCALAR_STAGE_BYTES = 64


@triton.jit
def with_residuals(coarse, norm, scale, residual):
    """-> coarse [BM, BN], in units of scale, plus what the codes of each row may have missed, in the same units.

    The rounding here is some 4e-7 of what is added and 2e-7 of coarse. Norms and residuals are each 1e-6 too large,
    which covers both where coarse is up to twice what is added. Where coarse is larger, the sum is large, and
    `upper_bound` adds 1e-6 of it."""
    return coarse + (norm / scale)[None, :] * residual[:, None]


@triton.jit
def upper_bound(best, error):
    """best = scale * the largest product, error >= what it may have missed -> their sum, rounded up."""
    bound = best + error + 1e-6 * (tl.abs(best) + error)  # the slack covers the rounding of these lines
    return tl.where(bound == bound, bound, float("inf"))  # NaN, where infinities met, excludes nothing


@triton.jit
def joined(product, fine, BASE: tl.constexpr):
    """-> products of both digits, in units of the second: integers that fit (`digit_base`). Without BASE, unchanged."""
    if BASE:
        product = product * BASE + fine
    return product.to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "num_queries", "num_blocks"])
def block_bounds(
    rows,  # [M, D] fp16, bf16, fp32 or int8
    row_scales,  # [M] fp32, read if SCALED
    queries,  # [Q, D]; with BASE [2 * Q, D] int8, all first digits and then all second ones
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
    BASE: tl.constexpr,  # of two digits; 0: queries are floats
    EVEN: tl.constexpr,  # size % BK == 0
):
    """out = max over a block of scale * row_scale * (row . query), plus what the product may have missed."""
    query_tiles = tl.cdiv(num_queries, BN)
    block = tl.program_id(0) // query_tiles  # the query tiles of a block follow each other, and find its rows in L2
    query = tl.program_id(0) % query_tiles * BN + tl.arange(0, BN)
    first = block.to(tl.int64) * BM
    # The last block repeats its last row, and the last tile its last query: this needs no mask and changes no maximum.
    row = tl.minimum(tl.arange(0, BM), num_rows - 1 - first).to(tl.int32)
    known = tl.minimum(query, num_queries - 1)
    component = tl.arange(0, BK)
    row_pointers = rows + first * size + row[:, None] * size + component[None, :]
    query_pointers = queries + known[:, None] * size + component[None, :]
    product = tl.zeros((BM, BN), dtype=tl.int32 if BASE else tl.float32)
    fine = product
    for d in range(0, size, BK):
        if EVEN:
            x = tl.load(row_pointers + d)
            y = tl.load(query_pointers + d)
        else:
            x = tl.load(row_pointers + d, mask=(d + component < size)[None, :], other=0)
            y = tl.load(query_pointers + d, mask=(d + component < size)[None, :], other=0)
        if BASE:
            if EVEN:
                z = tl.load(query_pointers + num_queries * size + d)
            else:
                z = tl.load(query_pointers + num_queries * size + d, mask=(d + component < size)[None, :], other=0)
            product = tl.dot(x, tl.trans(y), product, out_dtype=tl.int32)
            fine = tl.dot(x, tl.trans(z), fine, out_dtype=tl.int32)
        else:
            product = tl.dot(x.to(y.dtype), tl.trans(y), product, input_precision="tf32")
    coarse = joined(product, fine, BASE)
    if SCALED:
        coarse = coarse * tl.load(row_scales + first + row)[:, None]
    scale, norm = tl.load(scales + known), tl.load(norms + known)
    error = tl.load(residual_norms + known) * tl.load(magnitudes + block)
    if BASE:
        coarse = with_residuals(coarse, norm, scale, tl.load(residuals + first + row))
    else:
        error += norm * tl.load(residuals + block)
    bound = upper_bound(tl.max(coarse, 0) * scale, error)
    tl.store(out + query.to(tl.int64) * num_blocks + block, bound, mask=query < num_queries)


def digit_base(size: int) -> int:
    """-> the largest power of two, at most 128, for which sums of `size` products of two digits fit int32.

    A code is at most 127, a second digit at most half of the base."""
    base = 128
    while base > 1 and size * 127 * (127 * base + base // 2) >= 1 << 31:
        base //= 2
    return base


def candidates(num_queries: int, size: int, digits: bool, shared_memory: int, walks: bool) -> list[Candidate]:
    """-> what to try for this many queries of D `size`; the first is used where nothing has been tuned.

    `digits`: rows and queries are 8-bit codes. `shared_memory`: bytes that a program can have. `walks`: descriptors
    are available for these rows on this device."""
    from searchr1_kernels._topk_walk_triton import DIGITS_WALKS, WALKS

    table, stage_bytes = DIGITS_CONFIGURATIONS if digits else CONFIGURATIONS, STAGE_BYTES
    if size % 16:
        table, stage_bytes = SCALAR_CONFIGURATIONS, _SCALAR_STAGE_BYTES
    tile = _tile(num_queries, table)
    num_warps, num_stages = table[tile]
    fitting = shared_memory // ((BLOCK_ROWS + tile * (1 + digits)) * stage_bytes)
    found = [Candidate(0, BLOCK_ROWS, tile, num_warps, max(1, min(num_stages, fitting)), stage_bytes)]
    if walks:
        ways = DIGITS_WALKS if digits else WALKS
        tile = _tile(num_queries, ways)
        walking = [Candidate(programs, rows, tile, *rest) for programs, rows, *rest in ways[tile]]
        found = [*walking, *found] if size % 16 else [*found, *walking]
    return found


def _tile(num_queries: int, table: dict[int, Any]) -> int:
    """-> the smallest tile with room for all queries, or the largest tile."""
    return min((tile for tile in table if tile >= num_queries), default=max(table))


def block_constants(way: Candidate, itemsize: int) -> dict[str, int]:
    """-> meta-parameters of a kernel for rows and queries of `itemsize` bytes a number."""
    return {
        "BM": way.rows, "BN": way.queries, "BK": way.stage_bytes // itemsize,
        "num_warps": way.num_warps, "num_stages": way.num_stages,
    }  # fmt: skip


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16."""
    cases = [_case("fp16", "fp16", tile) for tile in CONFIGURATIONS]
    cases += [_case("i8", "i8", tile) for tile in DIGITS_CONFIGURATIONS]
    cases += [_case(element, element, 256) for element in ("bf16", "fp32")]
    cases += [_case(*both, 32, size=100) for both in (("fp16", "fp16"), ("fp32", "fp32"), ("i8", "i8"), ("i8", "fp16"))]
    return [*cases, _case("i8", "fp16", 256), _case("fp16", "fp16", 256, size=80)]


def _case(rows: str, queries: str, tile: int, size: int = 256) -> tuple:
    """-> one of `compile_cases`, for element types of rows and queries, queries per program, and components."""
    itemsize = {"fp32": 4, "fp16": 2, "bf16": 2, "i8": 1}[queries]
    (way, *_) = candidates(tile, size, queries == "i8", 1 << 20, walks=False)
    constants = block_constants(way, itemsize)
    even = size % constants["BK"] == 0
    constants |= {"SCALED": rows == "i8", "EVEN": even, "BASE": 128 if queries == "i8" else 0}
    num_warps, num_stages = constants.pop("num_warps"), constants.pop("num_stages")
    signature = {"rows": f"*{rows}", "queries": f"*{queries}", **dict.fromkeys(VECTORS, "*fp32")}
    divisible = {*signature, *(() if size % 16 else ("size",))}
    signature |= dict.fromkeys(("num_rows", "num_queries", "size", "num_blocks"), "i32")
    kind = rows if rows == queries else f"{rows}_{queries}"
    name = f"block_bounds_{kind}_{tile}" + ("_scalar" if size % 16 else "" if even else "_uneven")
    return name, block_bounds, signature, constants, num_warps, num_stages, divisible
