"""The search's kernels besides the pass over the corpus: operands, the best blocks, exact scores, the best hits.

The best of many numbers (blocks by bound, rows by score) are taken one after the other, best first: a warp per query
holds the maximum of every group of them, takes the largest, and replaces it with the next largest of its group. All
keys are different, as their lower half is a place, so the order is unique, and whatever is not below the last key has
been taken. A step is some hundred instructions of one warp and a read from L2; for so few, sorting does more work.

Shape legend: Q queries, M rows, D components, G blocks of 128 rows, P places per query for chosen blocks, K hits,
N groups, of blocks or of rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from searchr1_kernels._topk_bounds_triton import BLOCK_ROWS

PART_ROWS = 32  # rows of a block that one program scores; when hits are taken, each has a lane
PARTS = BLOCK_ROWS // PART_ROWS
MAX_GROUPS = 1024  # of which a warp holds the maxima: 64 registers of a thread
MAX_PLACES = MAX_GROUPS // PARTS
MAX_GROUP_BLOCKS = 4096
_MAXIMA_TILE = 4096  # bounds of one program
NO_BLOCK = tl.constexpr(-1)
_NO_KEY = tl.constexpr(-0x8000000000000000)
_PARTS = tl.constexpr(PARTS)
# As in `_topk_numba`: rounding of scores and bounds to fp32, the same where fp32 underflows, and the size from which a
# score may be infinite.
_ROUNDING, _LEAST, _HUGE = tl.constexpr(2.5e-7), tl.constexpr(1e-37), tl.constexpr(3.4e38)


@triton.jit
def make_key(value, place):
    """fp32 value, place below 2^32 -> int64 key: higher for larger values, then for lower places."""
    bits = value.to(tl.int32, bitcast=True)
    monotone = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (monotone << 32) | (0xFFFFFFFF - place.to(tl.int64))


@triton.jit
def key_value(key):
    """-> the key's value."""
    monotone = (key >> 32).to(tl.int32)
    return (monotone ^ ((monotone >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_place(key):
    """-> the key's place."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def highest_score(offset, bound):
    """offset fp64, a block's bound without it fp32 -> fp64 that no score of the block exceeds."""
    bound = bound.to(tl.float64)
    highest = offset + bound + _ROUNDING * (tl.abs(offset + bound) + tl.abs(bound)) + _LEAST
    return tl.where(highest < _HUGE, highest, float("inf"))  # also for NaN


@triton.jit
def _may_reach(key, offset, threshold, THRESHOLD: tl.constexpr):
    """Whether there is a key, and its block may reach the threshold: unless it is known to be below."""
    reaches = key != _NO_KEY
    if THRESHOLD:
        reaches &= (highest_score(offset, key_value(key)) < threshold) == 0
    return reaches


@triton.jit(do_not_specialize=["num_queries", "rounding"])
def prepare_queries(
    queries,  # [Q, D] floating
    center,  # [D] fp32, read if BASE
    operand,  # [Q, D] fp32, fp16 or bf16; with BASE [2 * Q, D] int8, all first digits and then all second ones
    scales,  # [Q] fp32: of products with the operand
    norms,  # [Q] fp32: of queries, rounded up
    residual_norms,  # [Q] fp32: of what the operand lacks plus what the products may round, rounded up
    offsets,  # [Q] fp64: query . center, or 0
    num_queries,
    size,
    rounding,  # fp32: of a product, relative to the norms
    BD: tl.constexpr,
    BASE: tl.constexpr,  # of two digits; 0: the operand is floats
):
    """Write query ~ scale * operand, with components of the operand at most 1 (floats) or 127 (first digits).

    Sums are in fp64; the slack of 1e-6 in the norms covers their own rounding to fp32."""
    query = tl.program_id(0).to(tl.int64)
    component = tl.arange(0, BD)
    peaks = tl.zeros((BD,), dtype=tl.float64)
    squares = tl.zeros((BD,), dtype=tl.float64)
    along = tl.zeros((BD,), dtype=tl.float64)
    for d in range(0, size, BD):
        mask = d + component < size
        value = tl.load(queries + query * size + d + component, mask=mask, other=0).to(tl.float32).to(tl.float64)
        peaks = tl.maximum(peaks, tl.abs(value))
        squares += value * value
        if BASE:
            along += value * tl.load(center + d + component, mask=mask, other=0).to(tl.float64)
    unit = (tl.max(peaks, 0) / (127 if BASE else 1)).to(tl.float32)
    unit = tl.where(unit > 1e-30, unit, 1.0)  # of so small a query, everything is left over
    exact_unit = unit.to(tl.float64)
    left_over = tl.zeros((BD,), dtype=tl.float64)
    for d in range(0, size, BD):
        mask = d + component < size
        value = tl.load(queries + query * size + d + component, mask=mask, other=0).to(tl.float32).to(tl.float64)
        in_units = value / exact_unit
        place = operand + query * size + d + component
        if BASE:
            digit = tl.floor(in_units + 0.5)
            second = tl.floor((in_units - digit) * BASE + 0.5)
            tl.store(place, digit.to(tl.int8), mask=mask)
            tl.store(operand + (num_queries + query) * size + d + component, second.to(tl.int8), mask=mask)
            known = digit + second / BASE
        else:
            rounded = in_units.to(tl.float32).to(operand.dtype.element_ty)
            tl.store(place, rounded, mask=mask)
            known = rounded.to(tl.float32).to(tl.float64)
        left = value - known * exact_unit
        left_over += left * left
    norm = tl.sqrt(tl.sum(squares, 0))
    residual = tl.sqrt(tl.sum(left_over, 0))
    residual += rounding * (norm + residual)
    tl.store(scales + query, unit / (BASE if BASE else 1))
    tl.store(norms + query, (norm * (1 + 1e-6)).to(tl.float32))
    tl.store(residual_norms + query, (residual * (1 + 1e-6)).to(tl.float32))
    tl.store(offsets + query, tl.sum(along, 0))


@triton.jit(do_not_specialize=["num_blocks", "num_groups"])
def group_maxima(
    bounds,  # [Q, G] fp32
    maxima,  # [Q, N] int64
    num_blocks,
    num_groups,
    GROUP: tl.constexpr,  # blocks
    TILE: tl.constexpr,  # groups of a program
):
    """Compute the largest key of each group of blocks."""
    query = tl.program_id(0).to(tl.int64)  # the other axis has at most 65,535 programs
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    block = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = block < num_blocks
    keys = make_key(tl.load(bounds + query * num_blocks + block, mask=inside, other=0), block)
    keys = tl.where(inside, keys, _NO_KEY)
    tl.store(maxima + query * num_groups + group, tl.max(keys, 1), mask=group < num_groups)


@triton.jit(do_not_specialize=["num_blocks", "num_groups", "num_places", "begin", "end", "num_hits"])
def best_blocks(
    bounds,  # [Q, G] fp32
    maxima,  # [Q, N] int64; without THRESHOLD updated to what is left after the last taken block
    offsets,  # [Q] fp64, read if THRESHOLD
    thresholds,  # [Q, K] fp32: the last score is the threshold, read if THRESHOLD
    blocks,  # [Q, P] int64
    rest,  # [Q] fp32: the highest bound that was not taken; -inf where all were
    num_blocks,
    num_groups,
    num_places,
    begin,
    end,
    num_hits,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # at least N
    THRESHOLD: tl.constexpr,
):
    """Fill places from `begin` to `end` with the best blocks, in order of their keys.

    With THRESHOLD, only with blocks that may have a row of that score or better; the other places get `NO_BLOCK`."""
    query = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    largest = tl.load(maxima + query * num_groups + group, mask=group < num_groups, other=_NO_KEY)
    key = tl.max(largest, 0)
    place = begin
    offset, threshold = tl.zeros((), tl.float64), tl.full((), float("-inf"), tl.float64)
    if THRESHOLD:
        offset = tl.load(offsets + query)
        threshold = tl.load(thresholds + query * num_hits + num_hits - 1).to(tl.float64)
    while _may_reach(key, offset, threshold, THRESHOLD) & (place < end):
        tl.store(blocks + query * num_places + place, key_place(key))
        taken = key_place(key) // GROUP
        member = taken * GROUP + tl.arange(0, GROUP)
        inside = member < num_blocks
        keys = make_key(tl.load(bounds + query * num_blocks + member, mask=inside, other=0), member)
        following = tl.max(tl.where(inside & (keys < key), keys, _NO_KEY), 0)
        largest = tl.where(group == taken, following, largest)
        key = tl.max(largest, 0)
        place += 1
    tl.store(rest + query, tl.where(key == _NO_KEY, float("-inf"), key_value(key)))
    if THRESHOLD:
        while place < end:
            tl.store(blocks + query * num_places + place, NO_BLOCK)
            place += 1
    else:
        tl.store(maxima + query * num_groups + group, largest, mask=group < num_groups)


@triton.jit(do_not_specialize=["num_rows", "num_places", "begin", "count"])
def exact_keys(
    rows,  # [M, D]
    row_scales,  # [M] fp32, read if SCALED
    queries,  # [Q, D] floating
    blocks,  # [Q, P] int64; NO_BLOCK: nothing to do
    keys,  # [Q, P * 128] int64
    maxima,  # [Q, P * PARTS] int64: the largest of each part
    num_rows,
    size,
    num_places,
    begin,  # of the places that are scored
    count,
    PART: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Compute exact scores of the rows of a part of a block, as keys.

    Products are exact in fp64, and summed in fp64 in an order that only `size` decides. Rows past the end get the
    smallest key of all, and so does the maximum of a part without a block."""
    program = tl.program_id(0).to(tl.int64)
    part = program % _PARTS
    query = program // _PARTS // count
    place = query * num_places + begin + program // _PARTS % count
    block = tl.load(blocks + place)
    largest = tl.full((), _NO_KEY, dtype=tl.int64)
    if block != NO_BLOCK:
        first = (block * _PARTS + part) * PART
        for r in range(0, PART, BR):
            row = first + r + tl.arange(0, BR)
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
            score = tl.where(score == 0, 0.0, score)  # -0 equals 0, and must have its bits
            key = tl.where(inside, make_key(score, row), _NO_KEY)
            tl.store(keys + (place * _PARTS + part) * PART + r + tl.arange(0, BR), key)
            largest = tl.maximum(largest, tl.max(key, 0))
    tl.store(maxima + place * _PARTS + part, largest)


@triton.jit(do_not_specialize=["num_places", "count", "num_hits"])
def best_hits(
    keys,  # [Q, P * 128] int64
    maxima,  # [Q, P * PARTS] int64
    offsets,  # [Q] fp64
    rest,  # [Q] fp32
    scores,  # [Q, K] fp32
    ids,  # [Q, K] int64
    unproven,  # [Q] int32
    num_places,
    count,  # of places, from the first
    num_hits,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,  # at least count * PARTS
):
    """Write the K best rows in order, and whether a block that was not scored may have a better one."""
    query = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    largest = tl.load(maxima + query * num_places * _PARTS + group, mask=group < count * _PARTS, other=_NO_KEY)
    score = tl.full((), 0, dtype=tl.float32)
    for hit in range(num_hits):
        key = tl.max(largest, 0)
        taken = tl.max(tl.where(largest == key, group, -1), 0)
        score = key_value(key)
        tl.store(scores + query * num_hits + hit, score)
        tl.store(ids + query * num_hits + hit, key_place(key))
        members = tl.load(keys + (query * num_places * _PARTS + taken) * PART + tl.arange(0, PART))
        following = tl.max(tl.where(members < key, members, _NO_KEY), 0)
        largest = tl.where(group == taken, following, largest)
    bound = tl.load(rest + query)
    proven = (bound == float("-inf")) | (highest_score(tl.load(offsets + query), bound) < score.to(tl.float64))
    tl.store(unproven + query, tl.where(proven, 0, 1))


def group_blocks(num_blocks: int) -> int:
    """-> blocks per group: a power of two, for which a warp holds all groups' maxima and reads one group in a step."""
    group = 32
    while group < MAX_GROUP_BLOCKS and -(-num_blocks // group) > MAX_GROUPS // 2:
        group *= 2
    return group


def group_constants(num_blocks: int) -> dict[str, int]:
    """-> meta-parameters of `best_blocks`, and of `group_maxima` with TILE in place of GROUPS."""
    group = group_blocks(num_blocks)
    return {"GROUP": group, "GROUPS": max(32, triton.next_power_of_2(-(-num_blocks // group)))}


def maxima_tile(group: int) -> int:
    """-> groups per program of `group_maxima`."""
    return max(1, _MAXIMA_TILE // group)


# `exact_keys`: 16 rows by 128 components in fp64 are 32 registers of a thread (32 by 64 spill in Triton 3.6, sm_80).
EXACT_CONFIGURATION = {"PART": PART_ROWS, "BR": 16, "BD": 128, "num_warps": 4}
# A width that 16 does not divide is read number by number: the above would spill 8 bytes (Triton 3.9, sm_80).
SCALAR_EXACT_CONFIGURATION = EXACT_CONFIGURATION | {"BD": 64}
PREPARE_CONFIGURATION = {"BD": 256, "num_warps": 4}
TAKE_CONFIGURATION = {"num_warps": 1}  # a step waits for no other warp


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16."""
    cases = []

    def add(name, kernel, pointers, numbers, constants, divisible=()):
        constants = dict(constants)
        num_warps = constants.pop("num_warps", 4)
        signature = pointers | dict.fromkeys(numbers, "i32")
        if "rounding" in signature:
            signature["rounding"] = "fp32"
        cases.append((name, kernel, signature, constants, num_warps, 3, {*pointers, *divisible}))

    for element, base in (("fp16", 0), ("bf16", 0), ("fp32", 0), ("i8", 128)):
        pointers = {"queries": "*fp32", "center": "*fp32", "operand": f"*{element}", "offsets": "*fp64"}
        pointers |= dict.fromkeys(("scales", "norms", "residual_norms"), "*fp32")
        constants = PREPARE_CONFIGURATION | {"BASE": base}
        add(f"prepare_queries_{element}", prepare_queries, pointers, ("num_queries", "size", "rounding"), constants,
            ("size",))  # fmt: skip
    for group in (32, 128, MAX_GROUP_BLOCKS):
        add(f"group_maxima_{group}", group_maxima, {"bounds": "*fp32", "maxima": "*i64"}, ("num_blocks", "num_groups"),
            {"GROUP": group, "TILE": maxima_tile(group)})  # fmt: skip
    for group, groups, threshold in ((128, 512, False), (128, 512, True), (MAX_GROUP_BLOCKS, MAX_GROUPS, True)):
        pointers = {"bounds": "*fp32", "maxima": "*i64", "offsets": "*fp64", "thresholds": "*fp32", "blocks": "*i64",
                    "rest": "*fp32"}  # fmt: skip
        numbers = ("num_blocks", "num_groups", "num_places", "begin", "end", "num_hits")
        constants = TAKE_CONFIGURATION | {"GROUP": group, "GROUPS": groups, "THRESHOLD": threshold}
        add(f"best_blocks_{group}x{groups}_{threshold}", best_blocks, pointers, numbers, constants)
    for element, scaled in (("fp16", False), ("bf16", False), ("fp32", False), ("i8", True)):
        pointers = {"rows": f"*{element}", "row_scales": "*fp32", "queries": "*fp32"}
        pointers |= dict.fromkeys(("blocks", "keys", "maxima"), "*i64")
        numbers = ("num_rows", "size", "num_places", "begin", "count")
        for suffix, options, divisible in (
            ("", EXACT_CONFIGURATION, ("size",)), ("_scalar", SCALAR_EXACT_CONFIGURATION, ())
        ):  # fmt: skip
            constants = options | {"SCALED": scaled}
            add(f"exact_keys_{element}{suffix}", exact_keys, pointers, numbers, constants, divisible)
    for groups in (64, MAX_GROUPS):
        pointers = {"keys": "*i64", "maxima": "*i64", "offsets": "*fp64", "rest": "*fp32", "scores": "*fp32",
                    "ids": "*i64", "unproven": "*i32"}  # fmt: skip
        constants = TAKE_CONFIGURATION | {"PART": PART_ROWS, "GROUPS": groups}
        add(f"best_hits_{groups}", best_hits, pointers, ("num_places", "count", "num_hits"), constants)
    return cases
