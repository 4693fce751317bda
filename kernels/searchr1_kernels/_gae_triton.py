"""The scan of `gae` on a GPU: tiles of each sequence in parallel, then what comes in from the tiles to their right.

Let X be what a token adds to the advantage of the unmasked token before it: gamma * V_next + gamma * lam * A_next, and
the rewards of masked tokens in between. Right to left, every token maps X to X:

    unmasked    X <- gamma * V + gamma * lam * (r - V + X)         its advantage is r - V + X
    masked      X <- r + X
    past the end of a sequence    X <- 0

Maps x -> a * x + b compose to such maps, associatively: one scan, with nothing to compact and no wait for the host.

Tiles are counted from the end of their sequence, so a sequence's result does not depend on the others in the batch.
Tile `cu_seqlens[s] // B + s + c` is the c-th of sequence s: so many are always enough, and some stay empty.

Shape legend: N tokens, S sequences, T tiles of B tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

TILE = 1024
NUM_WARPS = 8
_TILES_AT_ONCE = 256


@triton.jit
def _compose(a1, b1, a2, b2):
    """First the map 1, then the map 2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _place(cu_seqlens, num_sequences, search_steps, B: tl.constexpr):
    """-> first token, end and number c of this program's tile; the tile is empty where end - c * B <= first token."""
    tile = tl.program_id(0)
    low, high = 0, num_sequences
    for _ in range(search_steps):  # the last sequence whose tiles begin here or before
        middle = (low + high) // 2
        before = (tl.load(cu_seqlens + middle) // B).to(tl.int32) + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    begin = tl.load(cu_seqlens + low).to(tl.int64)
    end = tl.load(cu_seqlens + low + 1).to(tl.int64)
    return begin, end, tile - (begin // B).to(tl.int32) - low


@triton.jit
def _scan(
    rewards, values, mask, begin, last, end, gamma, gamma_rest, decay, decay_rest,
    B: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """-> tokens [B] from `last` down, and the maps that give the X each of them gets, of the X that `last` gets."""
    gamma = tl.zeros((B,), tl.float64) + gamma + gamma_rest
    decay = tl.zeros((B,), tl.float64) + decay + decay_rest
    token = last - tl.arange(0, B)
    following = token + 1
    known = (token >= begin) & (following < end)
    reward = tl.load(rewards + following, mask=known, other=0.0).to(tl.float64)
    value = tl.load(values + following, mask=known, other=0.0).to(tl.float64)
    a = decay
    b = gamma * value + decay * (reward - value)
    if MASKED:
        kept = tl.load(mask + following, mask=known, other=1) != 0
        a = tl.where(kept, a, 1.0)
        b = tl.where(kept, b, reward)
    a = tl.where(following < end, a, 0.0)
    b = tl.where(following < end, b, 0.0)
    a = tl.where(token >= begin, a, 1.0)
    b = tl.where(token >= begin, b, 0.0)
    a, b = tl.associative_scan((a, b), 0, _compose)
    return token, a, b


@triton.jit
def _last(a, B: tl.constexpr):
    """The last element."""
    return tl.sum(tl.where(tl.arange(0, B) == B - 1, a, 0.0), 0)


@triton.jit
def _write(rewards, values, mask, advantages, returns, token, begin, x, MASKED: tl.constexpr):
    inside = token >= begin
    reward = tl.load(rewards + token, mask=inside, other=0.0).to(tl.float64)
    value = tl.load(values + token, mask=inside, other=0.0).to(tl.float64)
    advantage = reward - value + x
    total = advantage + value
    if MASKED:
        kept = tl.load(mask + token, mask=inside, other=0) != 0
        advantage = tl.where(kept, advantage, 0.0)
        total = tl.where(kept, total, 0.0)
    tl.store(advantages + token, advantage.to(advantages.dtype.element_ty), mask=inside)
    tl.store(returns + token, total.to(returns.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_sequences", "search_steps"])
def scan_tiles(
    rewards,  # [N]
    values,  # [N]
    mask,  # [N] uint8, read if MASKED
    cu_seqlens,  # [S+1]
    advantages,  # [N]
    returns,  # [N]
    slopes,  # [T] fp64
    shifts,  # [T] fp64
    gamma,
    gamma_rest,  # of gamma's fp64 value
    decay,  # gamma * lam
    decay_rest,
    num_sequences,
    search_steps,
    B: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Advantages and returns of every sequence's last tile, to which nothing comes in; the map of every whole tile."""
    begin, end, number = _place(cu_seqlens, num_sequences, search_steps, B)
    last = end - 1 - number.to(tl.int64) * B
    if last >= begin:
        token, a, b = _scan(rewards, values, mask, begin, last, end, gamma, gamma_rest, decay, decay_rest, B, MASKED)
        tl.store(slopes + tl.program_id(0), _last(a, B))
        tl.store(shifts + tl.program_id(0), _last(b, B))
        if number == 0:
            _write(rewards, values, mask, advantages, returns, token, begin, b, MASKED)


@triton.jit(do_not_specialize=["num_sequences", "search_steps"])
def apply_carries(
    rewards, values, mask, cu_seqlens, advantages, returns, slopes, shifts,
    gamma, gamma_rest, decay, decay_rest, num_sequences, search_steps,
    B: tl.constexpr, MASKED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Advantages and returns of all other tiles."""
    begin, end, number = _place(cu_seqlens, num_sequences, search_steps, B)
    last = end - 1 - number.to(tl.int64) * B
    if (last >= begin) & (number > 0):
        first = tl.program_id(0) - number
        carry = tl.sum(tl.zeros((AT_ONCE,), tl.float64), 0)
        for done in range(0, number, AT_ONCE):
            tile = done + tl.arange(0, AT_ONCE)
            a = tl.load(slopes + first + tile, mask=tile < number, other=1.0)
            b = tl.load(shifts + first + tile, mask=tile < number, other=0.0)
            a, b = tl.associative_scan((a, b), 0, _compose)
            carry = _last(a, AT_ONCE) * carry + _last(b, AT_ONCE)
        token, a, b = _scan(rewards, values, mask, begin, last, end, gamma, gamma_rest, decay, decay_rest, B, MASKED)
        _write(rewards, values, mask, advantages, returns, token, begin, b + a * carry, MASKED)


def scan(rewards, values, cu_seqlens, gamma, decay, mask, advantages, returns) -> None:
    """Fills advantages and returns [N]; all contiguous, on one device, N and S above 0; mask [N] bool or None."""
    num_sequences = cu_seqlens.shape[0] - 1
    num_tiles = rewards.shape[0] // TILE + num_sequences
    slopes, shifts = torch.empty(2, num_tiles, dtype=torch.float64, device=rewards.device).unbind()
    arguments = (
        rewards, values, rewards if mask is None else mask.view(torch.uint8), cu_seqlens, advantages, returns,
        slopes, shifts, *_split(gamma), *_split(decay), num_sequences, num_sequences.bit_length(),
    )  # fmt: skip
    options = {"B": TILE, "MASKED": mask is not None, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(rewards):
        scan_tiles[(num_tiles,)](*arguments, **options)
        apply_carries[(num_tiles,)](*arguments, **options, AT_ONCE=_TILES_AT_ONCE)


def _split(number: float) -> tuple[float, float]:
    """Two fp32 numbers whose sum is an fp64 one, to 2^-48: a launch rounds what it is given to fp32."""
    high = float(np.float32(number))
    return high, number - high


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16."""
    pointers = {"rewards": "*fp32", "values": "*fp32", "mask": "*u8", "cu_seqlens": "*i32"}
    pointers |= {"advantages": "*fp32", "returns": "*fp32", "slopes": "*fp64", "shifts": "*fp64"}
    numbers = dict.fromkeys(("gamma", "gamma_rest", "decay", "decay_rest"), "fp32")
    numbers |= {"num_sequences": "i32", "search_steps": "i32"}
    signature, constants, divisible = pointers | numbers, {"B": TILE, "MASKED": True}, set(pointers)
    return [
        ("gae_scan_tiles", scan_tiles, signature, constants, NUM_WARPS, 3, divisible),
        ("gae_apply_carries", apply_carries, signature, constants | {"AT_ONCE": _TILES_AT_ONCE}, NUM_WARPS, 3,
         divisible),
    ]  # fmt: skip
