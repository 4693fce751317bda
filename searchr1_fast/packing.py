"""Ragged trajectories into packed batches: no padding, every token once, every batch within a token budget.

What is decided here: which sequences share a forward pass, and which tokens are predicted. The loss mask itself was
made where the tokens were born; it is only turned into positions.

Left out: cutting a trajectory that alone is over the budget; it goes alone.

Shape legend: L tokens of a trajectory, T tokens of a batch, S its sequences, P its policy tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from searchr1_fast.types import PackedBatch, Trajectory

# Attention costs as much as everything else in a layer at about 12 * hidden_size tokens; 2048 is a middling size.
_ATTENTION_PARITY_TOKENS = 12 * 2048


def pack(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[np.ndarray | float],  # per trajectory: one number, or [L] aligned with its tokens
    tokens_per_microbatch: int,
    *,
    indices: Sequence[int] | None = None,
    mask_observations: bool = True,
) -> list[PackedBatch]:
    """Pack `trajectories[i]` for i in `indices` (None: all) into as few, and as equal, batches as the budget allows.

    `trajectory_index` of a batch holds these i, ascending. With `mask_observations` off every token after the prompt
    is a policy token; the sampler has no log-probability for what it did not sample, so there `rollout_logprobs` is NaN
    (`losses` reads it as: the same as the trainer's). Deterministic; CPU tensors; nothing chosen, no batches.
    """
    if len(advantages) != len(trajectories):
        raise ValueError(f"pack: got {len(advantages)} advantages for {len(trajectories)} trajectories; give one each")
    chosen = list(range(len(trajectories))) if indices is None else [int(i) for i in indices]
    if len(set(chosen)) != len(chosen) or any(not 0 <= i < len(trajectories) for i in chosen):
        raise ValueError(f"pack: indices must be distinct and from 0 to {len(trajectories) - 1}, got {chosen}")
    return [
        _pack_one(trajectories, advantages, sorted(chosen[place] for place in places), mask_observations)
        for places in plan([len(trajectories[i].token_ids) for i in chosen], tokens_per_microbatch)
    ]


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of `lengths` in bins of at most `budget` tokens, few and equal: longest first into the lightest bin.

    A first pass finds how many bins are needed, opening one whenever none has room; a second fills that many from the
    start, which balances them. Ties go to the earlier place and the earlier bin.
    """
    if budget < 1:
        raise ValueError(f"train.tokens_per_microbatch: must be at least 1, got {budget}")
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    alone = [[place] for place in order if lengths[place] > budget]
    shared = order[len(alone) :]
    first = _fill(shared, lengths, budget, -(-sum(lengths[place] for place in shared) // budget))
    second = _fill(shared, lengths, budget, len(first))
    return alone + (second if len(second) <= len(first) else first)


def _fill(order: list[int], lengths: Sequence[int], budget: int, num_bins: int) -> list[list[int]]:
    """Longest-first into the lightest of `num_bins` bins; one more bin whenever the lightest has no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    lightest = [(0, number) for number in range(num_bins)]  # a heap already
    for place in order:
        if not lightest or lightest[0][0] + lengths[place] > budget:
            heapq.heappush(lightest, (0, len(bins)))
            bins.append([])
        load, number = lightest[0]
        bins[number].append(place)
        heapq.heapreplace(lightest, (load + lengths[place], number))
    return [places for places in bins if places]


def assign_to_ranks(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Places of `lengths` for each rank, ascending, of nearly equal cost; the same answer on every rank.

    Cost counts attention: a long sequence costs more than two halves. A rank may get nothing.
    """
    if world_size < 1:
        raise ValueError(f"assign_to_ranks: world_size must be at least 1, got {world_size}")
    cost = [length * (1.0 + length / _ATTENTION_PARITY_TOKENS) for length in lengths]
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    lightest = [(0.0, rank) for rank in range(world_size)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        load, rank = lightest[0]
        ranks[rank].append(place)
        heapq.heapreplace(lightest, (load + cost[place], rank))
    return [sorted(places) for places in ranks]


def policy_mask(trajectory: Trajectory, mask_observations: bool = True) -> np.ndarray:
    """[L] bool: the tokens that are trained on."""
    if mask_observations:
        return trajectory.loss_mask
    return np.arange(len(trajectory.token_ids)) >= trajectory.prompt_length


def _pack_one(trajectories, advantages, members: list[int], mask_observations: bool) -> PackedBatch:
    """One batch of `trajectories[i]` for i in `members`."""
    chosen = [trajectories[i] for i in members]
    lengths = np.array([len(trajectory.token_ids) for trajectory in chosen])  # [S]
    starts = np.cumsum(lengths) - lengths  # [S]
    masks = [policy_mask(trajectory, mask_observations) for trajectory in chosen]
    token_ids = np.concatenate([trajectory.token_ids for trajectory in chosen])  # [T]
    targets_at = np.flatnonzero(np.concatenate(masks))  # [P]; never a sequence's first token: prompts are not empty
    values = [_policy_values(trajectories[i], advantages[i], mask, i) for i, mask in zip(members, masks, strict=True)]
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids.astype(np.int64)),
        positions=torch.from_numpy(np.arange(len(token_ids)) - np.repeat(starts, lengths)),
        cu_seqlens=_offsets(lengths),
        max_seqlen=int(lengths.max()),
        policy_index=torch.from_numpy(targets_at - 1),
        targets=torch.from_numpy(token_ids[targets_at].astype(np.int64)),
        policy_cu_seqlens=_offsets([int(mask.sum()) for mask in masks]),
        rollout_logprobs=torch.from_numpy(np.concatenate([logprobs for logprobs, _ in values])),
        advantages=torch.from_numpy(np.concatenate([advantage for _, advantage in values])),
        trajectory_index=list(members),
    )


def _policy_values(trajectory: Trajectory, advantage, mask: np.ndarray, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Rollout log-probabilities and advantages of a trajectory's policy tokens, both fp32."""
    advantage = np.asarray(advantage, dtype=np.float32)
    if advantage.shape not in ((), mask.shape):
        raise ValueError(
            f"pack: the advantage of trajectory {place} must be one number or {len(mask)} (one per token), "
            f"got shape {list(advantage.shape)}"
        )
    advantage = np.broadcast_to(advantage, mask.shape)[mask]
    sampled = trajectory.loss_mask[mask]
    logprobs = np.where(sampled, trajectory.rollout_logprobs[mask], np.float32(np.nan)).astype(np.float32)
    if not np.isfinite(logprobs[sampled]).all() or not np.isfinite(advantage).all():
        raise ValueError(
            f"pack: trajectory {place} (question {trajectory.question.id}) has a log-probability or advantage that is "
            "not finite; look for NaN in the sampler's logits or in the reward"
        )
    return logprobs, advantage


def _offsets(lengths) -> torch.Tensor:
    """[S] -> [S+1] int32."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
