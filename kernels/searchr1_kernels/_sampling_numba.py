"""Sampling of tokens on a CPU: a few compiled passes over a row, and no sort.

Probabilities are relative to the likeliest token's. Only those of one row exist at a time, and stay in the caches.

Probabilities are not negative, so their bits as integers have the same order. Top-k and top-p keep all that are at
least some threshold, which is found by halving an interval of integers: by counts (top-k) or sums (top-p) of what is
above. Only what can matter is searched: a lower bound of the threshold comes from the largest probability of every
block of tokens (those of k blocks are k tokens), or from what all tokens below it could add up to; blocks with nothing
from the bound up are skipped.

Where an array's bits are needed too, both are passed, and blocks have one length: this lets loops use vector registers
(151,936 tokens: 8 us a pass, against 47 to 150 us otherwise; one core of an Intel Xeon, 2026-11-27).

Shape legend
    S  rows    V  vocabulary    B  blocks of a row    n  packed probabilities
"""

from __future__ import annotations

import numba
import numpy as np

from searchr1_kernels._numba_numbers import FAST_MATH, LOG2_E, exp2
from searchr1_kernels._threads import share

BLOCK = 64  # tokens
# Sums may be reordered, so that they use vector registers; but NaN keeps its meaning.
_SUMS = {"reassoc", "nsz", "contract"}
_ONE = np.int32(0x3F800000)  # bits of the probability 1
_INFINITE, _MINUS_INFINITE = np.int32(0x7F800000), np.int32(-0x7F800001)  # as `_highest` orders their bits
_LEAST_REST = 1e-4  # if 1 - top_p is larger, what is left out is certainly more than rounding


@numba.njit(cache=True, nogil=True)
def choose(turns, cuts, logits, uniforms, temperature, top_k, top_p, ids, logprobs):
    """logits [S,V] fp32, uniforms [S] fp64 -> fills ids, logprobs [S] of the rows that `share` hands to this thread.

    top_k 0 and top_p 1 are no limit."""
    vocabulary = logits.shape[1]
    num_blocks = (vocabulary + BLOCK - 1) // BLOCK
    sums, peaks = np.empty(num_blocks, np.float32), np.empty(num_blocks, np.int32)
    weights = np.empty(vocabulary, np.float32)
    bits = weights.view(np.int32)
    top_k = top_k if top_k < vocabulary else 0
    limited = top_k > 0 or top_p < 1
    packed = np.empty(vocabulary if limited else 0, np.int32)
    for row in share(turns, cuts):
        values, least = logits[row], np.int32(0)
        highest = _highest(values.view(np.int32))
        if np.isnan(highest):
            ids[row], logprobs[row] = 0, highest
            continue
        _weigh(values, highest, temperature, weights, sums)
        total = _total(sums)
        if limited:
            _block_peaks(bits, peaks)
            least = _least(total, bits, peaks, top_k, top_p, packed)
            _kept_sums(weights, bits, peaks, least, sums)
        token = _draw(weights, bits, sums, least, uniforms[row])
        ids[row] = token
        logprobs[row] = (np.float64(values[token]) - np.float64(highest)) / temperature - np.log(total)


