"""Advantages of GRPO and PPO by hand, against the oracle, and independent of how a step is cut into batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from searchr1_kernels import reference

from searchr1_fast.advantage import grpo_advantages, ppo_advantages, token_rewards, whiten_step
from searchr1_fast.types import PackedBatch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_batch(policy_lengths: list[int], seed: int = 0) -> PackedBatch:
    """Sequences of one prompt token and policy tokens, with random log-probabilities."""
    offsets = np.concatenate([[0], np.cumsum(policy_lengths)]).astype(np.int32)
    sequence = torch.from_numpy(offsets) + torch.arange(len(offsets), dtype=torch.int32)
    total = int(offsets[-1])
    generator = torch.Generator().manual_seed(seed)
    return PackedBatch(
        token_ids=torch.zeros(int(sequence[-1]), dtype=torch.int64),
        positions=torch.cat([torch.arange(length + 1) for length in policy_lengths]),
        cu_seqlens=sequence,
        max_seqlen=max(policy_lengths) + 1,
        policy_index=torch.zeros(total, dtype=torch.int64),
        targets=torch.zeros(total, dtype=torch.int64),
        policy_cu_seqlens=torch.from_numpy(offsets),
        rollout_logprobs=-torch.rand(total, generator=generator),
        advantages=torch.zeros(total),
        trajectory_index=list(range(len(policy_lengths))),
    )


def test_grpo_matches_the_oracle():
    generator = np.random.default_rng(0)
    rewards, groups = generator.integers(0, 2, 60).astype(float), generator.integers(0, 15, 60)
    for normalize_std in (True, False):
        advantages, keep = grpo_advantages(rewards, groups, normalize_std)
        want = reference.group_advantages(torch.tensor(rewards), torch.tensor(groups), normalize_std=normalize_std)
        np.testing.assert_allclose(advantages, want[0].numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(keep, want[1].numpy())
        assert advantages.dtype == np.float32
        assert keep.dtype == bool


def test_grpo_by_hand():
    advantages, keep = grpo_advantages([1.0, 0.0, 1.0, 3.0], [0, 0, 1, 2])
    np.testing.assert_allclose(advantages, [0.5**0.5, -(0.5**0.5), 0, 0], rtol=1e-5)
    assert keep.tolist() == [True, True, False, False]


def test_grpo_refuses_a_reward_that_is_not_finite():
    with pytest.raises(ValueError, match="the reward of trajectory 1 is nan"):
        grpo_advantages([0.0, float("nan")], [0, 0])


def test_outcome_stands_on_the_last_policy_token():
    batch = make_batch([3, 0, 2])
    rewards = token_rewards(batch, torch.tensor([1.0, 9.0, -0.5]))
    assert rewards.tolist() == [0.0, 0.0, 1.0, 0.0, -0.5]
    assert token_rewards(make_batch([0, 0]), torch.tensor([1.0, 1.0])).shape == (0,)
    assert token_rewards(make_batch([0, 1]), torch.tensor([7.0, 1.0])).tolist() == [1.0]


def test_kl_in_reward():
    batch = make_batch([2, 1])
    ref = batch.rollout_logprobs - torch.tensor([0.5, -0.25, 1.0])
    rewards = token_rewards(batch, torch.tensor([1.0, 0.0]), ref_logprobs=ref, kl_coefficient=0.1)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 1.025, -0.1]))
    assert token_rewards(batch, torch.tensor([1.0, 0.0]), ref_logprobs=ref).tolist() == [0.0, 1.0, 0.0]
    batch.rollout_logprobs[0] = float("nan")  # a retrieved token, trained on without a mask, was never sampled
    rewards = token_rewards(batch, torch.tensor([1.0, 0.0]), ref_logprobs=ref, kl_coefficient=0.1)
    torch.testing.assert_close(rewards, torch.tensor([0.0, 1.025, -0.1]))


def test_ppo_by_hand():
    """gamma = lam = 1 without whitening: the sum of the rewards still to come, less the value."""
    batch = make_batch([3, 2])
    values = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    rewards = token_rewards(batch, torch.tensor([1.0, 0.0]))
    (packed,), (returns,) = ppo_advantages([batch], [rewards], [values], whiten=False)
    torch.testing.assert_close(returns, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(packed.advantages, returns - values)
    assert (batch.advantages == 0).all()
    assert packed.trajectory_index == batch.trajectory_index


@pytest.mark.parametrize("whiten", [False, True])
def test_ppo_does_not_depend_on_the_cut(whiten):
    lengths, parts = [4, 0, 7, 3, 9, 1], [[4, 0], [7, 3, 9], [1]]
    values, rewards = torch.randn(24), torch.randn(24)
    split = [sum(part) for part in parts]
    options = {"gamma": 0.9, "lam": 0.8, "whiten": whiten}
    (whole,), (whole_returns,) = ppo_advantages([make_batch(lengths)], [rewards], [values], **options)
    batches, returns = ppo_advantages(
        [make_batch(p) for p in parts], rewards.split(split), values.split(split), **options
    )
    torch.testing.assert_close(torch.cat([batch.advantages for batch in batches]), whole.advantages)
    torch.testing.assert_close(torch.cat(returns), whole_returns)
    if whiten:
        assert float(whole.advantages.mean()) == pytest.approx(0, abs=1e-5)
        assert float(whole.advantages.std()) == pytest.approx(1, abs=1e-5)


def test_whitening_across_ranks():
    """Two batches here and sums from another rank, against the moments of all; a rank without a batch takes part."""
    values = torch.randn(30)
    theirs = torch.tensor([12.0, 3.0, 40.0], dtype=torch.float64)  # another rank's count, sum and sum of squares

    def all_reduce(moments: torch.Tensor) -> None:
        moments += theirs

    whitened = torch.cat(whiten_step(list(values.split([10, 20])), all_reduce))
    count = 42
    mean = (values.double().sum() + 3.0) / count
    variance = (values.double().square().sum() + 40.0 - count * mean**2) / (count - 1)
    torch.testing.assert_close(whitened.double(), (values.double() - mean) / variance.sqrt(), rtol=1e-5, atol=1e-6)
    called = []
    assert whiten_step([], called.append) == []
    assert len(called) == 1
