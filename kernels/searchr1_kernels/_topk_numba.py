"""The loops of the search on a CPU: codes of rows, block maxima with their bounds, and exact scores.

Bounds hold for real numbers; slack constants make them safe to compute in floating point. An infinity in them (rows
near the end of fp32's range) may become NaN, so comparisons are written to keep what is not known to be excluded.

Shape legend: Q queries, M rows, D components, T rows of a tile, B rows of a block, G blocks.
"""

from __future__ import annotations

import numba
import numpy as np

from searchr1_kernels._threads import share

# Slack for a product of codes: int32 to fp32, and a multiplication (2^-23 together).
BOUND_SLACK = 1e-6
# Slack for a score: unequal ones may be rounded to the same fp32 (2^-23), and a bound is kept in fp32 (2^-24).
ROUNDING = 2.5e-7
# The same for scores that underflow in fp32, also where the processor treats denormals as zero.
LEAST = 1e-37
# From here on a score may be rounded to infinity, as all beyond are: they are equal.
HUGE = 3.4e38

# Sums may be reordered, so that they use vector registers; but NaN and infinity keep their meaning, as bounds need.
_SUMS = {"reassoc", "nsz", "contract"}
_LANES = 32
# More than underflow loses of numbers, also where the processor treats denormals as zero.
TINY = 1e-33
_TINY = np.float32(TINY)