@numba.njit(cache=True, nogil=True)
def take_likeliest(turns, cuts, logits, ids, logprobs):
    """logits [S,V] fp32 -> fills ids, logprobs [S] of the rows that `share` hands out: the first of the largest."""
    sums = np.empty((logits.shape[1] + BLOCK - 1) // BLOCK, np.float32)
    weights = np.empty(logits.shape[1], np.float32)
    for row in share(turns, cuts):
        values = logits[row]
        highest = _highest(values.view(np.int32))
        token = 0
        if not np.isnan(highest):
            token = _first(values, highest)
            _weigh(values, highest, 1.0, weights, sums)
            highest = -np.float32(np.log(_total(sums)))
        ids[row], logprobs[row] = token, highest


@numba.njit(cache=True, nogil=True)
def _highest(bits):
    """-> the largest number with these bits; NaN if one is NaN or +inf, or all are -inf.

    Compared as integers in the numbers' order: a maximum of numbers that may be NaN does not become SIMD."""
    above, below = np.int32(-(2**31)), np.int32(2**31 - 1)
    for i in range(bits.shape[0]):
        key = bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        above, below = max(above, key), min(below, key)
    if above >= _INFINITE or below < _MINUS_INFINITE or above == _MINUS_INFINITE:
        return np.float32(np.nan)
    value = np.full(1, above ^ ((above >> np.int32(31)) & np.int32(0x7FFFFFFF)), np.int32)
    return value.view(np.float32)[0]


@numba.njit(cache=True, nogil=True, fastmath=FAST_MATH)
def _weigh(values, highest, temperature, weights, sums):
    """Fill weights, relative to the largest and 0 below 2^-126, and the sums of each block."""
    scale = np.float32(min(LOG2_E / temperature, 3e38))
    for b in range(sums.shape[0]):
        first = b * BLOCK
        total = np.float32(0)
        if first + BLOCK <= values.shape[0]:  # a loop of constant length has no remainder
            for i in range(BLOCK):
                weight = _weight(values[first + i], highest, scale)
                weights[first + i] = weight
                total += weight
        else:
            # The compiler gives a loop that writes and sums a version for arrays that may overlap, used where one
            # begins less than 32 numbers after the other: memory addresses would decide the order of sums.
            for i in range(first, values.shape[0]):
                weights[i] = _weight(values[i], highest, scale)
            for i in range(first, values.shape[0]):
                total += weights[i]
        sums[b] = total


@numba.njit(fastmath=FAST_MATH, inline="always")
def _weight(value, highest, scale):
    power = max((value - highest) * scale, np.float32(-1000.0))
    return exp2(power) if power >= np.float32(-126.0) else np.float32(0.0)


@numba.njit(cache=True, nogil=True)
def _first(values, value):
    """-> the first place of a value that is present."""
    first = 0
    while first + BLOCK <= values.shape[0]:
        found = np.int32(0)
        for i in range(BLOCK):
            found |= np.int32(values[first + i] == value)
        if found:
            break
        first += BLOCK
    while values[first] != value:
        first += 1
    return first


@numba.njit(cache=True, nogil=True)
def _least(total, bits, peaks, top_k, top_p, packed):
    """-> bits of the smallest probability that is kept."""
    if top_k:
        cut = _search(peaks, np.int32(0), top_k)
    else:
        small = np.full(1, 0.9 * (1 - top_p) * total / bits.shape[0] if 1 - top_p > _LEAST_REST else 0.0, np.float32)
        cut = max(small.view(np.int32)[0], np.int32(1))
    kept = packed[: _collect(bits, peaks, cut, packed)]
    values = kept.view(np.float32)
    if not top_k:
        return _search_sums(values, kept, cut - 1, top_p * total)
    least = _search(kept, cut - 1, top_k)
    if top_p == 1:
        return least
    num_equal = top_k - _count_above(kept, least)  # for exactly k tokens, whichever of equal ones they are
    value = np.full(1, least, np.int32).view(np.float32)[0]
    whole = np.float64(_sum_above(values, kept, least)) + num_equal * np.float64(value)
    return _search_sums(values, kept, least - 1, top_p * whole)


@numba.njit(cache=True, nogil=True)
def _search(bits, low, target):
    """-> the smallest bits above `low` above which there are fewer than `target` numbers."""
    high = _ONE
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        if _count_above(bits, middle) >= target:
            low = middle
        else:
            high = middle
    return high


@numba.njit(cache=True, nogil=True)
def _search_sums(weights, bits, low, target):
    """-> the smallest bits above `low` above which weights sum to less than `target`."""
    high = _ONE
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        if _sum_above(weights, bits, middle) >= target:
            low = middle
        else:
            high = middle
    return high


@numba.njit(cache=True, nogil=True, error_model="numpy")  # with NaN, a division by 0 gives NaN
def _draw(weights, bits, sums, least, uniform):
    """-> the place where the running sum of what is kept exceeds the uniform's share of the total.

    Finds the block, then the token in it; never one of weight 0; for NaN some place."""
    total = _total(sums)
    share, before, block = min(uniform * total, np.nextafter(total, 0.0)), 0.0, 0
    for b in range(sums.shape[0]):
        if sums[b] > 0:
            block = b
            if before + sums[b] > share:
                break
            before += sums[b]
    first = token = block * BLOCK
    end, exact = min(first + BLOCK, weights.shape[0]), 0.0
    for i in range(first, end):
        exact += weights[i] if bits[i] >= least else np.float32(0)
    # As a fraction: the block's sum is rounded, and the difference would fall to its last token.
    share, before = min((share - before) / sums[block] * exact, np.nextafter(exact, 0.0)), 0.0
    for i in range(first, end):
        if weights[i] > 0 and bits[i] >= least:
            token = i
            before += weights[i]
            if before > share:
                break
    return token


# --------------------------------------------------------------------------------------------------------- the passes


@numba.njit(cache=True, nogil=True)
def _total(sums):
    total = 0.0
    for value in sums:
        total += value
    return total


@numba.njit(cache=True, nogil=True, fastmath=_SUMS)
def _sum_above(weights, bits, least):
    total = np.float32(0)
    for i in range(bits.shape[0]):
        weight = weights[i]  # read unconditionally, or the loop has a branch
        total += weight if bits[i] > least else np.float32(0)
    return total


@numba.njit(cache=True, nogil=True)
def _count_above(bits, least):
    count = np.int32(0)
    for i in range(bits.shape[0]):
        count += np.int32(bits[i] > least)
    return count


@numba.njit(cache=True, nogil=True)
def _block_peaks(bits, peaks):
    num_whole = bits.shape[0] // BLOCK
    for b in range(num_whole):
        peak = np.int32(0)
        for i in range(BLOCK):
            peak = max(peak, bits[b * BLOCK + i])
        peaks[b] = peak
    if num_whole < peaks.shape[0]:
        peaks[num_whole] = bits[num_whole * BLOCK :].max()


@numba.njit(cache=True, nogil=True)
def _kept_sums(weights, bits, peaks, least, sums):
    """Fill the sums of what is kept of each block."""
    for b in range(peaks.shape[0]):
        part = slice(b * BLOCK, (b + 1) * BLOCK)
        sums[b] = _sum_above(weights[part], bits[part], least - 1) if peaks[b] >= least else np.float32(0)


@numba.njit(cache=True, nogil=True)
def _collect(bits, peaks, cut, packed):
    """-> the number of bits from `cut` up, which are packed."""
    count = 0
    for b in range(peaks.shape[0]):
        if peaks[b] >= cut:
            for i in range(b * BLOCK, min((b + 1) * BLOCK, bits.shape[0])):
                packed[count] = bits[i]  # overwritten by the next, if it is below
                count += bits[i] >= cut
    return count
