"""The objective per row against its value and slope worked out case by case, metrics, and extremes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import PolicyLoss, masked_kl
from searchr1_kernels._segments import segment_sums
from searchr1_kernels.policy_objective import (
    MAX_METRICS,
    MIN_METRICS,
    SUM_METRICS,
    PolicyRows,
    row_terms,
    total_and_metrics,
)


def sample(count: int, seed: int = 0, spread: float = 0.5):
    """-> logprobs, rollout, advantages, reference; all [N] fp64 for sharp comparisons."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -3 * torch.rand(count, generator=generator, dtype=torch.float64)
    logprobs = rollout + spread * torch.randn(count, generator=generator, dtype=torch.float64)
    advantages, ref = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
    return logprobs, rollout, advantages, rollout + ref


def evaluate(loss, logprobs, rollout, advantages, ref=None, old=None, weights=None, on_policy=False, entropy=None):
    """All [N] -> loss 0-d, its slope by the log-probabilities [N], metrics as numbers."""
    rows = PolicyRows(rollout, advantages, ref, old, weights)
    terms = row_terms(loss, rows, logprobs, on_policy)
    total, metrics = total_and_metrics(loss, rows, terms, torch.zeros_like(logprobs) if entropy is None else entropy)
    names = (*SUM_METRICS, *MAX_METRICS, *MIN_METRICS)
    return total, terms.slope, dict(zip(names, metrics.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    clip_low=st.sampled_from([0.1, 0.2]),
    clip_high=st.sampled_from([0.2, 0.28, 3.0]),
    kind_and_coefficient=st.sampled_from([("k1", 0.0), ("k2", 0.0), ("k1", 0.2), ("k2", 0.3), ("k3", 0.3)]),
    entropy_coefficient=st.sampled_from([0.0, 0.2]),
    cap=st.sampled_from([0.0, 1.25, 2.0]),
)
def test_ppo_to_the_sampler(seed, clip_low, clip_high, kind_and_coefficient, entropy_coefficient, cap):
    kind, kl_coefficient = kind_and_coefficient
    p, rollout, advantages, ref = sample(30, seed)
    entropy = torch.rand(30, dtype=torch.float64)
    loss = PolicyLoss(
        clip_low=clip_low, clip_high=clip_high, kl_kind=kind, kl_coefficient=kl_coefficient,
        entropy_coefficient=entropy_coefficient, importance_cap=cap,
    )  # fmt: skip
    total, slope, metrics = evaluate(loss, p, rollout, advantages, ref, entropy=entropy)
    ratio = (p - rollout).exp()
    capped = ratio.clamp(max=cap or float("inf"))
    value = -torch.minimum(advantages * capped, advantages * capped.clamp(1 - clip_low, 1 + clip_high))
    active = torch.where(advantages >= 0, capped <= 1 + clip_high, capped >= 1 - clip_low)
    gradient = torch.where(active & (ratio == capped), -advantages * ratio, 0.0)
    d = p - ref
    kl, kl_gradient = {
        "k1": (d, torch.ones_like(d)),
        "k2": (d**2 / 2, d),
        "k3": ((-d).exp() + d - 1, 1 - (-d).exp()),
    }[kind]
    torch.testing.assert_close(total, value.sum() + kl_coefficient * kl.sum() - entropy_coefficient * entropy.sum())
    torch.testing.assert_close(slope, gradient + kl_coefficient * kl_gradient)
    wanted = {
        "policy_loss": value.sum(),
        "clip_fraction": (~active & (advantages != 0)).sum(),
        "truncated_fraction": (ratio != capped).sum(),
        "logprob_difference": (p - rollout).abs().sum(),
        "ratio": ratio.sum(),
        "ratio_squared": (ratio**2).sum(),
        "importance_weight": 30.0,
        "rollout_policy_kl": (ratio - 1 - (p - rollout)).sum(),
        "entropy": entropy.sum(),
        "kl_ref": kl.sum(),
        "logprob_difference_max": (p - rollout).abs().max(),
        "ratio_max": ratio.max(),
        "ratio_min": ratio.min(),
    }
    assert metrics == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-9)


@pytest.mark.parametrize("cap", [0.0, 1.2, 2.0])
@pytest.mark.parametrize("kind", ["ppo", "cispo", "reinforce"])
def test_on_policy_is_a_weighted_policy_gradient(cap, kind):
    """For any log-probabilities of the sampler: nothing is clipped, and the slope is -A w with a constant w."""
    p, rollout, advantages, _ = sample(50, spread=1.0)
    loss = PolicyLoss(kind=kind, importance_cap=cap)
    _, slope, metrics = evaluate(loss, p, rollout, advantages, on_policy=True)
    drift = (p - rollout).exp()
    weight = drift.clamp(max=cap) if cap else torch.ones_like(drift)
    torch.testing.assert_close(slope, -advantages * weight)
    assert metrics["clip_fraction"] == 0
    assert metrics["importance_weight"] == pytest.approx(float(weight.sum()))
    assert metrics["truncated_fraction"] == (int((drift > cap).sum()) if cap else 0)
    assert metrics["ratio"] == pytest.approx(float(drift.sum()))


