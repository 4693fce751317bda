"""Pack ragged trajectories into batches: no padding, no beginning twice, every batch within a token budget.

Samples of one question begin alike: the prompt, often the first turn, then the passages it found. A token's hidden
state depends only on the tokens before it, so a common beginning is computed once and attended to by all sequences that
share it: the batch is a tree, laid out branch by branch. A shared token gets gradients from every branch. In the demo's
first step, this leaves half of the rows: 14,222 of 28,834.

Sequences are sorted by their tokens. The longest beginning that a sequence shares with any before it is then the one
that it shares with the last, and cutting the sorted list into runs keeps shared beginnings together.

Ranks go through their batches in step, because FSDP gathers a block on all of them at once. An update therefore takes
the sum over its rounds of the costliest batch in each, not the largest sum of a rank. So the batches of all ranks are
cut from one list, as many as make whole rounds, and sorted by cost; every round takes the next of them, one per rank.

This file decides which sequences share a forward pass, on which rank, and which tokens are predicted. The loss mask
was made where the tokens were born; here it is only turned into positions.

Left out: splitting a trajectory that is over the budget; it goes alone.

Shape legend
    L  tokens of a trajectory    T  rows of a batch    S  its sequences    P  its policy tokens    K  keys: adding up
    what each sequence attends to
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from searchr1_fast.types import PackedBatch, SharedPrefixes, Trajectory

# Attention costs as much as everything else in a layer at about 12 * hidden_size tokens; 2048 is a middling size.
_ATTENTION_PARITY_TOKENS = 12 * 2048
_HALVINGS = 20  # bisection steps for the cost of the heaviest run: to a millionth of the cost of all

Span = tuple[int, int]  # [begin, end) of the sorted sequences: a run, which makes a batch


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

    A batch's `trajectory_index` holds these i, in the order of their tokens. With `mask_observations` off, every token
    after the prompt is a policy token. The sampler has no log-probability for tokens that it did not sample: there
    `rollout_logprobs` is NaN, which `losses` takes to equal the trainer's. With `share_prefixes` off, every token of
    every sequence is laid out (the plain twin). Deterministic; CPU tensors; no batches if nothing is chosen.
    """
    layout = lay_out(trajectories, tokens_per_microbatch, indices=indices, share_prefixes=share_prefixes)
    return pack_rank(trajectories, advantages, layout, mask_observations=mask_observations)


def pack_rank(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[np.ndarray | float],  # as `pack` takes them
    layout: Layout,
    rank: int = 0,
    *,
    mask_observations: bool = True,
) -> list[PackedBatch]:
    """Build one rank's batches of a layout of these trajectories."""
    if len(advantages) != len(trajectories):
        raise ValueError(f"pack: got {len(advantages)} advantages for {len(trajectories)} trajectories; give one each")
    batches = []
    for begin, end in layout.runs[rank]:
        shared = [0, *layout.shared[begin + 1 : end]]
        batches.append(_pack_run(trajectories, advantages, layout.order[begin:end], shared, mask_observations))
    return batches


@dataclass(frozen=True)
class Layout:
    """Which trajectories share a batch, and which rank has it; the same on every rank."""

    order: list[int]  # indices of the trajectories, sorted by their tokens
    lengths: list[int]  # their lengths, in this order
    shared: list[int]  # how many first tokens each shares with the one before
    runs: list[list[Span]]  # by rank, in the order of the rounds

    @property
    def num_rounds(self) -> int:
        """Number of batches of the rank that has most; others may have one less."""
        return max(map(len, self.runs))

    @cached_property
    def costs(self) -> list[list[float]]:
        """The costs of each rank's batches."""
        return [[_cost(self.lengths, self.shared, *run) for run in runs] for runs in self.runs]

    @property
    def imbalance(self) -> float:
        """Sum over rounds of the costliest batch's cost, divided by the mean rank's cost; 1.0: no rank waits."""
        rounds = [max(batches[n] for batches in self.costs if n < len(batches)) for n in range(self.num_rounds)]
        return sum(rounds) / self._mean if self._mean else 1.0

    @property
    def largest_rank(self) -> float:
        """The largest cost of a rank over the mean: what the imbalance would be if ranks waited only at the end."""
        return max(map(sum, self.costs)) / self._mean if self._mean else 1.0

    @property
    def _mean(self) -> float:
        return sum(map(sum, self.costs)) / len(self.costs)