@numba.njit(cache=True, nogil=True, fastmath=_SUMS)
def quantize(rows, center, codes, scales, residuals, magnitudes):
    """Fill the outputs from rows [M,D] fp32; -> the first row that is not finite, or -1."""
    num_rows, size = rows.shape
    row = np.empty(size, np.float32)
    bits = row.view(np.int32)
    largest = np.empty(1, np.int32)
    slack = np.float32(1 + 1e-6 + 6e-8 * size)  # the sums below round
    for r in range(num_rows):
        for i in range(size):
            row[i] = rows[r, i] - center[i]
        peak_bits = np.int32(0)
        for i in range(size):  # the maximum of magnitudes as integers vectorises, and NaN is the largest
            peak_bits = max(peak_bits, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
        if peak_bits >= 0x7F800000:
            return r
        largest[0] = peak_bits
        peak = largest.view(np.float32)[0]
        scale = peak / np.float32(127)
        inverse = np.float32(127) / peak if peak > np.float32(1e-30) else np.float32(0)
        left_over, length = np.float32(0), np.float32(0)  # in units of the scale, so that no square leaves fp32
        for i in range(size):
            value = row[i] * inverse
            code = np.rint(value)
            codes[r, i] = np.int8(code)
            left_over += (value - code) * (value - code)
            length += code * code
        if inverse == 0:
            left_over = np.float32(size * 127 * 127)
        scales[r] = scale
        magnitudes[r] = np.sqrt(length) * scale * slack + _TINY
        # The subtraction, the product and the scale were rounded, relative to their operands.
        residuals[r] = np.sqrt(left_over) * scale * slack + np.float32(4e-7) * magnitudes[r] + _TINY
    return -1


@numba.njit(cache=True, nogil=True)
def code_magnitudes(codes, scales, magnitudes):
    """codes [M,D] int8, scales [M] -> magnitudes [M] of scale * code."""
    for r in range(codes.shape[0]):
        total = 0
        for i in range(codes.shape[1]):
            total += np.int32(codes[r, i]) * np.int32(codes[r, i])
        magnitudes[r] = np.float32(np.sqrt(total) * abs(scales[r]) * (1 + 1e-6)) + _TINY


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _block_maximum(tile, scales, begin, end, best):
    """best [Q] = max over rows begin to end of tile [T,Q] * scales [T]."""
    best[:] = -np.inf
    for r in range(begin, end):
        scale = scales[r]
        for q in range(best.shape[0]):
            best[q] = max(best[q], np.float32(tile[r, q]) * scale)


@numba.njit(cache=True, nogil=True)
def reduce_tile(
    tile, row_scales, residuals, magnitudes, block, first, highest, lowest, offsets, scales, norms, residual_norms
):
    """Reduce a tile [T,Q] of products to highest [Q,G], from block `first` on; lowest [Q,k] keeps the best."""
    num_rows, num_queries = tile.shape
    best, roots = np.empty(num_queries, np.float32), lowest[:, 0].copy()
    lows, highs = np.empty(num_queries), np.empty(num_queries, np.float32)
    for begin in range(0, num_rows, block):
        end = min(begin + block, num_rows)
        _block_maximum(tile, row_scales, begin, end, best)
        residual, magnitude = np.float32(0), np.float32(0)
        for r in range(begin, end):
            residual, magnitude = max(residual, residuals[r]), max(magnitude, magnitudes[r])
        risen = 0
        for q in range(num_queries):  # without a branch, so that it vectorises
            coarse = scales[q] * best[q]
            error = norms[q] * residual + residual_norms[q] * magnitude + BOUND_SLACK * abs(coarse)
            lows[q] = coarse - error
            highs[q] = _highest(coarse + error, offsets[q])
            risen += lows[q] > roots[q]
        g = first + begin // block
        for q in range(num_queries):
            highest[q, g] = highs[q]
        if risen:
            for q in range(num_queries):
                if lows[q] > roots[q]:
                    _replace_root(lowest[q], lows[q])
                    roots[q] = lowest[q, 0]


@numba.njit(cache=True, nogil=True)
def _highest(bound, offset):
    """Bound of a sum in real numbers, less `offset` -> bound of its fp32 rounding, itself safe to round to fp32.

    NaN where an infinity met a zero: compare so that NaN is kept."""
    return bound + ROUNDING * (abs(offset + bound) + abs(bound)) + LEAST


@numba.njit(cache=True, nogil=True)
def _most(bound):
    """-> the largest fp32 that a score up to this bound may be rounded to."""
    return bound if bound < HUGE else np.inf  # also for NaN


@numba.njit(cache=True, nogil=True)
def _replace_root(heap, value):
    """Replace the root of a binary heap, smallest first, by a larger value."""
    place, size = 0, heap.shape[0]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = value


@numba.njit(cache=True, nogil=True)
def count_candidates(highest, thresholds):
    """highest [Q,G], thresholds [Q] -> the number of entries that are not below their query's threshold."""
    count = 0
    for q in range(highest.shape[0]):
        for g in range(highest.shape[1]):
            count += not (highest[q, g] < thresholds[q])
    return count


@numba.njit(cache=True, nogil=True)
def _candidates(highest, threshold, places):
    """highest [G] -> the number of blocks that are not below the threshold; their indices go to places [G]."""
    found, step = 0, 64
    for begin in range(0, highest.shape[0], step):
        end = min(begin + step, highest.shape[0])
        kept = 0
        for g in range(begin, end):  # without a branch, so that it vectorises
            kept += not (highest[g] < threshold)
        if kept:
            for g in range(begin, end):
                if not (highest[g] < threshold):
                    places[found] = g
                    found += 1
    return found


@numba.njit(cache=True, nogil=True)
def refine_queries(
    turns, cuts, queries, rows, table, row_scales, codes, block,
    highest, thresholds, offsets, scales, norms, residual_norms, query_codes, scores, ids,
):  # fmt: skip
    """Fill scores and ids [Q,k] of the queries that `share` hands to this thread.

    `codes`: None, or codes, scales, residuals, magnitudes."""
    num_rows, k = rows.shape[0], scores.shape[1]
    places = np.empty(highest.shape[1], np.int64)
    row, lanes = np.empty(rows.shape[1], np.float32), np.empty(_LANES)
    for q in share(turns, cuts):
        found = _candidates(highest[q], thresholds[q], places)
        highs = np.empty(found)
        for j in range(found):
            highs[j] = _most(offsets[q] + highest[q, places[j]])
        filled = 0
        for j in np.argsort(-highs):
            if filled == k and highs[j] < scores[q, k - 1]:
                break
            for r in range(places[j] * block, min(places[j] * block + block, num_rows)):
                if codes is not None and filled == k:
                    coarse = scales[q] * codes[1][r] * _code_product(codes[0][r], query_codes[q])
                    error = norms[q] * codes[2][r] + residual_norms[q] * codes[3][r] + BOUND_SLACK * abs(coarse)
                    if _most(offsets[q] + _highest(coarse + error, offsets[q])) < scores[q, k - 1]:
                        continue
                score = _exact(queries[q], rows[r], table, row_scales, r, row, lanes)
                filled = _insert(scores[q], ids[q], filled, score, r)


@numba.njit(cache=True, nogil=True)
def _code_product(code, query_code):
    """-> the product of two codes [D] int8, in 32 bits, which the loop needs to be told."""
    total = np.int32(0)
    for i in range(code.shape[0]):
        total = np.int32(total + np.int32(code[i]) * np.int32(query_code[i]))
    return np.float64(total)


@numba.njit(cache=True, nogil=True)
def _exact(query, stored, table, row_scales, r, row, lanes):
    """-> the score: products (exact in fp64) summed in fp64 over lanes in this order, then rounded to fp32.

    The lanes are written out because a compiler may not reorder a sum on its own, and with fastmath it would choose an
    order anew wherever this is inlined. `row` [D] fp32 and `lanes` are workspace.
    """
    size = query.shape[0]
    if table is None:
        for i in range(size):
            row[i] = stored[i]
    else:
        for i in range(size):
            row[i] = table[stored[i]]
    lanes[:] = 0.0
    whole = size - size % _LANES
    for i in range(0, whole, _LANES):
        for j in range(_LANES):
            lanes[j] += np.float64(query[i + j]) * np.float64(row[i + j])
    for j in range(size - whole):
        lanes[j] += np.float64(query[whole + j]) * np.float64(row[whole + j])
    total = 0.0
    for j in range(_LANES):
        total += lanes[j]
    if row_scales is not None:
        total *= np.float64(row_scales[r])
    score = np.float32(total)
    return score if score != 0 else np.float32(0)  # -0 equals 0, and must have its bits


@numba.njit(cache=True, nogil=True)
def _insert(scores, ids, filled, score, row):
    """Insert (score, row) into the first `filled` of [k], best first, ties by row; -> how many there are now."""
    k = scores.shape[0]
    if filled == k and not (score > scores[k - 1] or (score == scores[k - 1] and row < ids[k - 1])):
        return filled
    place = min(filled, k - 1)
    while place > 0 and (score > scores[place - 1] or (score == scores[place - 1] and row < ids[place - 1])):
        scores[place], ids[place] = scores[place - 1], ids[place - 1]
        place -= 1
    scores[place], ids[place] = score, row
    return min(filled + 1, k)
