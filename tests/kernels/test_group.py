"""Group advantages and whitening against plain fp64 loops, and moments that are joined across micro-batches."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import group_advantages, masked_moments, masked_whiten, reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


rewards_and_groups = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, -3.0]), st.integers(-2, 5)), max_size=40
).map(lambda pairs: (torch.tensor([r for r, _ in pairs]), torch.tensor([g for _, g in pairs], dtype=torch.int64)))


@settings(deadline=None)
@given(sample=rewards_and_groups, normalize_std=st.booleans())
def test_matches_the_oracle(sample, normalize_std):
    rewards, groups = sample
    advantages, keep = group_advantages(rewards, groups, normalize_std=normalize_std)
    want, want_keep = reference.group_advantages(rewards.double(), groups, normalize_std=normalize_std)
    assert torch.equal(keep, want_keep)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), want, rtol=1e-5, atol=1e-6)
    assert (advantages[~keep] == 0).all()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_advantages_are_fp32_of_any_rewards(count):
    advantages, keep = group_advantages(torch.rand(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int32))
    assert (advantages.dtype, keep.dtype) == (torch.float32, torch.bool)
    assert keep.tolist() == [count > 1] * count


def test_by_hand():
    rewards, groups = torch.tensor([1.0, 5.0, 0.0, 0.0, 5.0]), torch.tensor([7, -1, 7, 7, -1])
    advantages, keep = group_advantages(rewards, groups)
    third = 1 / 3
    std = (((1 - third) ** 2 + 2 * third**2) / 2) ** 0.5  # unbiased
    torch.testing.assert_close(advantages, torch.tensor([(1 - third) / std, 0, -third / std, -third / std, 0]))
    assert keep.tolist() == [True, False, True, True, False]


def test_equal_rewards_do_not_become_a_direction():
    """The mean of equal numbers may differ from them; the rest, over a tiny deviation, is not signal."""
    rewards = torch.full((5,), 0.1)
    advantages, keep = group_advantages(rewards, torch.zeros(5, dtype=torch.int64))
    assert not keep.any()
    assert (advantages == 0).all()


def test_a_nan_stays_in_its_group():
    """And the NaN is loud: the group is kept, and its advantages are NaN."""
    rewards, groups = torch.randn(30), torch.arange(30) % 4
    want, _ = group_advantages(rewards, groups)
    rewards[5] = torch.nan
    advantages, keep = group_advantages(rewards, groups)
    others = groups != 1
    assert torch.equal(advantages[others], want[others])
    assert advantages[~others].isnan().all() and keep[~others].all()


def test_a_group_alone_equals_the_group_in_a_batch():
    """Bit for bit, wherever its samples are, and every time."""
    rewards, groups = torch.randn(300), torch.randint(9, (300,))
    together, keep = group_advantages(rewards, groups)
    assert torch.equal(group_advantages(rewards, groups)[0], together)
    for group in range(9):
        members = groups == group
        alone, _ = group_advantages(rewards[members], groups[members])
        assert torch.equal(alone, together[members])
        assert keep[members].all()


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3), max_size=50),
    cut=st.integers(0, 50),
    masked=st.booleans(),
)
def test_whitening_in_parts_equals_whitening_the_whole(values, cut, masked):
    values = torch.tensor(values, dtype=torch.float64)
    mask = torch.rand(len(values), generator=torch.Generator().manual_seed(cut)) < 0.7 if masked else None
    parts = [(values[part], None if mask is None else mask[part]) for part in (slice(0, cut), slice(cut, None))]
    moments = sum(masked_moments(*part) for part in parts)
    have = torch.cat([masked_whiten(*part, moments=moments) for part in parts])
    whole = masked_whiten(values, mask)
    torch.testing.assert_close(have, whole, rtol=1e-4, atol=1e-5)
    if values.numel() and float(values.std(correction=0)) > 1e-2:
        torch.testing.assert_close(whole.double(), reference.masked_whiten(values, mask), rtol=1e-5, atol=1e-5)


def test_whitened_values_have_mean_zero_and_unit_variance():
    values, mask = 1000 + 0.5 * torch.randn(4000), torch.rand(4000) < 0.5
    values[~mask] = float("nan")
    whitened = masked_whiten(values, mask)
    assert whitened.dtype == torch.float32
    assert (whitened[~mask] == 0).all()
    assert float(whitened[mask].mean()) == pytest.approx(0, abs=1e-4)
    assert float(whitened[mask].std()) == pytest.approx(1, abs=1e-4)


def test_small_spreads_far_from_zero_keep_their_digits():
    """A mean rounded to fp32 would be off by up to 5e-4."""
    values = 1e4 + torch.randn(300)
    torch.testing.assert_close(
        masked_whiten(values).double(), reference.masked_whiten(values.double()), rtol=1e-6, atol=1e-6
    )


def test_whitening_with_moments_does_not_add_the_values_up(monkeypatch):
    moments = masked_moments(torch.randn(50))
    monkeypatch.setattr(sys.modules["searchr1_kernels.group"], "_masked_moments", None)
    assert masked_whiten(torch.randn(20), moments=moments).isfinite().all()
    with pytest.raises(ValueError, match="mask: expected shape"):
        masked_whiten(torch.randn(20), torch.ones(3, dtype=torch.bool), moments=moments)


@pytest.mark.parametrize("value", [0.1, 1e3 / 3, 123456.7, 1e9 / 7, -1e9 / 3])
@pytest.mark.parametrize("count", [2, 3, 999])
def test_equal_values_become_zero(value, count):
    """Rounding may make their variance negative."""
    whitened = masked_whiten(torch.full((count,), value, dtype=torch.float64))
    assert whitened.abs().max() <= 2e-3


@pytest.mark.parametrize("values", [torch.zeros(0), torch.tensor([3.0])])
def test_too_few_values_become_zero(values):
    assert (masked_whiten(values) == 0).all()
    assert (masked_whiten(values, torch.zeros(values.shape, dtype=torch.bool)) == 0).all()


def test_wrong_arguments_are_named():
    groups = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="rewards: expected a tensor, got list"):
        group_advantages([1.0, 0.0, 1.0], groups)
    with pytest.raises(ValueError, match="groups: expected shape"):
        group_advantages(torch.zeros(2), groups)
    with pytest.raises(ValueError, match="groups: expected .*int64"):
        group_advantages(torch.zeros(3), groups.float())
    with pytest.raises(ValueError, match=r"groups: expected the device of rewards \(cpu\), got meta"):
        group_advantages(torch.zeros(3), groups.to("meta"))
    with pytest.raises(ValueError, match="rewards: expected a floating-point"):
        group_advantages(groups, groups)
    with pytest.raises(ValueError, match="eps: expected a number not below 0, got -1"):
        group_advantages(torch.zeros(3), groups, eps=-1.0)
    with pytest.raises(ValueError, match="eps: expected a number not below 0, got -1"):
        masked_whiten(torch.zeros(3), eps=-1.0)
    with pytest.raises(ValueError, match=r"values: expected shape \[N\], got \[3, 2\]"):
        masked_whiten(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="moments: expected shape"):
        masked_whiten(torch.zeros(3), moments=torch.zeros(2))
    with pytest.raises(ValueError, match="values: expected a floating-point"):
        masked_moments(groups)
