"""Ragged trajectories into packed batches: no padding, no beginning twice, every batch within a token budget.

Samples of one question begin alike: the prompt, often the first turn, then the passages it found. What a token's hidden
state is depends on the tokens before it alone, so a common beginning is computed once and attended to by all that share
it: the batch is a tree, laid out branch by branch. A gradient reaches a shared token from every branch. In the
demo's first step that leaves half of the rows: 14,222 of 28,834.

Sequences are sorted by their tokens; then the longest beginning that a sequence shares with any before it is the one
it shares with the last, and cutting the sorted list into runs keeps what is shared together.

What is decided here: which sequences share a forward pass, and which tokens are predicted. The loss mask itself was
made where the tokens were born; it is only turned into positions.

Left out: cutting a trajectory that alone is over the budget; it goes alone.

Shape legend
    L  tokens of a trajectory    T  rows of a batch    S  its sequences    P  its policy tokens    K  keys: adding up
    what each sequence attends to
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from searchr1_fast.types import PackedBatch, SharedPrefixes, Trajectory

# Attention costs as much as everything else in a layer at about 12 * hidden_size tokens; 2048 is a middling size.
_ATTENTION_PARITY_TOKENS = 12 * 2048


def pack(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[np.ndarray | float],  # per trajectory: one number, or [L] aligned with its tokens
    tokens_per_microbatch: int,
    *,
    indices: Sequence[int] | None = None,
    mask_observations: bool = True,
    share_prefixes: bool = True,
) -> list[PackedBatch]:
    """Pack `trajectories[i]` for i in `indices` (None: all) into as few, and as equal, batches as the budget allows.

    `trajectory_index` of a batch holds these i, in the order of their tokens. With `mask_observations` off every token
    after the prompt is a policy token; the sampler has no log-probability for what it did not sample, so there
    `rollout_logprobs` is NaN (`losses` reads it as: the same as the trainer's). `share_prefixes` off lays every token
    of every sequence out: the plain twin. Deterministic; CPU tensors; nothing chosen, no batches.
    """
    if len(advantages) != len(trajectories):
        raise ValueError(f"pack: got {len(advantages)} advantages for {len(trajectories)} trajectories; give one each")
    chosen = list(range(len(trajectories))) if indices is None else [int(i) for i in indices]
    if len(set(chosen)) != len(chosen) or any(not 0 <= i < len(trajectories) for i in chosen):
        raise ValueError(f"pack: indices must be distinct and from 0 to {len(trajectories) - 1}, got {chosen}")
    order = in_order(trajectories, chosen)
    lengths = [len(trajectories[i].token_ids) for i in order]
    shared = shared_lengths(trajectories, order) if share_prefixes else [0] * len(order)
    batches = []
    for begin, end in plan(lengths, shared, tokens_per_microbatch):
        run_shared = [0, *shared[begin + 1 : end]]
        batches.append(_pack_run(trajectories, advantages, order[begin:end], run_shared, mask_observations))
    return batches


def in_order(trajectories: Sequence[Trajectory], indices: Sequence[int]) -> list[int]:
    """`indices` sorted by their trajectories' tokens, compared one after the other; equal ones as they came."""
    return sorted(indices, key=lambda i: trajectories[i].token_ids.astype(">u4").tobytes())


def shared_lengths(trajectories: Sequence[Trajectory], order: Sequence[int]) -> list[int]:
    """How many first tokens each trajectory shares with the one before it; 0 for the first."""
    shared = [0] * len(order)
    for place in range(1, len(order)):
        left, right = (trajectories[order[i]].token_ids for i in (place - 1, place))
        length = min(len(left), len(right))
        differ = left[:length] != right[:length]
        shared[place] = int(differ.argmax()) if differ.any() else length
    return shared


def plan(lengths: Sequence[int], shared: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Runs [begin, end) of at most `budget` rows, as few as possible and among those with the lightest heaviest.

    A run costs its first sequence whole, and of each other what it does not share with the one before. A part of a run
    never costs more than the run, so filling one after the other is optimal, and more room never needs more runs.
    """
    if budget < 1:
        raise ValueError(f"train.tokens_per_microbatch: must be at least 1, got {budget}")
    runs = _fill(lengths, shared, budget)
    low, high = 0, budget  # too little room, enough room
    while high - low > 1:
        middle = (low + high) // 2
        fewer = _fill(lengths, shared, middle)
        if len(fewer) <= len(runs):
            high, runs = middle, fewer
        else:
            low = middle
    return runs


def _fill(lengths: Sequence[int], shared: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Runs in order, each as long as there is room; a sequence that alone has too little goes alone."""
    starts, load = [], 0
    for place, length in enumerate(lengths):
        load += length - shared[place]
        if not starts or load > room:
            starts.append(place)
            load = length
    return list(zip(starts, [*starts[1:], len(lengths)], strict=False))  # no sequence, no run


def assign_to_ranks(lengths: Sequence[int], shared: Sequence[int], world_size: int) -> list[tuple[int, int]]:
    """A run [begin, end) for each rank, of nearly equal cost; the same answer on every rank. A rank may get nothing.

    Cost counts attention: a long sequence costs more than two halves.
    """
    if world_size < 1:
        raise ValueError(f"assign_to_ranks: world_size must be at least 1, got {world_size}")
    cost = [(n - m) * (1.0 + n / _ATTENTION_PARITY_TOKENS) for n, m in zip(lengths, shared, strict=True)]
    ends = np.cumsum([0.0, *cost])
    shares = ends[-1] * np.arange(1, world_size) / world_size
    bounds = np.searchsorted((ends[:-1] + ends[1:]) / 2, shares).tolist()  # a sequence goes where its middle lies
    return list(zip([0, *bounds], [*bounds, len(lengths)], strict=True))


def policy_mask(trajectory: Trajectory, mask_observations: bool = True) -> np.ndarray:
    """[L] bool: the tokens that are trained on."""
    if mask_observations:
        return trajectory.loss_mask
    return np.arange(len(trajectory.token_ids)) >= trajectory.prompt_length


def _pack_run(trajectories, advantages, members: list[int], shared: list[int], mask_observations: bool) -> PackedBatch:
    """One batch of `trajectories[i]` for i in `members`, of which each shares `shared` tokens with the one before."""
    chosen = [trajectories[i] for i in members]
    masks = [policy_mask(trajectory, mask_observations) for trajectory in chosen]
    values = [_policy_values(trajectories[i], advantages[i], mask, i) for i, mask in zip(members, masks, strict=True)]
    own = [len(trajectory.token_ids) - length for trajectory, length in zip(chosen, shared, strict=True)]
    paths = _paths(own, shared)
    places = [np.flatnonzero(mask) for mask in masks]  # never a sequence's first token: prompts are not empty
    target_rows = np.concatenate([path[at] for path, at in zip(paths, places, strict=True)])  # [P]
    token_ids = np.concatenate([t.token_ids[length:] for t, length in zip(chosen, shared, strict=True)])  # [T]
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids.astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([np.arange(m, m + n) for m, n in zip(shared, own, strict=True)])),
        cu_seqlens=_offsets(own),
        max_seqlen=max(own),
        policy_index=torch.from_numpy(np.concatenate([path[at - 1] for path, at in zip(paths, places, strict=True)])),
        targets=torch.from_numpy(token_ids[target_rows].astype(np.int64)),
        policy_cu_seqlens=_offsets([len(at) for at in places]),
        rollout_logprobs=torch.from_numpy(np.concatenate([logprobs for logprobs, _ in values])),
        advantages=torch.from_numpy(np.concatenate([advantage for _, advantage in values])),
        trajectory_index=list(members),
        prefixes=_prefixes(own, paths, target_rows) if any(shared) else None,
    )


def _paths(own: list[int], shared: list[int]) -> list[np.ndarray]:
    """The rows of each sequence from its first token to its last: [L] int64 each."""
    paths: list[np.ndarray] = []
    row = 0
    for length, count in zip(shared, own, strict=True):
        beginning = paths[-1][:length] if length else np.empty(0, dtype=np.int64)
        paths.append(np.concatenate([beginning, np.arange(row, row + count)]))
        row += count
    return paths


def _prefixes(own: list[int], paths: list[np.ndarray], target_rows: np.ndarray) -> SharedPrefixes:
    """A row has one token and one beginning, so policy tokens with the same row are one prediction."""
    keys = [path if count else path[:0] for path, count in zip(paths, own, strict=True)]
    _, distinct, inverse = np.unique(target_rows, return_index=True, return_inverse=True)
    return SharedPrefixes(
        key_index=torch.from_numpy(np.concatenate(keys)),
        cu_seqlens_k=_offsets([len(path) for path in keys]),
        max_seqlen_k=max(len(path) for path in keys),
        distinct=torch.from_numpy(distinct),
        distinct_inverse=torch.from_numpy(inverse),
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
