"""The scan of `gae` on a GPU: tiles of each sequence in parallel, then the carries from the tiles to their right.

Let X be what a token contributes to the advantage of the unmasked token before it: gamma * V_next + gamma * lam *
A_next, and the rewards of masked tokens in between. Right to left, every token maps X to X:

    unmasked    X <- gamma * V + gamma * lam * (r - V + X)         its advantage is r - V + X
    masked      X <- r + X
    past the end of a sequence    X <- 0

Maps x -> a * x + b compose to maps of the same form, associatively: one scan, with nothing to compact and no wait for
the host.

Tiles are counted from the end of their sequence, and carries are passed in that order, so a sequence's result does not
depend on the others in the batch. One program takes a sequence, tile by tile, and loads the next tile while it scans
(`scan_sequences`). Where sequences are so few and long that a GPU would have little to do, every tile gets a program
(`scan_tiles`, `apply_carries`), with the same arithmetic. Tile `cu_seqlens[s] // B + s + c` is then the c-th of
sequence s; N // B + S tiles are always enough, and some stay empty.

Shape legend: N tokens, S sequences, T tiles of B tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

# 4,096 sequences of 244 tokens are one tile each. By registers, a multiprocessor holds 6 programs of `scan_sequences`
# (sm_90, Triton 3.6; 5 with 3.9), and 10 and 12 of the other kernels.
TILE = 512
NUM_WARPS = 4
# Tokens per sequence above which every tile gets a program: one program would scan 16 tiles or more in a row.
_LONG = 16 * TILE
# Maps that `apply_carries` loads together. Past a sequence's own maps it reads others, or the room after the last, and
# uses none of them: with a mask, or with the remainder loaded one by one, every load would wait for the previous one.
_AHEAD = tl.constexpr(8)
# Whether `apply_carries` starts while `scan_tiles` ends, on GPUs that can (sm_90 and later). Not yet measured.
OVERLAP = False
# Whether to remember compiled kernels by the types of their arguments.
LAUNCH_DIRECTLY = True
_kernels: dict[tuple, Any] = {}
_POINTERS = ["rewards", "values", "mask", "cu_seqlens", "outputs", "maps"]
# Nothing is loaded or stored in vectors, so no launch needs to check alignments.
_ANY = {"do_not_specialize_on_alignment": _POINTERS}


@triton.jit
def _compose(a1, b1, a2, b2):
    """-> the map that applies map 1, then map 2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _place(cu_seqlens, num_sequences, search_steps, B: tl.constexpr):
    """-> begin and end of this program's sequence, and the number c of its tile, empty where end - c * B <= begin."""
    tile = tl.program_id(0)
    # Find the last sequence whose tiles begin at this one or before, among `span` from `low` on. B places are probed at
    # a time, so that one or two loads replace one for every bit of their number.
    low, span = 0, num_sequences
    for _ in range(search_steps):
        step = tl.cdiv(span, B)
        place = tl.arange(0, B) * step
        inside = (place < span) & (low + place < num_sequences)
        offset = tl.load(cu_seqlens + low + place, mask=inside, other=0)
        before = inside & ((offset // B).to(tl.int32) + low + place <= tile)
        low += (tl.sum(before.to(tl.int32), 0) - 1) * step
        span = step
    begin = tl.load(cu_seqlens + low).to(tl.int64)
    end = tl.load(cu_seqlens + low + 1).to(tl.int64)
    return begin, end, tile - (begin // B).to(tl.int32) - low


@triton.jit
def _load(rewards, values, mask, begin, last, end, B: tl.constexpr, MASKED: tl.constexpr):
    """-> reward, value and mask [B] of the tokens after each of those from `last` down; 0, 0 and 1 past either end."""
    back = tl.arange(0, B)
    known = (back < _clip(last + 1 - begin, B)) & (back > _clip(last + 1 - end, B))
    reward = tl.load(rewards + (last + 1) - back, mask=known, other=0.0)
    value = tl.load(values + (last + 1) - back, mask=known, other=0.0)
    kept = known  # read if MASKED
    if MASKED:
        kept = tl.load(mask + (last + 1) - back, mask=known, other=1) != 0
    return reward, value, kept


@triton.jit
def _clip(number, B: tl.constexpr):
    """-> a difference of places, in 32 bits: clipped, because beyond a tile all values are equivalent."""
    return tl.maximum(tl.minimum(number, B), -1).to(tl.int32)


@triton.jit
def _scan(
    reward, value, kept, begin, last, end, gamma, gamma_rest, decay, decay_rest,
    B: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What `_load` returns -> maps [B] from the X that `last` receives to the X of each token from `last` down."""
    back = tl.arange(0, B)
    gamma = tl.zeros((B,), tl.float64) + gamma + gamma_rest
    decay = tl.zeros((B,), tl.float64) + decay + decay_rest
    reward, value = reward.to(tl.float64), value.to(tl.float64)
    a = decay
    b = gamma * value + decay * (reward - value)
    if MASKED:
        a = tl.where(kept, a, 1.0)
        b = tl.where(kept, b, reward)
    followed = back > _clip(last + 1 - end, B)
    a = tl.where(followed, a, 0.0)
    b = tl.where(followed, b, 0.0)
    inside = back < _clip(last + 1 - begin, B)
    a = tl.where(inside, a, 1.0)
    b = tl.where(inside, b, 0.0)
    return tl.associative_scan((a, b), 0, _compose)


@triton.jit
def _last(a, B: tl.constexpr):
    """-> the last element."""
    return tl.sum(tl.where(tl.arange(0, B) == B - 1, a, 0.0), 0)


@triton.jit
def _write(
    rewards, values, mask, outputs, num_tokens, begin, last, x, B: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Write advantages and returns of the tokens from `last` down, given the X [B] that each receives."""
    back = tl.arange(0, B)
    inside = back < _clip(last + 1 - begin, B)
    reward = tl.load(rewards + last - back, mask=inside, other=0.0).to(tl.float64)
    value = tl.load(values + last - back, mask=inside, other=0.0).to(tl.float64)
    advantage = reward - value + x
    total = advantage + value
    if MASKED:
        kept = tl.load(mask + last - back, mask=inside, other=0) != 0
        advantage = tl.where(kept, advantage, 0.0)
        total = tl.where(kept, total, 0.0)
    tl.store(outputs + last - back, advantage.to(outputs.dtype.element_ty), mask=inside)
    tl.store(outputs + num_tokens + last - back, total.to(outputs.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"], **_ANY)
def scan_sequences(
    rewards,  # [N]
    values,  # [N]
    mask,  # [N] uint8, read if MASKED
    cu_seqlens,  # [S+1]
    outputs,  # [2, N]: advantages, returns
    num_tokens,
    gamma,
    gamma_rest,  # the remainder of gamma's fp64 value
    decay,  # gamma * lam
    decay_rest,
    B: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Compute advantages and returns of a sequence."""
    sequence = tl.program_id(0)
    # 64-bit offsets where 32 bits are enough would spill 8 bytes without a mask (Triton 3.6).
    begin = tl.load(cu_seqlens + sequence).to(num_tokens.dtype).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(num_tokens.dtype).to(tl.int64)
    reward, value, kept = _load(rewards, values, mask, begin, end - 1, end, B, MASKED)
    carry = tl.full((), 0.0, tl.float64)
    last = end - 1
    for _ in range(tl.cdiv(end - begin, B).to(tl.int32)):
        after = _load(rewards, values, mask, begin, last - B, end, B, MASKED)
        a, b = _scan(
            reward, value, kept, begin, last, end, gamma, gamma_rest, decay, decay_rest, B, MASKED
        )  # fmt: skip
        x = b + a * carry
        _write(rewards, values, mask, outputs, num_tokens, begin, last, x, B, MASKED)
        if last - B >= begin:  # `_last` makes warps wait for each other, and most sequences are one tile
            carry = _last(x, B)
        reward, value, kept = after
        last -= B


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "search_steps"], **_ANY)
def scan_tiles(
    rewards, values, mask, cu_seqlens, outputs,
    maps,  # [2 * T + _AHEAD] fp64: slopes, shifts, room
    num_tokens, gamma, gamma_rest, decay, decay_rest, num_sequences, search_steps,
    B: tl.constexpr, MASKED: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Compute each tile's composed map, and advantages and returns of each sequence's last tile, which has no carry."""
    if OVERLAPS:
        gdc_launch_dependents()  # takes effect once all programs have reached it
    begin, end, number = _place(cu_seqlens, num_sequences, search_steps, B)
    last = end - 1 - number.to(tl.int64) * B
    if last >= begin:
        reward, value, kept = _load(rewards, values, mask, begin, last, end, B, MASKED)
        a, b = _scan(
            reward, value, kept, begin, last, end, gamma, gamma_rest, decay, decay_rest, B, MASKED
        )  # fmt: skip
        tl.store(maps + tl.program_id(0), _last(a, B))
        tl.store(maps + tl.num_programs(0) + tl.program_id(0), _last(b, B))
        if number == 0:
            _write(rewards, values, mask, outputs, num_tokens, begin, last, b, B, MASKED)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "search_steps"], **_ANY)
def apply_carries(
    rewards, values, mask, cu_seqlens, outputs, maps, num_tokens,
    gamma, gamma_rest, decay, decay_rest, num_sequences, search_steps,
    B: tl.constexpr, MASKED: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Compute advantages and returns of all other tiles."""
    begin, end, number = _place(cu_seqlens, num_sequences, search_steps, B)
    last = end - 1 - number.to(tl.int64) * B
    if (last >= begin) & (number > 0):
        maps += tl.program_id(0) - number
        reward, value, kept = _load(rewards, values, mask, begin, last, end, B, MASKED)  # arrives during the loop
        if OVERLAPS:
            gdc_wait()  # for the maps; none is read before
        carry = tl.full((), 0.0, tl.float64)
        for first in range(0, number, _AHEAD):
            slopes, shifts = (), ()
            for done in tl.static_range(_AHEAD):
                slopes += (tl.load(maps + first + done),)
                shifts += (tl.load(maps + tl.num_programs(0) + first + done),)
            for done in tl.static_range(_AHEAD):
                carry = tl.where(first + done < number, shifts[done] + slopes[done] * carry, carry)
        a, b = _scan(
            reward, value, kept, begin, last, end, gamma, gamma_rest, decay, decay_rest, B, MASKED
        )  # fmt: skip
        _write(rewards, values, mask, outputs, num_tokens, begin, last, b + a * carry, B, MASKED)
    else:
        if OVERLAPS:
            gdc_wait()  # or the next launch would wait for this one only, not for `scan_tiles` too


def scan(rewards, values, cu_seqlens, gamma, decay, mask, outputs) -> None:
    """Fill outputs [2, N] with advantages and returns.

    All tensors are contiguous and on one device, N and S above 0; mask [N] bool or None."""
    device = rewards.get_device()  # -1 in the interpreter
    if device >= 0 and device != driver.active.get_current_device():
        with torch.cuda.device(device):
            scan(rewards, values, cu_seqlens, gamma, decay, mask, outputs)
        return
    num_tokens, num_sequences = rewards.numel(), cu_seqlens.numel() - 1
    types = (device, rewards.dtype, values.dtype, mask is None, cu_seqlens.dtype, outputs.dtype, num_tokens >> 31)
    tensors = (rewards, values, rewards if mask is None else mask, cu_seqlens, outputs)
    numbers = (num_tokens, *_split(gamma, decay))
    if num_tokens <= _LONG * num_sequences:
        _launch(scan_sequences, num_sequences, types, tensors, numbers, (TILE, mask is not None))
        return
    num_tiles = num_tokens // TILE + num_sequences
    tensors = (*tensors, torch.empty(2 * num_tiles + _AHEAD.value, dtype=torch.float64, device=rewards.device))
    numbers = (*numbers, num_sequences, _search_steps(num_sequences))
    constants = (TILE, mask is not None, OVERLAP and _can_overlap(device))
    _launch(scan_tiles, num_tiles, types, tensors, numbers, constants)
    _launch(apply_carries, num_tiles, types, tensors, numbers, constants)


@functools.cache
def _can_overlap(device: int) -> bool:
    """Whether the device can overlap launches; False in the interpreter."""
    return device >= 0 and torch.cuda.get_device_capability(device)[0] >= 9


def _search_steps(num_sequences: int) -> int:
    """-> the number of steps in which `_place` finds a sequence."""
    steps = 0
    while num_sequences > 1:
        num_sequences, steps = -(-num_sequences // TILE), steps + 1
    return steps


def _launch(kernel: Any, programs: int, types: tuple, tensors: tuple, numbers: tuple, constants: tuple) -> None:
    """Launch a kernel, from the second call on without Triton's work on the host.

    Triton looks for the kernel that fits the arguments, which their types determine here, and asks CUDA about each
    pointer. Its own launch is used while a profiler has hooks set.

    With checks in one expression and no imports on the way, this takes a call from 18 to 11 us of Python, not counting
    Triton's C and CUDA (one core of an Intel Xeon, 2026-11-27).
    """
    key = (id(kernel), types, constants, NUM_WARPS)  # a kernel hashes its source
    compiled = _kernels.get(key)
    if compiled is None or not LAUNCH_DIRECTLY or _has_hooks():
        tensors = (tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in tensors)
        early = {"launch_pdl": True} if kernel is apply_carries and constants[2] else {}
        # None in the interpreter.
        _kernels[key] = kernel[(programs,)](*tensors, *numbers, *constants, num_warps=NUM_WARPS, **early)
        return
    compiled.run(
        programs, 1, 1, driver.active.get_current_stream(types[0]), compiled.function, compiled.packed_metadata,
        None, None, None, *[tensor.data_ptr() for tensor in tensors], *numbers, *constants,
    )  # fmt: skip


def _has_hooks() -> bool:
    """Whether launch hooks are set: in Triton's list of them, or as a single one in the list's place."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


@functools.lru_cache(maxsize=16)
def _split(*numbers: float) -> tuple[float, ...]:
    """-> for each fp64 number, two fp32 ones that sum to it, to 2^-48: a launch rounds its arguments to fp32."""
    highs = [float(np.float32(number)) for number in numbers]
    return tuple(part for number, high in zip(numbers, highs, strict=True) for part in (high, number - high))


def compile_cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, set[str]]]:
    """What is shipped, for the compile test: name, kernel, signature, constants, warps, stages, and the arguments that
    are multiples of 16, of which there are none."""
    pointers = {"rewards": "*fp32", "values": "*fp32", "mask": "*u8", "cu_seqlens": "*i32", "outputs": "*fp32"}
    numbers = dict.fromkeys(("gamma", "gamma_rest", "decay", "decay_rest"), "fp32") | {"num_tokens": "i32"}
    tiled = pointers | numbers | {"maps": "*fp64", "num_sequences": "i32", "search_steps": "i32"}
    constants = {"B": TILE, "MASKED": True}
    of_tiles = constants | {"OVERLAPS": False}  # sm_80 does not support it
    return [
        ("gae_scan_sequences", scan_sequences, pointers | numbers, constants, NUM_WARPS, 3, set()),
        ("gae_scan_tiles", scan_tiles, tiled, of_tiles, NUM_WARPS, 3, set()),
        ("gae_apply_carries", apply_carries, tiled, of_tiles, NUM_WARPS, 3, set()),
    ]
