"""Group-relative advantages (GRPO) and masked whitening (PPO).

Statistics are fp64 and are given out as sums, so that a caller can add those of other micro-batches and ranks before
they are used. Standard deviations are unbiased, as Search-R1's are.

Left out: anything that waits for a GPU on purpose, except `torch.unique` over the group ids.

Shape legend: N samples or tokens, G distinct groups.
"""

from __future__ import annotations

import torch

from searchr1_kernels import checks


@torch.no_grad()
def group_advantages(
    rewards: torch.Tensor,  # [N]
    groups: torch.Tensor,  # [N] int64: samples of one question share a number, in any order
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> advantages [N] fp32 `(r - mean) / (std + eps)` (without `normalize_std`: `r - mean`), and keep [N] bool.

    keep is False, and the advantage exactly 0, where a group's rewards are all the same: it has nothing to compare,
    whether it has one sample or many, and rounding in the mean must not become a direction.
    """
    checks.check_shape("rewards", rewards, ("N",))
    checks.check_shape("groups", groups, (rewards.shape[0],))
    checks.check_floating("rewards", rewards)
    checks.check_dtype("groups", groups, torch.int64, torch.int32)
    checks.check_device("groups", groups, "rewards", rewards)
    unique, member = torch.unique(groups, return_inverse=True)  # [G], [N]
    values = rewards.double()
    zeros = values.new_zeros(unique.shape[0])  # [G]
    count = zeros.index_add(0, member, torch.ones_like(values))
    mean = zeros.index_add(0, member, values) / count
    centred = values - mean[member]
    lowest = zeros.scatter_reduce(0, member, values, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, member, values, "amax", include_self=False)
    keep = (lowest != highest)[member]
    advantages = centred
    if normalize_std:
        variance = zeros.index_add(0, member, centred.square()) / (count - 1).clamp(min=1)
        advantages = centred / (variance.sqrt()[member] + eps)
    return advantages.masked_fill(~keep, 0.0).float(), keep


@torch.no_grad()
def masked_moments(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """[N] -> [3] fp64: count, sum, sum of squares of the unmasked values. Adding two results joins two sets."""
    checks.check_shape("values", values, ("N",))
    checks.check_floating("values", values)
    checks.check_mask(mask, "values", values)
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
    """-> `(x - mean) / sqrt(variance + eps)` as [N] fp32, 0 where masked. Without `moments` those of `values` are used.

    Fewer than two values have no variance; they become 0.
    """
    own = masked_moments(values, mask)  # also checks the arguments
    moments = own if moments is None else moments.to(own)
    checks.check_shape("moments", moments, (3,))
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)
    whitened = (values.double() - mean) * torch.rsqrt(variance + eps)
    return (whitened if mask is None else whitened.masked_fill(~mask, 0.0)).float()
