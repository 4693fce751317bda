"""Generalised advantage estimation over packed sequences: a reverse scan, one segment per sequence.

    delta_t = r_t + gamma * V_next - V_t        A_t = delta_t + gamma * lam * A_next        return_t = A_t + V_t

"next" is the next unmasked token of the same sequence; after the last one V and A are 0. A reward on a masked token
belongs to the unmasked token before it, so an environment's tokens can carry one without taking part in the recursion.

CPU: one compiled pass, right to left, with the sequences shared out over torch's threads (`_gae_llvm`). CUDA:
sequences, or tiles of long ones, in parallel (`_gae_triton`). Elsewhere: a scan by doubling, log2(N) passes of torch
operators. All of them carry fp64, and none waits for its device. Left out: bootstrapping a value past a sequence's end,
which a finished trajectory never needs.

Shape legend: N tokens of all sequences, S sequences.
"""

from __future__ import annotations

import functools
import numbers
from typing import Any

import numpy as np
import torch

from searchr1_kernels import _gae_llvm, checks
from searchr1_kernels._installed import has_triton
from searchr1_kernels._threads import num_parts, run_parts
from searchr1_kernels.registration import register

# Tokens that make waking a thread worthwhile.
_PART_TOKENS = 1 << 16
_OFFSETS = (torch.int32, torch.int64)
_PRECISE = (torch.float32, torch.float64)


