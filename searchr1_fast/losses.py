"""The losses of policy and critic over the policy tokens of one packed batch, and how their metrics are combined.

Every loss is a sum divided by `denominator`, the number of policy tokens of the whole optimizer step over all
micro-batches and ranks. So the losses of the parts add up to the loss of the whole, however it was split. (Search-R1
averages the means of micro-batches, so the fewer policy tokens a micro-batch has, the more each weighs.)

The policy's loss is `searchr1_kernels.linear_policy_loss`; this file supplies its arguments. Nothing waits for the
device. Metrics are sums over tokens, except those in `MAX_METRICS` and `MIN_METRICS`.

Shape legend: P policy tokens, R of them that are scored, S sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from searchr1_kernels import PolicyLoss, linear_logprob, linear_policy_loss
from searchr1_kernels._segments import segment_sums
from searchr1_kernels.policy_objective import MAX_METRICS, MIN_METRICS

from searchr1_fast.config import AlgorithmConfig
from searchr1_fast.types import PackedBatch


def policy_objective(algorithm: AlgorithmConfig) -> PolicyLoss:
    """The configured objective; without the KL if `kl_in_reward` puts it in the reward."""
    return PolicyLoss(
        kind=algorithm.loss,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        importance_cap=algorithm.importance_cap,
        kl_kind=algorithm.kl_kind,
        kl_coefficient=0.0 if algorithm.kl_in_reward else algorithm.kl_coefficient,
        entropy_coefficient=algorithm.entropy_coefficient,
    )


def policy_loss(
    scorer: Callable[..., Any],  # `policy.TokenScorer`
    algorithm: AlgorithmConfig,
    batch: PackedBatch,
    denominator: float,
    ref_logprobs: torch.Tensor | None = None,  # [P] fp32
    on_policy: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-> the loss and metrics of `linear_policy_loss`, all 0-d. `denominator`: policy tokens of the optimizer step,
    including those that `algorithm.mismatch_mask` leaves out."""
    head = linear_policy_loss if algorithm.mismatch_mask == "none" else partial(_masked_loss, batch, algorithm)
    return scorer(
        batch,
        head,
        rollout_logprobs=batch.rollout_logprobs,
        advantages=batch.advantages,
        ref_logprobs=ref_logprobs,
        loss=policy_objective(algorithm),
        denominator=denominator,
        on_policy=on_policy,
        token_rows=batch.token_rows,
        cu_seqlens=batch.policy_cu_seqlens if algorithm.loss == "gspo" else None,
    )


def _masked_loss(
    batch: PackedBatch,
    algorithm: AlgorithmConfig,
    hidden: torch.Tensor,  # [R, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [R] int64
    *,
    temperature: float,
    **arguments: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`linear_policy_loss` with whole trajectories left out. Which ones is known only once all of their tokens have
    log-probabilities, so the head first makes a pass without gradients."""
    with torch.no_grad():
        logprobs = batch.spread(linear_logprob(hidden, weight, targets, temperature=temperature))  # [P]
    weights = mismatch_weights(logprobs, batch.rollout_logprobs, batch.policy_cu_seqlens, algorithm)
    options = {"temperature": temperature, "token_weights": weights, **arguments}
    loss, metrics = linear_policy_loss(hidden, weight, targets, **options)
    return loss, metrics | {"mismatch_fraction": (1.0 - weights).sum()}


@torch.no_grad()
def mismatch_weights(
    logprobs: torch.Tensor,  # [P] fp32: of the trainer
    rollout_logprobs: torch.Tensor,  # [P] fp32: of the sampler; NaN where nobody sampled
    policy_cu_seqlens: torch.Tensor,  # [S+1] int32
    algorithm: AlgorithmConfig,
) -> torch.Tensor:  # [P] fp32
    """1 for tokens of trajectories to which sampler and trainer give about the same probability, 0 for all others.

    A trajectory's ratio is the product of p / p_sampler over its sampled tokens, or their geometric mean. It says about
    long trajectories what no single token's ratio does (arXiv 2512.23075; verl and SkyRL mask this way too).
    """
    offsets = policy_cu_seqlens.long()
    is_sampled = ~rollout_logprobs.isnan()  # [P]
    ratios = segment_sums((logprobs - rollout_logprobs).where(is_sampled, 0.0), offsets)  # [S] fp64, logarithms
    if algorithm.mismatch_mask == "geometric":
        ratios = ratios / segment_sums(is_sampled, offsets).clamp(min=1)
    low, high = (math.log(bound) if bound else -math.inf for bound in (algorithm.mismatch_low, algorithm.mismatch_high))
    is_kept = ~((ratios < low) | (ratios > high))  # NaN is kept, so that the update is skipped and reported
    return is_kept.to(logprobs.dtype).repeat_interleave(offsets.diff(), output_size=len(logprobs))


def value_loss(
    values: torch.Tensor,  # [P] fp32, differentiable
    returns: torch.Tensor,  # [P]
    old_values: torch.Tensor,  # [P]: of the critic before the step
    clip: float,
    denominator: float | torch.Tensor,
) -> torch.Tensor:
    """-> 0-d: half the squared error of the value, or of the value clipped to within `clip` of the old one if that is
    larger (0: unclipped)."""
    for name, tensor in (("returns", returns), ("old_values", old_values)):
        if tensor.shape != values.shape:
            raise ValueError(
                f"value_loss: {name} must have the shape of values {list(values.shape)}, got {list(tensor.shape)}"
            )
    if not isinstance(denominator, torch.Tensor) and denominator <= 0:  # a tensor's value is not worth waiting for
        raise ValueError(f"denominator: must be the number of policy tokens of the step, above 0, got {denominator}")
    error = (values - returns).square()
    if clip > 0:
        held = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error.sum() / denominator


def accumulate_metrics(totals: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor]) -> None:
    """Merge the metrics of another micro-batch into `totals`, in place and on the device."""
    for name, value in metrics.items():
        if name not in totals:
            totals[name] = value
        else:
            join = torch.maximum if name in MAX_METRICS else torch.minimum if name in MIN_METRICS else torch.add
            totals[name] = join(totals[name], value)
