"""Sampling of tokens on a GPU where every token may be drawn; `_sampling_triton` has the rest, and launches both.

The vocabulary is cut into parts of `PART` tokens, one program each, so that a few rows are enough to fill a GPU.

    summarise    every part's largest logit and sum of exponentials: the only pass over all logits
    draw         a program per row: the part that the uniform falls into, by the parts' sums; then the token, by sums
                 within the part

A token's weight is exp((logit - the row's largest) / temperature), at most 1. It is recomputed wherever it is needed,
and compared with itself as computed elsewhere. It has the same bits everywhere: a difference and products, which no
compiler fuses.

How a row is cut depends on the vocabulary alone, and sums have a fixed order, so a row has the same bits alone and in
any batch.

Shape legend
    S  rows    V  vocabulary    P  parts of a row
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

PART = 4096  # tokens
BLOCK = 64  # tokens whose largest logit is kept, to bound what top-k and top-p leave
NUM_WARPS = 8
VOCABULARIES = (500, 50_257, 151_936, 1_000_000)  # of `compile_cases`
# A program loads one number of it: where a step's begin, after other numbers of 8 bytes, must not choose the kernel.
ANYWHERE = ["uniforms"]


@triton.jit
def weigh(logit, peak, scale):
    """-> the weight of a logit. scale: log2(e) / temperature."""
    return tl.exp2((logit - peak) * scale)


@triton.jit
def bits_of(weight):
    """-> the weight's bits as int32, ordered like the weights."""
    return weight.to(tl.int32, bitcast=True)


@triton.jit
def total_of(values):
    """-> the sum of a matrix."""
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def load_parts(peaks, sums, row, num_parts, scale, PARTS: tl.constexpr):
    """-> the row's largest logit; each part's largest; each part's sum of weights, 0 only if its peak's weight is 0."""
    part = tl.arange(0, PARTS)
    known = part < num_parts
    peak = tl.load(peaks + row * num_parts + part, mask=known, other=float("-inf"))
    sum_ = tl.load(sums + row * num_parts + part, mask=known, other=0.0)
    highest = tl.max(peak, 0)
    return highest, peak, sum_ * weigh(peak, highest, scale)


@triton.jit
def _first(hit, index, SIZE: tl.constexpr):
    """-> the index of the first hit; 0 where there is none (NaN)."""
    first = tl.min(tl.where(hit, index, SIZE), 0)
    return tl.where(first < SIZE, first, 0)


@triton.jit
def _first_above(weight, fraction, index, SIZE: tl.constexpr):
    """-> the first place of positive weight at which the running sum exceeds `fraction` of the total; 0 for NaN.

    In fp64: the sums of a parallel scan rise from place to place only up to rounding, and a token of next to no weight
    would be drawn as often as that is off."""
    sums = tl.cumsum(weight.to(tl.float64), 0)
    total = tl.max(tl.where(weight > 0, sums, 0.0), 0)
    return _first((weight > 0) & ((sums > fraction * total) | (sums >= total)), index, SIZE)


