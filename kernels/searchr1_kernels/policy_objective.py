"""The policy objective per row, as a function of its token's log-probability, and its derivative in closed form.

With d = log p - log p_base, r = exp(d) the ratio and A the advantage, a row's loss and its derivative with respect to
log p are

                loss                                                            derivative
    ppo, gspo   -w min(A r, A clip(r, 1 - clip_low, 1 + clip_high)),            -w A r where the loss is that, else 0
                for A < 0 at most -w A dual_clip
    cispo       -w sg(min(r, 1 + clip_high)) A log p                            -w min(r, 1 + clip_high) A
    reinforce   -w A log p                                                      -w A
    KL          kl_coefficient * (k1, k2 or k3 of `masked_kl`)                  kl_coefficient * (1, d or 1 - exp(-d)),
                                                                                d to the reference
    entropy     -entropy_coefficient * H                                        with respect to H: -entropy_coefficient

sg stops the gradient; w is the importance weight, which gets no gradient. `linear_policy_loss` says what p_base and w
are. Every function here takes vectors of rows, and none waits for the device.

Sources: PPO arXiv 1707.06347 eq. 7; dual clip 1912.09729 eq. 5; asymmetric clip: DAPO, 2503.14476; CISPO 2506.13585,
without its lower bound, as used there; GSPO 2507.18071, in its per-token form (section 4.3), which is the per-sequence
form where a sequence has one advantage; KL estimators joschu.net/blog/kl-approx.html; truncated importance sampling
fengyao.notion.site/off-policy-rl.

Shape legend: N rows, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from searchr1_kernels import checks
from searchr1_kernels._segments import segment_sums
from searchr1_kernels.masked_kl import _DIFFERENCE_LIMIT, EXPONENT_LIMIT, KLKind, masked_kl

Kind = Literal["ppo", "cispo", "reinforce", "gspo"]

SUM_METRICS = (
    "policy_loss",
    "clip_fraction",
    "truncated_fraction",
    "logprob_difference",
    "ratio",
    "ratio_squared",
    "importance_weight",
    "rollout_policy_kl",
    "entropy",
    "kl_ref",
)
MAX_METRICS = ("logprob_difference_max", "ratio_max")
MIN_METRICS = ("ratio_min",)
_NUMBERS = ("clip_low", "clip_high", "dual_clip", "importance_cap", "kl_coefficient", "entropy_coefficient")


@dataclass(frozen=True)
class PolicyLoss:
    """A policy objective, with its constants."""

    kind: Kind = "ppo"
    clip_low: float = 0.2
    """ppo and gspo: the ratio's lower bound is 1 - clip_low."""
    clip_high: float = 0.2
    """ppo, gspo and cispo: its upper bound is 1 + clip_high."""
    dual_clip: float = 0.0
    """ppo and gspo: for A < 0 the loss is at most -A dual_clip; a number above 1, or 0 for no bound."""
    importance_cap: float = 0.0
    """Truncated importance sampling: the cap of the ratio to the sampler, or of the importance weight; 0: neither."""
    kl_kind: KLKind = "k3"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("ppo", "cispo", "reinforce", "gspo"):
            raise ValueError(f"kind: expected 'ppo', 'cispo', 'reinforce' or 'gspo', got {self.kind!r}")
        if self.kl_kind not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_kind: expected 'k1', 'k2' or 'k3', got {self.kl_kind!r}")
        for name in _NUMBERS:
            checks.check_number(name, getattr(self, name))
        _expect("clip_low", self.clip_low, 0.0 < self.clip_low <= 1.0, "a number above 0, at most 1")
        _expect("clip_high", self.clip_high, 0.0 < self.clip_high < float("inf"), "a finite number above 0")
        _expect("dual_clip", self.dual_clip, self.dual_clip == 0 or self.dual_clip > 1, "0 or a number above 1")
        cap = self.importance_cap
        _expect("importance_cap", cap, cap == 0 or cap >= 1, "0 or a number not below 1")
        for name in ("kl_coefficient", "entropy_coefficient"):
            value = getattr(self, name)
            _expect(name, value, 0.0 <= value < float("inf"), "a finite number not below 0")
        if self.dual_clip and self.kind not in ("ppo", "gspo"):
            raise ValueError(f"dual_clip: expected 0 for {self.kind}, which has no such bound, got {self.dual_clip}")