def lay_out(
    trajectories: Sequence[Trajectory],
    tokens_per_microbatch: int,
    world_size: int = 1,
    *,
    indices: Sequence[int] | None = None,
    share_prefixes: bool = True,
) -> Layout:
    """Assign `trajectories[i]` for i in `indices` (None: all) to batches and ranks. A rank may get nothing."""
    chosen = list(range(len(trajectories))) if indices is None else [int(i) for i in indices]
    if len(set(chosen)) != len(chosen) or any(not 0 <= i < len(trajectories) for i in chosen):
        raise ValueError(f"pack: indices must be distinct and from 0 to {len(trajectories) - 1}, got {chosen}")
    order = in_order(trajectories, chosen)
    lengths = [len(trajectories[i].token_ids) for i in order]
    shared = shared_lengths(trajectories, order) if share_prefixes else [0] * len(order)
    runs = plan(lengths, shared, tokens_per_microbatch, world_size)
    return Layout(order, lengths, shared, deal(runs, [_cost(lengths, shared, *run) for run in runs], world_size))


def in_order(trajectories: Sequence[Trajectory], indices: Sequence[int]) -> list[int]:
    """Sort `indices` by their trajectories' tokens, lexicographically; equal ones keep their order."""
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


def plan(lengths: Sequence[int], shared: Sequence[int], budget: int, world_size: int = 1) -> list[Span]:
    """Cut runs of at most `budget` rows: as few as make whole rounds, and with the costliest as cheap as possible.

    A run has its first sequence whole, and of every other sequence what it does not share with the one before. A part
    of a run never has more rows or a higher cost than the run, so filling one run after the other is optimal, and more
    room never needs more runs.
    """
    if budget < 1:
        raise ValueError(f"train.tokens_per_microbatch: must be at least 1, got {budget}")
    if world_size < 1:
        raise ValueError(f"plan: world_size must be at least 1, got {world_size}")
    low, high = 0.0, sum(_row_cost(0, length) for length in lengths)  # too little room, enough room
    runs = _fill(lengths, shared, budget, high)
    most = -(-len(runs) // world_size) * world_size
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        other = _fill(lengths, shared, budget, middle)
        if len(other) <= most:
            high, runs = middle, other
        else:
            low = middle
    return runs


def deal(runs: Sequence[Span], costs: Sequence[float], world_size: int) -> list[list[Span]]:
    """Deal runs to ranks: the costliest first, in rounds of one per rank, which go back and forth among the ranks."""
    dealt: list[list[Span]] = [[] for _ in range(world_size)]
    falling = sorted(range(len(runs)), key=lambda place: -costs[place])
    for turn, place in enumerate(falling):
        number, rank = divmod(turn, world_size)
        dealt[rank if number % 2 == 0 else world_size - 1 - rank].append(runs[place])
    return dealt


def _fill(lengths: Sequence[int], shared: Sequence[int], room: int, limit: float) -> list[Span]:
    """Fill runs in order, each for as long as there is room; a sequence that exceeds the room by itself goes alone."""
    starts: list[int] = []
    rows, cost = 0, 0.0
    for place, length in enumerate(lengths):
        rows += length - shared[place]
        cost += _row_cost(shared[place], length)
        if not starts or rows > room or cost > limit:
            starts.append(place)
            rows, cost = length, _row_cost(0, length)
    return list(zip(starts, [*starts[1:], len(lengths)], strict=False))  # no sequence, no run


def _row_cost(begin: int, end: int) -> float:
    """Cost of a sequence's rows [begin, end), in units of a row without attention; a row attends to all before it."""
    return (end - begin) * (1.0 + (begin + end) / _ATTENTION_PARITY_TOKENS)


def _cost(lengths: Sequence[int], shared: Sequence[int], begin: int, end: int) -> float:
    """Cost of a run."""
    others = zip(shared[begin + 1 : end], lengths[begin + 1 : end], strict=True)
    return _row_cost(0, lengths[begin]) + sum(_row_cost(*rows) for rows in others)


def policy_mask(trajectory: Trajectory, mask_observations: bool = True) -> np.ndarray:
    """[L] bool: the tokens that are trained on."""
    if mask_observations:
        return trajectory.loss_mask
    return np.arange(len(trajectory.token_ids)) >= trajectory.prompt_length


def _pack_run(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[np.ndarray | float],  # as `pack` takes them
    members: list[int],
    shared: list[int],
    mask_observations: bool,
) -> PackedBatch:
    """Pack `trajectories[i]` for i in `members` as one batch; each shares `shared` tokens with the one before."""
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


def _prefixes(
    own: list[int],
    paths: list[np.ndarray],  # [L] int64 each
    target_rows: np.ndarray,  # [P] int64
) -> SharedPrefixes:
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


def _policy_values(
    trajectory: Trajectory,
    advantage: np.ndarray | float,
    mask: np.ndarray,  # [L] bool
    place: int,
) -> tuple[np.ndarray, np.ndarray]:
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


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    """[S] -> [S+1] int32."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
