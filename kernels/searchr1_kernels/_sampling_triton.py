"""Sampling of tokens on a GPU, in two launches (`_sampling_draw_triton`), or four where top-k or top-p applies.

The tokens that top-k or top-p leaves are all those whose weight is at least some threshold. Weights are positive, so
their bits as integers have the same order; the threshold is searched for among integers, and nothing is sorted:

    summarise    as in `_sampling_draw_triton`; also the largest logit of every block of 64 tokens
    bound        a program per row: a lower bound of the threshold, from the largest weights of blocks (those of k
                 blocks are k tokens), and for top-p from what all weights below could add up to
    collect      every part's weights from the bound up, packed; parts without one read no logits
    choose       a program per row: the threshold, by counts (top-k) or sums (top-p) of the packed weights above three
                 candidates at a time; then as `draw`

The bound affects how long the search takes, never what it finds. Where it excludes little (top-p of a flat
distribution), a row's weights are read from the cache once per two bits. There are no atomics, so a row has the same
bits alone and in any batch.

Shape legend
    S  rows    V  vocabulary    P  parts of a row
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from searchr1_kernels import _sampling_draw_triton as drawing
from searchr1_kernels._sampling_draw_triton import (
    ANYWHERE,
    bits_of,
    draw,
    draw_token,
    load_parts,
    summarise,
    total_of,
    weigh,
    write_row,
)

# Packed weights of a row that `choose` processes at a time. With 16 warps it spills (sm_90, Triton 3.9: 16 bytes for a
# vocabulary that 16 does not divide).
AT_ONCE = 8192
_ONE = tl.constexpr(0x3F800000)  # bits of the weight 1, the largest
# Relative slack of a bound: sums of weights round at about 1e-6 of their total.
_SLACK = tl.constexpr(1e-5)
_LEAST_REST = tl.constexpr(1e-4)  # below this, 1 - top_p is not used as a bound: it is worth no more than the rounding


@triton.jit
def _narrow(low, high, first, second, third, target):
    """-> the rest of (low, high], given the totals above the three candidates in between.

    It shrinks even if a total is NaN: a search must end."""
    step = high - low
    quarter = tl.maximum(step // 4, 1)
    new_low = tl.where(first >= target, low + quarter, low)
    new_low = tl.where(second >= target, low + step // 2, new_low)
    new_low = tl.where(third >= target, high - quarter, new_low)
    new_high = tl.where(third >= target, high, high - quarter)
    new_high = tl.where(second >= target, new_high, low + step // 2)
    new_high = tl.where(first >= target, new_high, low + quarter)
    return new_low, new_high


@triton.jit
def _search_blocks(weight, high, target, WEIGHTED: tl.constexpr):
    """-> the smallest bits above which there are fewer weights [n] than `target`, or if WEIGHTED a smaller sum."""
    low = high * 0
    bits = bits_of(weight)
    value = weight if WEIGHTED else tl.full((weight.shape[0],), 1.0, tl.float32)
    while high - low > 1:
        step = high - low
        quarter = tl.maximum(step // 4, 1)
        first = tl.sum(tl.where(bits > low + quarter, value, 0.0), 0)
        second = tl.sum(tl.where(bits > low + step // 2, value, 0.0), 0)
        third = tl.sum(tl.where(bits > high - quarter, value, 0.0), 0)
        low, high = _narrow(low, high, first, second, third, target)
    return high


@triton.jit
def _load_lists(lists, counts, start, WIDTH: tl.constexpr):
    """-> weights [P, WIDTH] of each list from place `start` on; 0 past its end."""
    place = start + tl.arange(0, WIDTH)
    return tl.load(lists[:, None] + place[None, :], mask=place[None, :] < counts[:, None], other=0.0)


@triton.jit
def _search_lists(
    lists, counts, longest, low, target, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """Search as `_search_blocks` does, over the packed weights and above `low`."""
    high = low * 0 + _ONE
    while high - low > 1:
        step = high - low
        quarter = tl.maximum(step // 4, 1)
        first = tl.zeros((PARTS, WIDTH), tl.float32)
        second = tl.zeros((PARTS, WIDTH), tl.float32)
        third = tl.zeros((PARTS, WIDTH), tl.float32)
        for start in range(0, longest, WIDTH):
            weight = _load_lists(lists, counts, start, WIDTH)
            bits = bits_of(weight)
            value = weight if WEIGHTED else tl.full((PARTS, WIDTH), 1.0, tl.float32)
            first += tl.where(bits > low + quarter, value, 0.0)
            second += tl.where(bits > low + step // 2, value, 0.0)
            third += tl.where(bits > high - quarter, value, 0.0)
        low, high = _narrow(low, high, total_of(first), total_of(second), total_of(third), target)
    return high


@triton.jit(do_not_specialize=["top_k"])
def bound(
    peaks,  # [S, P]
    sums,  # [S, P]
    block_peaks,  # [S, P, BLOCKS]
    tops,  # [S]: the largest logit
    cuts,  # [S] int32: bits of a weight that nothing is kept below
    vocabulary,  # V
    num_parts,  # P
    scale,
    top_k,
    top_p,
    top_p_rest,  # 1 - top_p
    COUNTED: tl.constexpr,  # whether there is a top-k
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Compute a row's lower bound of the weights that are kept.

    With top-k it is the k-th largest of the blocks' peaks, even with top-p: what that keeps of k tokens depends on all
    of them."""
    row = tl.program_id(0).to(tl.int64)
    highest, peak, mass = load_parts(peaks, sums, row, num_parts, scale, PARTS)
    block = tl.arange(0, PARTS * BLOCKS)
    num_blocks = num_parts * BLOCKS
    block_peak = tl.load(block_peaks + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    weight = weigh(block_peak, highest, scale)
    one = (tl.program_id(0) * 0 + _ONE).to(tl.int32)
    if COUNTED:
        cut = _search_blocks(weight, one, top_k.to(tl.float32), False)
    else:
        total = tl.sum(mass, 0)
        cut = _search_blocks(weight, one, top_p * (1 + _SLACK) * total, True)
        # Even if the whole vocabulary lay below this weight, it would add up to less than top-p leaves out.
        small = tl.where(top_p_rest < _LEAST_REST, 0.0, 0.9 * top_p_rest * total / vocabulary)
        cut = tl.maximum(cut, bits_of(small))
    tl.store(tops + row, highest)
    tl.store(cuts + row, tl.maximum(cut, 1))


@triton.jit
def collect(
    logits,  # [S, V]
    peaks,  # [S, P]
    tops,  # [S]
    cuts,  # [S] int32
    weights,  # [S, P, PART_SIZE]
    counts,  # [S, P] int32
    vocabulary,  # V
    scale,
    PART_SIZE: tl.constexpr,
):
    """Pack the weights of a part that may be kept, in the order of its tokens."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    entry = row * tl.num_programs(1) + part
    highest = tl.load(tops + row)
    cut = tl.load(cuts + row)
    count = cut * 0
    if bits_of(weigh(tl.load(peaks + entry), highest, scale)) >= cut:
        token = part * PART_SIZE + tl.arange(0, PART_SIZE)
        logit = tl.load(logits + row * vocabulary + token, mask=token < vocabulary, other=float("-inf"))
        weight = weigh(logit, highest, scale)
        kept = bits_of(weight) >= cut
        places = tl.cumsum(kept.to(tl.int32), 0)
        tl.store(weights + entry * PART_SIZE + places - 1, weight, mask=kept)
        count = tl.sum(kept.to(tl.int32), 0)
    tl.store(counts + entry, count)


@triton.jit(do_not_specialize=["top_k"], do_not_specialize_on_alignment=ANYWHERE)
def choose(
    logits,  # [S, V]
    uniforms,  # [S]
    peaks,  # [S, P]
    sums,  # [S, P]
    cuts,  # [S] int32
    weights,  # [S, P, PART_SIZE]
    counts,  # [S, P] int32
    ids,  # [S] int64
    logprobs,  # [S]
    vocabulary,  # V
    num_parts,  # P
    scale,
    inverse,
    top_k,
    top_p,
    COUNTED: tl.constexpr,  # whether there is a top-k
    WEIGHTED: tl.constexpr,  # whether there is a top-p
    PART_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Draw a row's token from those that are kept."""
    row = tl.program_id(0).to(tl.int64)
    highest, peak, mass = load_parts(peaks, sums, row, num_parts, scale, PARTS)
    total = tl.sum(mass.to(tl.float64), 0)
    part = tl.arange(0, PARTS)
    count = tl.load(counts + row * num_parts + part, mask=part < num_parts, other=0)
    longest = tl.max(count, 0)
    lists = weights + (row * num_parts + part) * PART_SIZE
    least = tl.load(cuts + row)
    whole = total.to(tl.float32)
    if COUNTED:
        least = _search_lists(lists, count, longest, least - 1, top_k.to(tl.float32), False, PARTS, WIDTH)
    if WEIGHTED:
        if COUNTED:  # the total weight of exactly k tokens, whichever of equal ones they are
            num_above = tl.zeros((PARTS, WIDTH), tl.float32)
            above = tl.zeros((PARTS, WIDTH), tl.float32)
            for start in range(0, longest, WIDTH):
                weight = _load_lists(lists, count, start, WIDTH)
                num_above += tl.where(bits_of(weight) > least, 1.0, 0.0)
                above += tl.where(bits_of(weight) > least, weight, 0.0)
            whole = total_of(above) + (top_k.to(tl.float32) - total_of(num_above)) * least.to(tl.float32, bitcast=True)
        least = _search_lists(lists, count, longest, least - 1, top_p * whole, True, PARTS, WIDTH)
    kept = tl.zeros((PARTS, WIDTH), tl.float32)
    for start in range(0, longest, WIDTH):
        weight = _load_lists(lists, count, start, WIDTH)
        kept += tl.where(bits_of(weight) >= least, weight, 0.0)
    uniform = tl.load(uniforms + row).to(tl.float64)
    logits += row * vocabulary
    token, logit = draw_token(
        logits, uniform, peak, highest, tl.sum(kept, 1), least, scale, vocabulary, True, False, PART_SIZE, PARTS
    )  # fmt: skip
    write_row(ids, logprobs, row, token, logit, highest, total, inverse)


def sample(
    logits: torch.Tensor,  # [S, V] fp32
    uniforms: torch.Tensor,  # [S]
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids [S] int64, logprobs [S] fp32. The arguments are the operator's."""
    (num_rows, vocabulary), device = logits.shape, logits.device
    # Triton specializes on the alignment of addresses and strides, and the order of sums may depend on it. This makes V
    # alone decide it.
    logits = logits.contiguous()
    if logits.data_ptr() % 16 and vocabulary % 16 == 0:
        logits = logits.clone()
    ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    if num_rows == 0:
        return ids, logprobs
    greedy, limited = temperature == 0, temperature > 0 and (0 < top_k < vocabulary or top_p < 1)
    inverse = 1.0 if greedy else 1.0 / temperature
    num_parts, blocks = triton.cdiv(vocabulary, drawing.PART), drawing.PART // drawing.BLOCK
    peaks, sums = (torch.empty(num_rows, num_parts, dtype=torch.float32, device=device) for _ in range(2))
    block_peaks = peaks  # not written
    if limited:
        block_peaks = torch.empty(num_rows, num_parts, blocks, dtype=torch.float32, device=device)
    scale = inverse * math.log2(math.e)
    with torch.cuda.device_of(logits):
        summarise[(num_rows, num_parts)](
            logits, peaks, sums, block_peaks, vocabulary, scale,
            BLOCKS=blocks, BLOCK_SIZE=drawing.BLOCK, BOUNDED=limited, num_warps=drawing.NUM_WARPS,
        )  # fmt: skip
        tensors = (logits, uniforms.contiguous(), peaks, sums)
        outputs, numbers = (ids, logprobs), (vocabulary, num_parts, scale, inverse)
        if limited:
            _choose(tensors, block_peaks, outputs, numbers, top_k if top_k < vocabulary else 0, top_p)
        else:
            draw[(num_rows,)](
                *tensors, *outputs, *numbers,
                GREEDY=greedy, PART_SIZE=drawing.PART, PARTS=drawing.room(num_parts), num_warps=drawing.NUM_WARPS,
            )  # fmt: skip
    return ids, logprobs


def _choose(tensors, block_peaks, outputs, numbers, top_k, top_p) -> None:
    """Launch the kernels that follow `summarise`; `tensors`, `outputs` and `numbers` are those of `draw`."""
    logits, _, peaks, sums = tensors
    (num_rows, num_parts, blocks), device, part = block_peaks.shape, logits.device, {"PART_SIZE": drawing.PART}
    vocabulary, _, scale, _ = numbers
    tops = torch.empty(num_rows, dtype=torch.float32, device=device)
    cuts = torch.empty(num_rows, dtype=torch.int32, device=device)
    counts = torch.empty(num_rows, num_parts, dtype=torch.int32, device=device)
    weights = torch.empty(num_rows, num_parts, drawing.PART, dtype=torch.float32, device=device)
    counted, options = top_k > 0, configuration(num_parts)
    bound[(num_rows,)](
        peaks, sums, block_peaks, tops, cuts, vocabulary, num_parts, scale, top_k, top_p, 1 - top_p,
        COUNTED=counted, PARTS=options["PARTS"], BLOCKS=blocks, num_warps=drawing.NUM_WARPS,
    )  # fmt: skip
    collect[(num_rows, num_parts)](
        logits, peaks, tops, cuts, weights, counts, vocabulary, scale, **part, num_warps=drawing.NUM_WARPS
    )
    choose[(num_rows,)](
        *tensors, cuts, weights, counts, *outputs, *numbers, top_k, top_p,
        COUNTED=counted, WEIGHTED=top_p < 1, **part, **options, num_warps=drawing.NUM_WARPS,
    )  # fmt: skip


def configuration(num_parts: int) -> dict[str, int]:
    """-> meta-parameters of `choose`: room for parts, and how many weights of each it processes at a time."""
    parts = drawing.room(num_parts)
    return {"PARTS": parts, "WIDTH": max(1, min(drawing.PART, AT_ONCE // parts))}


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16."""
    part = {"PART_SIZE": drawing.PART}
    cases = [drawing.case("collect", collect, part)]
    for vocabulary in drawing.VOCABULARIES:
        sizes = configuration(triton.cdiv(vocabulary, drawing.PART))
        for counted, weighted in ((True, False), (False, True), (True, True)):
            name = f"{vocabulary}" + ("_top_k" if counted else "") + ("_top_p" if weighted else "")
            constants = {"COUNTED": counted, "WEIGHTED": weighted, **part, **sizes}
            cases.append(drawing.case(f"choose_{name}", choose, constants, vocabulary))
            if not (counted and weighted):
                constants = {"COUNTED": counted, "PARTS": sizes["PARTS"], "BLOCKS": drawing.PART // drawing.BLOCK}
                cases.append(drawing.case(f"bound_{name}", bound, constants, vocabulary))
    return cases
