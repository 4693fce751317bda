"""The scans (compiled loop, doubling, Triton) against the plain loop, over ragged segments and masks."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import _gae_llvm, gae, reference
from searchr1_kernels.gae import _scan_torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def device_scan(rewards, values, cu_seqlens, *, gamma=1.0, lam=1.0, mask=None):
    """The scan for devices without Triton, run on the CPU."""
    return _scan_torch(rewards, values, cu_seqlens, gamma, lam, mask, torch.promote_types(values.dtype, torch.float32))


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [gae, device_scan])


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@IMPLEMENTATIONS
@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=8),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    policy_share=st.sampled_from([None, 0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle(implementation, lengths, gamma, lam, policy_share, seed):
    generator, total = torch.Generator().manual_seed(seed), sum(lengths)
    rewards = torch.randn(total, generator=generator, dtype=torch.float64)
    values = torch.randn(total, generator=generator, dtype=torch.float64)
    mask = None if policy_share is None else torch.rand(total, generator=generator) < policy_share
    options = {"gamma": gamma, "lam": lam, "mask": mask}
    for have, want in zip(
        implementation(rewards, values, offsets(lengths), **options),
        reference.gae(rewards, values, offsets(lengths), **options),
        strict=True,
    ):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
        assert mask is None or (have[~mask] == 0).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("rest", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_mask_of_eight_tokens(implementation, dtype, rest):
    """A CPU takes eight tokens at a time, from the end, in three ways by their mask; `rest` remain at the beginning."""
    patterns = (torch.randperm(256)[:, None] >> torch.arange(8) & 1).bool()
    alike = torch.tensor([[True], [True], [False], [False], [True]]).expand(5, 8)  # each way after both
    mask = torch.cat([torch.rand(rest) < 0.5, patterns.flatten(), alike.flatten()])
    rewards, values = torch.randn(2, len(mask), dtype=dtype)
    rewards[~mask & (torch.rand(len(mask)) < 0.5)] = 0.0
    options = {"gamma": 0.97, "lam": 0.9, "mask": mask}
    want = reference.gae(rewards.double(), values.double(), offsets([len(mask)]), **options)
    values[~mask] = float("nan")  # must not be read
    precision = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    for have, wanted in zip(implementation(rewards, values, offsets([len(mask)]), **options), want, strict=True):
        torch.testing.assert_close(have, wanted.to(dtype), **precision)


@IMPLEMENTATIONS
def test_by_hand(implementation):
    """Two sequences; E marks tokens of the environment, and the second sequence begins with one."""
    #                        A     E    E    A   |  E     A
    rewards = torch.tensor([0.0, 0.25, 0.0, 1.0, 9.0, 2.0])
    values = torch.tensor([0.5, 7.0, 7.0, 0.25, 7.0, 1.0])
    mask = torch.tensor([True, False, False, True, False, True])
    advantages, returns = implementation(rewards, values, offsets([4, 2]), gamma=0.5, lam=0.5, mask=mask)
    last = 1.0 - 0.25
    first = (0.0 + 0.25) + 0.5 * 0.25 - 0.5 + 0.25 * last
    torch.testing.assert_close(advantages, torch.tensor([first, 0, 0, last, 0, 1.0]))
    torch.testing.assert_close(returns, torch.tensor([first + 0.5, 0, 0, 1.0, 0, 2.0]))


@IMPLEMENTATIONS
def test_mask_equals_compaction(implementation):
    """What masked tokens hold does not matter."""
    rewards, values = torch.randn(50), torch.randn(50)
    mask = torch.rand(50) < 0.6
    rewards[~mask], values[~mask] = 0.0, float("nan")
    cu_seqlens = offsets([20, 0, 30])
    seen = torch.cat([torch.zeros(1, dtype=torch.long), mask.cumsum(0)])
    whole = implementation(rewards, values, cu_seqlens, gamma=0.9, lam=0.9, mask=mask)
    compact = implementation(rewards[mask], values[mask], seen[cu_seqlens.long()], gamma=0.9, lam=0.9)
    for have, want in zip(whole, compact, strict=True):
        torch.testing.assert_close(have[mask], want)


@IMPLEMENTATIONS
def test_undiscounted_advantage_is_return_minus_value(implementation):
    rewards, values = torch.zeros(3000), torch.randn(3000)
    rewards[-1] = 1.0
    advantages, returns = implementation(rewards, values, offsets([3000]))
    torch.testing.assert_close(returns, torch.ones(3000))
    torch.testing.assert_close(advantages, 1 - values)


@IMPLEMENTATIONS
def test_long_sequences_match_the_oracle(implementation):
    """Sequences longer than what is processed at once, and exactly as long."""
    lengths = [4096, 1, 8200, 4097]
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64)
    options = {"gamma": 0.99, "lam": 0.97, "mask": torch.rand(sum(lengths)) < 0.4}
    want = reference.gae(rewards, values, offsets(lengths), **options)
    for have, wanted in zip(implementation(rewards, values, offsets(lengths), **options), want, strict=True):
        torch.testing.assert_close(have, wanted, rtol=1e-11, atol=1e-11)


@IMPLEMENTATIONS
def test_a_sequence_alone_equals_the_sequence_in_a_batch(implementation):
    lengths = [7, 4100, 13, 9000, 20]
    rewards, values, mask = torch.randn(sum(lengths)), torch.randn(sum(lengths)), torch.rand(sum(lengths)) < 0.7
    together = implementation(rewards, values, offsets(lengths), gamma=0.9, lam=0.8, mask=mask)
    pieces = (tensor.split(lengths) for tensor in (rewards, values, mask))
    alone = [
        implementation(r, v, offsets([len(r)]), gamma=0.9, lam=0.8, mask=m) for r, v, m in zip(*pieces, strict=True)
    ]
    for output in range(2):
        assert torch.equal(together[output], torch.cat([pair[output] for pair in alone]))


@IMPLEMENTATIONS
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_tokens(implementation, lengths):
    for output in implementation(torch.zeros(0), torch.zeros(0), offsets(lengths)):
        assert output.shape == (0,)
        assert output.dtype == torch.float32


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rewards_are_not_rounded_to_the_type_of_the_values(implementation, dtype):
    """2^30 + 1 is 2^30 in fp32, so less 2^30 it is 1, or 0 if it was rounded."""
    rewards = torch.tensor([*[0.0] * 7, -(2.0**30), 2.0**30 + 1], dtype=torch.float64)
    advantages, returns = implementation(rewards, torch.zeros(9, dtype=dtype), offsets([9]))
    assert returns.tolist() == [*[1.0] * 8, 2.0**30]
    assert advantages.dtype == torch.float32


def test_threads_share_the_sequences(monkeypatch):
    """The bits are the same for any number of threads and any spread of the tokens."""
    lengths = [0, 3, 900, 0, 40, 1, 5000, 7, 300, 0]
    inputs = (torch.randn(sum(lengths)), torch.randn(sum(lengths)), offsets(lengths))
    options = {"gamma": 0.9, "lam": 0.8, "mask": torch.rand(sum(lengths)) < 0.5}
    alone = gae(*inputs, **options)
    monkeypatch.setattr(sys.modules["searchr1_kernels.gae"], "_PART_TOKENS", 100)
    for threads in (2, 3, 50):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        shared = gae(*inputs, **options)
        assert all(torch.equal(left, right) for left, right in zip(shared, alone, strict=True))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), max_size=12), num_parts=st.integers(1, 9))
def test_parts_have_about_as_many_tokens(lengths, num_parts):
    total, longest = sum(lengths), max(lengths, default=0)
    in_64_bits, cuts = _gae_llvm.cut(offsets(lengths).numpy(), total, num_parts)
    assert in_64_bits.dtype == np.int64 and in_64_bits.tolist() == offsets(lengths).tolist()
    assert len(cuts) == num_parts + 1 and cuts[0] == 0 and in_64_bits[cuts[-1]] == total
    for tokens in np.diff(in_64_bits[cuts]):
        assert 0 <= tokens <= total / num_parts + longest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_outputs_are_precise_constants(dtype):
    values = torch.randn(6, dtype=dtype, requires_grad=True)
    advantages, returns = gae(torch.ones(6), values, offsets([2, 4]))
    assert advantages.dtype == returns.dtype == torch.promote_types(dtype, torch.float32)
    assert not advantages.requires_grad
    assert not returns.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(3)}, "values: expected shape"),
        ({"rewards": torch.zeros(4, dtype=torch.int64)}, "rewards: expected a floating-point"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens: expected offsets that rise from 0 to 4, got 0 to 3"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "with a fall between"),
        ({"cu_seqlens": torch.tensor([0, 2**62, 4])}, "with a fall between"),
        ({"cu_seqlens": torch.tensor([-1, 2, 4])}, "expected offsets that rise from 0 to 4, got -1 to 4"),
        ({"cu_seqlens": torch.tensor([1, 2, 4], dtype=torch.int32)}, "rise from 0 to 4, got 1 to 4"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "expected offsets that rise from 0 to 4, got 0 to 5"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens: expected torch.int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens: expected at least one"),
        ({"cu_seqlens": [0, 4]}, "cu_seqlens: expected a tensor, got list"),
        ({"rewards": torch.zeros(4).numpy()}, "rewards: expected a tensor, got ndarray"),
        ({"mask": [True] * 4}, "mask: expected a tensor, got list"),
        ({"mask": torch.ones(4)}, "mask: expected torch.bool"),
        ({"values": torch.zeros(4, device="meta")}, r"values: expected the device of rewards \(cpu\), got meta"),
        ({"mask": torch.ones(4, dtype=torch.bool, device="meta")}, "mask: expected the device of rewards"),
        ({"gamma": 1.5}, "gamma: expected a number from 0 to 1, got 1.5"),
        ({"lam": -0.1}, "lam: expected a number from 0 to 1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"rewards": torch.zeros(4), "values": torch.zeros(4), "cu_seqlens": torch.tensor([0, 4])}
    with pytest.raises(ValueError, match=message):
        gae(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[1_000_003], [150_000, 1, 1023, 1024, 1025, 0, 70_000], [3] * 5000])
def test_a_gpu_and_a_cpu_agree(lengths, masked):
    total = sum(lengths)
    rewards, values, mask = torch.randn(total), torch.randn(total), torch.rand(total) < 0.4 if masked else None
    want = gae(rewards, values, offsets(lengths), gamma=0.99, lam=0.95, mask=mask)
    moved = (tensor.cuda() for tensor in (rewards, values, offsets(lengths)))
    have = gae(*moved, gamma=0.99, lam=0.95, mask=None if mask is None else mask.cuda())
    for left, right in zip(have, want, strict=True):
        torch.testing.assert_close(left.cpu(), right, rtol=1e-6, atol=1e-6)