def _expect(name: str, value: float, fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {what}, got {value}")


class PolicyRows(NamedTuple):
    """What is known about each row before the head runs; constants to autograd."""

    rollout_logprobs: torch.Tensor  # [N]
    advantages: torch.Tensor  # [N]
    ref_logprobs: torch.Tensor | None  # [N]
    old_logprobs: torch.Tensor | None  # [N]
    token_weights: torch.Tensor | None  # [N]

    def slice(self, begin: int, end: int) -> PolicyRows:
        """Rows `begin` to `end` of each tensor."""
        return PolicyRows(*(None if tensor is None else tensor[begin:end] for tensor in self))


class RowTerms(NamedTuple):
    """Terms of the objective per row, [N] each, in the precision of the log-probabilities."""

    policy: torch.Tensor  # the policy's loss, token weight included
    slope: torch.Tensor  # derivative of policy and KL loss with respect to log p, token weight included
    clipped: torch.Tensor  # bool: the clip removed the gradient, or for cispo bounded it
    truncated: torch.Tensor  # bool: the cap bound ratio or weight
    difference: torch.Tensor  # log p - log p_sampler
    weight: torch.Tensor  # importance weight
    kl: torch.Tensor  # estimate of KL(policy || reference), 0 without one


def row_terms(
    loss: PolicyLoss,
    rows: PolicyRows,
    logprobs: torch.Tensor,  # [N], no gradient needed
    on_policy: bool,
    cu_seqlens: torch.Tensor | None = None,  # [S+1]: for gspo, which needs all rows at once
) -> RowTerms:
    """-> the terms of the objective, row by row."""
    advantages, cap = rows.advantages, loss.importance_cap
    base = logprobs if rows.old_logprobs is None else rows.old_logprobs
    rollout = torch.where(rows.rollout_logprobs.isnan(), base, rows.rollout_logprobs)
    ones, never = torch.ones_like(logprobs), torch.zeros_like(logprobs, dtype=torch.bool)
    weight, truncated = ones, never
    to_sampler = rows.old_logprobs is None and not on_policy and loss.kind != "reinforce"
    if cap and not to_sampler:
        correction = _limited_exp(base - rollout)
        weight, truncated = correction.clamp(max=cap), correction > cap
    if on_policy or loss.kind == "reinforce":
        ratio, moving = ones, ~never
    else:
        log_ratio = logprobs - (rollout if to_sampler else base)
        if loss.kind == "gspo":
            log_ratio = _sequence_means(log_ratio, cu_seqlens)
        ratio, moving = _limited_exp(log_ratio), log_ratio.abs() <= EXPONENT_LIMIT
        if cap and to_sampler:
            truncated = ratio > cap
            ratio, moving = ratio.clamp(max=cap), moving & ~truncated
    if loss.kind == "reinforce":
        slope, clipped = -weight * advantages, never
        policy = slope * logprobs
    elif loss.kind == "cispo":
        slope, clipped = -weight * ratio.clamp(max=1.0 + loss.clip_high) * advantages, ratio > 1.0 + loss.clip_high
        policy = slope * logprobs
    else:
        policy, slope, clipped = _clipped(loss, advantages, ratio, moving)
        policy, slope = weight * policy, weight * slope
    kl = torch.zeros_like(logprobs)
    if rows.ref_logprobs is not None:
        kl = masked_kl(logprobs, rows.ref_logprobs, loss.kl_kind)
        if loss.kl_coefficient:
            slope = slope + loss.kl_coefficient * _kl_slope(logprobs - rows.ref_logprobs, loss.kl_kind)
    if rows.token_weights is not None:
        policy, slope = policy * rows.token_weights, slope * rows.token_weights
    return RowTerms(policy, slope, clipped, truncated, logprobs - rollout, weight, kl)


def _clipped(loss: PolicyLoss, advantages, ratio, moving) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All [N] -> loss, its derivative with respect to log p, and where the clip removed that.

    `moving`: where the ratio has a gradient.
    """
    unclipped = advantages * ratio
    held = advantages * ratio.clamp(1.0 - loss.clip_low, 1.0 + loss.clip_high)
    objective, clipped = torch.minimum(unclipped, held), held < unclipped
    if loss.dual_clip:
        floor = advantages * loss.dual_clip
        below = (advantages < 0) & (objective < floor)
        objective, clipped = torch.where(below, floor, objective), clipped | below
    return -objective, -unclipped.masked_fill(clipped | ~moving, 0.0), clipped


def _kl_slope(difference: torch.Tensor, kind: KLKind) -> torch.Tensor:
    """[N] log p - log q -> derivative of `masked_kl` with respect to log p, 0 beyond its limits."""
    slope, lowest = torch.ones_like(difference) if kind == "k1" else difference, -_DIFFERENCE_LIMIT
    if kind == "k3":
        slope, lowest = -torch.expm1(-difference), -EXPONENT_LIMIT
    return slope.masked_fill((difference < lowest) | (difference > _DIFFERENCE_LIMIT), 0.0)


def entropy_slope(loss: PolicyLoss, rows: PolicyRows, logprobs: torch.Tensor) -> torch.Tensor | None:
    """-> derivative of the objective with respect to each row's entropy, [N]; None where there is no bonus."""
    if not loss.entropy_coefficient:
        return None
    weights = torch.ones_like(logprobs) if rows.token_weights is None else rows.token_weights
    return -loss.entropy_coefficient * weights


def total_and_metrics(
    loss: PolicyLoss, rows: PolicyRows, terms: RowTerms, entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> sum of the rows' losses (0-d), and the metrics in the order of `SUM_`, `MAX_` and `MIN_METRICS`, [13]."""
    policy_loss = terms.policy.sum()
    weights = rows.token_weights
    total = policy_loss
    if loss.kl_coefficient:
        total = total + loss.kl_coefficient * (terms.kl if weights is None else terms.kl * weights).sum()
    if loss.entropy_coefficient:
        total = total - loss.entropy_coefficient * (entropy if weights is None else entropy * weights).sum()
    drift = _limited_exp(terms.difference)
    zero = drift.new_zeros(1)
    sums = (
        policy_loss,
        terms.clipped.sum(),
        terms.truncated.sum(),
        terms.difference.abs().sum(),
        drift.sum(),
        drift.square().sum(),
        terms.weight.sum(),
        masked_kl(-terms.difference, torch.zeros_like(drift), "k3").sum(),
        entropy.sum(),
        terms.kl.sum(),
    )
    extremes = (  # without rows, numbers that change no other extreme
        torch.cat([terms.difference.abs(), zero]).max(),
        torch.cat([drift, zero]).max(),
        torch.cat([drift, zero + float("inf")]).min(),
    )
    return total, torch.stack([value.to(total.dtype) for value in (*sums, *extremes)])


def _limited_exp(difference: torch.Tensor) -> torch.Tensor:
    return difference.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()


def _sequence_means(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[N] -> the mean over its sequence for every row, [N]."""
    offsets = cu_seqlens.long()
    means = segment_sums(values, offsets) / offsets.diff()  # [S]; NaN for a sequence without rows, which is not read
    sequence = torch.searchsorted(offsets[1:], torch.arange(len(values), device=values.device), right=True)
    return means.to(values.dtype)[sequence]
