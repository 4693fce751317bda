"""From rewards to advantages.

GRPO needs one number per trajectory, before packing. PPO needs the critic's values of every policy token, which come
from packed forward passes, so its advantages are put into batches that are already packed:

    pack(trajectories, [0.0] * N, budget)  ->  values [P], reference log-probs [P]
        ->  token_rewards(batch, outcomes)  ->  ppo_advantages(batches, rewards, values)  ->  batches, returns

Observations take no part in GAE, whitening or the critic: a packed batch's [P] tensors hold policy tokens only.

Shape legend: N trajectories, P policy tokens of a batch, S its sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from searchr1_kernels import gae, group_advantages, masked_kl, masked_moments, masked_whiten
from searchr1_kernels.masked_kl import KLKind

from searchr1_fast.types import PackedBatch


def grpo_advantages(
    rewards: Sequence[float] | np.ndarray,  # [N]
    groups: Sequence[int] | np.ndarray,  # [N]
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """-> advantages [N] fp32, keep [N] bool. keep is False where a group's rewards are all equal (a lone sample
    included): nothing can be learnt from it, and its advantage is 0."""
    rewards = np.asarray(rewards, dtype=np.float64)
    groups = np.asarray(groups, dtype=np.int64)
    if not np.isfinite(rewards).all():
        place = int(np.flatnonzero(~np.isfinite(rewards))[0])
        raise ValueError(f"rewards: the reward of trajectory {place} is {rewards[place]}; a reward must be finite")
    advantages, keep = group_advantages(
        torch.from_numpy(rewards), torch.from_numpy(groups), normalize_std=normalize_std, eps=eps
    )
    return advantages.numpy(), keep.numpy()


def token_rewards(
    batch: PackedBatch,
    outcomes: torch.Tensor,  # [S] of each sequence of the batch
    *,
    ref_logprobs: torch.Tensor | None = None,  # [P]
    kl_coefficient: float = 0.0,
    kl_kind: KLKind = "k1",
) -> torch.Tensor:
    """-> [P] fp32: the outcome on the last policy token of each sequence, and on every policy token
    `- kl_coefficient * KL(sampler || reference)`, which with k1 is the paper's `logprob - ref_logprob`.

    The outcome of a sequence without policy tokens is dropped. A token that nobody sampled (NaN in `rollout_logprobs`)
    bears no KL.
    """
    rewards = torch.zeros_like(batch.rollout_logprobs)
    if ref_logprobs is not None and kl_coefficient > 0:
        sampled = ~batch.rollout_logprobs.isnan()
        rewards = -kl_coefficient * masked_kl(batch.rollout_logprobs, ref_logprobs, kl_kind, mask=sampled)
    if batch.num_policy_tokens == 0:
        return rewards
    speaks = batch.policy_cu_seqlens.diff() > 0  # [S]
    last = (batch.policy_cu_seqlens[1:].long() - 1).clamp(min=0)  # [S]
    return rewards.index_add(0, last, outcomes.to(rewards) * speaks)


@torch.no_grad()
def ppo_advantages(
    batches: Sequence[PackedBatch],
    rewards: Sequence[torch.Tensor],  # [P] of each batch, from `token_rewards`
    values: Sequence[torch.Tensor],  # [P] of each batch
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten: bool = True,
    all_reduce: Callable[[torch.Tensor], None] | None = None,
) -> tuple[list[PackedBatch], list[torch.Tensor]]:
    """-> the batches with their advantages, and the returns, [P] fp32 each and never whitened.

    Pass all batches of the step: whitening is over all of them and, with `all_reduce` (sums a tensor over ranks in
    place), over all ranks. How the step is split into batches changes nothing.
    """
    estimates = [
        gae(reward, value, batch.policy_cu_seqlens, gamma=gamma, lam=lam)
        for batch, reward, value in zip(batches, rewards, values, strict=True)
    ]
    advantages = [advantage for advantage, _ in estimates]
    if whiten:
        advantages = whiten_step(advantages, all_reduce)
    packed = [dataclasses.replace(b, advantages=a) for b, a in zip(batches, advantages, strict=True)]
    return packed, [returns for _, returns in estimates]


def whiten_step(
    advantages: Sequence[torch.Tensor],  # [P] of each batch
    all_reduce: Callable[[torch.Tensor], None] | None = None,
) -> list[torch.Tensor]:
    """Zero mean and unit variance over all batches together (and all ranks: a rank without batches must still call)."""
    device = advantages[0].device if advantages else "cpu"
    moments = torch.zeros(3, dtype=torch.float64, device=device)  # count, sum, sum of squares
    for advantage in advantages:
        moments += masked_moments(advantage)
    if all_reduce is not None:
        all_reduce(moments)
    return [masked_whiten(advantage, moments=moments) for advantage in advantages]
