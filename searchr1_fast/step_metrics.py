"""The numbers that a step writes to its row in metrics.jsonl.

`reward_mean` to `response_tokens_mean` leave out trajectories whose search failed; `policy_tokens` are those trained
on; `kept_fraction` is the share of the sampled trajectories they come from; `tokens_per_second` counts sampled tokens;
`entropy`, `kl_ref`, `rollout_policy_kl`, `clip_fraction` and the other metrics of `linear_policy_loss`, which says what
they are, are means over policy tokens of all minibatches, or extremes; `grad_norm` is a mean over optimizer steps; a
mean of nothing is null.
`update_imbalance` is the time of an update, by the cost of its micro-batches, over what it would be if no rank waited
for another (packing.py); a mean over optimizer steps.
`search/…` are the step's searches on all ranks (retrieval/statistics.py), `time_search_wait` how long the engine
waited; `time_park` and `time_unpark` how long the host took to give the index's memory to the update and to take it
back; `time_checkpoint…` how long a save took (checkpoint_writer.py), in rows of steps that save; not in `time_step`.
`finish_<reason>` are shares of all sampled trajectories, by `types.FinishReason`; `time_<phase>` are rank 0's seconds.
With vLLM, `time_handover` is the part of `time_sync` in which vLLM gets the weights and they are compared.
`sampler_…` are of the first minibatch, before the weights change (agreement.py).

Shape legend: N trajectories.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from searchr1_kernels.policy_objective import MAX_METRICS, MIN_METRICS
from torch.distributed import ReduceOp

from searchr1_fast.agreement import AGREEMENT, MAXIMA, SUMS, agreement
from searchr1_fast.run import Run
from searchr1_fast.types import FinishReason, Trajectory


@dataclass(slots=True)
class Updates:
    """What the optimizer steps of one step of the run reported."""

    num_tokens: int = 0  # policy tokens, all ranks together
    imbalances: list[float] = field(default_factory=list)
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)  # this rank's sums over tokens, and extremes; 0-d
    first: dict[str, torch.Tensor] = field(default_factory=dict)  # those of the first minibatch, which is on-policy
    num_first_tokens: int = 0
    num_first_sampled: int = 0  # how many of them the sampler gave a log-probability
    grad_norms: list[float] = field(default_factory=list)
    critic_grad_norms: list[float] = field(default_factory=list)


def rollout_metrics(
    run: Run,
    trajectories: list[Trajectory],
    rewards: np.ndarray,  # [N]
    kept: np.ndarray,  # [N] bool
) -> dict[str, Any]:
    """What the rollout looked like and how long the step's phases took."""
    count = len(trajectories)
    is_judged = np.array([t.is_judged for t in trajectories])  # some are True: a rollout with none has raised
    reward_mean = float(rewards[is_judged].mean())
    judged = [t for t in trajectories if t.is_judged]
    times = run.timers.collect()
    sampled = sum(int(t.loss_mask.sum()) for t in trajectories)
    reasons = Counter(t.finish_reason for t in trajectories)
    is_vllm = run.config.rollout.engine == "vllm"
    return {
        "reward_mean": reward_mean,
        "em": reward_mean,
        "searches_mean": sum(t.num_searches for t in judged) / len(judged),
        "response_tokens_mean": sum(t.response_length for t in judged) / len(judged),
        "kept_fraction": float(kept.mean()),
        **{f"finish_{reason.value}": reasons[reason] / count for reason in FinishReason},
        "trajectories_per_second": count / times["time_step"],
        "tokens_per_second": sampled / times["time_step"],
        # vLLM does not say how many of its own there were.
        "preemptions": None if is_vllm else int(run.ranks.sum(run.loop.statistics.num_preemptions)),
        "forward_splits": None if is_vllm else int(run.ranks.sum(run.loop.statistics.num_splits)),
        **times,
    }


def update_metrics(run: Run, updates: Updates) -> dict[str, Any]:
    """Turn the sums of all ranks into means over policy tokens: the only place where metrics leave the device."""
    metrics, first = updates.metrics, updates.first
    names = metrics.keys() - {"logprob_difference", "ratio_squared"}  # only of the first minibatch: agreement.py
    sums = reduced(run, names - {*MAX_METRICS, *MIN_METRICS}, metrics, ReduceOp.SUM)
    maxima = reduced(run, names & {*MAX_METRICS}, metrics, ReduceOp.MAX)
    minima = reduced(run, names & {*MIN_METRICS}, metrics, ReduceOp.MIN)
    sampler: dict[str, float | None] = dict.fromkeys(AGREEMENT)
    if first:
        of_first = (reduced(run, set(keys), first, op) for keys, op in ((SUMS, ReduceOp.SUM), (MAXIMA, ReduceOp.MAX)))
        sampler |= agreement(*of_first, updates.num_first_tokens, updates.num_first_sampled)
    norms = [norm for norm in updates.grad_norms if math.isfinite(norm)]
    critic_norms = [norm for norm in updates.critic_grad_norms if math.isfinite(norm)]
    critic = {"critic_grad_norm": _mean(critic_norms)} if run.critic is not None else {}
    return {
        "policy_tokens": updates.num_tokens,
        **dict.fromkeys(("entropy", "kl_ref", "rollout_policy_kl", "clip_fraction")),  # null where nothing was updated
        **{key: total / updates.num_tokens for key, total in sums.items()},
        **maxima,
        **minima,
        **sampler,
        "grad_norm": _mean(norms),
        **critic,
        "lr": run.policy.last_learning_rate,
        "update_imbalance": _mean(updates.imbalances),
        "skipped_updates": len(updates.grad_norms) + len(updates.critic_grad_norms) - len(norms) - len(critic_norms),
    }


def reduced(run: Run, keys: Set[str], metrics: dict[str, torch.Tensor], op: ReduceOp) -> dict[str, float]:
    """Reduce some of the metrics over all ranks, in one message."""
    if not keys:
        return {}
    stacked = torch.stack([metrics[key].double() for key in sorted(keys)])
    return dict(zip(sorted(keys), run.ranks.all_reduce(stacked, op).tolist(), strict=True))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
