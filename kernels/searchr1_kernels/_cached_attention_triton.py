"""Attention over a KV cache on a GPU: a program per tile of tokens, key/value head and, for lone tokens, part of keys.

The query heads that share a key/value head are rows of one product, so keys and values are read once for all of them.
A token that is alone in its tile has too few rows to fill a GPU: its keys are cut into parts of `PART` places, counted
from place 0, and a second kernel sums the parts in their order. The grid has as many parts as the whole cache needs;
programs past a token's position end at once, so no position is read on the host. Tiles of several tokens of one slot
fill a GPU by themselves, and go through all their keys. Nothing in a row's arithmetic depends on other rows: blocks
that it does not see multiply its sums by 1 and add 0.

A paged slot's keys are loaded from one block of its table at a time. The block's number is one more load before them; a
lone token's program, which has few blocks, loads all their numbers first. What is multiplied, and in which order, is
the same as without a table.

Shape legend: T tokens, U lone tokens, N tiles, P parts, H query heads, G key/value heads, C slots of M places, or with
a table C slots of W blocks of M places, d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from searchr1_kernels.cached_attention import tile_tokens

PART = 512  # places; a multiple of every block of keys
_TOKENS_AT_ONCE = 1024  # lone tokens of a launch: bounds the partial sums, [1024, H, P, d] fp32
# Up to this many lone tokens, a program of a paged cache loads two blocks of keys and values ahead. This hides latency
# that the few other programs on its multiprocessor do not hide; with many tokens, fewer programs would fit on one. 900
# places, 2 heads of 128, bf16, H200, 2026-11-27: 13.5 -> 12.1 us for 1 token, 25.5 -> 22.7 for 64, 69.8 -> 73.2 for
# 256. The bits are the same.
_FEW_TOKENS, _FEW_STAGES = 64, 3
_COMBINED = 1024  # sums that a program of `combine` holds
# Loaded and stored number by number. Their alignment differs from step to step (end to end in one memory, or with 14
# heads); it would choose between two equivalent kernels, and compile the second in the middle of a rollout.
_ANYWHERE = ["slots", "positions", "blocks", "tiles", "peaks", "totals"]


@triton.jit
def write_lines(target, line, values, inside, D: tl.constexpr):
    """Write values [BM, BD] to the lines [BM] of `target` [lines, D] that are inside."""
    component = tl.arange(0, values.shape[1])
    pointers = target + line[:, None] * D + component[None, :]
    tl.store(pointers, values.to(target.dtype.element_ty), mask=inside[:, None] & (component < D)[None, :])


@triton.jit(do_not_specialize=["first_tile", "num_parts", "num_blocks"], do_not_specialize_on_alignment=_ANYWHERE)
def attend(
    query,  # [T, H, d]
    keys,  # [C, G, M, d]
    values,  # [C, G, M, d]
    slots,  # [T] int64
    positions,  # [T] int64
    blocks,  # [C, W] int32, read if PAGED
    tiles,  # [N, 2] int32: first token, count; read if TABLE
    output,  # [T, H, d], written unless SPLIT
    sums,  # [U, H, P, d] fp32, written if SPLIT
    peaks,  # [U, H, P] fp32, written if SPLIT
    totals,  # [U, H, P] fp32, written if SPLIT
    first_tile,
    num_parts,
    num_blocks,  # W
    block_places,  # M, read if PAGED
    query_token, query_head, key_slot, key_head, key_place, value_slot, value_head, value_place,  # strides
    scale,  # of the scores, in powers of 2
    GROUP: tl.constexpr,  # H / G
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SPLIT_PLACES: tl.constexpr,
    PAGED: tl.constexpr,
    TABLE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Softmax attention of a tile's rows; if SPLIT, sums, largest score and sum of weights of one part of its keys."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    first = (first_tile + tile).to(tl.int64)
    count = 1
    if TABLE:
        entry = tiles + first * 2
        first = tl.load(entry).to(tl.int64)
        count = tl.load(entry + 1)
    row = tl.arange(0, BM)
    inside = row < count * GROUP
    # Rows past the end repeat the last token, whose keys are visible, so no row is without a key.
    token = first + tl.minimum(row // GROUP, count - 1)
    head = kv_head * GROUP + row % GROUP
    position = tl.load(positions + token)
    if SPLIT and PAGED:  # in 64 bits a step has a fifth more instructions; in 32, some other launches spill 8 bytes
        position = position.to(tl.int32)
    last = tl.max(position, 0)
    slot = tl.load(slots + first)
    begin = part * SPLIT_PLACES
    end = last + 1
    if SPLIT:
        end = tl.minimum(end, begin + SPLIT_PLACES)
    if begin < end:
        component = tl.arange(0, BD)
        known = component < D
        q = tl.load(
            query + token[:, None] * query_token + head[:, None] * query_head + component[None, :],
            mask=inside[:, None] & known[None, :], other=0.0,
        )  # fmt: skip
        key_pointers = keys + kv_head.to(tl.int64) * key_head + component[None, :]
        value_pointers = values + kv_head.to(tl.int64) * value_head + component[None, :]
        peak = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        sum_ = tl.zeros((BM, BD), tl.float32)
        if PAGED and SPLIT:  # before the loop: behind a load inside it, keys and values would not be loaded ahead
            starts = begin + tl.arange(0, SPLIT_PLACES // BN) * BN
            entries = tl.load(blocks + slot * num_blocks + starts // block_places, mask=starts < end, other=0)
        for start in range(begin, end, BN):
            if PAGED:
                number = tl.cast(start, tl.int32) // block_places  # a 64-bit division is a call
                if SPLIT:
                    block = tl.sum(tl.where(starts == start, entries, 0), 0).to(tl.int64)
                else:
                    block = tl.load(blocks + slot * num_blocks + number).to(tl.int64)
                skipped = number * block_places  # places of the slot before this block
            else:
                block = slot
                skipped = 0
            place = start + tl.arange(0, BN)
            mask = (place < end)[:, None] & known[None, :]
            offset = (place - skipped).to(tl.int64)[:, None]
            k = tl.load(key_pointers + block * key_slot + offset * key_place, mask=mask, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            seen = (place[None, :] <= position[:, None]) & (place < end)[None, :]
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            shrink = tl.exp2(peak - higher)
            weight = tl.exp2(score - higher[:, None])
            v = tl.load(value_pointers + block * value_slot + offset * value_place, mask=mask, other=0.0)
            total = total * shrink + tl.sum(weight, 1)
            sum_ = tl.dot(weight.to(v.dtype), v, sum_ * shrink[:, None], input_precision="ieee")
            peak = higher
        if SPLIT:
            line = (tile.to(tl.int64) * GROUP * tl.num_programs(1) + head) * num_parts + part
            write_lines(sums, line, sum_, inside, D)
            tl.store(peaks + line, peak, mask=inside)
            tl.store(totals + line, total, mask=inside)
        else:
            line = token * (GROUP * tl.num_programs(1)) + head
            write_lines(output, line, sum_ / total[:, None], inside, D)


@triton.jit
def read_part(sums, peaks, totals, line, inside, D: tl.constexpr, BD: tl.constexpr):
    """-> sums [BH, BD], peaks and totals [BH] of the lines [BH] that are inside."""
    component = tl.arange(0, BD)
    mask = inside[:, None] & (component < D)[None, :]
    peak = tl.load(peaks + line, mask=inside, other=0.0)
    total = tl.load(totals + line, mask=inside, other=0.0)
    return tl.load(sums + line[:, None] * D + component[None, :], mask=mask, other=0.0), peak, total


@triton.jit(do_not_specialize=["first_tile", "num_parts"], do_not_specialize_on_alignment=_ANYWHERE)
def combine(
    positions,  # [T] int64
    tiles,  # [N, 2] int32, read if TABLE
    output,  # [T, H, d]
    sums,  # [U, H, P, d] fp32
    peaks,  # [U, H, P] fp32
    totals,  # [U, H, P] fp32
    first_tile,
    num_parts,
    H: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    SPLIT_PLACES: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Sum a token's parts, in their order, for BH of its heads."""
    tile = tl.program_id(0)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = head < H
    token = (first_tile + tile).to(tl.int64)
    if TABLE:
        token = tl.load(tiles + token * 2).to(tl.int64)
    parts = (tl.load(positions + token) // SPLIT_PLACES + 1).to(tl.int32)
    line = (tile.to(tl.int64) * H + head) * num_parts
    sum_, peak, total = read_part(sums, peaks, totals, line, inside, D, BD)
    for part in range(1, parts):
        other_sum, other, other_total = read_part(sums, peaks, totals, line + part, inside, D, BD)
        higher = tl.maximum(peak, other)
        shrink = tl.exp2(peak - higher)
        grow = tl.exp2(other - higher)
        total = total * shrink + other_total * grow
        sum_ = sum_ * shrink[:, None] + other_sum * grow[:, None]
        peak = higher
    write_lines(output, token * H + head, sum_ / total[:, None], inside, D)


def configuration(group: int, head_dim: int, itemsize: int, split: bool) -> dict[str, int]:
    """-> meta-parameters of `attend`."""
    rows = group if split else tile_tokens(group) * group
    num_warps = 4 if itemsize < 4 and (split or head_dim in (16, 32, 64, 128)) else 8
    if itemsize == 4 and not split:
        # With 8 warps, sm_80 spills 32 bytes at a head size of 128 (Triton 3.6 and 3.9), sm_100 8 bytes at 64 (3.6).
        num_warps = 16 if head_dim > 64 else 4
    wide = head_dim > 128 and itemsize == 4  # one more stage takes 100 to 146 KB: sm_86 and sm_89 have 99
    return {
        "BM": max(16, triton.next_power_of_2(rows)),
        "BN": 64 if head_dim <= 128 and itemsize < 4 else 32 if split or itemsize < 4 else 16,
        "BD": max(16, triton.next_power_of_2(head_dim)),
        "num_warps": num_warps,
        "num_stages": 1 if wide and not split else 2,
    }


def stages_for_few(head_dim: int, itemsize: int) -> int:
    """-> pipeline stages of `attend` for few lone tokens of a paged cache."""
    return 2 if head_dim > 128 and itemsize == 4 else _FEW_STAGES


def combining_configuration(num_heads: int, head_dim: int) -> dict[str, int]:
    """-> meta-parameters of `combine`. A thread has 8 numbers, 16 bytes of bf16 to store."""
    components = max(16, triton.next_power_of_2(head_dim))
    heads = min(max(1, _COMBINED // components), triton.next_power_of_2(num_heads))
    return {"BH": heads, "BD": components, "num_warps": min(8, max(1, heads * components // 256))}


def run(query, keys, values, slots, positions, table, tiles, num_alone, output) -> None:
    """Fill output [T, H, d].

    All tensors are on one device, the last dimension of each has stride 1, and T is above 0. table [C, W] int32, or
    None where a slot is a block; tiles [N, 2] int32, of which the first `num_alone` are lone tokens, or None where
    every token is alone."""
    inputs = (query, keys, values, slots, positions, table, tiles, output)
    with torch.cuda.device_of(query):
        num_alone = query.shape[0] if tiles is None else num_alone
        for begin in range(0, num_alone, _TOKENS_AT_ONCE):
            size = min(_TOKENS_AT_ONCE, num_alone - begin)
            _run_alone(*inputs, begin, size)
        if tiles is not None and tiles.shape[0] > num_alone:
            tensors, numbers, options = _arguments(*inputs)
            grid = (tiles.shape[0] - num_alone, keys.shape[1], 1)
            unused = (output, output, output)  # not written
            attend[grid](*tensors, *unused, num_alone, 1, *numbers, **options, TABLE=True, SPLIT=False)


def _run_alone(query, keys, values, slots, positions, table, tiles, output, begin, size) -> None:
    """Fill the output of lone tokens `begin` to `begin + size`."""
    num_heads, head_dim = query.shape[1:]
    num_places = keys.shape[2] if table is None else table.shape[1] * keys.shape[2]
    num_parts = -(-num_places // PART)
    sums = torch.empty(size, num_heads, num_parts, head_dim, dtype=torch.float32, device=query.device)
    peaks, totals = torch.empty(2, size, num_heads, num_parts, dtype=torch.float32, device=query.device).unbind()
    inputs = (query, keys, values, slots, positions, table, tiles, output)
    tensors, numbers, options = _arguments(*inputs, split=True)
    if table is not None and size <= _FEW_TOKENS:
        options["num_stages"] = stages_for_few(head_dim, query.element_size())
    partial, has_tiles = (sums, peaks, totals, begin, num_parts), tiles is not None
    attend[(size, keys.shape[1], num_parts)](*tensors, *partial, *numbers, **options, TABLE=has_tiles, SPLIT=True)
    options = combining_configuration(num_heads, head_dim)
    constants = {"H": num_heads, "D": head_dim, "SPLIT_PLACES": PART, "TABLE": has_tiles}
    grid = (size, triton.cdiv(num_heads, options["BH"]))
    combine[grid](positions, tensors[6], output, *partial, **constants, **options)


def _arguments(
    query, keys, values, slots, positions, table, tiles, output, split=False
) -> tuple[tuple, tuple, dict[str, int]]:
    """-> tensors; numbers; constants and options of a launch."""
    group, head_dim = query.shape[1] // keys.shape[1], query.shape[2]
    strides = (*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3])
    scale = head_dim**-0.5 * 1.4426950408889634  # log2(e)
    blocks, num_blocks = (slots, 1) if table is None else (table, table.shape[1])
    tensors = (query, keys, values, slots, positions, blocks, positions if tiles is None else tiles, output)
    options = configuration(group, head_dim, query.element_size(), split)
    if table is not None:
        options["BN"] = math.gcd(options["BN"], keys.shape[2])
    options |= {"GROUP": group, "D": head_dim, "SPLIT_PLACES": PART, "PAGED": table is not None}
    return tensors, (num_blocks, keys.shape[2], *strides, scale), options


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16."""
    shapes = [("bf16", 8, 128), ("bf16", 7, 64), ("bf16", 2, 80), ("bf16", 4, 256), ("fp16", 8, 128), ("fp32", 2, 128)]
    widest = ("fp32", 8, 256)
    encoders = [("fp32", 1, 64), ("fp32", 1, 32), ("bf16", 1, 64)]  # texts end to end, no table: E5 and BGE, MiniLM
    cases = [_attend_case(*shape, split) for shape in [*shapes, widest, *encoders] for split in (True, False)]
    cases += [_attend_case(*shape, split, paged=True) for shape in [*shapes, widest] for split in (True, False)]
    cases += [_attend_case(*shape, split=True, paged=True, stages=_FEW_STAGES) for shape in shapes]
    sizes = (("bf16", 16, 128), ("bf16", 14, 64), ("bf16", 8, 80), ("fp16", 8, 256), ("fp32", 12, 64))
    sums = [*(_combine_case(*size) for size in sizes), _combine_case(*sizes[0], table=True)]
    return [*cases, *sums]


def _combine_case(element: str, num_heads: int, head_dim: int, table: bool = False) -> tuple:
    """One of `compile_cases`."""
    constants = combining_configuration(num_heads, head_dim)
    num_warps = constants.pop("num_warps")
    constants |= {"H": num_heads, "D": head_dim, "SPLIT_PLACES": PART, "TABLE": table}
    pointers = {"positions": "*i64", "tiles": "*i32" if table else "*i64", "output": f"*{element}"}
    pointers |= dict.fromkeys(("sums", "peaks", "totals"), "*fp32")
    signature = pointers | {"first_tile": "i32", "num_parts": "i32"}
    name = f"cached_attention_combine_{element}_{num_heads}x{head_dim}" + ("_table" if table else "")
    return name, combine, signature, constants, num_warps, 3, set(pointers) - {*_ANYWHERE}


def _attend_case(
    element: str, group: int, head_dim: int, split: bool, paged: bool = False, stages: int | None = None
) -> tuple:
    """One of `compile_cases`."""
    constants = configuration(group, head_dim, 4 if element == "fp32" else 2, split)
    num_warps, num_stages = constants.pop("num_warps"), constants.pop("num_stages")
    constants |= {"GROUP": group, "D": head_dim, "SPLIT_PLACES": PART, "PAGED": paged}
    constants |= {"TABLE": not split, "SPLIT": split}
    signature = dict.fromkeys(("query", "keys", "values", "output"), f"*{element}")
    signature |= {"slots": "*i64", "positions": "*i64", "blocks": "*i32" if paged else "*i64", "tiles": "*i32"}
    signature |= dict.fromkeys(("sums", "peaks", "totals"), "*fp32")
    strides = [f"{name}_{axis}" for name in ("key", "value") for axis in ("slot", "head", "place")]
    strides += ["query_token", "query_head"]
    divisible = {*signature, *strides, "block_places"} - {*_ANYWHERE}
    numbers = ("first_tile", "num_parts", "num_blocks", "block_places", *strides)
    signature |= dict.fromkeys(numbers, "i32") | {"scale": "fp32"}
    name = f"cached_attention_{element}_{group}x{head_dim}" + ("_paged" if paged else "") + ("_alone" if split else "")
    name += f"_{stages}_stages" if stages else ""
    return name, attend, signature, constants, num_warps, stages or num_stages, divisible