# ratio, advantage -> loss and slope, clip 0.8 to 1.25, dual clip 3
CASES = [
    (1.0, 2.0, -2.0, -2.0, False),
    (2.0, 2.0, -2.5, 0.0, True),  # good and already likelier than the upper bound
    (0.5, 2.0, -1.0, -1.0, False),  # good and less likely: no lower bound
    (0.5, -2.0, 1.6, 0.0, True),  # bad and already below the lower bound
    (2.0, -2.0, 4.0, 4.0, False),  # bad and likelier: no upper bound
    (3.5, -2.0, 6.0, 0.0, True),  # except the dual clip's, for bad ones alone
    (3.5, 2.0, -2.5, 0.0, True),
    (3.5, 0.0, 0.0, 0.0, False),  # nothing to clip
]


@pytest.mark.parametrize(("ratio", "advantage", "value", "slope", "clipped"), CASES)
def test_each_side_of_each_clip(ratio, advantage, value, slope, clipped):
    old = torch.tensor([-1.0], dtype=torch.float64)
    loss = PolicyLoss(clip_low=0.2, clip_high=0.25, dual_clip=3.0)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    for anchor in ({"rollout": old}, {"rollout": old - 1, "old": old}):  # without a cap the sampler has no effect
        p = old + torch.tensor(ratio, dtype=torch.float64).log()
        total, have, metrics = evaluate(loss, p, advantages=advantages, **anchor)
        assert (float(total), float(have)) == pytest.approx((value, slope))
        assert metrics["clip_fraction"] == clipped


def test_without_settings_it_is_plain_ppo():
    """It clips at 0.8 and 1.2 and nowhere else, without weights or bonuses; checked settings cannot change."""
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.19, 1.21, 9.0], dtype=torch.float64)
    for sign in (1.0, -1.0):
        advantages, zeros = torch.full_like(ratio, sign), torch.zeros_like(ratio)
        total, _, metrics = evaluate(PolicyLoss(), ratio.log(), zeros, advantages, zeros - 1, entropy=zeros + 1)
        assert float(total) == pytest.approx(-float(torch.minimum(sign * ratio, sign * ratio.clamp(0.8, 1.2)).sum()))
        assert metrics["clip_fraction"] == 2
    with pytest.raises(FrozenInstanceError):
        PolicyLoss().clip_low = -1.0


def test_on_and_off_policy_agree_where_nothing_moved():
    _, rollout, advantages, _ = sample(20)
    slopes = []
    for on_policy in (True, False):
        _, slope, metrics = evaluate(PolicyLoss(), rollout, rollout, advantages, on_policy=on_policy)
        slopes.append(slope)
        assert metrics["rollout_policy_kl"] == metrics["logprob_difference_max"] == metrics["clip_fraction"] == 0
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("on_policy", [True, False])
def test_tokens_nobody_sampled_count_as_on_policy(on_policy):
    """NaN in rollout_logprobs: retrieved tokens that are trained on when observations are not masked."""
    p, rollout, advantages, _ = sample(10)
    rollout[::2] = float("nan")
    total, slope, metrics = evaluate(PolicyLoss(importance_cap=2.0), p, rollout, advantages, on_policy=on_policy)
    torch.testing.assert_close(slope[::2], -advantages[::2])
    assert total.isfinite()
    assert all(value < float("inf") for value in metrics.values())


@pytest.mark.parametrize("kind", ["ppo", "cispo", "reinforce"])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("cap", [0.0, 2.0, float("inf")])
def test_finite_at_the_extremes(on_policy, cap, kind):
    extremes = torch.tensor([0.0, -1.0, -100.0, -2e4, -1e30])
    p, rollout = extremes.repeat_interleave(5), extremes.repeat(5)
    loss = PolicyLoss(kind=kind, kl_coefficient=0.1, importance_cap=cap)
    for sign in (1.0, -1.0):
        total, slope, metrics = evaluate(loss, p, rollout, sign * torch.ones(25), rollout.flip(0), on_policy=on_policy)
        assert total.isfinite()
        assert slope.isfinite().all()
        assert all(abs(value) < float("inf") for value in metrics.values())


@pytest.mark.parametrize("distance", [25.0, -25.0])
def test_beyond_the_exponents_limit_the_ratio_is_constant(distance):
    """A slope there would be the limited ratio times an advantage: 5e8 for a token that is lost anyway."""
    p, advantages = torch.full((2,), distance, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    zeros = torch.zeros_like(p)
    total, slope, _ = evaluate(PolicyLoss(clip_low=1.0, clip_high=1e9), p, zeros, advantages)
    assert float(total) == pytest.approx(0.0, abs=1e-3)
    assert slope.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_slope_of_the_kl_is_that_of_masked_kl(kind):
    """On both sides of every limit."""
    p = torch.tensor([-2e9, -30.0, -20.5, -19.5, -1.0, 0.0, 1.0, 25.0, 2e9], dtype=torch.float64).requires_grad_()
    zeros = torch.zeros_like(p)
    masked_kl(p, zeros, kind).sum().backward()
    _, slope, _ = evaluate(PolicyLoss(kl_kind=kind, kl_coefficient=1.0), p.detach(), zeros, zeros, zeros)
    torch.testing.assert_close(slope, p.grad)


def test_sums_over_a_sequence_are_exact_to_fp64():
    """Sums of fp32 slopes and log-ratios; a sequence without tokens has the sum 0."""
    values = torch.tensor([2.0**24, 1.0, 1.0, 5.0])
    sums = segment_sums(values, torch.tensor([0, 3, 3, 4]))
    assert sums.dtype == torch.float64 and sums.tolist() == [2.0**24 + 2, 0.0, 5.0]
