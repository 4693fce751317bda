"""Attention of lone tokens over a paged KV cache on a CPU: one compiled loop over blocks.

Generation is bound by reading keys and values. So a few tokens go through their blocks abreast, block by block: where
they share a block, as consecutive samples of one prompt do, the second to read it finds it in the processor's cache.
Nothing has to say what is shared, and a token's arithmetic is its own: alone it has the same bits. While a block is
computed, the next one is fetched, since blocks lie anywhere and the processor cannot predict where. Compared with a
loop over contiguous slots, for 128 tokens of 4 heads of 32 behind 375 places: 2.2 times as fast where groups of 8 share
400 places, 0.9 times where nothing is shared, and then 1.6 times in bf16 (Intel Xeon with AVX-512, one core, memory not
in its caches, 2026-11-27).

Where rows and blocks are whole vectors, a block's code is written out for the length of its rows
(`_attention_block_llvm`); elsewhere it is a loop (`_add_block`), which is also its twin. With keys in the caches, for
256 tokens of 4 heads of 64 over 2, behind 127 places: 0.49 ms against 1.05 in fp32, 0.50 against 1.37 in bf16. With
keys in memory, beside other work on both cores: 1.1 to 1.3 and 1.4 to 1.8 times as fast as the loop, in fp32 at 0.75 to
0.93 of the rate of a plain sum over memory (one core of an Intel Xeon, 2026-11-27). It compiles in 3 s, once per
machine, head size and type. Prefetching into the second-level cache alone was about as fast, bypassing it 1.3 to 1.5
times slower; huge pages changed nothing.

Softmax is the online one (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3), a block at a time, in fp32.

Shape legend
    T  tokens    U  those that are computed here    H  query heads    G  key/value heads    d  head dimension
    C  slots    W  blocks of a slot    P  blocks    B  places of a block
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch

from searchr1_kernels._attention_block_llvm import add_block, heads_together, load_queries, store_sums, takes
from searchr1_kernels._numba_numbers import FAST_MATH, LOG2_E, as_array, exp2, narrow, prefetch, widen

# Tokens that go through their blocks abreast: a block's data of all of them has to stay in the first-level cache.
ABREAST = 8

_LINE_BYTES = 64  # of a cache line


def attend_blocks(
    query: torch.Tensor,  # [T, H, d] fp32 or bf16
    keys: torch.Tensor,  # [P, G, B, d] of the same type
    values: torch.Tensor,  # [P, G, B, d]
    table: torch.Tensor,  # [C, W] int32
    slots: torch.Tensor,  # [T] int64
    positions: torch.Tensor,  # [T] int64
    tokens: torch.Tensor,  # [U] int64, from `order_by_blocks`
    output: torch.Tensor,  # [T, H, d] of the type of `query`: rows `tokens` are written
) -> None:
    """Attend from each token to places 0 … positions[t] of its slot; the result is rounded once."""
    assert query.dtype in (torch.float32, torch.bfloat16) and output.dtype == query.dtype
    num_heads, head_dim = query.shape[1:]
    abreast = min(ABREAST, -(-len(tokens) // numba.get_num_threads()))
    attend = _attend
    if takes(head_dim, keys.shape[2], query.dtype == torch.bfloat16):
        attend = _attend_by_vectors(head_dim, heads_together(num_heads // keys.shape[1], head_dim))
    arrays = (as_array(query), as_array(keys), as_array(values))
    numbers = (x.numpy() for x in (table, slots, positions, tokens))
    attend(*arrays, *numbers, as_array(output), max(1, abreast), np.float32(head_dim**-0.5 * LOG2_E))


def order_by_blocks(table: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """table [C, W] int32, slots [T] int64, tokens [U] int64 -> [U]: tokens with the same first blocks side by side."""
    rows = table.numpy()[slots.numpy()[tokens.numpy()]]  # [U, W]
    as_bytes = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    return tokens[torch.from_numpy(np.argsort(as_bytes, kind="stable"))]


# ---------------------------------------------------------------------------------------------------------- the kernel


@functools.cache
def _attend_by_vectors(head_dim: int, heads: int):
    """-> the loop for rows and blocks of whole vectors; `heads` of the heads that share keys take a block at once."""

    @numba.njit(parallel=True, fastmath=FAST_MATH, cache=True)
    def attend(query, keys, values, table, slots, positions, tokens, output, abreast, scale):
        sizes = query.shape[1], keys.shape[1], keys.shape[2]
        flat = query.reshape(-1), keys.reshape(-1), values.reshape(-1), output.reshape(-1)
        for run in numba.prange(-(-len(tokens) // abreast)):
            own = tokens[run * abreast : (run + 1) * abreast]
            attend_abreast(own, flat, sizes, table, slots, positions, scale, heads, head_dim)

    return attend


@numba.njit(fastmath=FAST_MATH, cache=True)
def attend_abreast(own, memory, sizes, table, slots, positions, scale, heads, head_dim):
    """Take the tokens `own` through their blocks.

    `memory`: queries, keys, values and outputs, of one dimension each. `sizes`: H, G, B. `heads` of the heads that
    share keys take a block at once; it and `head_dim` are compile-time constants."""
    heads, head_dim = numba.literally(heads), numba.literally(head_dim)
    all_queries, all_keys, all_values, all_outputs = memory
    num_heads, num_kv_heads, size = sizes
    group, area = num_heads // num_kv_heads, size * head_dim
    visits = _visits(own, positions, size)
    weights = np.empty(heads * size, dtype=np.float32)
    queries = np.empty(len(own) * group * head_dim, dtype=np.float32)
    sums = np.empty(len(own) * group * head_dim, dtype=np.float32)
    peaks = np.empty(len(own) * group, dtype=np.float32)
    totals = np.empty(len(own) * group, dtype=np.float32)
    for g in range(num_kv_heads):
        sums[:] = np.float32(0.0)
        peaks[:] = np.float32(-np.inf)
        totals[:] = np.float32(0.0)
        for j in range(len(own)):
            begin = (own[j] * num_heads + g * group) * head_dim
            for i in range(0, group * head_dim, heads * head_dim):
                row = j * group * head_dim + i
                load_queries(all_queries[begin + i :], scale, queries[row:], heads, head_dim)
        for v in range(len(visits)):
            j, number, filled = visits[v]
            begin = (table[slots[own[j]], number] * num_kv_heads + g) * area
            following, next_number, next_filled = visits[(v + 1) % len(visits)]
            next_g = g if v + 1 < len(visits) else (g + 1) % num_kv_heads
            next_begin = (table[slots[own[following]], next_number] * num_kv_heads + next_g) * area
            for i in range(j * group, (j + 1) * group, heads):
                add_block(
                    queries[i * head_dim :], all_keys[begin:], all_values[begin:], filled,
                    all_keys[next_begin:], all_values[next_begin:], next_filled, weights,
                    peaks[i:], totals[i:], sums[i * head_dim :], heads, head_dim,
                )  # fmt: skip
        for i in range(len(own) * group):
            begin = (own[i // group] * num_heads + g * group + i % group) * head_dim
            store_sums(sums[i * head_dim :], np.float32(1.0) / totals[i], all_outputs[begin:], head_dim)


@numba.njit(cache=True)
def _visits(own, positions, size):
    """-> [n, 3], block by block: index of a token in `own`, number of its block, and how many places of it count."""
    count, longest = 0, 0
    for t in own:
        blocks = -(-(positions[t] + 1) // size)
        count, longest = count + blocks, max(longest, blocks)
    visits = np.empty((count, 3), dtype=np.int64)
    place = 0
    for number in range(longest):
        for j in range(len(own)):
            filled = min(size, positions[own[j]] + 1 - number * size)
            if filled > 0:
                visits[place, 0], visits[place, 1], visits[place, 2] = j, number, filled
                place += 1
    return visits


@numba.njit(parallel=True, fastmath=FAST_MATH, cache=True)
def _attend(query, keys, values, table, slots, positions, tokens, output, abreast, scale):
    num_heads, head_dim = query.shape[1], query.shape[2]
    num_kv_heads, size = keys.shape[1], keys.shape[2]
    group = num_heads // num_kv_heads
    for run in numba.prange(-(-len(tokens) // abreast)):
        first = run * abreast
        own = tokens[first : first + abreast]
        longest = 0
        for t in own:
            longest = max(longest, positions[t] + 1)
        weights = np.empty(size, dtype=np.float32)
        sums = np.empty((len(own) * group, head_dim), dtype=np.float32)
        peaks = np.empty(len(own) * group, dtype=np.float32)
        totals = np.empty(len(own) * group, dtype=np.float32)
        for g in range(num_kv_heads):
            sums[:] = np.float32(0.0)
            peaks[:] = np.float32(-np.inf)
            totals[:] = np.float32(0.0)
            for number in range(-(-longest // size)):
                for j in range(len(own)):
                    t = own[j]
                    filled = min(size, positions[t] + 1 - number * size)
                    if filled <= 0:
                        continue
                    after = j + 1 < len(own)
                    _fetch(keys, values, table, slots, positions, own[j + 1 if after else 0], number + 1 - after, g)
                    block = table[slots[t], number]
                    for a in range(group):
                        i = j * group + a
                        peaks[i], totals[i] = _add_block(
                            query[t, g * group + a], keys[block, g], values[block, g],
                            filled, scale, peaks[i], totals[i], weights, sums[i],
                        )  # fmt: skip
            for i in range(len(own) * group):
                share = np.float32(1.0) / totals[i]
                for c in range(head_dim):
                    output[own[i // group], g * group + i % group, c] = narrow(sums[i, c] * share, output[0, 0, 0])


@numba.njit(inline="always")
def _fetch(keys, values, table, slots, positions, t, number, g):
    """Prefetch what token t has in block `number` of its slot."""
    filled = min(keys.shape[2], positions[t] + 1 - number * keys.shape[2])
    if filled > 0:
        block = table[slots[t], number]
        some_keys, some_values = keys[block, g].reshape(-1), values[block, g].reshape(-1)
        for i in range(0, filled * keys.shape[3], _LINE_BYTES // keys.itemsize):
            prefetch(some_keys, i)
            prefetch(some_values, i)


@numba.njit(fastmath=FAST_MATH, cache=True)
def _add_block(query, keys, values, filled, scale, peak, total, weights, sums):
    """Add the first `filled` places of a block. -> the new peak and total; `sums` [d] is updated.

    `weights` [B] is scratch."""
    head_dim = len(query)
    highest = peak
    for m in range(filled):
        score = np.float32(0.0)
        for c in range(head_dim):
            score += widen(query[c]) * widen(keys[m, c])
        weights[m] = score * scale
    for m in range(filled):
        highest = max(highest, weights[m])
    if highest > peak:
        shrink = exp2(peak - highest) if peak > -np.inf else np.float32(0.0)
        total *= shrink
        for c in range(head_dim):
            sums[c] *= shrink
    for m in range(filled):
        weights[m] = exp2(weights[m] - highest)
    for m in range(filled):
        total += weights[m]
    whole = filled - filled % 4
    for m in range(0, whole, 4):  # four at a time: the sums are read and written once for them
        for c in range(head_dim):
            sums[c] += (
                weights[m] * widen(values[m, c])
                + weights[m + 1] * widen(values[m + 1, c])
                + weights[m + 2] * widen(values[m + 2, c])
                + weights[m + 3] * widen(values[m + 3, c])
            )
    for m in range(whole, filled):
        for c in range(head_dim):
            sums[c] += weights[m] * widen(values[m, c])
    return highest, total
