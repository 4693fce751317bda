"""Packing: every token once, no padding, the budget kept; and the same loss and gradients however a step is cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import linear_logprob

from searchr1_fast.config import AlgorithmConfig
from searchr1_fast.losses import policy_loss
from searchr1_fast.packing import assign_to_ranks, pack, plan
from searchr1_fast.types import FinishReason, Question, Trajectory

QUESTION = Question("q", "text", ("answer",), "test")
VOCABULARY = 50


def make(pieces: list[tuple[bool, int]], seed: int = 0) -> Trajectory:
    """Random tokens in pieces (is policy, length) after a prompt, the first piece."""
    generator = np.random.default_rng(seed)
    sizes = [size for _, size in pieces]
    mask = np.repeat([policy for policy, _ in pieces], sizes)
    logprobs = np.where(mask, -generator.random(sum(sizes)) - 3.5, 0.0).astype(np.float32)
    ids = generator.integers(0, VOCABULARY, sum(sizes))
    return Trajectory(QUESTION, 0, ids, mask, logprobs, sizes[0], [], FinishReason.ANSWER)


def some(count: int, seed: int = 0) -> list[Trajectory]:
    """Prompt, turn, observation, turn, of random lengths; the policy may have said nothing."""
    generator = np.random.default_rng(seed)
    return [
        make([(i % 2 == 1, int(generator.integers(i == 0, 9))) for i in range(4)], seed * 1000 + number)
        for number in range(count)
    ]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 25),
    seed=st.integers(0, 100),
    budget=st.integers(1, 120),
    mask_observations=st.booleans(),
    choose=st.booleans(),
)
def test_every_token_once_and_in_place(count, seed, budget, mask_observations, choose):
    trajectories = some(count, seed)
    advantages = [np.random.default_rng(seed + i).normal(size=len(t.token_ids)) for i, t in enumerate(trajectories)]
    indices = list(range(count - 1, -1, -2)) if choose else None
    batches = pack(trajectories, advantages, budget, indices=indices, mask_observations=mask_observations)

    packed = [index for batch in batches for index in batch.trajectory_index]
    assert sorted(packed) == sorted(range(count) if indices is None else indices)
    for batch in batches:
        assert batch.num_tokens <= budget or batch.num_sequences == 1
        assert batch.trajectory_index == sorted(batch.trajectory_index)
        assert batch.cu_seqlens.dtype == batch.policy_cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens[-1] == batch.num_tokens
        assert batch.policy_cu_seqlens[-1] == batch.num_policy_tokens
        assert batch.max_seqlen == batch.cu_seqlens.diff().max()
        for place, index in enumerate(batch.trajectory_index):
            trajectory = trajectories[index]
            begin, end = batch.cu_seqlens[place : place + 2].tolist()
            assert batch.token_ids[begin:end].tolist() == trajectory.token_ids.tolist()
            assert batch.positions[begin:end].tolist() == list(range(end - begin))
            policy = slice(*batch.policy_cu_seqlens[place : place + 2].tolist())
            if mask_observations:
                at = np.flatnonzero(trajectory.loss_mask)
            else:
                at = np.arange(trajectory.prompt_length, len(trajectory.token_ids))
            assert (batch.policy_index[policy] - begin + 1).tolist() == at.tolist()
            assert (batch.policy_index[policy] >= begin).all()  # predicted from inside the own sequence
            assert batch.targets[policy].tolist() == trajectory.token_ids[at].tolist()
            wanted = np.where(trajectory.loss_mask, trajectory.rollout_logprobs, np.nan)[at]
            np.testing.assert_array_equal(batch.rollout_logprobs[policy].numpy(), wanted)
            np.testing.assert_array_equal(batch.advantages[policy].numpy(), advantages[index][at].astype(np.float32))


@pytest.mark.parametrize("as_array", [False, True])
def test_one_advantage_for_a_whole_trajectory(as_array):
    trajectories = some(3)
    advantages = np.array([0.5, -1.0, 2.0], dtype=np.float32)
    (batch,) = pack(trajectories, advantages if as_array else advantages.tolist(), 10_000)
    wanted = np.repeat(advantages, batch.policy_cu_seqlens.diff().numpy())
    np.testing.assert_array_equal(batch.advantages.numpy(), wanted)


@given(lengths=st.lists(st.integers(1, 60), max_size=60), budget=st.integers(1, 100))
def test_plan_keeps_the_budget_and_wastes_few_bins(lengths, budget):
    bins = plan(lengths, budget)
    assert sorted(place for places in bins for place in places) == list(range(len(lengths)))
    loads = [sum(lengths[place] for place in places) for places in bins]
    shared = [load for load in loads if load <= budget]
    assert all(len(places) == 1 for places, load in zip(bins, loads, strict=True) if load > budget)
    # Two lightest bins that fit in one would mean that a bin was opened for nothing.
    assert len(shared) < 2 or sum(sorted(shared)[:2]) > budget or sum(shared) > (len(shared) - 1) * budget
    assert plan(lengths, budget) == bins


@pytest.mark.parametrize(
    ("lengths", "budget", "wanted"),
    [
        ([30, 29, 28, 10, 9, 8], 60, [57, 57]),
        ([5, 5, 4, 4, 2], 10, [5, 7, 8]),  # two bins of 9 and one of 2, were the third not there from the start
    ],
)
def test_plan_balances(lengths, budget, wanted):
    assert sorted(sum(lengths[place] for place in places) for places in plan(lengths, budget)) == wanted


@given(lengths=st.lists(st.integers(1, 5000), max_size=60), world_size=st.integers(1, 9))
def test_ranks_share_everything_evenly(lengths, world_size):
    ranks = assign_to_ranks(lengths, world_size)
    assert len(ranks) == world_size
    assert all(places == sorted(places) for places in ranks)
    assert sorted(place for places in ranks for place in places) == list(range(len(lengths)))
    loads = [sum(lengths[place] for place in places) for places in ranks]
    assert max(loads) - min(loads) <= 1.25 * max(lengths, default=0)


def test_attention_counts_as_cost():
    """Sixteen sequences of 1k tokens cost less than one of 16k, so its rank gets none of them, and no more tokens."""
    ranks = assign_to_ranks([16384, *[1024] * 20], 2)
    assert ranks[0] == [0]
    assert ranks[1] == list(range(1, 21))


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("budget", [1, 40, 90])
def test_loss_and_gradients_do_not_depend_on_the_cut(make_decoder, budget, on_policy):
    tiny_decoder = make_decoder()
    trajectories = some(12, seed=3)
    advantages = np.random.default_rng(0).normal(size=12).tolist()
    algorithm = AlgorithmConfig(kl_coefficient=0.1, entropy_coefficient=0.01)

    def step(budget: int) -> tuple[float, dict[str, float], list[torch.Tensor]]:
        tiny_decoder.zero_grad()
        total, sums = 0.0, {}
        batches = pack(trajectories, advantages, budget)
        denominator = sum(batch.num_policy_tokens for batch in batches)
        for batch in batches:
            hidden = tiny_decoder.hidden(batch.token_ids, batch.cu_seqlens)[batch.policy_index]
            logprobs, entropy = linear_logprob(hidden, tiny_decoder.head_weight, batch.targets, return_entropy=True)
            loss, metrics = policy_loss(
                logprobs, batch, algorithm=algorithm, ref_logprobs=batch.rollout_logprobs - 0.1, entropy=entropy,
                denominator=denominator, on_policy=on_policy,
            )  # fmt: skip
            loss.backward()
            total += float(loss.detach())
            for name in ("clip_fraction", "kl_ref", "entropy", "rollout_policy_kl"):
                sums[name] = sums.get(name, 0.0) + float(metrics[name])
        return total, sums, [parameter.grad.clone() for parameter in tiny_decoder.parameters()]

    whole, parts = step(10_000), step(budget)
    assert len(pack(trajectories, advantages, budget)) > 1
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)
    assert parts[1] == pytest.approx(whole[1], rel=1e-4)
    for have, want in zip(parts[2], whole[2], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-6)


def test_nothing_to_pack():
    assert pack([], [], 10) == []
    assert pack(some(3), [0.0] * 3, 10, indices=[]) == []


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.0], 10), {}, "got 1 advantages for 2 trajectories"),
        (([0.0, np.zeros(3)], 99), {}, "advantage of trajectory 1 must be one number or"),
        (([0.0, float("nan")], 99), {}, r"trajectory 1 \(question q\) has a log-probability or advantage that is not"),
        (([0.0, 0.0], 0), {}, "train.tokens_per_microbatch: must be at least 1, got 0"),
        (([0.0, 0.0], 10), {"indices": [0, 2]}, "indices must be distinct and from 0 to 1"),
        (([0.0, 0.0], 10), {"indices": [1, 1]}, "indices must be distinct"),
    ],
)
def test_mistakes_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        pack([make([(False, 3), (True, 4)]), make([(False, 3), (True, 5)])], *arguments, **options)


def test_a_broken_sampler_is_noticed():
    trajectory = make([(False, 3), (True, 4)])
    broken = dataclasses.replace(trajectory, rollout_logprobs=np.full(7, np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="not finite"):
        pack([broken], [1.0], 10)
