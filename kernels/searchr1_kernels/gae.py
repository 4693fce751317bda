"""Generalised advantage estimation over packed sequences: a reverse scan, one segment per sequence.

    delta_t = r_t + gamma * V_next - V_t        A_t = delta_t + gamma * lam * A_next        return_t = A_t + V_t

"next" is the next unmasked token of the same sequence; after the last one V and A are 0. A reward on a masked token
belongs to the unmasked token before it, so an environment's tokens can carry one without taking part in the recursion.

CPU: one compiled pass, right to left. Other devices: compaction, then a scan by doubling, log2(N) passes on the device.
Both carry fp64. Left out: bootstrapping a value past a sequence's end, which a finished trajectory never needs.

Shape legend: N tokens of all sequences, S sequences, M unmasked tokens.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from searchr1_kernels import checks


@torch.no_grad()
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

    Masked tokens get 0 in both; a reward before the first unmasked token of its sequence is dropped.
    """
    checks.check_shape("rewards", rewards, ("N",))
    checks.check_shape("values", values, (rewards.shape[0],))
    checks.check_floating("rewards", rewards)
    checks.check_floating("values", values)
    checks.check_cu_seqlens(cu_seqlens, rewards.shape[0])
    checks.check_device("values", values, "rewards", rewards)
    checks.check_device("cu_seqlens", cu_seqlens, "rewards", rewards)
    checks.check_mask(mask, "rewards", rewards)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if rewards.device.type == "cpu":
        return _scan_cpu(rewards, values, cu_seqlens, gamma, lam, mask, dtype)
    return _scan_torch(rewards, values, cu_seqlens, gamma, lam, mask, dtype)


def _scan_cpu(rewards, values, cu_seqlens, gamma, lam, mask, dtype):
    """Shapes as `gae`."""
    advantages, returns = (torch.empty(rewards.shape[0], dtype=dtype) for _ in range(2))
    mask = torch.ones(rewards.shape[0], dtype=torch.bool) if mask is None else mask
    inputs = (rewards.to(dtype), values.to(dtype), mask, cu_seqlens.long())
    arrays = (tensor.detach().contiguous().numpy() for tensor in inputs)
    _reverse_scan(*arrays, float(gamma), float(gamma * lam), advantages.numpy(), returns.numpy())
    return advantages, returns


@numba.njit(cache=True, nogil=True)
def _reverse_scan(rewards, values, mask, cu_seqlens, gamma, decay, advantages, returns):
    """Arrays [N], cu_seqlens [S+1]; fills advantages and returns."""
    for sequence in range(cu_seqlens.shape[0] - 1):
        next_value = np.float64(0.0)
        advantage = np.float64(0.0)
        waiting = np.float64(0.0)  # rewards of masked tokens on their way to the unmasked token before them
        for t in range(cu_seqlens[sequence + 1] - 1, cu_seqlens[sequence] - 1, -1):
            if not mask[t]:
                waiting += rewards[t]
                advantages[t] = 0.0
                returns[t] = 0.0
                continue
            value = np.float64(values[t])
            advantage = rewards[t] + waiting + gamma * next_value - value + decay * advantage
            advantages[t] = advantage
            returns[t] = advantage + value
            next_value = value
            waiting = 0.0


def _scan_torch(rewards, values, cu_seqlens, gamma, lam, mask, dtype):
    """Shapes as `gae`; waits for the device only where a mask is given."""
    rewards, values, cu_seqlens = rewards.double(), values.double(), cu_seqlens.long()
    if mask is None:
        advantages, returns = _scan_unmasked(rewards, values, cu_seqlens, gamma, lam)
        return advantages.to(dtype), returns.to(dtype)
    kept = mask.nonzero().squeeze(1)  # [M]
    seen = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.cumsum(0)])  # [N+1]: unmasked tokens before each place
    kept_cu_seqlens = seen[cu_seqlens]  # [S+1]
    owner = seen[1:] - 1  # [N]: the unmasked token at or before each token
    owned = owner >= kept_cu_seqlens[_sequence_of(cu_seqlens, rewards.shape[0])]  # in the same sequence
    kept_rewards = torch.zeros_like(values[kept]).index_add_(0, owner[owned], rewards[owned])
    outputs = _scan_unmasked(kept_rewards, values[kept], kept_cu_seqlens, gamma, lam)
    advantages, returns = (torch.zeros_like(values).index_copy_(0, kept, output) for output in outputs)
    return advantages.to(dtype), returns.to(dtype)


def _scan_unmasked(rewards, values, cu_seqlens, gamma, lam):
    """[M] fp64 each -> advantages, returns. Composes the maps A -> delta_t + decay_t * A over spans that double."""
    total = values.shape[0]
    if total == 0:
        return values, values
    sequence = _sequence_of(cu_seqlens, total)
    continues = torch.zeros_like(values)  # 1 where the next token is of the same sequence
    continues[:-1] = (sequence[1:] == sequence[:-1]).to(values.dtype)
    decay = continues * (gamma * lam)
    advantages = rewards + gamma * continues * values.roll(-1) - values
    span = 1
    while span < total:
        advantages[:-span] += decay[:-span] * advantages[span:]
        decay = torch.cat([decay[:-span] * decay[span:], torch.zeros_like(decay[-span:])])
        span *= 2
    return advantages, advantages + values


def _sequence_of(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """[total] int64: the sequence of each token; sequences may be empty."""
    places = torch.arange(total, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
