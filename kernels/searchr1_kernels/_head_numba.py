"""The head and the likeliest token of each row on a CPU, in one pass over the vocabulary.

Logits are used while they are in the first-level cache, and never exist all at once. Rows are in panels of LANES
(`_panels_llvm`), so that each row's largest logit, its token, and the sum of the exponentials relative to it (Milakov
and Gimelshein 2018, arXiv 1805.02867, algorithm 3) are vectors, and nothing goes across lanes. In bf16, logits are kept
in fp32, as in the trainer.

Shape legend
    S  rows    D  hidden size    V  vocabulary    L  LANES
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from searchr1_kernels import _panels_llvm as panels
from searchr1_kernels._numba_numbers import FAST_MATH, LOG2_E, as_array, prefetch
from searchr1_kernels._panels_llvm import CONFIGURATION_BYTES, ROWS, begin_tiles, end_tiles, from_rows, multiply
from searchr1_kernels._vector_code import LANES
from searchr1_kernels._vector_numba import exp2, larger, load, splat, store, where_larger

_MIN_ROWS = {torch.float32: 16, torch.bfloat16: 1}  # from which on this beats a matrix product and a pass over it
_MOST_TOKENS = 1 << 24  # up to which token ids are exact in fp32
_LINE_BYTES = 64  # of a cache line


def takes(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `likeliest` takes rows [S, D] and a head [V, D], and there are enough rows for all threads."""
    if hidden.device.type != "cpu" or hidden.dtype not in _MIN_ROWS or weight.dtype != hidden.dtype:
        return False
    num_rows, (vocab_size, size) = len(hidden), weight.shape
    return (
        num_rows >= max(_MIN_ROWS[hidden.dtype], LANES * (numba.get_num_threads() - 1) + 1)
        and vocab_size % ROWS == 0
        and vocab_size <= _MOST_TOKENS
        and size % ROWS == 0
        and weight.is_contiguous()
        and panels.takes(hidden.dtype == torch.bfloat16)
    )


def likeliest(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [S, D], weight [V, D] -> ids [S] int64, the first of the largest, and their logprobs [S] fp32.

    A log-probability is NaN where a logit of the row is."""
    num_rows, share = len(hidden), 4 // hidden.dtype.itemsize
    num_panels = -(-num_rows // LANES)
    places = np.minimum(np.arange(num_panels * LANES), num_rows - 1) * (hidden.shape[1] // share)
    ids, logprobs = np.empty(num_panels * LANES, np.int64), np.empty(num_panels * LANES, np.float32)
    x, head = hidden.contiguous().view(torch.int32).numpy(), as_array(weight.detach())
    num_parts = min(numba.get_num_threads(), num_panels)
    _run(x.reshape(-1), places, head.reshape(-1), hidden.shape[1], ids, logprobs, num_parts)
    return torch.from_numpy(ids[:num_rows]), torch.from_numpy(logprobs[:num_rows])


@numba.njit(parallel=True, fastmath=FAST_MATH, cache=True)
def _run(x, places, weight, size, ids, logprobs, num_parts):
    num_panels = len(places) // LANES
    for part in numba.prange(num_parts):
        begin, end = part * num_panels // num_parts * LANES, (part + 1) * num_panels // num_parts * LANES
        _run_part(x, places[begin:end], weight, size, ids[begin:end], logprobs[begin:end])


@numba.njit(fastmath=FAST_MATH, cache=True)
def _run_part(x, places, weight, size, ids, logprobs):
    """Fill ids and log-probabilities from packed x, the places where its rows begin, `weight` [V * D], and `size` D."""
    configuration = np.empty(2 * CONFIGURATION_BYTES, dtype=np.uint8)
    begin_tiles(weight, configuration)
    num_panels, panel_size = len(places) // LANES, size * weight.itemsize // 4 * LANES
    packed = np.empty(num_panels * panel_size, dtype=np.int32)
    for panel in range(num_panels):
        for i in range(0, panel_size, LANES * LANES):
            from_rows(packed, panel * panel_size + i, x, places, panel * LANES, i // LANES)
    peaks = np.full(len(places), -np.inf, dtype=np.float32)
    totals, tokens = np.zeros(len(places), dtype=np.float32), np.zeros(len(places), dtype=np.float32)
    logits = np.empty(2 * ROWS * LANES, dtype=np.float32)
    lines, numbers = ROWS * size * weight.itemsize // _LINE_BYTES, _LINE_BYTES // weight.itemsize
    for token in range(0, len(weight) // size, ROWS):
        for panel in range(0, num_panels, 2):
            for line in range(lines * panel // num_panels, lines * (panel + 2) // num_panels):
                prefetch(weight, (token + ROWS) * size + line * numbers)
            begin = panel * panel_size
            if panel + 1 < num_panels:
                multiply(weight, token * size, size, packed, begin, panel_size, logits, 0, ROWS * LANES, 2)
                _add(logits, 0, token, peaks, totals, tokens, panel * LANES)
                _add(logits, ROWS * LANES, token, peaks, totals, tokens, (panel + 1) * LANES)
            else:
                multiply(weight, token * size, size, packed, begin, panel_size, logits, 0, ROWS * LANES, 1)
                _add(logits, 0, token, peaks, totals, tokens, panel * LANES)
    for i in range(len(places)):
        ids[i], logprobs[i] = np.int64(tokens[i]), -np.log(totals[i])
    end_tiles(weight, configuration)


@numba.njit(fastmath=FAST_MATH, cache=True)
def _add(logits, place, token, peaks, totals, tokens, lane):
    """Add a panel's logits at `place`, of ROWS tokens from `token` on, to its peaks, totals and tokens."""
    before, found = load(peaks, lane), load(tokens, lane)
    peak, one = before, splat(np.float32(LOG2_E))
    for i in range(ROWS):
        x = load(logits, place + i * LANES)
        found = where_larger(x, peak, splat(np.float32(token + i)), found)
        peak = larger(x, peak)
    total = load(totals, lane) * exp2((before - peak) * one)
    other = splat(np.float32(0.0))
    for i in range(0, ROWS, 2):
        total = total + exp2((load(logits, place + i * LANES) - peak) * one)
        other = other + exp2((load(logits, place + (i + 1) * LANES) - peak) * one)
    store(peak, peaks, lane)
    store(found, tokens, lane)
    store(total + other, totals, lane)