def gae(
    rewards: torch.Tensor,  # [N]
    values: torch.Tensor,  # [N]
    cu_seqlens: torch.Tensor,  # [S+1] int32 or int64
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    mask: torch.Tensor | None = None,  # [N] bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> advantages, returns, both [N] fp32 (fp64 for fp64 values), constants to autograd.

    Generalised advantage estimation (Schulman et al., 2016, equation 16), truncated at each sequence's end. Masked
    tokens get 0 in both; a reward before the first unmasked token of its sequence is dropped. A sequence's outputs have
    the same bits alone and in any batch. Raises ValueError where a shape, type, device or number is not as above; the
    values of the offsets are read on a CPU only.
    """
    # Made one after the other, as in `_check`, these checks take a fifth of a call on a GPU.
    fits = isinstance(rewards, torch.Tensor) and isinstance(values, torch.Tensor)
    fits = fits and isinstance(cu_seqlens, torch.Tensor) and (mask is None or isinstance(mask, torch.Tensor))
    fits = fits and rewards.dim() == cu_seqlens.dim() == 1 and rewards.shape == values.shape and cu_seqlens.shape[0] > 0
    fits = fits and rewards.is_floating_point() and values.is_floating_point() and cu_seqlens.dtype in _OFFSETS
    fits = fits and rewards.device == values.device == cu_seqlens.device
    fits = fits and isinstance(gamma, numbers.Real) and isinstance(lam, numbers.Real)
    fits = fits and 0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0
    if fits and mask is not None:
        fits = mask.shape == rewards.shape and mask.dtype == torch.bool and mask.device == rewards.device
    if not fits:
        _check(rewards, values, cu_seqlens, gamma, lam, mask)
    if rewards.requires_grad or values.requires_grad:
        rewards, values = rewards.detach(), values.detach()
    return _OPERATOR(rewards, values, cu_seqlens, gamma, lam, mask).unbind()


def _check(rewards, values, cu_seqlens, gamma, lam, mask) -> None:
    """Raise ValueError for the argument of `gae` that does not fit; one is known not to."""
    checks.check_shape("rewards", rewards, ("N",))
    checks.check_shape("values", values, (rewards.shape[0],))
    checks.check_floating("rewards", rewards)
    checks.check_floating("values", values)
    checks.check_device("values", values, "rewards", rewards)
    checks.check_cu_seqlens(cu_seqlens, "rewards", rewards)
    checks.check_mask(mask, "rewards", rewards)
    for name, value in (("gamma", gamma), ("lam", lam)):
        checks.check_number(name, value)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    raise AssertionError("one of these was meant to speak")


def _gae(rewards, values, cu_seqlens, gamma, lam, mask):
    """-> advantages and returns in one tensor, [2,N]: two outputs of an operator may not share memory."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if rewards.is_cuda and has_triton():
        return _scan_triton(rewards, values, cu_seqlens, gamma, lam, mask, dtype)
    if rewards.device.type == "cpu":
        return _scan_cpu(rewards, values, cu_seqlens, gamma, lam, mask, dtype)
    return torch.stack(_scan_torch(rewards, values, cu_seqlens, gamma, lam, mask, dtype))


def _fake(rewards, values, cu_seqlens, gamma, lam, mask):
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.new_empty((2, values.shape[0]), dtype=dtype)


_OPERATOR = register(
    "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, float gamma, float lam, Tensor? mask) -> Tensor",
    _gae,
    _fake,
)


def _scan_cpu(rewards, values, cu_seqlens, gamma, lam, mask, dtype):
    """-> [2,N]; inputs as in `gae`."""
    numpy_dtype = np.float64 if dtype == torch.float64 else np.float32
    # numpy allocates 4 MiB and more in huge pages; page faults of torch's memory would take as long as the scan.
    outputs = np.empty((2, rewards.shape[0]), numpy_dtype)
    mask = torch.ones(rewards.shape[0], dtype=torch.bool) if mask is None else mask
    # Each keeps its own type: fp64 rewards are not rounded to the fp32 of the values.
    precise = (x if x.dtype in _PRECISE else x.float() for x in (rewards, values))
    arrays = [x.contiguous().numpy() for x in (*precise, mask)]
    arrays[2] = arrays[2].view(np.uint8)
    # A scan of 1 M tokens leaves nothing else in the caches: after one, what a call did around it in torch and numpy
    # took 0.4 ms, by itself 0.08 (one thread of an Intel Xeon, 2026-11-27).
    total = rewards.shape[0]
    offsets, cuts = _gae_llvm.cut(cu_seqlens.contiguous().numpy(), total, num_parts(total, _PART_TOKENS))
    if len(cuts) == 0:
        checks.check_offsets("cu_seqlens", cu_seqlens, total)  # says what is wrong
    arguments = (*arrays, offsets, float(gamma), float(gamma * lam), *outputs)
    run_parts(lambda turns: _gae_llvm.scan(turns, cuts, *arguments), len(cuts) - 1)
    return torch.from_numpy(outputs)


def _scan_triton(rewards, values, cu_seqlens, gamma, lam, mask, dtype):
    """-> [2,N]; inputs as in `gae`."""
    num_tokens = values.numel()  # in half the time that `shape` takes
    outputs = values.new_empty((2, num_tokens), dtype=dtype)
    if num_tokens > 0 and cu_seqlens.numel() > 1:
        mask = None if mask is None else mask.contiguous()
        inputs = (rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous())
        _triton().scan(*inputs, gamma, gamma * lam, mask, outputs)
    return outputs


@functools.cache
def _triton() -> Any:
    """-> the module `_gae_triton`. An import statement in a function takes longer than the whole call may."""
    from searchr1_kernels import _gae_triton

    return _gae_triton


def _scan_torch(rewards, values, cu_seqlens, gamma, lam, mask, dtype):
    """As `gae`, by composing the maps x -> slope * x + shift of `_gae_triton` over spans that double."""
    rewards, values, decay = rewards.double(), values.double(), gamma * lam
    if values.shape[0] == 0:
        return values.to(dtype), values.to(dtype)
    slope = torch.full_like(values, decay)
    shift = gamma * values + decay * (rewards - values)
    if mask is not None:
        slope, shift = torch.where(mask, slope, 1.0), torch.where(mask, shift, rewards)
    ends = torch.zeros(values.shape[0] + 1, dtype=torch.bool, device=values.device)
    ends[cu_seqlens.long()] = True
    # A token gets what the maps from the next token on make of 0; past its sequence's end, it gets 0.
    slope, shift = (tensor.roll(-1).masked_fill(ends[1:], 0.0) for tensor in (slope, shift))
    span = 1
    while span < values.shape[0]:
        shift[:-span] += slope[:-span] * shift[span:]
        slope = torch.cat([slope[:-span] * slope[span:], torch.zeros_like(slope[-span:])])
        span *= 2
    advantages = rewards - values + shift
    returns = advantages + values
    if mask is not None:
        advantages, returns = advantages.masked_fill(~mask, 0.0), returns.masked_fill(~mask, 0.0)
    return advantages.to(dtype), returns.to(dtype)
