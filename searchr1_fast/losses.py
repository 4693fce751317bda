"""The losses of policy and critic over the policy tokens of one packed batch.

Every loss is a sum divided by `denominator`, the number of policy tokens of the whole optimizer step over all
micro-batches and ranks. So adding the losses of the parts gives the loss of the whole, however it was cut. (Search-R1
averages the means of micro-batches, in which a token weighs more the emptier its micro-batch.)

Nothing here waits for the device. Metrics are sums over tokens, except those in `MAX_METRICS`.

Left out: sequence-level ratios; no recipe here uses them.

Shape legend: P policy tokens.
"""

from __future__ import annotations

import torch
from searchr1_kernels import masked_kl

from searchr1_fast.config import AlgorithmConfig
from searchr1_fast.types import PackedBatch

# exp(20) = 4.9e8: no ratio of use is near, and fp32 is far from overflow.
_EXPONENT_LIMIT = 20.0

MAX_METRICS = frozenset({"logprob_difference_max"})


def policy_loss(
    logprobs: torch.Tensor,  # [P] fp32, differentiable
    batch: PackedBatch,
    *,
    algorithm: AlgorithmConfig,
    ref_logprobs: torch.Tensor | None = None,  # [P]
    entropy: torch.Tensor | None = None,  # [P], differentiable where its coefficient is not 0
    denominator: int | torch.Tensor,
    on_policy: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-> loss (0-d), metrics (0-d each, detached).

        - min(A r, A clip(r, 1 - clip_low, 1 + clip_high)) * weight  +  kl_coefficient * KL  -  entropy_coefficient * H

    `on_policy`: the weights are those that sampled. The ratio is 1 with the gradient of the log-probability, and what
    sampler and trainer disagree by in arithmetic becomes a constant weight min(p_trainer / p_sampler, importance_cap).
    Otherwise the ratio is to the sampler itself, at most importance_cap, and there is no weight. A cap above
    1 + clip_high is felt where A < 0 alone, which the clip leaves unbounded (dual clip, arXiv 1912.09729, eq. 5).

    The KL is left out where `kl_in_reward` puts it elsewhere. A NaN in `rollout_logprobs` marks a token nobody sampled:
    it counts as on-policy.

    Metrics: policy_loss, clip_fraction, truncated_fraction, ratio (p_trainer / p_sampler, unclipped),
    importance_weight, rollout_policy_kl (k3 of KL(sampler || trainer)), logprob_difference_max, and where given kl_ref
    and entropy.
    """
    _check_policy(logprobs, batch, algorithm, ref_logprobs, entropy, denominator)
    current = logprobs.detach()
    sampled = ~batch.rollout_logprobs.isnan()
    rollout = torch.where(sampled, batch.rollout_logprobs, current)
    drift = (current - rollout).clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).exp()  # p_trainer / p_sampler
    if on_policy:
        ratio = (logprobs - current).exp()
        weight = drift.clamp(max=algorithm.importance_cap) if algorithm.importance_cap > 0 else torch.ones_like(drift)
        truncated = drift > algorithm.importance_cap if algorithm.importance_cap > 0 else torch.zeros_like(sampled)
    else:
        # `old` is the sampler's, or for a token nobody sampled the trainer's own: that ratio is 1, with a gradient.
        ratio = (logprobs - rollout).clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).exp()
        weight, truncated = torch.ones_like(drift), torch.zeros_like(sampled)
        if algorithm.importance_cap > 0:
            ratio, truncated = ratio.clamp(max=algorithm.importance_cap), drift > algorithm.importance_cap
    advantages = batch.advantages
    unclipped = advantages * ratio
    clipped = advantages * ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    policy_terms = -weight * torch.minimum(unclipped, clipped)
    total = policy_terms.sum()
    metrics = {
        "policy_loss": total,
        "clip_fraction": (clipped < unclipped).sum(),
        "truncated_fraction": truncated.sum(),
        "ratio": drift.sum(),
        "importance_weight": weight.sum(),
        "rollout_policy_kl": masked_kl(rollout, current, "k3").sum(),
        "logprob_difference_max": _largest((current - rollout).abs()),
    }
    if ref_logprobs is not None:
        kl = masked_kl(logprobs, ref_logprobs, algorithm.kl_kind).sum()
        metrics["kl_ref"] = kl
        if algorithm.kl_coefficient > 0 and not algorithm.kl_in_reward:
            total = total + algorithm.kl_coefficient * kl
    if entropy is not None:
        metrics["entropy"] = entropy.sum()
        if algorithm.entropy_coefficient > 0:
            total = total - algorithm.entropy_coefficient * metrics["entropy"]
    return total / denominator, {name: value.detach().float() for name, value in metrics.items()}


def value_loss(
    values: torch.Tensor,  # [P] fp32, differentiable
    returns: torch.Tensor,  # [P]
    old_values: torch.Tensor,  # [P]: of the critic before the step
    clip: float,
    denominator: int | torch.Tensor,
) -> torch.Tensor:
    """-> 0-d: half the squared error, at least that of the value held within `clip` of the old one (0: unclipped)."""
    for name, tensor in (("returns", returns), ("old_values", old_values)):
        if tensor.shape != values.shape:
            raise ValueError(
                f"value_loss: {name} must have the shape of values {list(values.shape)}, got {list(tensor.shape)}"
            )
    _check_denominator(denominator)
    error = (values - returns).square()
    if clip > 0:
        held = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error.sum() / denominator


def accumulate_metrics(totals: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor]) -> None:
    """Join the metrics of another micro-batch into `totals`, in place and on the device."""
    for name, value in metrics.items():
        if name not in totals:
            totals[name] = value
        else:
            totals[name] = torch.maximum(totals[name], value) if name in MAX_METRICS else totals[name] + value


def _largest(values: torch.Tensor) -> torch.Tensor:
    """[P] of numbers not below 0 -> 0-d; 0 for none, where `max` would raise."""
    return torch.cat([values, values.new_zeros(1)]).max()


def _check_policy(logprobs, batch, algorithm, ref_logprobs, entropy, denominator) -> None:
    expected = batch.rollout_logprobs.shape
    for name, tensor in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs), ("entropy", entropy)):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"policy_loss: {name} must be {list(expected)}, one per policy token, got {list(tensor.shape)}"
            )
    if algorithm.kl_coefficient > 0 and not algorithm.kl_in_reward and ref_logprobs is None:
        raise ValueError("policy_loss: algorithm.kl_coefficient is above 0; give ref_logprobs")
    if algorithm.entropy_coefficient > 0 and entropy is None:
        raise ValueError("policy_loss: algorithm.entropy_coefficient is above 0; give entropy")
    _check_denominator(denominator)


def _check_denominator(denominator: int | torch.Tensor) -> None:
    """A tensor is taken as it is: reading it would wait for the device."""
    if not isinstance(denominator, torch.Tensor) and denominator <= 0:
        raise ValueError(f"denominator: must be the number of policy tokens of the step, above 0, got {denominator}")
