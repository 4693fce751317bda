"""The layers of a decoding step on a CPU, fp32 and bf16, in one compiled loop over threads.

Each thread takes some of the tokens through all layers. A layer's operations are so short that their overhead
dominates: the interpreter, starting and joining a pool of threads, results that leave the caches before they are read
again. Here threads meet once a step, and what a thread passes from one operation to the next is its own. Tokens are in
panels of LANES (`_panels_llvm`): products read the weights in place, everything between them works on vectors of one
number of LANES tokens, and only attention and its cache have rows. Values are rounded where the modules round; between
products they are fp32.

A last panel that is not full repeats the last token, which is therefore computed and written more than once, with the
same bits. Weights and cache are passed as addresses: arrays of every layer would take longer to pass than to work on.

Shape legend
    T  tokens    N  panels    L  LANES    D  hidden size    I  MLP size    H, G  query, key/value heads    d  head size
    P  blocks    B  places of a block    M  the larger of D and (H + 2 G) d
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numba
import numpy as np

from searchr1_kernels._cached_attention_numba import ABREAST, attend_abreast
from searchr1_kernels._numba_numbers import FAST_MATH, LOG2_E, array_at, prefetch, widen
from searchr1_kernels._panels_llvm import (
    CONFIGURATION_BYTES,
    ROWS,
    begin_tiles,
    end_tiles,
    from_rows,
    multiply,
    to_rows,
)
from searchr1_kernels._vector_code import LANES
from searchr1_kernels._vector_numba import (
    exp2,
    load,
    load_packed,
    rounded,
    smaller,
    splat,
    square_root,
    store,
    store_packed,
)

_LINE_BYTES = 64  # of a cache line


# Columns of `addresses` for a layer: int64, 0 where there is nothing. The memory is fp32, or bf16.
INPUT_NORM, HEADS, BIAS, QUERY_NORM, KEY_NORM, OUTPUT, MLP_NORM, GATES, DOWN, KEYS, VALUES = range(11)


class Panels(NamedTuple):
    """A step's data of its tokens, in contiguous panels."""

    tokens: np.ndarray  # [N L] int64
    cos: np.ndarray  # [N * d / 2 * L] fp32
    sin: np.ndarray  # [N * d / 2 * L] fp32
    residual: np.ndarray  # [N * D * L] fp32
    projected: np.ndarray  # [N * M * L] fp32: output of a product
    given: np.ndarray  # [N * max(D, H d) * L] packed: input of a product
    inner: np.ndarray  # [N * I * L] packed: input of the last product


class Rows(NamedTuple):
    """The data that attention reads and writes, in rows."""

    query: np.ndarray  # [T * H d]
    attended: np.ndarray  # [T * H d]
    packed_query: np.ndarray  # the same memory, 32 bits a number
    packed_attended: np.ndarray
    query_places: np.ndarray  # [N L] int64: of a lane's query and of its attention's output, in packed numbers
    key_places: np.ndarray  # [N L] int64: of a lane's first key and value
    table: np.ndarray  # [C, W] int32: blocks of a slot
    slots: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64


class Sizes(NamedTuple):
    """The sizes of a layer and its cache."""

    hidden: int  # D
    inner: int  # I
    num_heads: int  # H
    num_kv_heads: int  # G
    block: int  # B
    num_blocks: int  # P


# -------------------------------------------------------------------------------------------------- parts of the loop
# They process panels `begin` to `end`. `share`: numbers of the model's type in 32 bits.


