"""The policy loss against closed forms of its value and gradient, the value loss by hand, metrics, extremes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.config import AlgorithmConfig
from searchr1_fast.losses import MAX_METRICS, accumulate_metrics, policy_loss, value_loss
from searchr1_fast.types import PackedBatch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_batch(rollout: torch.Tensor, advantages: torch.Tensor) -> PackedBatch:
    """One sequence; the loss reads these two tensors only."""
    count = rollout.shape[0]
    offsets = torch.tensor([0, count], dtype=torch.int32)
    ids = torch.zeros(count, dtype=torch.int64)
    return PackedBatch(ids, ids, offsets, count, ids, ids, offsets, rollout, advantages, [0])


def sample(count: int, seed: int = 0, spread: float = 0.5):
    """logprobs (a leaf), rollout, advantages, reference; all [P] fp64 for sharp comparisons."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -3 * torch.rand(count, generator=generator, dtype=torch.float64)
    logprobs = rollout + spread * torch.randn(count, generator=generator, dtype=torch.float64)
    advantages, ref = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
    return logprobs.requires_grad_(), rollout, advantages, rollout + ref


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    clip_low=st.sampled_from([0.1, 0.2]),
    clip_high=st.sampled_from([0.2, 0.28, 3.0]),
    kind_and_coefficient=st.sampled_from([("k1", 0.0), ("k2", 0.0), ("k2", 0.3), ("k3", 0.3)]),
    entropy_coefficient=st.sampled_from([0.0, 0.2]),
    cap=st.sampled_from([0.0, 1.25, 2.0]),
)
def test_off_policy_matches_the_closed_form(seed, clip_low, clip_high, kind_and_coefficient, entropy_coefficient, cap):
    kind, kl_coefficient = kind_and_coefficient
    logprobs, rollout, advantages, ref = sample(30, seed)
    entropy = torch.rand(30, dtype=torch.float64).requires_grad_()
    algorithm = AlgorithmConfig(
        clip_low=clip_low, clip_high=clip_high, kl_kind=kind, kl_coefficient=kl_coefficient,
        entropy_coefficient=entropy_coefficient, importance_cap=cap,
    )  # fmt: skip
    loss, metrics = policy_loss(
        logprobs, make_batch(rollout, advantages), algorithm=algorithm, ref_logprobs=ref, entropy=entropy, denominator=7
    )
    loss.backward()
    p = logprobs.detach()
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
    total = value.sum() + kl_coefficient * kl.sum() - entropy_coefficient * entropy.detach().sum()
    torch.testing.assert_close(loss.detach(), total / 7)
    torch.testing.assert_close(logprobs.grad, (gradient + kl_coefficient * kl_gradient) / 7)
    if entropy_coefficient:
        torch.testing.assert_close(entropy.grad, torch.full_like(entropy, -entropy_coefficient / 7))
    wanted = {
        "policy_loss": value.sum(),
        "clip_fraction": (~active & (advantages != 0)).sum(),
        "truncated_fraction": (ratio != capped).sum(),
        "ratio": ratio.sum(),
        "importance_weight": 30.0,
        "rollout_policy_kl": (ratio - 1 - (p - rollout)).sum(),
        "logprob_difference_max": (p - rollout).abs().max(),
        "kl_ref": kl.sum(),
        "entropy": entropy.detach().sum(),
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-5
    )
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("cap", [0.0, 1.2, 2.0])
def test_on_policy_is_a_weighted_policy_gradient(cap):
    """Whatever the sampler's log-probabilities: nothing is clipped, the gradient is -A w, w a constant."""
    logprobs, rollout, advantages, _ = sample(50, spread=1.0)
    loss, metrics = policy_loss(
        logprobs, make_batch(rollout, advantages), algorithm=AlgorithmConfig(importance_cap=cap), denominator=50,
        on_policy=True,
    )  # fmt: skip
    loss.backward()
    drift = (logprobs.detach() - rollout).exp()
    weight = drift.clamp(max=cap) if cap else torch.ones_like(drift)
    torch.testing.assert_close(logprobs.grad, -advantages * weight / 50)
    torch.testing.assert_close(loss.detach(), -(advantages * weight).mean())
    assert metrics["clip_fraction"] == 0
    assert float(metrics["importance_weight"]) == pytest.approx(float(weight.sum()), rel=1e-6)
    assert metrics["truncated_fraction"] == (int((drift > cap).sum()) if cap else 0)
    assert float(metrics["ratio"]) == pytest.approx(float(drift.sum()), rel=1e-6)


def test_on_and_off_policy_agree_where_nothing_moved():
    _, rollout, advantages, _ = sample(20)
    gradients = []
    for on_policy in (True, False):
        logprobs = rollout.clone().requires_grad_()
        loss, metrics = policy_loss(
            logprobs, make_batch(rollout, advantages), algorithm=AlgorithmConfig(), denominator=20, on_policy=on_policy
        )
        loss.backward()
        gradients.append(logprobs.grad)
        assert metrics["rollout_policy_kl"] == metrics["logprob_difference_max"] == metrics["clip_fraction"] == 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("on_policy", [True, False])