@triton.jit
def draw_token(
    logits, uniform, peak, highest, mass, least, scale, vocabulary,
    CUT: tl.constexpr, GREEDY: tl.constexpr, PART_SIZE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """-> the token and its logit. logits: the row's; peak, mass [P]: its parts'; least: bits, read if CUT."""
    parts = tl.arange(0, PARTS)
    place = tl.arange(0, PART_SIZE)
    part = _first(peak == highest, parts, PARTS) if GREEDY else _first_above(mass, uniform, parts, PARTS)
    token = part * PART_SIZE + place
    logit = tl.load(logits + token, mask=token < vocabulary, other=float("-inf"))
    if GREEDY:
        place = _first((logit == highest) & (token < vocabulary), place, PART_SIZE)
    else:
        exact = mass.to(tl.float64)
        before = tl.sum(tl.where(parts < part, exact, 0.0), 0)
        rest = uniform * tl.sum(exact, 0) - before
        weight = weigh(logit, highest, scale)
        if CUT:
            weight = tl.where(bits_of(weight) >= least, weight, 0.0)
        # As a fraction: the part's sum is rounded, and the difference would fall to its last token.
        place = _first_above(weight, rest / tl.sum(tl.where(parts == part, exact, 0.0), 0), place, PART_SIZE)
    token = part * PART_SIZE + place
    return token, tl.load(logits + token)


@triton.jit
def write_row(ids, logprobs, row, token, logit, highest, total, inverse):
    """Write a row's token and log-probability. total: of all weights, fp64, including those left out; inverse:
    1 / temperature."""
    tl.store(ids + row, token.to(tl.int64))
    tl.store(logprobs + row, ((logit - highest) * inverse - tl.log(total)).to(tl.float32))


@triton.jit
def summarise(
    logits,  # [S, V]
    peaks,  # [S, P]
    sums,  # [S, P]
    block_peaks,  # [S, P, BLOCKS], written if BOUNDED
    vocabulary,  # V
    scale,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Compute a part's largest logit, and its sum of exponentials of the logits' differences to that."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    block = tl.arange(0, BLOCKS)
    token = (part * BLOCKS + block)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    logit = tl.load(logits + row * vocabulary + token, mask=token < vocabulary, other=float("-inf"))
    block_peak = tl.max(logit, 1)
    peak = tl.max(block_peak, 0)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    entry = row * tl.num_programs(1) + part
    tl.store(peaks + entry, peak)
    tl.store(sums + entry, total_of(weigh(logit, finite, scale)))
    if BOUNDED:
        tl.store(block_peaks + entry * BLOCKS + block, block_peak)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def draw(
    logits,  # [S, V]
    uniforms,  # [S]
    peaks,  # [S, P]
    sums,  # [S, P]
    ids,  # [S] int64
    logprobs,  # [S]
    vocabulary,  # V
    num_parts,  # P
    scale,
    inverse,
    GREEDY: tl.constexpr,
    PART_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Draw a row's token from the whole vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    highest, peak, mass = load_parts(peaks, sums, row, num_parts, scale, PARTS)
    total = tl.sum(mass.to(tl.float64), 0)
    uniform = tl.load(uniforms + row).to(tl.float64)
    logits += row * vocabulary
    token, logit = draw_token(
        logits, uniform, peak, highest, mass, 0, scale, vocabulary, False, GREEDY, PART_SIZE, PARTS
    )  # fmt: skip
    write_row(ids, logprobs, row, token, logit, highest, total, inverse)


def room(num_parts: int) -> int:
    """-> the number of parts that a row's program has room for."""
    return triton.next_power_of_2(num_parts)


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16."""
    blocks = {"BLOCKS": PART // BLOCK, "BLOCK_SIZE": BLOCK}
    cases = [
        case(f"summarise{'_bounded' if bounded else ''}", summarise, blocks | {"BOUNDED": bounded})
        for bounded in (False, True)
    ]
    for vocabulary in VOCABULARIES:
        for greedy in (False, True):
            constants = {"GREEDY": greedy, "PART_SIZE": PART, "PARTS": room(triton.cdiv(vocabulary, PART))}
            cases.append(case(f"draw_{vocabulary}{'_greedy' if greedy else ''}", draw, constants, vocabulary))
    return cases


_TYPES = (
    dict.fromkeys(("logits", "peaks", "sums", "block_peaks", "tops", "weights", "logprobs"), "*fp32")
    | {"uniforms": "*fp64", "ids": "*i64", "cuts": "*i32", "counts": "*i32"}
    | dict.fromkeys(("vocabulary", "num_parts", "top_k"), "i32")
    | dict.fromkeys(("scale", "inverse", "top_p", "top_p_rest"), "fp32")
)


def case(name: str, kernel: Any, constants: dict[str, Any], vocabulary: int = 0) -> tuple:
    """-> one of `compile_cases`, for a vocabulary that 16 divides or not."""
    signature = {argument: _TYPES[argument] for argument in kernel.arg_names if argument not in constants}
    divided = {argument for argument, kind in signature.items() if kind.startswith("*")} - {*ANYWHERE}
    if vocabulary % 16 == 0:
        divided.add("vocabulary")
    return f"sample_tokens_{name}", kernel, signature, constants, NUM_WARPS, 3, divided
