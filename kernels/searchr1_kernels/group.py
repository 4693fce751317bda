"""Group-relative advantages (GRPO) and masked whitening (PPO).

Statistics are fp64 and are returned as sums, so that a caller can add those of other micro-batches and ranks before
using them. Standard deviations are unbiased, as in Search-R1.

Nothing here waits for a GPU, and no sum depends on the order in which threads happen to run: sums over groups are
formed over doubling spans of the sorted samples, in log2(N) passes, and not by atomic additions.

Shape legend: N samples or tokens, G distinct groups.
"""

from __future__ import annotations

import torch

from searchr1_kernels import checks
from searchr1_kernels.registration import register


@torch.no_grad()
def group_advantages(
    rewards: torch.Tensor,  # [N]
    groups: torch.Tensor,  # [N] int64 or int32: samples of one question share a number, in any order
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> advantages [N] fp32 `(r - mean) / (std + eps)` (without `normalize_std`: `r - mean`), and keep [N] bool.

    This is GRPO's advantage (Shao et al., 2024, section 4.1.2), and without the division Dr. GRPO's (Liu et al., 2025).
    Where a group's rewards are all the same, keep is False and the advantage exactly 0: the group has nothing to
    compare, whether it has one sample or many, and rounding in the mean must not become a direction. A group's outputs
    have the same bits whatever other groups there are. Raises ValueError where a shape, type or device is not as above.
    """
    checks.check_tensor("rewards", rewards)
    checks.check_tensor("groups", groups)
    checks.check_number("eps", eps, 0.0)
    return _GROUP_ADVANTAGES(rewards.detach(), groups, normalize_std, eps)


def _group_advantages(rewards, groups, normalize_std, eps):
    checks.check_shape("rewards", rewards, ("N",))
    checks.check_shape("groups", groups, (rewards.shape[0],))
    checks.check_floating("rewards", rewards)
    checks.check_dtype("groups", groups, torch.int64, torch.int32)
    checks.check_device("groups", groups, "rewards", rewards)
    if rewards.shape[0] == 0:
        return rewards.new_empty(0, dtype=torch.float32), rewards.new_empty(0, dtype=torch.bool)
    groups, order = torch.sort(groups.long(), stable=True)
    values = rewards.double()[order]
    first, last = (torch.searchsorted(groups, groups, right=right) for right in (False, True))
    last = last - 1  # [N]: of each sample's group
    count = (last - first + 1).double()
    differs = (values != values[first]).double()
    totals = _sums(torch.stack([values, differs]), groups)[:, last]  # [2, N]
    centred, keep = values - totals[0] / count, totals[1] > 0
    advantages = centred
    if normalize_std:
        variance = _sums(centred.square()[None], groups)[0, last] / (count - 1).clamp(min=1)
        advantages = centred / (variance.sqrt() + eps)
    advantages = advantages.masked_fill(~keep, 0.0).float()
    return tuple(torch.empty_like(output).scatter(0, order, output) for output in (advantages, keep))


def _sums(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """values [C,N] fp64, sorted groups [N] -> running sums within each group, [C,N]."""
    span = 1
    while span < groups.shape[0]:
        reached = torch.where(groups[span:] == groups[:-span], values[:, :-span], 0.0)
        values = torch.cat([values[:, :span], values[:, span:] + reached], dim=1)
        span *= 2
    return values


@torch.no_grad()
def masked_moments(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """values, mask [N] -> [3] fp64: count, sum and sum of squares of the unmasked values.

    The moments of two sets add up to those of both together. Raises ValueError where a shape, type or device is not as
    above.
    """
    checks.check_tensor("values", values)
    checks.check_optional("mask", mask)
    return _MASKED_MOMENTS(values.detach(), mask)


def _check_values(values, mask) -> None:
    checks.check_shape("values", values, ("N",))
    checks.check_floating("values", values)
    checks.check_mask(mask, "values", values)


def _masked_moments(values, mask):
    _check_values(values, mask)
    values = values.double()
    kept = torch.ones_like(values) if mask is None else mask.double()
    if mask is not None:
        values = values.masked_fill(~mask, 0.0)
    return torch.stack([kept.sum(), values.sum(), values.square().sum()])


@torch.no_grad()
def masked_whiten(
    values: torch.Tensor,  # [N]
    mask: torch.Tensor | None = None,  # [N] bool
    *,
    moments: torch.Tensor | None = None,  # [3] of `masked_moments`, summed over everything that counts
    eps: float = 1e-8,
) -> torch.Tensor:
    """-> `(x - mean) / sqrt(variance + eps)` as [N] fp32, 0 where masked.

    Mean and variance are those of `moments`, by default of the unmasked `values`. The variance is unbiased. Fewer than
    two values have none; they become 0. Raises ValueError where a shape, type or device is not as above.
    """
    checks.check_tensor("values", values)
    checks.check_optional("mask", mask)
    checks.check_optional("moments", moments)
    checks.check_number("eps", eps, 0.0)
    return _MASKED_WHITEN(values.detach(), mask, moments, eps)


def _masked_whiten(values, mask, moments, eps):
    if moments is None:
        moments = _masked_moments(values, mask)
    else:
        _check_values(values, mask)
        checks.check_shape("moments", moments, (3,))
        checks.check_floating("moments", moments)
        checks.check_device("moments", moments, "values", values)
        moments = moments.double()
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)
    whitened = (values.double() - mean) * torch.rsqrt(variance + eps)
    return (whitened if mask is None else whitened.masked_fill(~mask, 0.0)).float()


_GROUP_ADVANTAGES = register(
    "group_advantages(Tensor rewards, Tensor groups, bool normalize_std, float eps) -> (Tensor, Tensor)",
    _group_advantages,
)
_MASKED_MOMENTS = register("masked_moments(Tensor values, Tensor? mask) -> Tensor", _masked_moments)
_MASKED_WHITEN = register(
    "masked_whiten(Tensor values, Tensor? mask, Tensor? moments, float eps) -> Tensor", _masked_whiten
)