def test_tokens_nobody_sampled_count_as_on_policy(on_policy):
    """NaN in rollout_logprobs: retrieved tokens that are trained on when observations are not masked."""
    logprobs, rollout, advantages, _ = sample(10)
    rollout[::2] = float("nan")
    loss, metrics = policy_loss(
        logprobs, make_batch(rollout, advantages), algorithm=AlgorithmConfig(), denominator=1, on_policy=on_policy
    )
    loss.backward()
    torch.testing.assert_close(logprobs.grad[::2], -advantages[::2])
    assert loss.isfinite()
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_finite_at_the_extremes(on_policy, cap):
    extremes = torch.tensor([0.0, -1.0, -100.0, -2e4, -1e30])
    leaf = extremes.repeat_interleave(5).requires_grad_()
    for sign in (1.0, -1.0):
        loss, metrics = policy_loss(
            leaf, make_batch(extremes.repeat(5), sign * torch.ones(25)), ref_logprobs=extremes.repeat(5).flip(0),
            algorithm=AlgorithmConfig(kl_coefficient=0.1, importance_cap=cap), denominator=25, on_policy=on_policy,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())


def test_kl_in_reward_is_measured_but_not_in_the_loss():
    logprobs, rollout, advantages, ref = sample(10)
    algorithm = AlgorithmConfig(name="ppo", kl_coefficient=0.5, kl_in_reward=True)
    batch = make_batch(rollout, advantages)
    with_ref, metrics = policy_loss(logprobs, batch, algorithm=algorithm, ref_logprobs=ref, denominator=10)
    without, bare = policy_loss(logprobs, batch, algorithm=algorithm, denominator=10)
    assert with_ref == without
    assert metrics["kl_ref"] > 0
    assert "kl_ref" not in bare
    assert "entropy" not in bare


def test_no_policy_tokens_add_nothing_and_still_have_a_graph():
    empty = torch.zeros(0, requires_grad=True)
    loss, metrics = policy_loss(
        empty, make_batch(torch.zeros(0), torch.zeros(0)), algorithm=AlgorithmConfig(), entropy=empty, denominator=5
    )
    loss.backward()
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert value_loss(empty, torch.zeros(0), torch.zeros(0), 0.5, 5) == 0


def test_the_denominator_may_live_on_the_device():
    logprobs, rollout, advantages, _ = sample(10)
    losses = [
        policy_loss(logprobs, make_batch(rollout, advantages), algorithm=AlgorithmConfig(), denominator=n)[0]
        for n in (10, torch.tensor(10))
    ]
    assert losses[0] == losses[1]


def test_metrics_join_by_sum_and_by_maximum():
    totals: dict[str, torch.Tensor] = {}
    for ratio, largest in ((1.0, 0.5), (2.0, 0.25)):
        accumulate_metrics(totals, {"ratio": torch.tensor(ratio), "logprob_difference_max": torch.tensor(largest)})
    assert totals == {"ratio": 3.0, "logprob_difference_max": 0.5}
    assert set(totals) >= MAX_METRICS


def test_value_loss_by_hand():
    values = torch.tensor([0.0, 2.0, 2.0], requires_grad=True)
    returns, old = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 1.0])
    loss = value_loss(values, returns, old, 0.5, 2)
    # 1st: within the clip. 2nd: held at 1.5, but the unclipped error is larger. 3rd: held at 1.5, the larger error.
    torch.testing.assert_close(loss.detach(), torch.tensor(0.5 * (1.0 + 1.0 + 1.5**2) / 2))
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.5, 0.5, 0.0]))
    torch.testing.assert_close(value_loss(values, returns, old, 0.0, 2).detach(), torch.tensor(0.5 * 3.0 / 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(3)}, r"logprobs must be \[2\], one per policy token, got \[3\]"),
        ({"ref_logprobs": torch.zeros(2, 1)}, "ref_logprobs must be"),
        ({"entropy": torch.zeros(1)}, "entropy must be"),
        ({"algorithm": AlgorithmConfig(kl_coefficient=0.1)}, "kl_coefficient is above 0; give ref_logprobs"),
        ({"algorithm": AlgorithmConfig(entropy_coefficient=0.1)}, "entropy_coefficient is above 0; give entropy"),
        ({"denominator": 0}, "denominator: must be the number of policy tokens"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"logprobs": torch.zeros(2), "algorithm": AlgorithmConfig(), "denominator": 1} | change
    with pytest.raises(ValueError, match=message):
        policy_loss(batch=make_batch(torch.zeros(2), torch.zeros(2)), **arguments)


def test_value_loss_names_a_wrong_shape():
    with pytest.raises(ValueError, match="returns must have the shape of values"):
        value_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), 0.5, 1)
