"""Packing: no padding, no duplicates, the budget kept; and the same loss and gradients however a step is laid out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searchr1_kernels import PolicyLoss, linear_logprob, linear_policy_loss

from searchr1_fast.packing import deal, in_order, lay_out, pack, pack_rank, plan, shared_lengths
from searchr1_fast.policy import TokenScorer
from searchr1_fast.types import FinishReason, PackedBatch, Question, Trajectory

QUESTION = Question("q", "text", ("answer",), "test")
VOCABULARY = 50


def make(pieces: list[tuple[bool, int]], seed: int = 0) -> Trajectory:
    """A trajectory of random tokens in pieces (is policy, length), the first of which is the prompt."""
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


def family(count: int, seed: int = 0) -> list[Trajectory]:
    """Trajectories that share prefixes: each is an earlier one, cut somewhere or whole, and continued differently."""
    generator = np.random.default_rng(seed)
    trajectories = some(min(count, 2), seed)
    while len(trajectories) < count:
        parent = trajectories[generator.integers(len(trajectories))]
        cut = int(generator.integers(parent.prompt_length, len(parent.token_ids) + 1))
        rest = make([(False, 1), (True, int(generator.integers(0, 6)))], int(generator.integers(1 << 30)))
        parts = [(parent, slice(0, cut)), (rest, slice(1, None))]
        arrays = (
            np.concatenate([getattr(trajectory, name)[part] for trajectory, part in parts])
            for name in ("token_ids", "loss_mask", "rollout_logprobs")
        )
        trajectories.append(Trajectory(QUESTION, 0, *arrays, parent.prompt_length, [], FinishReason.ANSWER))
    return [trajectories[i] for i in generator.permutation(count)]


def key_rows(batch: PackedBatch, place: int) -> list[int]:
    """The rows that sequence `place` attends to."""
    if batch.prefixes is None:
        return list(range(*batch.cu_seqlens[place : place + 2].tolist()))
    begin, end = batch.prefixes.cu_seqlens_k[place : place + 2].tolist()
    return batch.prefixes.key_index[begin:end].tolist()


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(0, 25),
    seed=st.integers(0, 100),
    budget=st.integers(1, 120),
    mask_observations=st.booleans(),
    choose=st.booleans(),
    related=st.booleans(),
    share_prefixes=st.booleans(),
)
def test_every_token_in_place(count, seed, budget, mask_observations, choose, related, share_prefixes):
    trajectories = family(count, seed) if related else some(count, seed)
    advantages = [np.random.default_rng(seed + i).normal(size=len(t.token_ids)) for i, t in enumerate(trajectories)]
    indices = list(range(count - 1, -1, -2)) if choose else None
    options = {"indices": indices, "mask_observations": mask_observations, "share_prefixes": share_prefixes}
    batches = pack(trajectories, advantages, budget, **options)

    packed = [index for batch in batches for index in batch.trajectory_index]
    assert sorted(packed) == sorted(range(count) if indices is None else indices)
    for batch in batches:
        assert batch.num_tokens <= budget or batch.num_sequences == 1
        assert batch.cu_seqlens.dtype == batch.policy_cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens[-1] == batch.num_tokens
        assert batch.policy_cu_seqlens[-1] == batch.num_policy_tokens
        assert batch.max_seqlen == batch.cu_seqlens.diff().max()
        assert share_prefixes or batch.prefixes is None
        beginnings = {tuple(trajectories[i].token_ids[: n + 1]) for i in batch.trajectory_index for n in range(
            len(trajectories[i].token_ids))}  # fmt: skip
        assert not share_prefixes or batch.num_tokens == len(beginnings)  # no duplicates
        for place, index in enumerate(batch.trajectory_index):
            trajectory, own = trajectories[index], list(range(*batch.cu_seqlens[place : place + 2].tolist()))
            policy = slice(*batch.policy_cu_seqlens[place : place + 2].tolist())
            at = np.arange(trajectory.prompt_length, len(trajectory.token_ids))
            if mask_observations:
                at = np.flatnonzero(trajectory.loss_mask)
            rows = key_rows(batch, place)
            if own:
                assert rows[-len(own) :] == own
                assert batch.token_ids[rows].tolist() == trajectory.token_ids.tolist()
                assert batch.positions[rows].tolist() == list(range(len(trajectory.token_ids)))
                assert batch.policy_index[policy].tolist() == [rows[i - 1] for i in at]
            assert batch.token_ids[batch.policy_index[policy]].tolist() == trajectory.token_ids[at - 1].tolist()
            assert batch.positions[batch.policy_index[policy]].tolist() == (at - 1).tolist()
            assert batch.targets[policy].tolist() == trajectory.token_ids[at].tolist()
            wanted = np.where(trajectory.loss_mask, trajectory.rollout_logprobs, np.nan)[at]
            np.testing.assert_array_equal(batch.rollout_logprobs[policy].numpy(), wanted)
            np.testing.assert_array_equal(batch.advantages[policy].numpy(), advantages[index][at].astype(np.float32))
        predictions = list(zip(batch.scored_rows.tolist(), batch.scored_targets.tolist(), strict=True))
        wanted = list(zip(batch.policy_index.tolist(), batch.targets.tolist(), strict=True))
        assert len(set(predictions)) == len(predictions)
        assert [predictions[int(i)] for i in batch.spread(torch.arange(len(predictions)).float())] == wanted


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_sharing_changes_no_score_and_no_gradient(make_decoder, budget):
    """Gradients of both outputs, weights per trajectory, and trajectories that are prefixes or copies of others."""
    decoder = make_decoder()
    trajectories = family(30, seed=5)
    advantages = np.random.default_rng(0).normal(size=30).tolist()

    def score(share_prefixes: bool) -> tuple[dict[int, list[float]], list[torch.Tensor], int]:
        decoder.zero_grad()
        scores, num_tokens = {}, 0
        for batch in pack(trajectories, advantages, budget, share_prefixes=share_prefixes):
            outputs = TokenScorer(decoder, 0.7)(batch, linear_logprob, return_entropy=True)
            logprobs, entropy = map(batch.spread, outputs)
            ((logprobs + 0.3 * entropy) * batch.advantages).sum().backward()
            for index, part in zip(batch.trajectory_index, logprobs.split(batch.policy_cu_seqlens.diff().tolist()),
                                   strict=True):  # fmt: skip
                scores[index] = part.tolist()
            num_tokens += batch.num_tokens
        return scores, [parameter.grad.clone() for parameter in decoder.parameters()], num_tokens

    shared, plain = score(True), score(False)
    assert shared[2] < 0.6 * plain[2] or budget == 1
    for index in range(30):
        assert shared[0][index] == pytest.approx(plain[0][index], rel=1e-4, abs=1e-5)
    for have, want in zip(shared[1], plain[1], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("as_array", [False, True])
def test_one_advantage_for_a_whole_trajectory(as_array):
    trajectories = some(3)
    advantages = np.array([0.5, -1.0, 2.0], dtype=np.float32)
    (batch,) = pack(trajectories, advantages if as_array else advantages.tolist(), 10_000)
    wanted = np.repeat(advantages[batch.trajectory_index], batch.policy_cu_seqlens.diff().numpy())
    np.testing.assert_array_equal(batch.advantages.numpy(), wanted)


@st.composite
def sorted_lengths(draw, most: int = 60) -> tuple[list[int], list[int]]:
    """Lengths, and how much each shares with the one before: at most the whole of either."""
    lengths = draw(st.lists(st.integers(1, most), max_size=40))
    bounds = [0, *(min(pair) for pair in zip(lengths, lengths[1:], strict=False))]
    return lengths, [draw(st.integers(0, bound)) for bound in bounds[: len(lengths)]]


def load(lengths: list[int], shared: list[int], begin: int, end: int) -> int:
    """Rows that a run of sequences takes."""
    return lengths[begin] + sum(lengths[begin + 1 : end]) - sum(shared[begin + 1 : end])


@settings(deadline=None)
@given(sequences=sorted_lengths(), budget=st.integers(1, 100))
def test_plan_keeps_the_budget_and_wastes_no_run(sequences, budget):
    lengths, shared = sequences
    runs = plan(lengths, shared, budget)
    assert [place for begin, end in runs for place in range(begin, end)] == list(range(len(lengths)))
    loads = [load(lengths, shared, begin, end) for begin, end in runs]
    assert all(rows <= budget or end - begin == 1 for rows, (begin, end) in zip(loads, runs, strict=True))
    fewest = {0: 0}  # by dynamic programming: the fewest runs that cover the first sequences
    for end in range(1, len(lengths) + 1):
        fits = [b for b in range(end) if b == end - 1 or load(lengths, shared, b, end) <= budget]
        fewest[end] = 1 + min(fewest[b] for b in fits)
    assert len(runs) == fewest[len(lengths)]


def test_plan_balances():
    assert plan([10] * 8, [0] * 8, 60) == [(0, 4), (4, 8)]
    assert plan([30, 30, 30, 30], [0, 20, 0, 20], 45) == [(0, 2), (2, 4)]


@settings(deadline=None)
@given(sequences=sorted_lengths(), budget=st.integers(1, 200), world_size=st.integers(1, 9))
def test_ranks_have_whole_rounds(sequences, budget, world_size):
    """Ranks differ by at most one batch, and there are no more rounds than the budget requires."""
    lengths, shared = sequences
    runs = plan(lengths, shared, budget, world_size)
    costs = [float(load(lengths, shared, *run)) for run in runs]
    dealt = deal(runs, costs, world_size)
    assert sorted(run for one in dealt for run in one) == runs
    counts = [len(one) for one in dealt]
    assert max(counts) == -(-len(plan(lengths, shared, budget)) // world_size)
    assert max(counts) - min(counts) <= 1 or len(runs) < world_size
    for number in range(max(counts) - 1):  # no batch of a later round costs more
        later = [costs[runs.index(run)] for one in dealt for run in one[number + 1 :]]
        assert min(costs[runs.index(one[number])] for one in dealt) >= max(later)


def test_attention_counts_as_cost():
    """A sequence of 24k tokens costs as much as 44 of 1k with twice its tokens, although there is room for more."""
    assert plan([24_000, *[1024] * 44], [0] * 45, 60_000, 2) == [(0, 1), (1, 45)]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_wait_little_for_one_another(world_size):
    """Lengths as Search-R1's models write them: most within 15 % of 680 tokens, some twice that.

    Minibatches have 51 questions with 5 samples, as in the paper's GRPO.
    """
    generator = np.random.default_rng(0)
    trajectories = []
    for _ in range(51):
        prompt = generator.integers(0, VOCABULARY, 170)
        for _ in range(5):
            length = int(generator.choice([600, 680, 760, 1030, 1400], p=[0.25, 0.5, 0.15, 0.08, 0.02]))
            trajectory = make([(False, 170), (True, 120), (False, length - 330), (True, 40)], len(trajectories))
            trajectory.token_ids[:170] = prompt
            trajectories.append(trajectory)
    for budget in (4096, 16_384):
        layout = lay_out(trajectories, budget, world_size)
        assert 1.0 <= layout.imbalance < 1.05
        batches = [pack_rank(trajectories, [0.0] * 255, layout, rank) for rank in range(world_size)]
        assert {len(one) for one in batches} == {layout.num_rounds}
        assert sorted(i for one in batches for batch in one for i in batch.trajectory_index) == list(range(255))
        pairs = [[int(batch.positions.sum()) + batch.num_tokens for batch in one] for one in batches]
        rows = [[batch.num_tokens for batch in one] for one in batches]
        costs = np.array(rows) + np.array(pairs) / (12 * 2048 / 2)  # [ranks, rounds], row by row
        assert costs.max(0).sum() / costs.sum(1).mean() == pytest.approx(layout.imbalance, rel=1e-3)


def test_less_to_do_than_ranks():
    layout = lay_out(some(3, seed=1), 1000, 5)
    assert [len(runs) for runs in layout.runs] == [1, 1, 1, 0, 0]
    assert layout.num_rounds == 1 and layout.imbalance >= 5 / 3
    nothing = lay_out([], 1000, 5)
    assert (nothing.runs, nothing.num_rounds, nothing.imbalance) == ([[]] * 5, 0, 1.0)


def test_order_and_shared_lengths():
    trajectories = [make([(False, 2), (True, 3)]) for _ in range(4)]
    for trajectory, ids in zip(trajectories, ([5, 300, 1, 1, 1], [5, 7, 2, 2, 2], [5, 300, 1, 0, 9], [5, 7, 2, 2, 2]),
                               strict=True):  # fmt: skip
        trajectory.token_ids[:] = ids
    order = in_order(trajectories, range(4))
    assert order == [1, 3, 2, 0]  # by value, not by the bytes of little-endian numbers
    assert shared_lengths(trajectories, order) == [0, 5, 1, 3]


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("budget", [1, 40, 90])
def test_loss_and_gradients_do_not_depend_on_the_cut(make_decoder, budget, on_policy):
    tiny_decoder = make_decoder()
    trajectories = some(12, seed=3)
    advantages = np.random.default_rng(0).normal(size=12).tolist()
    objective = PolicyLoss(kl_coefficient=0.1, entropy_coefficient=0.01, importance_cap=2.0)

    def step(budget: int) -> tuple[float, dict[str, float], list[torch.Tensor]]:
        tiny_decoder.zero_grad()
        total, sums = 0.0, {}
        batches = pack(trajectories, advantages, budget)
        denominator = sum(batch.num_policy_tokens for batch in batches)
        for batch in batches:
            loss, metrics = TokenScorer(tiny_decoder, 1.0)(
                batch, linear_policy_loss, rollout_logprobs=batch.rollout_logprobs, advantages=batch.advantages,
                ref_logprobs=batch.rollout_logprobs - 0.1, loss=objective, denominator=denominator,
                on_policy=on_policy, token_rows=batch.token_rows,
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