@numba.njit(fastmath=FAST_MATH, cache=True)
def _project(weights, count, depth, packed, panel_size, begin, end, output, target_size):
    """Multiply `count` rows of weights by the panels in `packed`, into `output`; both sizes are distances of panels.

    The rows that follow are prefetched meanwhile."""
    lines = ROWS * depth * weights.itemsize // _LINE_BYTES
    numbers = _LINE_BYTES // weights.itemsize
    for row in range(0, count, ROWS):
        for panel in range(begin, end, 2):
            for line in range(lines * (panel - begin) // (end - begin), lines * (panel + 2 - begin) // (end - begin)):
                prefetch(weights, (row + ROWS) * depth + line * numbers)
            source, result = panel * panel_size, panel * target_size + row * LANES
            if panel + 1 < end:
                multiply(weights, row * depth, depth, packed, source, panel_size, output, result, target_size, 2)
            else:
                multiply(weights, row * depth, depth, packed, source, panel_size, output, result, target_size, 1)


@numba.njit(fastmath=FAST_MATH, cache=True)
def _add_norm(residual, added, added_size, adds, weight, eps, given, given_size, begin, end):
    """Add `added` to `residual` if `adds`, and write the norm (arXiv 1910.07467, eq. 4) of that to `given`."""
    size = len(weight)
    for panel in range(begin, end):
        place, other = panel * size * LANES, panel * added_size
        even, odd = splat(np.float32(0.0)), splat(np.float32(0.0))
        for i in range(0, size * LANES, 2 * LANES):
            first, second = load(residual, place + i), load(residual, place + i + LANES)
            if adds:
                first = rounded(first + rounded(load(added, other + i), weight), weight)
                second = rounded(second + rounded(load(added, other + i + LANES), weight), weight)
                store(first, residual, place + i)
                store(second, residual, place + i + LANES)
            even, odd = even + first * first, odd + second * second
        factor = _inverse_root(even + odd, size, eps)
        for i in range(size // 2):
            at = place + 2 * i * LANES
            first = load(residual, at) * factor * splat(widen(weight[2 * i]))
            second = load(residual, at + LANES) * factor * splat(widen(weight[2 * i + 1]))
            store_packed(first, second, given, panel * given_size, i, weight)


@numba.njit(fastmath=FAST_MATH, inline="always")
def _inverse_root(squares, size, eps):
    return splat(np.float32(1.0)) / square_root(squares / splat(np.float32(size)) + splat(eps))


@numba.njit(fastmath=FAST_MATH, cache=True)
def _head(projected, place, size, bias, bias_place, norm, eps):
    """Apply bias and norm to one head of a panel, in place."""
    squares = splat(np.float32(0.0))
    for i in range(size):
        x = load(projected, place + i * LANES)
        if len(bias):
            x = x + splat(widen(bias[bias_place + i]))
        x = rounded(x, bias)
        squares = squares + x * x
        store(x, projected, place + i * LANES)
    if len(norm):
        factor = _inverse_root(squares, size, eps)
        for i in range(size):
            x = load(projected, place + i * LANES) * factor * splat(widen(norm[i]))
            store(rounded(x, bias), projected, place + i * LANES)


@numba.njit(fastmath=FAST_MATH, cache=True)
def _rotate(projected, place, size, cos, sin, angle_place, packed, target, like):
    """Rotate one head of a panel by the angles (arXiv 2104.09864, eq. 34), and pack it."""
    half = size // 2
    for i in range(0, half, 2):
        at, other, angle = place + i * LANES, place + (half + i) * LANES, angle_place + i * LANES
        a, b, c, s = load(projected, at), load(projected, other), load(cos, angle), load(sin, angle)
        first, second = a * c - b * s, b * c + a * s
        at, other, angle = at + LANES, other + LANES, angle + LANES
        a, b, c, s = load(projected, at), load(projected, other), load(cos, angle), load(sin, angle)
        store_packed(first, a * c - b * s, packed, target, i // 2, like)
        store_packed(second, b * c + a * s, packed, target, (half + i) // 2, like)


@numba.njit(fastmath=FAST_MATH, cache=True)
def _write_head(packed, place, size, rows, places, panel, shift):
    """Write one head of a panel, `size` packed numbers, to its rows."""
    for i in range(0, size, LANES):
        to_rows(packed, place + i * LANES, rows, places, panel * LANES, shift + i)


@numba.njit(fastmath=FAST_MATH, cache=True)
def _write_heads(of_heads, memory, panels, rows, sizes, head_dim, eps, begin, end):
    """Write queries, keys and values from `projected` to rows.

    `of_heads`: bias, norms of queries and keys. `memory`: packed keys and values. `given`, which is no longer needed,
    is scratch for a head."""
    (bias, query_norm, key_norm), (keys, values) = of_heads, memory
    num_heads, num_kv_heads, share = sizes.num_heads, sizes.num_kv_heads, 4 // bias.itemsize
    projected, given = panels.projected, panels.given
    width, size = (num_heads + 2 * num_kv_heads) * head_dim, head_dim // share
    distance = max(sizes.hidden, num_heads * head_dim) // share * LANES
    for panel in range(begin, end):
        scratch, angle = panel * distance, panel * (head_dim // 2) * LANES
        for h in range(num_heads + 2 * num_kv_heads):
            place, own = (panel * max(width, sizes.hidden) + h * head_dim) * LANES, h * head_dim
            shift = (h - num_heads) % num_kv_heads * sizes.block * size
            if h < num_heads:
                _head(projected, place, head_dim, bias, own, query_norm, eps)
                _rotate(projected, place, head_dim, panels.cos, panels.sin, angle, given, scratch, bias)
                _write_head(given, scratch, size, rows.packed_query, rows.query_places, panel, h * size)
            elif h < num_heads + num_kv_heads:
                _head(projected, place, head_dim, bias, own, key_norm, eps)
                _rotate(projected, place, head_dim, panels.cos, panels.sin, angle, given, scratch, bias)
                _write_head(given, scratch, size, keys, rows.key_places, panel, shift)
            else:
                _head(projected, place, head_dim, bias, own, bias[:0], eps)
                for i in range(0, head_dim, 2):
                    at = place + i * LANES
                    even, odd = load(projected, at), load(projected, at + LANES)
                    store_packed(even, odd, given, scratch, i // 2, bias)
                _write_head(given, scratch, size, values, rows.key_places, panel, shift)


@numba.njit(fastmath=FAST_MATH, cache=True)
def _project_gates(weights, hidden, inner, given, given_size, target, share, begin, end):
    """Compute gate and up, and write `silu(gate) * up` (arXiv 2002.05202, eq. 5) to `target`, a few rows at a time."""
    scratch = np.empty(4 * ROWS * LANES, dtype=np.float32)  # of gate and up, two panels each
    lines = ROWS * hidden * weights.itemsize // _LINE_BYTES
    numbers = _LINE_BYTES // weights.itemsize
    size = ROWS * LANES
    for row in range(0, inner, ROWS):
        for panel in range(begin, end, 2):
            for line in range(lines * (panel - begin) // (end - begin), lines * (panel + 2 - begin) // (end - begin)):
                prefetch(weights, (row + ROWS) * hidden + line * numbers)
                prefetch(weights, (inner + row + ROWS) * hidden + line * numbers)
            count = min(2, end - panel)
            for which in range(2):
                first = (which * inner + row) * hidden
                if count == 2:
                    multiply(weights, first, hidden, given, panel * given_size, given_size,
                             scratch, 2 * which * size, size, 2)  # fmt: skip
                else:
                    multiply(weights, first, hidden, given, panel * given_size, given_size,
                             scratch, 2 * which * size, size, 1)  # fmt: skip
            for p in range(count):
                begin_of_row = ((panel + p) * inner + row) // share * LANES
                for i in range(0, ROWS, 2):
                    place = p * size + i * LANES
                    even, odd = _gated(scratch, place, weights), _gated(scratch, place + LANES, weights)
                    store_packed(even, odd, target, begin_of_row, i // 2, weights)


@numba.njit(fastmath=FAST_MATH, inline="always")
def _gated(scratch, place, like):
    gate, up = rounded(load(scratch, place), like), rounded(load(scratch, place + 2 * ROWS * LANES), like)
    power = smaller(gate * splat(np.float32(-LOG2_E)), splat(np.float32(127.0)))
    return rounded(gate / (splat(np.float32(1.0)) + exp2(power)), like) * up


# -------------------------------------------------------------------------------------------------------------- a step


@functools.cache
def step_loop(head_dim: int, heads: int):
    """-> the loop over threads; `heads` of the heads that share keys take a block at once."""

    @numba.njit(parallel=True, fastmath=FAST_MATH, cache=True)
    def run_step(x, output, norm, addresses, cos, sin, panels, rows, sizes, num_parts, numbers):
        """Run a step: x [T * D] -> output [T * D], both packed.

        The last norm is [D], addresses [layers, 11], cos and sin [T, d] fp32. `numbers`: eps of the layers' norms, of
        the heads' norms and of the last norm, and the scale of attention scores."""
        num_panels = len(panels.tokens) // LANES
        for part in numba.prange(num_parts):
            own = part * num_panels // num_parts, (part + 1) * num_panels // num_parts
            _run_part(x, output, norm, addresses, cos, sin, panels, rows, sizes, own, numbers, heads, head_dim)

    return run_step


@numba.njit(fastmath=FAST_MATH, cache=True)
def _run_part(x, output, norm, addresses, cos, sin, panels, rows, sizes, own, numbers, heads, head_dim):
    """Run the step for the panels `own`, from and to."""
    (eps, head_eps, last_eps, scale), (begin, end) = numbers, own
    configuration = np.empty(2 * CONFIGURATION_BYTES, dtype=np.uint8)
    begin_tiles(norm, configuration)
    share, hidden, width = 4 // norm.itemsize, sizes.hidden, sizes.num_heads * head_dim
    given_size = max(hidden, width) // share * LANES
    added_size = max(width + 2 * sizes.num_kv_heads * head_dim, hidden) * LANES
    _begin(x, hidden, cos, sin, given_size, norm, panels, begin, end)
    for layer in range(len(addresses)):
        _run_layer(
            addresses[layer], norm, panels, rows, sizes, begin, end, layer > 0, eps, head_eps, scale, heads, head_dim
        )
    residual, added, given = panels.residual, panels.projected, panels.given
    _add_norm(residual, added, added_size, True, norm, last_eps, given, given_size, begin, end)
    places = panels.tokens[begin * LANES : end * LANES] * (hidden // share)
    for panel in range(begin, end):
        for i in range(0, hidden // share, LANES):
            to_rows(given, panel * given_size + i * LANES, output, places, (panel - begin) * LANES, i)
    end_tiles(norm, configuration)


@numba.njit(fastmath=FAST_MATH, cache=True)
def _begin(x, size, cos, sin, given_size, like, panels, begin, end):
    """Fill `residual` and the angles of the panels from x [T * D] packed, cos and sin [T, d]."""
    share, half, given, tokens = 4 // like.itemsize, cos.shape[1] // 2, panels.given, panels.tokens
    places = tokens[begin * LANES : end * LANES] * (size // share)
    for panel in range(begin, end):
        for i in range(0, size // share, LANES):
            from_rows(given, panel * given_size + i * LANES, x, places, (panel - begin) * LANES, i)
        for i in range(size // 2):
            place = (panel * size + 2 * i) * LANES
            store(load_packed(given, panel * given_size, i, 0, like), panels.residual, place)
            store(load_packed(given, panel * given_size, i, 1, like), panels.residual, place + LANES)
        for lane in range(LANES):
            t = tokens[panel * LANES + lane]
            for i in range(half):
                place = (panel * half + i) * LANES + lane
                panels.cos[place], panels.sin[place] = cos[t, i], sin[t, i]


@numba.njit(fastmath=FAST_MATH, cache=True)
def _run_layer(own, like, panels, rows, sizes, begin, end, adds, eps, head_eps, scale, heads, head_dim):
    """Run a layer, whose addresses are `own`, from the residual stream to what will be added to it."""
    share, hidden, inner, width = 4 // like.itemsize, sizes.hidden, sizes.inner, sizes.num_heads * head_dim
    all_width, area = width + 2 * sizes.num_kv_heads * head_dim, sizes.num_blocks * sizes.num_kv_heads * sizes.block
    added_size, given_size = max(all_width, hidden) * LANES, max(hidden, width) // share * LANES
    residual, projected, given = panels.residual, panels.projected, panels.given
    weight = array_at(own[INPUT_NORM], hidden, like)
    _add_norm(residual, projected, added_size, adds, weight, eps, given, given_size, begin, end)
    weight = array_at(own[HEADS], all_width * hidden, like)
    _project(weight, all_width, hidden, given, given_size, begin, end, projected, added_size)
    of_heads = (
        array_at(own[BIAS], all_width, like), array_at(own[QUERY_NORM], head_dim, like),
        array_at(own[KEY_NORM], head_dim, like),
    )  # fmt: skip
    keys, values = array_at(own[KEYS], area * head_dim, like), array_at(own[VALUES], area * head_dim, like)
    memory = (
        array_at(own[KEYS], area * head_dim // share, given),
        array_at(own[VALUES], area * head_dim // share, given),
    )
    _write_heads(of_heads, memory, panels, rows, sizes, head_dim, head_eps, begin, end)
    memory, shape = (rows.query, keys, values, rows.attended), (sizes.num_heads, sizes.num_kv_heads, sizes.block)
    last = min(end * LANES, len(rows.slots))
    for first in range(begin * LANES, last, ABREAST):
        abreast = panels.tokens[first : min(first + ABREAST, last)]
        attend_abreast(abreast, memory, shape, rows.table, rows.slots, rows.positions, scale, heads, head_dim)
    for panel in range(begin, end):
        for i in range(0, width // share, LANES):
            place = panel * given_size + i * LANES
            from_rows(given, place, rows.packed_attended, rows.query_places, panel * LANES, i)
    weight = array_at(own[OUTPUT], hidden * width, like)
    _project(weight, hidden, width, given, given_size, begin, end, projected, added_size)
    weight = array_at(own[MLP_NORM], hidden, like)
    _add_norm(residual, projected, added_size, True, weight, eps, given, given_size, begin, end)
    weight = array_at(own[GATES], 2 * inner * hidden, like)
    _project_gates(weight, hidden, inner, given, given_size, panels.inner, share, begin, end)
    weight = array_at(own[DOWN], hidden * inner, like)
    _project(weight, hidden, inner, panels.inner, inner // share * LANES, begin, end, projected, added_size)
